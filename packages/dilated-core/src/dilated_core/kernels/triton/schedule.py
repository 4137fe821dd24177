"""In which order the rows of a head are cut into tiles, so that rows of one tile meet the same keys. Imports torch.

The programs are right for any order; this one makes them fast. Within each cell, one or a few of the shortest
segments, rows that lie on the grids of the same branches come together. A tile then needs few masks, and wastes work
only where it holds the end of one such group and the start of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Branches that the order looks at: their bits and a position share an int64.
SORTED_BRANCHES = 31
# Rows that the largest tile has: see ``cell_length``.
TILE_ROWS = 128
INT32_MAX = 2**31 - 1
# Such a rate, or a larger one, keeps one position of any sequence; a segment length and a rate fit an int32 together.
LARGEST_RATE = 1 << 30


class Branches(NamedTuple):
    """A pattern and its heads, as numbers: what the programs are told of them.

    Attributes:
        pairs: (segment length, rate) of each branch.
        phases: for each branch, where in a segment each head's grid starts; -1 for a head that is not in it.
    """

    pairs: tuple[tuple[int, int], ...]
    phases: tuple[tuple[int, ...], ...]

    def head_classes(self) -> tuple[list[int], list[int]]:
        """Heads of equal phases share a class: the first head of every class, and the class of every head."""
        classes: dict[tuple[int, ...], int] = {}
        first: list[int] = []
        of_head = []
        for head, phases in enumerate(zip(*self.phases, strict=True)):
            if phases not in classes:
                classes[phases] = len(first)
                first.append(head)
            of_head.append(classes[phases])
        return first, of_head


class Tables(NamedTuple):
    """The same on a device, int32, and the order of the rows.

    Attributes:
        branches: (branches, 2), segment lengths and rates.
        phases: (branches, heads).
        order: (classes, rows), positions, each sequence by itself; None for as they come.
        head_class: (heads,), the row of ``order`` that a head takes; None without.
        stream: the CUDA stream they were made on, 0 for the default one and on the CPU.
    """

    branches: Tensor
    phases: Tensor
    order: Tensor | None = None
    head_class: Tensor | None = None
    stream: int = 0

    def tensors(self) -> list[Tensor]:
        """Those there are."""
        return [table for table in self[:4] if table is not None]


def make_tables(branches: Branches, bounds: Sequence[tuple[int, int]], device: torch.device) -> Tables:
    """The tables of an attention over sequences that lie one after the other. On CUDA, waits until they are there.

    Args:
        bounds: (start, stop) of every sequence; the first starts at 0.

    Raises:
        RuntimeError: a CUDA graph is being captured, into which no tables can be copied.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dilated_attention: a CUDA graph can be captured only after a call of the same sizes, which prepares what "
            'kernel="triton" reads; call it before the capture, with no more than a few other sizes in between'
        )
    pairs = [[min(length, INT32_MAX), min(rate, LARGEST_RATE)] for length, rate in branches.pairs]
    tables = Tables(
        torch.tensor(pairs, dtype=torch.int32, device=device),
        torch.tensor(branches.phases, dtype=torch.int32, device=device),
    )
    if any(rate > 1 for _, rate in branches.pairs):
        first, of_head = branches.head_classes()
        order = row_order(tables.branches, tables.phases[:, first], bounds)
        head_class = torch.tensor(of_head, dtype=torch.int32, device=device)
        tables = tables._replace(order=order, head_class=head_class)
    if device.type == "cuda":  # so that they can be read on any stream from now on
        stream = torch.cuda.current_stream(device)
        stream.synchronize()
        tables = tables._replace(stream=stream.cuda_stream)
    return tables


def row_order(branches: Tensor, phases: Tensor, bounds: Sequence[tuple[int, int]]) -> Tensor:
    """Rows by cell, then by the branches they lie on, then by position: (classes, rows), int32.

    The groups of a cell follow in the order of a Gray code, those of the next cell the other way round, so that groups
    that share a tile differ in few branches. Positions run up in one group and down in the next, so that rows that
    share a tile lie near each other: a causal one walks from the first row's keys to the last row's.

    Args:
        branches: (branches, 2), segment lengths and rates; phases: (branches, classes).

    >>> branches, phases = torch.tensor([[4, 1], [8, 2]]), torch.tensor([[0], [0]])
    >>> row_order(branches, phases, [(0, 8)]).tolist()  # of each four, the odd rows by themselves: on one branch only
    [[0, 2, 3, 1, 5, 7, 6, 4]]
    """
    starts, stops = torch.tensor(bounds, dtype=torch.int64, device=branches.device).unbind(1)
    rows = int(bounds[-1][1])
    start = torch.repeat_interleave(starts, stops - starts, output_size=rows)
    local = torch.arange(rows, device=branches.device) - start
    longest = max(stop - start for start, stop in bounds)
    by_rate = branches[:, 1].argsort(stable=True)[:SORTED_BRANCHES]
    pairs = branches[by_rate].tolist()
    classes = []
    for of_class in phases[by_rate].T.tolist():  # one by one: in long sequences the keys of all would take much memory
        own = [(length, rate, phase) for (length, rate), phase in zip(pairs, of_class, strict=True) if phase >= 0]
        cell = cell_length([(length, rate) for length, rate, _ in own], longest)
        key = start + local - local % cell
        digit = local // cell % 2
        for length, rate, phase in own:
            digit = digit ^ (local % length % rate == phase)
            key = 2 * key + digit
        order = key.argsort(stable=True)
        group = (key[order].diff(prepend=key[order[:1]]) != 0).cumsum(0)
        place = torch.where(group % 2 == 0, order, rows - 1 - order)
        classes.append(order[(group * rows + place).argsort()].int())
    return torch.stack(classes)


def cell_length(pairs: Sequence[tuple[int, int]], longest: int) -> int:
    """How many positions to group rows in, at least the shortest segment: of (length, rate) pairs, by rate.

    The rows of the largest rate should fill a tile, or else they share it with rows that do not meet their keys. But
    a tile over several of the shortest segments walks the keys of all these: fewer than the largest rate's, it should.

    >>> cell_length([(1024, 1), (65536, 16)], longest=65536)  # 64 rows of rate 16 in 1,024; they meet 4,096 keys
    2048
    >>> cell_length([(1024, 1), (8192, 16)], longest=65536)  # they meet 512 keys: fewer than one more segment has
    1024
    """
    if not pairs:
        return longest
    cell, its_rate = min(pairs)
    length, rate = pairs[-1]
    while cell < TILE_ROWS * rate and 2 * cell // its_rate < min(length, longest) // rate:
        cell *= 2
    return cell


def make_tiles(bounds: Sequence[tuple[int, int]], block: int, device: torch.device) -> Tensor:
    """(tiles, 3), int32: where each tile's rows begin, and where their sequence starts and stops."""
    tiles = [[begin, start, stop] for start, stop in bounds for begin in range(start, stop, block)]
    return torch.tensor(tiles, dtype=torch.int32, device=device)
