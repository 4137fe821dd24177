"""Traces of look-ups: what was asked for, in which order, what each value took to make and weighs.

A trace is kept as a table of keys and the places in it that the look-ups name, one after another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

from dilated_pattern_cache import PatternCache
from dilated_pattern_cache.values.leaves import charges_of

FOLDER = Path(__file__).parent / "traces"
REPEATS = 3


class Key(NamedTuple):
    """Attributes: text: of the key; nbytes: of its value; seconds: to make it."""

    text: str
    nbytes: int
    seconds: float


class Trace(NamedTuple):
    """Attributes: name, about: what was recorded; keys: each once; lookups: places in ``keys``."""

    name: str
    about: str
    keys: list[Key]
    lookups: list[int]

    @property
    def footprint(self) -> int:
        """Bytes of all values together."""
        return sum(key.nbytes for key in self.keys)

    @property
    def seconds(self) -> float:
        """What it takes to make every value at every look-up."""
        return sum(self.keys[place].seconds for place in self.lookups)

    def save(self, environment: dict[str, Any], folder: Path = FOLDER) -> Path:
        """Write NAME.json: a key a line, then the look-ups."""
        path = folder / f"{self.name}.json"
        keys = ",\n  ".join(json.dumps(key) for key in self.keys)
        head = json.dumps({"name": self.name, "about": self.about, "environment": environment})[1:-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        lookups = json.dumps(self.lookups, separators=(",", ":"))
        path.write_text(f'{{{head},\n "keys": [\n  {keys}\n ],\n "lookups": {lookups}}}\n')
        return path


def load(path: Path) -> Trace:
    """A trace from its file."""
    found = json.loads(path.read_text())
    return Trace(found["name"], found["about"], [Key(*key) for key in found["keys"]], found["lookups"])


class Recorder:
    """A cache that notes what it is asked for. What a key is first asked with is run several times, and timed.

    >>> recorder = Recorder(PatternCache())
    >>> [recorder.get_or_create(key, bytes) for key in "aba"]
    [b'', b'', b'']
    >>> recorder.trace("letters", "three").lookups
    [0, 1, 0]
    """

    def __init__(self, cache: PatternCache[Any, Any]) -> None:
        self._cache = cache
        self._places: dict[Hashable, int] = {}
        self._keys: list[Key] = []
        self._lookups: list[int] = []

    def get_or_create(self, key: Hashable, create: Callable[[], Any]) -> Any:
        """As the cache's."""
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = len(self._keys)
            self._keys.append(_measured(key, create))
        self._lookups.append(place)
        return self._cache.get_or_create(key, create)

    def trace(self, name: str, about: str) -> Trace:
        """What was noted."""
        return Trace(name, about, list(self._keys), list(self._lookups))


def _measured(key: Hashable, create: Callable[[], Any]) -> Key:
    taken = []
    value = None
    for _ in range(REPEATS):
        started = perf_counter()
        value = create()
        taken.append(perf_counter() - started)
    return Key(str(key), sum(charges_of(value).values()), float(f"{median(taken):.4g}"))
