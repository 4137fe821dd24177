"""Layers that are alike as one row: "layers.0-11.self_attn" for twelve. Imports the standard library."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from dilated_factory.reporting.facts import ModuleReport


@dataclass(frozen=True)
class Group:
    """Modules with equal decisions and names that differ in numbers only.

    Attributes:
        name: with ranges for the numbers.
        modules: the members, in the model's order.
    """

    name: str
    modules: tuple[ModuleReport, ...]

    @property
    def first(self) -> ModuleReport:
        """The member that speaks for all."""
        return self.modules[0]


def grouped(modules: tuple[ModuleReport, ...]) -> tuple[Group, ...]:
    """Put modules together that are alike, in the order of each group's first.

    >>> from dilated_factory.decision import Decision
    >>> decision = Decision("improved", "auto", "off", False, ())
    >>> layers = tuple(ModuleReport(f"layers.{n}.attn", "A", decision) for n in range(12))
    >>> [(group.name, len(group.modules)) for group in grouped(layers)]
    [('layers.0-11.attn', 12)]
    """
    alike: dict[tuple[object, ...], list[ModuleReport]] = {}
    for one in modules:
        template = tuple(None if part.isdigit() else part for part in one.name.split("."))
        key = (template, one.class_name, one.decision, one.resources, one.own)
        alike.setdefault(key, []).append(one)
    return tuple(group for members in alike.values() for group in _ranges(members))


def _ranges(members: list[ModuleReport]) -> list[Group]:
    """One group where ranges name these members and no others; else one for each first number."""
    rows = [one.name.split(".") for one in members]
    columns = [list(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
    combinations = 1
    for column in columns:
        combinations *= len(column)
    if combinations == len(members):
        name = ".".join(column[0] if len(column) == 1 else _spans(column) for column in columns)
        return [Group(name or f"({members[0].class_name})", tuple(members))]
    varying = next(place for place, column in enumerate(columns) if len(column) > 1)
    return [
        group
        for number in columns[varying]
        for group in _ranges([one for one, row in zip(members, rows, strict=True) if row[varying] == number])
    ]


def _spans(numbers: list[str]) -> str:
    """Numbers as spans.

    >>> _spans(["0", "1", "2", "5"])
    '0-2,5'
    """
    ordered = sorted(map(int, numbers))
    spans = []
    for _, pairs in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0]):
        span = [number for _, number in pairs]
        spans.append(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}")
    return ",".join(spans)
