"""What ``items()`` and ``values()`` of a cache return: views that use no entry and check none."""

from __future__ import annotations

from collections.abc import Hashable, ItemsView, Iterator, ValuesView
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from dilated_pattern_cache.cache import PatternCache

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Items(ItemsView[K, V]):
    """The pairs (key, value) at the moment when they are asked for."""

    _mapping: PatternCache[K, V]

    def __iter__(self) -> Iterator[tuple[K, V]]:
        for entry in list(self._mapping._store.masters.entries.values()):
            yield cast(K, entry.key), entry.value

    def __contains__(self, item: object) -> bool:
        return any(item == pair for pair in self)


class Values(ValuesView[V]):
    """The values at the moment when they are asked for."""

    _mapping: PatternCache[Any, V]

    def __iter__(self) -> Iterator[V]:
        for entry in list(self._mapping._store.masters.entries.values()):
            yield entry.value

    def __contains__(self, value: object) -> bool:
        return any(value is other or value == other for other in self)
