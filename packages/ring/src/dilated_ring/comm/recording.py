"""A transport that notes what passes: for tests, and for anyone who wants to see their own traffic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_ring.comm.protocol import Comm, Purpose, Transfer


class Record(NamedTuple):
    """One exchange as one rank saw it.

    Attributes:
        purpose: what it carried.
        received: bytes from each rank; what a rank keeps for itself is in neither.
        sent: bytes to each rank.
    """

    purpose: Purpose
    received: tuple[int, ...]
    sent: tuple[int, ...]


class RecordingComm:
    """Passes everything on to another Comm and keeps a Record of it in ``records``.

    Args:
        comm: what it passes everything on to.

    >>> from dilated_ring import dilated_ring_attention
    >>> from dilated_ring.comm import run_ranks
    >>> def work(comm):
    ...     recording = RecordingComm(comm)
    ...     dilated_ring_attention(*torch.ones(3, 1, 4, 1, 8), [8], [1], group=recording)
    ...     return recording.received_bytes("forward")
    >>> run_ranks(2, work)  # keys and values of 4 rows, 8 numbers of 4 bytes each
    [256, 256]
    """

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.records: list[Record] = []

    @property
    def rank(self) -> int:
        """See Comm."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """See Comm."""
        return self.comm.size

    @property
    def device(self) -> torch.device:
        """See Comm."""
        return self.comm.device

    def exchange(
        self,
        received: Tensor,
        sent: Tensor,
        received_counts: Sequence[int],
        sent_counts: Sequence[int],
        purpose: Purpose,
    ) -> Transfer:
        """Note the exchange and start it, see Comm."""
        transfer = self.comm.exchange(received, sent, received_counts, sent_counts, purpose)
        self.records.append(Record(purpose, self._bytes(received_counts, received), self._bytes(sent_counts, sent)))
        return transfer

    def give_up(self) -> None:
        """See Comm."""
        self.comm.give_up()

    def received_bytes(self, phase: str | None = None, branch: int | None = None) -> int:
        """Bytes received from other ranks so far.

        Args:
            phase: "agreement", "forward" or "backward"; None for all.
            branch: its number; None for all.
        """
        return sum(
            sum(record.received)
            for record in self.records
            if phase in (None, record.purpose.phase) and branch in (None, record.purpose.branch)
        )

    def _bytes(self, counts: Sequence[int], tensor: Tensor) -> tuple[int, ...]:
        return tuple(0 if rank == self.rank else count * tensor.itemsize for rank, count in enumerate(counts))
