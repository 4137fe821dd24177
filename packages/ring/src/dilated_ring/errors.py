"""What can go wrong between ranks."""

from __future__ import annotations

from collections.abc import Sequence


class RingError(RuntimeError):
    """The ranks cannot go on together. The group can be destroyed and made anew."""


class DisagreementError(RingError, ValueError):
    """The ranks were called with different arguments; raised on every rank, with the same message."""


class PeerError(RingError):
    """A peer died, stalled past the group's timeout, or left while it was waited for.

    Args:
        rank: of who noticed, within the group.
        size: how many ranks the group has.
        purpose: what was being exchanged, a ``dilated_ring.comm.Purpose``.
        reason: what is known of why.
        peers: ranks whose connections are closed.

    Attributes:
        rank: of who noticed.
        purpose: what was being exchanged, and for which branch.
        peers: ranks whose connections are closed, where that can be told: they died, or gave up the group themselves.
    """

    def __init__(self, rank: int, size: int, purpose: object, reason: object, peers: Sequence[int] = ()) -> None:
        super().__init__(f"rank {rank} of {size}, exchanging {purpose}: {reason}")
        self.rank, self.purpose, self.peers = rank, purpose, tuple(peers)
        self._arguments = rank, size, purpose, str(reason), self.peers

    def __reduce__(self) -> tuple[object, ...]:
        """Launchers and process pools send errors between processes, and an exception is rebuilt from its arguments."""
        return type(self), self._arguments


def named(ranks: Sequence[int]) -> str:
    """Ascending ranks in words: ``rank 2``, ``ranks 0, 2 and 4``, ``ranks 0-5 and 7``.

    >>> named([2]), named([0, 1, 2, 5])
    ('rank 2', 'ranks 0-2 and 5')
    """
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = [str(low) if low == high else f"{low}-{high}" for low, high in spans]
    if len(ranks) == 1:
        return f"rank {words[0]}"
    return f"ranks {words[0]}" if len(words) == 1 else f"ranks {', '.join(words[:-1])} and {words[-1]}"
