"""The plan: rectangles of equal shape stacked, so that one call attends many; and which tokens each of them holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.plan.cost import FULL_PRECISION, HALF_PRECISION, Cost
from dilated_block_sparse.plan.diagonal import Part, split_diagonal
from dilated_block_sparse.plan.rectangles import Extent, Rectangle, bits_of, columns_of, make_rectangles
from dilated_core.resources import PatternStore

# Rows and keys of a rectangle at most, where they must be gathered, so that what is gathered stays in proportion to the
# result: so many, or an eighth of all if that is more.
MOST_ROWS = 1024
MOST_KEYS = 1024
# Bits of all columns that are looked at together: 64 MiB of them.
MOST_BITS = 1 << 29

Starts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Axis:
    """The rows, or the keys, of equal rectangles: stretches of ``size`` tokens, the last one of each cut to ``length``.

    Attributes:
        starts: first tokens of the stretches, one tuple a rectangle.
        size: tokens of a stretch.
        length: tokens of a rectangle.
    """

    starts: Starts
    size: int
    length: int

    @property
    def span(self) -> slice | None:
        """The tokens of a single rectangle that follow each other; None where there are several, or gaps."""
        if len(self.starts) > 1 or any(stop - start != self.size for start, stop in pairwise(self.starts[0])):
            return None
        return slice(self.starts[0][0], self.starts[0][0] + self.length)

    def index(self, first: int, last: int, device: torch.device) -> tuple[Tensor, int]:
        """Stretches of rectangles ``first`` to ``last``, by number, int64, and the tokens of a stretch.

        A stretch is one token where some are cut short, or start at no multiple of their size.
        """
        starts = torch.tensor(self.starts[first:last], device="cpu")
        if self.length == starts.shape[1] * self.size and not (starts % self.size).any():
            return (starts.flatten() // self.size).to(device), self.size
        tokens = starts.unsqueeze(-1) + torch.arange(self.size, device="cpu")
        return tokens.flatten(1)[:, : self.length].flatten().to(device), 1


@dataclass(frozen=True)
class Stack:
    """Equal rectangles that have no row in common, of one head of the layout.

    Attributes:
        rows, keys: their tokens.
        is_causal: whether row i of each meets keys up to i only; rows and keys are then the same tokens.
        fresh: whether no stack before has any of the rows, so that results need not be merged.
    """

    rows: Axis
    keys: Axis
    is_causal: bool
    fresh: bool

    @property
    def count(self) -> int:
        """How many rectangles."""
        return len(self.rows.starts)

    @property
    def in_place(self) -> bool:
        """Whether nothing needs gathering."""
        return self.rows.span is not None and self.keys.span is not None


class HeadPlan(NamedTuple):
    """What one head of a layout is to compute.

    Attributes:
        stacks: in this order.
        once: whether every row lies in one rectangle at most.
    """

    stacks: tuple[Stack, ...]
    once: bool


Plan = tuple[HeadPlan, ...]


def make_plan(layout: BlockLayout, *, is_causal: bool = False, half: bool = False, by_row_block: bool = False) -> Plan:
    """Plan every head of the layout.

    Args:
        is_causal: whether row i sees keys j <= i only.
        half: whether the tensors are of half precision: products cost less there.
        by_row_block: whether a rectangle may hold no more than one block of rows.
    """
    cost = HALF_PRECISION if half else FULL_PRECISION
    return tuple(_plan_head(layout, head, cost, is_causal, by_row_block) for head in range(layout.heads))


def plan_of(
    layout: BlockLayout, patterns: PatternStore | None, *, is_causal: bool, half: bool, by_row_block: bool
) -> Plan:
    """The plan, made once: it is kept in ``patterns`` where there is one, else with the layout."""
    options = (is_causal, half, by_row_block)

    def create() -> Plan:
        return make_plan(layout, is_causal=is_causal, half=half, by_row_block=by_row_block)

    if patterns is not None:
        plan: Plan = patterns.get_or_create(("dilated_block_sparse.plan", layout.key(), *options), create)
        return plan
    if options not in layout.plans:
        layout.plans[options] = create()
    kept: Plan = layout.plans[options]
    return kept


def _plan_head(layout: BlockLayout, head: int, cost: Cost, is_causal: bool, by_row_block: bool) -> HeadPlan:
    row_extent = Extent.of(layout.q_len, layout.block_size[0])
    key_extent = Extent.of(layout.kv_len, layout.block_size[1])
    starts = layout.indptr[head].tolist()
    band = max(64, MOST_BITS // max(1, key_extent.blocks))
    parts: list[Part] = []
    rectangles: list[Rectangle] = []
    for first in range(0, row_extent.blocks, band):
        last = min(first + band, row_extent.blocks)
        columns = layout.indices[starts[first] : starts[last]].tolist()
        rows = {
            row: bits_of(columns[starts[row] - starts[first] : starts[row + 1] - starts[first]])
            for row in range(first, last)
        }
        if is_causal:
            more, rows = split_diagonal(rows, row_extent, key_extent, runs=not by_row_block)
            parts += more
        if by_row_block:
            rectangles += [Rectangle(0, (row,), bits) for row, bits in rows.items() if bits]
        else:
            rectangles += make_rectangles(rows, cost, row_extent, key_extent)
    shapes = [_Shape(-part.level, *_axes_of(part), part.is_causal) for part in parts]
    shapes += _from_rectangles(rectangles, row_extent, key_extent)
    # Parts first, whose levels are negative, then from many rows to few: the less is to be merged.
    shapes.sort(key=lambda shape: (shape.level >= 0, -shape.level))
    return _stacked(shapes, layout.q_len)


class _Shape(NamedTuple):
    """One rectangle. Shapes of one level have no row in common."""

    level: int
    row_starts: tuple[int, ...]
    row_size: int
    rows: int
    key_starts: tuple[int, ...]
    key_size: int
    keys: int
    is_causal: bool


def _axes_of(part: Part) -> tuple[tuple[int, ...], int, int, tuple[int, ...], int, int]:
    return (part.row,), part.rows, part.rows, (part.key,), part.keys, part.keys


def _from_rectangles(rectangles: list[Rectangle], row_extent: Extent, key_extent: Extent) -> Iterator[_Shape]:
    most_keys = max(MOST_KEYS, key_extent.blocks * key_extent.block // 8)
    most_rows = max(MOST_ROWS, row_extent.blocks * row_extent.block // 8)
    for level, rows, bits in rectangles:
        columns = columns_of(bits)
        for chunk, keys in enumerate(_cut(columns, most_keys // key_extent.block)):
            key_starts = tuple(column * key_extent.block for column in keys)
            key_count = key_extent.columns(bits_of(keys[-1:])) + (len(keys) - 1) * key_extent.block
            for row_chunk in _cut(rows, most_rows // row_extent.block):
                row_starts = tuple(row * row_extent.block for row in row_chunk)
                yield _Shape(
                    level + (chunk << 20),
                    row_starts,
                    row_extent.block,
                    row_extent.rows(row_chunk),
                    key_starts,
                    key_extent.block,
                    key_count,
                    False,
                )


def _cut(blocks: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """At most ``most`` blocks at a time, but all at once where they follow each other and need no gathering."""
    if blocks[-1] - blocks[0] == len(blocks) - 1:
        yield blocks
        return
    most = max(1, most)
    for first in range(0, len(blocks), most):
        yield blocks[first : first + most]


def _stacked(shapes: Iterable[_Shape], q_len: int) -> HeadPlan:
    """Equal shapes of one level as stacks; shapes come level by level."""
    touched = bytearray(q_len)
    stacks: dict[tuple[object, ...], list[_Shape]] = {}
    once = True
    for shape in shapes:
        fresh = True
        for start in shape.row_starts:
            stop = min(start + shape.row_size, q_len)
            fresh &= touched.find(1, start, stop) < 0
            touched[start:stop] = b"\1" * (stop - start)
        once &= fresh
        stacks.setdefault(
            (*shape[2:4], len(shape.row_starts), *shape[5:], len(shape.key_starts), shape.level, fresh), []
        ).append(shape)
    return HeadPlan(tuple(_stack(members, bool(kind[-1])) for kind, members in stacks.items()), once)


def _stack(shapes: list[_Shape], fresh: bool) -> Stack:
    first = shapes[0]
    rows = Axis(tuple(shape.row_starts for shape in shapes), first.row_size, first.rows)
    keys = Axis(tuple(shape.key_starts for shape in shapes), first.key_size, first.keys)
    return Stack(rows, keys, first.is_causal, fresh)
