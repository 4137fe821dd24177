"""Classes that a file may name: those of this package's keys, and those that the caller lists. No name is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any

from dilated_pattern_cache.keys import (
    BlockLayoutKey,
    BlockMaskKey,
    CommunicationPlanKey,
    DilatedIndexKey,
    PatternKey,
)

_OWN = (BlockLayoutKey, BlockMaskKey, CommunicationPlanKey, DilatedIndexKey)
_NOT_STATE = ("__dict__", "__weakref__", "__orig_class__")  # the last is what typing notes on instances


class Types:
    """The classes by name: the own ones by their class's name, others with their module.

    Raises:
        TypeError: one is neither a dataclass nor a NamedTuple, or makes its objects in a way of its own.
        ValueError: two have one name.

    >>> Types([]).name_of(DilatedIndexKey)
    'DilatedIndexKey'
    """

    def __init__(self, types: Iterable[type]) -> None:
        self._by_name: dict[str, type] = {kind.__name__: kind for kind in _OWN}
        self._names: dict[type, str] = {kind: name for name, kind in self._by_name.items()}
        for kind in types:
            _check(kind)
            name = self._names.setdefault(kind, f"{kind.__module__}.{kind.__qualname__}")
            if self._by_name.setdefault(name, kind) is not kind:
                raise ValueError(f"types: expected one class of a name, got two of the name {name}")

    def name_of(self, kind: type) -> str | None:
        """The name; None where the class is not among them."""
        return self._names.get(kind)

    def find(self, name: str) -> type | None:
        """The class; None where none has the name."""
        return self._by_name.get(name)


def is_namedtuple(kind: type) -> bool:
    """Whether it is a NamedTuple, or made by ``collections.namedtuple``."""
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


def field_names(kind: type) -> list[str]:
    """The fields of a dataclass or a NamedTuple, in their order."""
    return list(kind._fields) if is_namedtuple(kind) else [field.name for field in fields(kind)]  # type: ignore[attr-defined]


def build(kind: type, values: Sequence[Any]) -> Any:
    """An object of the class with these values of its fields.

    No ``__init__``, ``__new__`` or ``__post_init__`` of the class is run, so fields that the constructor does not take
    come back as well. A key's constructor is run, for its checks.

    Raises:
        Exception: what the constructor of a key raises.
    """
    if issubclass(kind, PatternKey):
        return kind(**dict(zip(field_names(kind), values, strict=True)))
    if is_namedtuple(kind):
        return tuple.__new__(kind, values)  # type: ignore[type-var]
    made = object.__new__(kind)
    for name, value in zip(field_names(kind), values, strict=True):
        object.__setattr__(made, name, value)
    return made


def lost_attributes(item: object) -> list[str]:
    """What the object has beside its fields, and would come back without. What is computed again on demand is none."""
    if isinstance(item, PatternKey):
        return []
    kind = type(item)
    known = {*field_names(kind), *_NOT_STATE}
    names = {*getattr(item, "__dict__", ()), *(name for name in _slots(kind) if hasattr(item, name))}
    return sorted(name for name in names - known if not isinstance(getattr(kind, name, None), cached_property))


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots


def _check(kind: Any) -> None:
    if not isinstance(kind, type) or not (is_dataclass(kind) or is_namedtuple(kind)):
        raise TypeError(f"types: expected dataclasses and NamedTuples, got {kind!r}")
    makes: Callable[..., object] = kind.__new__
    if is_dataclass(kind) and makes is not object.__new__:
        raise TypeError(f"types: expected no class with a __new__ of its own, got {kind!r}")
