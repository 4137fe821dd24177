"""Moving rows of keys between ranks: out to who attends them, and back what was made of them.

Either way is one uneven all-to-all. A message holds, of every tensor, the rows that the plan names, and nothing else.
What a rank keeps for itself is not sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from dilated_block_sparse.ring.rank_plan import Rows
from dilated_core.resources import Resources
from dilated_ring.comm import Comm, Purpose

Arrivals = Callable[[], None]
"""Waits, then writes or adds what arrived to its place."""


def start(
    comm: Comm,
    resources: Resources,
    tensors: Sequence[Tensor],
    sent: Sequence[Rows],
    into: Sequence[Tensor],
    received: Sequence[Rows],
    purpose: Purpose,
    *,
    add: bool = False,
) -> Arrivals:
    """Send rows of ``tensors``, and receive rows of ``into``.

    Args:
        tensors: (batch, tokens, heads, ...), of one dtype.
        sent: for each rank, the rows that it is sent.
        into: as many contiguous tensors, of other tokens and maybe another dtype.
        received: for each rank, the rows that come from it.
        add: whether what comes is added to ``into``, not written.
    """
    outgoing_counts, incoming_counts = _counts(sent, tensors), _counts(received, into)
    dtype, device = tensors[0].dtype, tensors[0].device
    outgoing, incoming = (
        resources.empty((sum(counts),), dtype=dtype, device=device, kind="comm")
        for counts in (outgoing_counts, incoming_counts)
    )
    for stretch, rows, tensor in _stretches(outgoing, sent, tensors):
        rows.take(tensor, stretch)
    transfer = comm.exchange(incoming, outgoing, incoming_counts, outgoing_counts, purpose)

    def arrive() -> None:
        transfer.wait()
        for stretch, rows, tensor in _stretches(incoming, received, into):
            if add:
                rows.add(tensor, stretch)
            else:
                rows.put(tensor, stretch)

    return arrive


def _counts(messages: Sequence[Rows], tensors: Sequence[Tensor]) -> list[int]:
    """Numbers in each message."""
    return [sum(rows.shape(tensor).numel() for tensor in tensors) for rows in messages]


def _stretches(
    buffer: Tensor, messages: Sequence[Rows], tensors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Rows, Tensor]]:
    """The part of a flat buffer that belongs to each tensor's rows in each message."""
    begin = 0
    for rows in messages:
        for tensor in tensors:
            shape = rows.shape(tensor)
            stretch = buffer[begin : begin + shape.numel()].view(shape)
            begin += shape.numel()
            if shape.numel():
                yield stretch, rows, tensor
