"""Sequences of allocations and releases: made from a seed or recorded, and replayed on any allocator."""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

from dilated_memory_pool import PoolEvent

HEADS, HEAD_DIM = 8, 64
SHORTEST, LONGEST = 1 << 10, 1 << 16
# Bytes a token of what an attention layer allocates: q, k, v or the output in fp32 and bf16, q, k and v packed, the
# hidden rows of an MLP, and two lse in fp32.
TOKEN_BYTES = (HEADS * HEAD_DIM * 4, HEADS * HEAD_DIM * 2, 3 * HEADS * HEAD_DIM * 4, 4 * HEADS * HEAD_DIM * 2, 64)
# (share of the allocations, mean lifetime in allocations): scratch, one layer, one batch.
LIFETIMES = ((0.80, 10), (0.15, 100), (0.05, 2000))


class Event(NamedTuple):
    """Attributes: key: of a piece of memory; nbytes: asked for, 0 where it is given back."""

    key: int
    nbytes: int


def lengths(count: int, *, shortest: int = SHORTEST, longest: int = LONGEST, seed: int = 0) -> list[int]:
    """Sequence lengths as they change from call to call: spread evenly over their logarithm, both ends included."""
    draw = random.Random(seed)
    span = math.log(longest / shortest)
    drawn = [round(shortest * math.exp(draw.random() * span)) for _ in range(count - 2)]
    drawn += [shortest, longest][:count]
    draw.shuffle(drawn)
    return drawn


def day(allocations: int, seed: int = 0) -> list[Event]:
    """A day of a machine that serves attention: the typical length rises and falls once, lifetimes differ by 200."""
    draw = random.Random(seed)
    shares, means = zip(*LIFETIMES, strict=True)
    trace: list[Event] = []
    ends: list[tuple[int, int]] = []  # (when, key), soonest first
    for now in range(allocations):
        while ends and ends[0][0] <= now:
            trace.append(Event(heapq.heappop(ends)[1], 0))
        noon = math.sin(math.pi * now / allocations)  # 0 in the night, 1 at midday
        typical = 256 * 16**noon
        length = int(min(LONGEST, max(64, draw.lognormvariate(math.log(typical), 1.0))))
        trace.append(Event(now, length * draw.choice(TOKEN_BYTES)))
        [mean] = draw.choices(means, shares)
        heapq.heappush(ends, (now + 1 + int(draw.expovariate(1 / mean)), now))
    trace += [Event(key, 0) for _, key in sorted(ends)]
    return trace


def recorded(events: Iterable[PoolEvent]) -> list[Event]:
    """What a pool's observer saw, as a trace."""
    trace: list[Event] = []
    held: dict[int, int] = {}  # address -> key
    for event in events:
        if event.kind == "allocate":
            held[event.address] = len(trace)
            trace.append(Event(len(trace), event.requested))
        elif event.kind == "free":
            trace.append(Event(held.pop(event.address), 0))
    return trace + [Event(key, 0) for key in held.values()]


def requests(trace: Iterable[Event]) -> int:
    """How many allocations it holds."""
    return sum(event.nbytes > 0 for event in trace)


def peak_bytes(trace: Iterable[Event]) -> int:
    """The most that is alive at one time."""
    held: dict[int, int] = {}
    now = peak = 0
    for key, nbytes in trace:
        now += nbytes - held.pop(key, 0)
        if nbytes:
            held[key] = nbytes
            peak = max(peak, now)
    return peak


class Replay(NamedTuple):
    """Attributes: seconds: altogether; failed: requests refused; samples: what ``sample`` returned."""

    seconds: float
    failed: int
    samples: list[Any]


def replay(
    trace: Sequence[Event],
    allocate: Callable[[int], object],
    *,
    refusal: type[Exception] = MemoryError,
    sample: Callable[[], object] | None = None,
    samples: int = 200,
) -> Replay:
    """Do what the trace says.

    Args:
        trace: what to do.
        allocate: bytes -> the one owner of that much memory.
        refusal: what ``allocate`` raises where there is no more: counted, and the trace goes on.
        sample: called ``samples`` times on the way, in equal steps.
        samples: how often.
    """
    live: dict[int, object] = {}
    failed = 0
    seen: list[Any] = []
    step = max(1, len(trace) // samples)
    started = perf_counter()
    for place, (key, nbytes) in enumerate(trace):
        if nbytes:
            try:
                live[key] = allocate(nbytes)
            except refusal:
                failed += 1
        else:
            live.pop(key, None)
        if sample is not None and place % step == 0:
            seen.append(sample())
    return Replay(perf_counter() - started, failed, seen)


class Watch:
    """An ``allocate`` that looks at every piece it hands out: none may overlap another that is alive.

    Args:
        allocate: bytes -> owner.
        address: owner -> of its first byte.
    """

    def __init__(self, allocate: Callable[[int], Any], address: Callable[[Any], int]) -> None:
        self._allocate, self._address = allocate, address
        self._live: list[tuple[int, int]] = []  # (first, last + 1), by address
        self.overlaps = 0

    def __call__(self, nbytes: int) -> object:
        """An owner that takes its range off the list when it goes."""
        owner = self._allocate(nbytes)
        first = self._address(owner)
        place = bisect_left(self._live, (first, 0))
        before, after = self._live[place - 1 : place], self._live[place : place + 1]
        self.overlaps += bool(before and before[0][1] > first) + bool(after and after[0][0] < first + nbytes)
        insort(self._live, (first, first + nbytes))
        return _Watched(self._live, (first, first + nbytes), owner)


class _Watched:
    """One piece of memory under watch."""

    def __init__(self, live: list[tuple[int, int]], place: tuple[int, int], owner: object) -> None:
        self._live, self._place, self._owner = live, place, owner

    def __del__(self) -> None:
        del self._live[bisect_left(self._live, self._place)]
