"""The lightweight placement: an arena for every block, and a stack of free ones for every size."""

from __future__ import annotations

from collections import defaultdict

from dilated_memory_pool.placement.spans import Arena, Span


class BinPlacement:
    """Bucketed allocation. A block is used again for requests of its own size class only, most recent first.

    Nothing is split, so nothing fragments, and a request costs a dictionary look-up; but memory cached for one class
    is of no use to another.
    """

    def __init__(self) -> None:
        self.taken: Span | None = None
        self._free: defaultdict[tuple[int | None, int], list[Span]] = defaultdict(list)
        self._clock = 0

    def take(self, nbytes: int, requested: int, locality: int | None) -> Span | None:
        """The block of exactly this class that was freed last."""
        stack = self._free.get((locality, nbytes))
        if not stack:
            return None
        span = self.taken = stack[-1]
        span.requested = requested
        del stack[-1]
        return span

    def give(self, span: Span) -> None:
        """Put it on its stack."""
        arena = span.arena
        arena.idle_since = self._clock = self._clock + 1
        self._free[arena.locality, span.nbytes].append(span)

    def join(self) -> None:
        """Blocks are never joined."""

    def add(self, arena: Arena) -> None:
        """A new block."""
        self.give(arena.spans[0])

    def discard(self, arena: Arena) -> None:
        """Remove its block from the stack, and the stack with its last block."""
        key = (arena.locality, arena.nbytes)
        self._free[key].remove(arena.spans[0])
        if not self._free[key]:
            del self._free[key]

    def arena_bytes(self, nbytes: int) -> int:
        """Just the block."""
        return nbytes

    def largest_free(self) -> int:
        """Bytes of the largest free block."""
        return max((nbytes for (_, nbytes), stack in self._free.items() if stack), default=0)

    def rebuild(self, arenas: list[Arena]) -> None:
        """One block an arena: it is free or it is not."""
        self._free.clear()
        for arena in sorted(arenas, key=lambda arena: arena.idle_since):
            if arena.idle:
                self._free[arena.locality, arena.nbytes].append(arena.spans[0])
