"""Cut one head's live blocks into dense rectangles, each block once, so that long calls do most of the work.

Rows of blocks with the same columns are one rectangle: dilated patterns, global rows, dense layouts. Of neighbours,
those columns that both have go to one rectangle of both, where the cost says so, and so on with ever more rows:
windows, global columns. Neighbours are rows that follow each other, or that lie a stride apart, whichever is cheaper.

Columns are sets of bits in a Python int: intersections of whole rows are single operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dilated_block_sparse.plan.cost import Cost

# Strides that are looked at, and rows that are looked at to choose one.
STRIDES = 64
SAMPLED_ROWS = 64


class Rectangle(NamedTuple):
    """Every row block of ``rows`` with every column block of ``columns``.

    Attributes:
        level: rectangles of one level have no row in common.
        rows: blocks, rising; columns: bits.
    """

    level: int
    rows: tuple[int, ...]
    columns: int


class Extent(NamedTuple):
    """How long blocks are.

    Attributes:
        block, last: tokens of a block, and of the last one.
        blocks: how many.
    """

    block: int
    last: int
    blocks: int

    @classmethod
    def of(cls, length: int, block: int) -> Extent:
        """Of a sequence."""
        blocks = -(-length // block)
        return cls(block, length - (blocks - 1) * block if blocks else 0, blocks)

    def rows(self, blocks: Sequence[int]) -> int:
        """Tokens in these blocks, which rise."""
        return len(blocks) * self.block - (self.block - self.last if blocks[-1] == self.blocks - 1 else 0)

    def columns(self, bits: int) -> int:
        """Tokens in the blocks of these bits."""
        short = self.block - self.last if bits >> (self.blocks - 1) & 1 else 0
        return bits.bit_count() * self.block - short


def bits_of(columns: Iterable[int]) -> int:
    """A set of columns as bits."""
    bits = 0
    for column in columns:
        bits |= 1 << column
    return bits


def columns_of(bits: int) -> list[int]:
    """The columns of a set, rising."""
    text = bin(bits)[:1:-1]
    found = []
    at = text.find("1")
    while at >= 0:
        found.append(at)
        at = text.find("1", at + 1)
    return found


def make_rectangles(rows: dict[int, int], cost: Cost, row_extent: Extent, key_extent: Extent) -> list[Rectangle]:
    """Cut rows of blocks, by number, with their columns as bits, into rectangles."""
    work = _Work(cost, row_extent, key_extent)
    nodes = _same_columns(rows)
    if len(nodes) == 1:
        return [Rectangle(0, *nodes[0])]
    stride = _best_stride(rows)
    orders = [[1]] if stride == 1 else [[1], [1, stride], [stride, 1]]
    plans = [work.shared(nodes, order) for order in [[], *orders]]
    return min(plans, key=work.cost_of)


class _Node(NamedTuple):
    rows: tuple[int, ...]
    columns: int


def _same_columns(rows: dict[int, int]) -> list[_Node]:
    """Rows with the same columns as one node, in the order of their first rows; rows without any are left out."""
    classes: dict[int, list[int]] = {}
    for row, columns in rows.items():
        if columns:
            classes.setdefault(columns, []).append(row)
    return [_Node(tuple(members), columns) for columns, members in classes.items()]


def _best_stride(rows: dict[int, int]) -> int:
    """The distance from 2 on at which rows have the most columns in common; 1 where neighbours have far more."""
    numbers = list(rows)
    sampled = numbers[:: -(-len(numbers) // SAMPLED_ROWS)]
    in_common = [0.0]
    for stride in range(1, min(STRIDES, len(numbers) // 2) + 1):
        pairs = [(rows[row] & rows[row + stride]).bit_count() for row in sampled if row + stride in rows]
        in_common.append(sum(pairs) / max(1, len(pairs)))
    best = max(range(2, len(in_common)), key=in_common.__getitem__, default=1)
    return best if best > 1 and in_common[best] > 0.5 * in_common[1] else 1


class _Work(NamedTuple):
    cost: Cost
    row_extent: Extent
    key_extent: Extent

    def cost_of(self, rectangles: list[Rectangle]) -> int:
        """In pairs."""
        return sum(self.of(rectangle.rows, rectangle.columns) for rectangle in rectangles)

    def of(self, rows: tuple[int, ...], columns: int) -> int:
        return self.cost.rectangle(self.row_extent.rows(rows), self.key_extent.columns(columns)) if columns else 0

    def shared(self, nodes: list[_Node], strides: list[int]) -> list[Rectangle]:
        """Let neighbours share columns, at each of the strides in turn; the rest stays with the nodes as they are."""
        found: list[Rectangle] = []
        for number, stride in enumerate(strides):
            ordered = sorted(nodes, key=lambda node: (node.rows[0] % stride, node.rows[0]))
            nodes = []
            for level, rows, columns in self._pair_up(ordered):
                if level:
                    found.append(Rectangle((number + 1) * 64 + level, rows, columns))
                elif columns:
                    nodes.append(_Node(rows, columns))
        return sorted(found, reverse=True) + [Rectangle(0, *node) for node in nodes]

    def _pair_up(self, nodes: list[_Node]) -> Iterator[tuple[int, tuple[int, ...], int]]:
        """(level, rows, columns): what is left to each node of each level when its pair has taken what both have."""
        level = 0
        while nodes:
            parents = []
            for at in range(0, len(nodes) - 1, 2):
                left, right = nodes[at : at + 2]
                both = left.columns & right.columns
                rows = tuple(sorted(left.rows + right.rows))
                apart = self.of(*left) + self.of(*right)
                joint = self.of(rows, both)
                for node in (left, right):
                    joint += self.of(node.rows, node.columns & ~both)
                if both and joint < apart:
                    parents.append(_Node(rows, both))
                else:
                    both = 0
                for node in (left, right):
                    if node.columns & ~both:
                        yield level, node.rows, node.columns & ~both
            if len(nodes) % 2:
                if parents:
                    parents.append(nodes[-1])
                else:
                    yield level, nodes[-1].rows, nodes[-1].columns
            nodes = parents
            level += 1
