"""A block layout as BigBird's (arXiv 2007.14062): what a block-sparse attention plans before it computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BlockLayout(NamedTuple):
    """Compressed rows. Attributes: starts: (rows + 1,); columns: the blocks of keys of all rows, rising in a row."""

    starts: Tensor
    columns: Tensor

    def dense(self) -> Tensor:
        """(rows, rows), bool."""
        rows = len(self.starts) - 1
        mask = torch.zeros(rows, rows, dtype=torch.bool, device=self.starts.device)
        row = torch.repeat_interleave(torch.arange(rows, device=self.starts.device), self.starts.diff())
        mask[row, self.columns] = True
        return mask


def block_layout(
    rows: int,
    *,
    window: int = 3,
    global_columns: int = 2,
    global_rows: int = 0,
    random: int = 3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """The blocks of keys that each of ``rows`` blocks of queries attends to.

    Args:
        rows: blocks of queries, and of keys.
        window: blocks around the diagonal, an odd number.
        global_columns: the first so many blocks of keys are for all.
        global_rows: the first so many blocks of queries see all.
        random: further blocks in each row, drawn without replacement from the others.
        seed: of the draw.
        device: where it is made.
    """
    place = torch.arange(rows, device=device)
    mask = (place[:, None] - place).abs() <= window // 2
    mask[:, :global_columns] = True
    mask[:global_rows] = True
    draw = torch.rand(rows, rows, generator=torch.Generator(device).manual_seed(seed), device=device)
    chosen = draw.masked_fill_(mask, -1.0).topk(min(random, rows)).indices
    mask.scatter_(1, chosen, True)
    starts = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    starts[1:] = mask.sum(1).cumsum(0)
    return BlockLayout(starts, mask.nonzero()[:, 1])


def is_such_a_layout(layout: BlockLayout, *, window: int, global_columns: int, global_rows: int, random: int) -> bool:
    """Whether a dense mask, filled block by block, tells the same of it as its compressed rows."""
    rows = len(layout.starts) - 1
    starts, columns = layout.starts.tolist(), layout.columns.tolist()
    mask = [[False] * rows for _ in range(rows)]
    for row in range(rows):
        found = columns[starts[row] : starts[row + 1]]
        due = set(range(max(0, row - window // 2), min(rows, row + window // 2 + 1)))
        due |= set(range(min(rows, global_columns)))
        due |= set(range(rows)) if row < global_rows else set()
        if found != sorted(set(found)) or not due <= set(found):
            return False
        if len(found) != len(due) + min(random, rows - len(due)):
            return False
        for column in found:
            mask[row][column] = True
    return bool((layout.dense().cpu() == torch.tensor(mask)).all())
