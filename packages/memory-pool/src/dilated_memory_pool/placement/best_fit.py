"""The full placement: best fit over all free spans, split when taken, joined with their neighbours when given back."""

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
        self._clock = 0

    def take(self, nbytes: int, requested: int, locality: int | None) -> Span | None:
        """The smallest free span that is large enough, cut to size; what is left stays free."""
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
        del free[best]
        if rest is not None:
            insort(free, _entry(rest))
        return span

    def give(self, span: Span) -> None:
        """Join it with free neighbours."""
        arena, free = span.arena, self._free[span.arena.locality]
        place = self._index(span)
        first = place - 1 if place and not arena.spans[place - 1].requested else place
        last = place + 1 if place + 1 < len(arena.spans) and not arena.spans[place + 1].requested else place
        joined = arena.spans[first : last + 1]
        if len(joined) > 1:
            whole = Span(arena, joined[0].offset, sum(part.nbytes for part in joined))
            for part in joined:
                if part is not span:
                    del free[bisect_left(free, _entry(part)[:2])]
            arena.spans[first : last + 1] = [whole]
            span = whole
        insort(free, _entry(span))
        arena.idle_since = self._clock = self._clock + 1

    def add(self, arena: Arena) -> None:
        """One free span."""
        insort(self._free[arena.locality], _entry(arena.spans[0]))

    def discard(self, arena: Arena) -> None:
        """Remove its one free span."""
        free = self._free[arena.locality]
        del free[bisect_left(free, _entry(arena.spans[0])[:2])]

    def arena_bytes(self, nbytes: int) -> int:
        """A chunk to share, or an arena of its own for what is larger."""
        return max(nbytes, self._chunk_bytes)

    def largest_free(self) -> int:
        """Bytes of the largest free span."""
        return max((free[-1][0] for free in self._free.values() if free), default=0)

    def rebuild(self, arenas: list[Arena]) -> None:
        """Join what lies side by side and is free, and sort it."""
        self._free.clear()
        for arena in arenas:
            spans: list[Span] = []
            for span in arena.spans:
                if spans and not (span.requested or spans[-1].requested):
                    before = spans.pop()
                    spans.append(Span(arena, before.offset, before.nbytes + span.nbytes))
                else:
                    spans.append(span)
            arena.spans[:] = spans
            self._free[arena.locality] += [_entry(span) for span in spans if not span.requested]
        for free in self._free.values():
            free.sort()

    @staticmethod
    def _index(span: Span) -> int:
        return bisect_left(span.arena.spans, span.offset, key=_offset)
