"""What can go wrong between ranks."""

from __future__ import annotations


class RingError(RuntimeError):
    """The ranks cannot go on together. The group can be destroyed and made anew."""


class DisagreementError(RingError, ValueError):
    """The ranks were called with different arguments; raised on every rank, with the same message."""


class PeerError(RingError):
    """A peer died, stalled past the group's timeout, or left while it was waited for.

    Attributes:
        rank: of who noticed.
        purpose: what was being exchanged, and for which branch.
    """

    def __init__(self, rank: int, size: int, purpose: object, reason: object) -> None:
        super().__init__(f"rank {rank} of {size}, exchanging {purpose}: {reason}")
        self.rank = rank
        self.purpose = purpose
