"""Which entry leaves first: by age, or by what it would cost to miss it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from operator import getitem
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dilated_pattern_cache.storage.shelf import Entry


class EvictionPolicy(Protocol):
    """An order of entries. The entry of the lowest rank leaves first.

    Attributes:
        clock: called at every hit, by any thread and without a lock: a single call into C. What it returns is kept as
            ``entry.used``. It never falls.
    """

    clock: Callable[[], float]

    def rank(self, entry: Entry) -> float:
        """What the entry is worth now. It never falls while the entry stays."""

    def evicted(self, entry: Entry) -> None:
        """Hear that the entry leaves."""


_first: Callable[[list[float], int], float] = getitem


class LRU:
    """Least recently used: the entry that was not used for the longest time leaves."""

    def __init__(self) -> None:
        self.clock: Callable[[], float] = count(1).__next__

    def rank(self, entry: Entry) -> float:
        """When it was last used, in uses of all entries."""
        return entry.used

    def evicted(self, entry: Entry) -> None:
        """Nothing to learn."""


class GreedyDualSize:
    """GreedyDual-Size with frequency: what is cheap to make, large, or seldom used leaves first.

        H = L + frequency * seconds / bytes

    L is the H of the last entry that left, as it was when this one was last used: who is not used any more is
    overtaken in time, whatever it cost. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency
    Caching Policy", HP Labs 1998, with the time to make a value as its cost.
    """

    def __init__(self) -> None:
        self._inflation = [0.0]
        self.clock: Callable[[], float] = partial(_first, self._inflation, 0)

    def rank(self, entry: Entry) -> float:
        """The value of H now."""
        return entry.used + (1 + entry.tally.value) * entry.seconds / max(entry.nbytes, 1)

    def evicted(self, entry: Entry) -> None:
        """Raise L."""
        self._inflation[0] = max(self._inflation[0], self.rank(entry))


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU, "gdsf": GreedyDualSize}
