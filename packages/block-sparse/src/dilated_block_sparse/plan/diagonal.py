"""What the diagonal crosses: rows that see a block in part, cut into causal squares and dense rectangles of tokens.

Row i sees keys j <= i. A run of row blocks whose every block from the run's first token up to the diagonal is live is
one causal square: a window's, or all of a dense layout. Elsewhere each stretch of crossed blocks gives a square, the
keys before it and the rows below it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dilated_block_sparse.plan.rectangles import Extent


class Part(NamedTuple):
    """Tokens: every row meets every key; where ``is_causal``, rows and keys are the same and row i meets keys j <= i.

    Attributes:
        level: parts of one level have no row in common.
        row, rows: first row, and how many; key, keys: the same.
    """

    level: int
    row: int
    rows: int
    key: int
    keys: int
    is_causal: bool = False


def split_diagonal(
    rows: dict[int, int], row_extent: Extent, key_extent: Extent, *, runs: bool = True
) -> tuple[list[Part], dict[int, int]]:
    """Cut what the diagonal crosses into parts.

    Args:
        rows: columns of each row block, as bits.
        row_extent, key_extent: of one sequence, so of the same length.
        runs: whether a square may hold several row blocks.

    Returns:
        The parts, and what is left of each row: blocks that every one of its rows sees whole.
    """
    split = _Split(row_extent, key_extent)
    parts: list[Part] = []
    left: dict[int, int] = {}
    for group in split.groups(rows, runs=runs):
        start = split.tokens(group[0])[0]
        if split.is_complete(group[0], rows[group[0]], start):
            stop = split.tokens(group[-1])[1]
            parts += split.square(start, stop)
            for row in group:
                left[row] = rows[row] & split.seen_whole(start)
        else:
            (row,) = group
            parts += split.stretches(row, rows[row])
            left[row] = rows[row] & split.seen_whole(start)
    return parts, left


class _Split(NamedTuple):
    row_extent: Extent
    key_extent: Extent

    @property
    def length(self) -> int:
        return (self.row_extent.blocks - 1) * self.row_extent.block + self.row_extent.last

    def tokens(self, row: int) -> tuple[int, int]:
        """First and last + 1 of a row block."""
        return row * self.row_extent.block, min((row + 1) * self.row_extent.block, self.length)

    def seen_whole(self, row: int) -> int:
        """The columns whose keys all lie before token ``row``."""
        return (1 << row // self.key_extent.block) - 1

    def touching(self, start: int, stop: int) -> int:
        """The columns that hold one of the tokens ``start`` to ``stop``."""
        return (1 << -(-stop // self.key_extent.block)) - 1 & ~self.seen_whole(start)

    def is_complete(self, row: int, columns: int, start: int) -> bool:
        """Whether the row block sees every key from ``start`` to itself."""
        wanted = self.touching(start, self.tokens(row)[1])
        return columns & wanted == wanted

    def groups(self, rows: dict[int, int], *, runs: bool) -> Iterator[list[int]]:
        """Runs of row blocks that make one square each; a row block that makes none is alone."""
        group: list[int] = []
        for row, columns in rows.items():
            if group:
                start = self.tokens(group[0])[0]
                follows = runs and row == group[-1] + 1
                if (
                    follows
                    and self.is_complete(group[0], rows[group[0]], start)
                    and self.is_complete(row, columns, start)
                ):
                    group.append(row)
                    continue
                yield group
            group = [row]
        if group:
            yield group

    def square(self, start: int, stop: int) -> Iterator[Part]:
        """Of a run that sees all from its first token on: the square, and the keys before it in its first block."""
        before = start // self.key_extent.block * self.key_extent.block
        yield Part(1, start, stop - start, start, stop - start, is_causal=True)
        if before < start:
            yield Part(2, start, stop - start, before, start - before)

    def stretches(self, row: int, columns: int) -> Iterator[Part]:
        """Of a row block in which crossed blocks are missing."""
        first, last = self.tokens(row)
        crossed = columns & self.touching(first, last)
        level = 1
        while crossed:
            column = (crossed & -crossed).bit_length() - 1
            end = column
            while crossed >> end & 1:
                crossed &= ~(1 << end)
                end += 1
            key, stop = column * self.key_extent.block, min(end * self.key_extent.block, last)
            if key < first:
                yield Part(level + 1, first, last - first, key, first - key)
                key = first
            yield Part(level, key, stop - key, key, stop - key, is_causal=True)
            if stop < last:
                yield Part(level + 2, stop, last - stop, key, stop - key)
            level += 3
