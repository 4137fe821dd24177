"""Comm: what every attention here asks of the network. One collective, the uneven all-to-all; a ring hop is one too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dilated_ring.errors import DisagreementError


@dataclass(frozen=True)
class Purpose:
    """What a transfer carries; what errors and records say of it.

    Attributes:
        what: such as "keys and values".
        phase: "agreement", "forward" or "backward".
        branch: number of the branch, None where there is none.
        detail: more about it, such as the branch's segment length and dilation rate.

    >>> str(Purpose("keys and values", "forward", 2, "segment_length 32768, dilation_rate 4"))
    'keys and values of branch 2 (segment_length 32768, dilation_rate 4), forward'
    """

    what: str
    phase: str
    branch: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        branch = "" if self.branch is None else f" of branch {self.branch}"
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.what}{branch}{detail}, {self.phase}"


class Transfer(Protocol):
    """An exchange on its way."""

    def wait(self) -> None:
        """Return when what was to be received is there.

        Raises:
            PeerError: a peer died, or stalled past the timeout.
        """


@runtime_checkable
class Comm(Protocol):
    """One rank's door to its peers. All ranks call ``exchange`` in the same order."""

    @property
    def rank(self) -> int:
        """Its own number, 0 to size - 1."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    @property
    def device(self) -> torch.device:
        """Where small tensors lie that are exchanged on no other tensor's behalf."""

    def exchange(
        self,
        received: Tensor,
        sent: Tensor,
        received_counts: Sequence[int],
        sent_counts: Sequence[int],
        purpose: Purpose,
    ) -> Transfer:
        """Start an uneven all-to-all: every rank sends every rank, itself too, a stretch of a flat tensor.

        Args:
            received: 1-D, contiguous, written: what rank 0 sends, then what rank 1 sends, ...
            sent: 1-D, contiguous: what rank 0 is to get, then what rank 1 is to get, ...; unchanged until waited for.
            received_counts, sent_counts: elements from and to each rank; they sum to the tensors' lengths.
            purpose: for errors and records.

        Raises:
            ValueError: these do not fit each other.
            PeerError: the group was given up.
        """

    def give_up(self) -> None:
        """Let peers that wait for this rank hear that it will not answer. It can then exchange no more."""


@contextmanager
def together(*comms: Comm | None) -> Iterator[None]:
    """Give up all ``comms`` where this rank fails in the midst of a call: its peers would wait for what never comes.

    A DisagreementError is no such failure: every rank raises it, and all can go on.

    Args:
        comms: this rank's; None is left out.
    """
    try:
        yield
    except DisagreementError:
        raise
    except BaseException:
        for comm in comms:
            if comm is not None:
                comm.give_up()
        raise


def check_message(
    comm: Comm, received: Tensor, sent: Tensor, received_counts: Sequence[int], sent_counts: Sequence[int]
) -> None:
    """Raise ValueError where the arguments of ``exchange`` do not fit each other: a network would not notice."""
    if received.dtype != sent.dtype:
        raise ValueError(f"received, sent: expected one dtype, got {received.dtype} and {sent.dtype}")
    for name, tensor, counts in (("received", received, received_counts), ("sent", sent, sent_counts)):
        if tensor.ndim != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected a flat contiguous tensor, got shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            )
        if len(counts) != comm.size or min(counts) < 0 or sum(counts) != len(tensor):
            raise ValueError(
                f"{name}_counts: expected {comm.size} counts that sum to {len(tensor)}, got {list(counts)}"
            )
