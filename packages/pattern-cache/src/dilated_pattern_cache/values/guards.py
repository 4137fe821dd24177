"""Values that everybody shares must not change. How a cache notices that one did."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, TypeAlias

from dilated_pattern_cache.values.leaves import is_ndarray, is_tensor, leaves

Guard: TypeAlias = Literal["version", "contents"]
GUARDS = ("version", "contents", None)


def watch(key: Hashable, value: Any, guard: Guard | None) -> Callable[[], bool] | None:
    """A function that raises PatternMutatedError once the value has changed; None where there is nothing to watch.

    - "version": the version counters of all tensors. NumPy arrays are made read-only instead.
    - "contents": copies of all tensors, arrays and buffers, and of what lists and dictionaries hold.

    - None: nothing.

    The function returns False where the value is intact and must not be given out: real tensors, within a dispatch
    mode of PyTorch.
    """
    found = leaves(value)
    tensors = [leaf for leaf in found if is_tensor(leaf)]
    if guard is None:
        if not tensors:
            return None
        from dilated_pattern_cache.values.tensors import outside_of_modes

        return outside_of_modes
    for leaf in found:
        if is_ndarray(leaf):
            leaf.flags.writeable = False
    if guard == "version":
        if not tensors:
            return None
        from dilated_pattern_cache.values.tensors import watch_versions

        return watch_versions(key, tensors)
    return _watch_contents(key, value, tensors, [leaf for leaf in found if not is_tensor(leaf)])


def _watch_contents(key: Hashable, value: Any, tensors: list[Any], buffers: list[Any]) -> Callable[[], bool]:
    before = _outline(value)
    copies = [(buffer, _content(buffer)) for buffer in buffers]
    tensors_intact: Callable[[], bool] = bool
    if tensors:
        from dilated_pattern_cache.values.tensors import watch_contents

        tensors_intact = watch_contents(key, tensors)

    def intact() -> bool:
        if _outline(value) != before or any(_content(buffer) != copy for buffer, copy in copies):
            from dilated_pattern_cache.errors import mutated

            raise mutated(key)
        return tensors_intact() if tensors else True

    return intact


def _content(buffer: Any) -> bytes:
    return bytes(buffer.get() if hasattr(buffer, "get") else buffer)  # CuPy's arrays are fetched


def _outline(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """Nested tuples that are equal while no container holds something else than before."""
    if isinstance(value, Mapping | tuple | list) and id(value) not in seen:
        within = (*seen, id(value))
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        return type(value), tuple((name, _outline(item, within)) for name, item in pairs)
    if isinstance(value, str | int | float | complex | bytes | frozenset | None):
        return type(value), value
    return _Same(value)


class _Same:
    """Equal to one of the same object, which lives on: no other has its identity meanwhile."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.item is other.item

    __hash__ = None  # type: ignore[assignment]
