"""The full placement: best fit over all free spans, split when taken, joined with their neighbours when given back.

Joining is put off until a request is met that none of the spans just given back fits exactly. So where the same sizes
come again and again, nothing is split and joined in turns; and every search sees all that is free in one piece.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from operator import attrgetter

from dilated_memory_pool.placement.spans import Arena, Span

_offset = attrgetter("offset")


def _entry(span: Span) -> tuple[int, int, Span]:
    """A span in the order of best fit: by size, then by address; no two have one address."""
    return span.nbytes, span.address, span


class BestFitPlacement:
    """Memory freed at one size serves requests of any other. Among equals the lowest address wins, which keeps the
    high ends of arenas free.

    Args:
        chunk_bytes: the smallest arena to ask for; requests share it.
    """

    def __init__(self, chunk_bytes: int) -> None:
        self.taken: Span | None = None
        self._chunk_bytes = chunk_bytes
        self._free: defaultdict[int | None, list[tuple[int, int, Span]]] = defaultdict(list)
        self._given: defaultdict[tuple[int | None, int], list[Span]] = defaultdict(list)  # back, and not joined yet
        self._clock = 0

    def take(self, nbytes: int, requested: int, locality: int | None) -> Span | None:
        """The smallest free span that is large enough, cut to size; what is left stays free."""
        if self._given:
            stack = self._given.get((locality, nbytes))
            if stack:
                span = self.taken = stack[-1]
                span.requested = requested
                del stack[-1]
                return span
            self.join()
        free = self._free[locality]
        best = bisect_left(free, (nbytes,))
        if best == len(free):
            return None
        span = free[best][2]
        rest = None
        if span.nbytes > nbytes:
            whole, arena = span, span.arena
            span = Span(arena, whole.offset, nbytes)
            rest = Span(arena, whole.offset + nbytes, whole.nbytes - nbytes)
            place = self._index(whole)
            arena.spans[place : place + 1] = [span, rest]
        self.taken = span
        span.requested = requested
        span.joined = False
        del free[best]
        if rest is not None:
            self._enter(rest)
        return span

    def give(self, span: Span) -> None:
        """Keep it for the next request of its size, or until ``join``."""
        arena = span.arena
        arena.idle_since = self._clock = self._clock + 1
        self._given[arena.locality, span.nbytes].append(span)

    def join(self) -> None:
        """Join what was given back with its neighbours."""
        while self._given:
            _, spans = self._given.popitem()
            for span in spans:
                self._join(span)

    def _join(self, span: Span) -> None:
        arena, free = span.arena, self._free[span.arena.locality]
        place = self._index(span)
        # A neighbour that was given back too, and is not joined yet, will find this one when its turn comes.
        first = place - 1 if place and arena.spans[place - 1].joined else place
        last = place + 1 if place + 1 < len(arena.spans) and arena.spans[place + 1].joined else place
        parts = arena.spans[first : last + 1]
        if len(parts) > 1:
            for part in parts:
                if part.joined:
                    del free[bisect_left(free, _entry(part)[:2])]
            span = Span(arena, parts[0].offset, sum(part.nbytes for part in parts))
            arena.spans[first : last + 1] = [span]
        self._enter(span)

    def _enter(self, span: Span) -> None:
        insort(self._free[span.arena.locality], _entry(span))
        span.joined = True

    def add(self, arena: Arena) -> None:
        """One free span."""
        self._enter(arena.spans[0])

    def discard(self, arena: Arena) -> None:
        """Remove its one free span."""
        free = self._free[arena.locality]
        del free[bisect_left(free, _entry(arena.spans[0])[:2])]

    def arena_bytes(self, nbytes: int) -> int:
        """A chunk to share, or an arena of its own for what is larger."""
        return max(nbytes, self._chunk_bytes)

    def largest_free(self) -> int:
        """Bytes of the largest free span, of those that are joined."""
        return max((free[-1][0] for free in self._free.values() if free), default=0)

    def rebuild(self, arenas: list[Arena]) -> None:
        """Join what lies side by side and is free, and sort it."""
        self._free.clear()
        self._given.clear()
        for arena in arenas:
            spans: list[Span] = []
            for span in arena.spans:
                if spans and not (span.requested or spans[-1].requested):
                    before = spans.pop()
                    spans.append(Span(arena, before.offset, before.nbytes + span.nbytes))
                else:
                    spans.append(span)
            arena.spans[:] = spans
            for span in spans:
                if not span.requested:
                    self._enter(span)

    @staticmethod
    def _index(span: Span) -> int:
        return bisect_left(span.arena.spans, span.offset, key=_offset)
