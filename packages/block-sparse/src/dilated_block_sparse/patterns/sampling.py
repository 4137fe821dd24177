"""Patterns that are drawn by lot: random and BigBird. The same seed draws the same blocks on every machine.

The lots come from a torch.Generator of the call's own, in CPU memory: nothing touches the global one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_block_sparse.layout.checks import BlockSize
from dilated_block_sparse.patterns.anchors import global_keys
from dilated_block_sparse.patterns.grid import CompressedRows, Grid, bounds, compress, expand, union
from dilated_block_sparse.patterns.windows import window_runs
from dilated_core.checks import boolean, positive_integer
from dilated_core.checks import length as non_negative

# Lots are below this, and taken modulo the number of columns: uniform to one part in LOTS / kv_blocks.
LOTS = 1 << 48


def random(
    seq_len: int,
    blocks_per_row: int,
    *,
    seed: int = 0,
    block_size: BlockSize = 128,
    heads: int = 1,
    is_causal: bool = False,
) -> CompressedRows:
    """``blocks_per_row`` columns for every row, drawn uniformly and without replacement, for each head anew.

    Args:
        seq_len: tokens.
        blocks_per_row: columns of each row, at least 0; a row that may see fewer has them all.
        seed: of the lots, at least 0.
        block_size: tokens, (rows, columns) or one number for both.
        heads: layouts to draw, each its own.
        is_causal: draw among the columns that the row block may see. ``.causal()`` of a layout drawn without
            this leaves early rows with few blocks, or none.

    Returns:
        indptr, int64 (heads, q_blocks + 1), and indices, int32 (live blocks,).

    >>> indptr, indices = random(6, 2, seed=3, block_size=1, heads=2, is_causal=True)
    >>> indptr.diff().tolist()
    [[1, 2, 2, 2, 2, 2], [1, 2, 2, 2, 2, 2]]
    """
    blocks_per_row, seed = non_negative("blocks_per_row", blocks_per_row), non_negative("seed", seed)
    heads, is_causal = positive_integer("heads", heads), boolean("is_causal", is_causal)
    grid = Grid(seq_len, block_size, is_causal=is_causal)
    available = grid.limit.repeat(heads)
    row, column = draw(available, available.clamp(max=blocks_per_row), seed)
    return compress(row * grid.kv_blocks + column, grid.q_blocks, grid.kv_blocks, heads)


def bigbird(
    seq_len: int,
    window: int,
    global_blocks: int,
    blocks_per_row: int,
    *,
    seed: int = 0,
    block_size: BlockSize = 128,
    heads: int = 1,
    is_causal: bool = False,
) -> CompressedRows:
    """A local window, global rows and columns, and random columns beside them: BigBird (arXiv 2007.14062, section 2).

    The random columns of a row are drawn among those that are not live otherwise, for each head anew.

    Args:
        seq_len: tokens.
        window: column blocks on either side, as in ``local``. The paper's w counts both sides: w = 2 * window + 1.
        global_blocks: first columns that all rows see, and first rows that see all columns; the paper's g, as ITC.
        blocks_per_row: random columns, the paper's r; fewer where fewer are left.
        seed: of the lots, at least 0.
        block_size: tokens, (rows, columns) or one number for both.
        heads: layouts to draw, each with its own random columns.
        is_causal: leave out what ``.causal()`` would, and draw among what the row block may see.

    Returns:
        indptr, int64 (heads, q_blocks + 1), and indices, int32 (live blocks,).

    >>> bigbird(8, 1, 1, 2, block_size=1)[0].diff().tolist()  # row 0 is global; row 7 has 0, 6, 7 and two by lot
    [[8, 5, 6, 6, 6, 6, 6, 5]]
    """
    window, global_blocks = non_negative("window", window), non_negative("global_blocks", global_blocks)
    blocks_per_row, seed = non_negative("blocks_per_row", blocks_per_row), non_negative("seed", seed)
    heads, is_causal = positive_integer("heads", heads), boolean("is_causal", is_causal)
    grid = Grid(seq_len, block_size, is_causal=is_causal)
    base = bigbird_base(grid, window, global_blocks)
    begins = bounds(base, grid.q_blocks, grid.kv_blocks)
    available = (grid.limit - begins.diff()).repeat(heads)
    row, rank = draw(available, available.clamp(max=blocks_per_row), seed)
    # The column of rank r among the free ones is r + t, t being how many live columns come before it: those whose own
    # rank among the free, column - place, is at most r.
    within = row % max(grid.q_blocks, 1)
    place = torch.arange(len(base), device="cpu") - torch.repeat_interleave(begins[:-1], begins.diff())
    before = torch.searchsorted(base - place, within * grid.kv_blocks + rank, right=True) - begins[within]
    lots = row * grid.kv_blocks + rank + before
    shared = (base + torch.arange(heads, device="cpu")[:, None] * (grid.q_blocks * grid.kv_blocks)).flatten()
    return compress(union([shared, lots]), grid.q_blocks, grid.kv_blocks, heads)


def bigbird_base(grid: Grid, window: int, global_blocks: int) -> Tensor:
    """Keys of what is live without the lots."""
    columns, wide = (torch.arange(min(global_blocks, size), device="cpu") for size in (grid.kv_blocks, grid.q_blocks))
    return union([window_runs(grid, window).keys(grid.kv_blocks), *global_keys(grid, columns, wide)])


def draw(available: Tensor, wanted: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """For each row, ``wanted`` different numbers below ``available``, every such set equally likely.

    Draws what is missing, drops what came twice, and draws again. Where more than half is wanted it draws what is to be
    left out: so every lot is new with a chance of at least one half, and few rounds do.

    Args:
        available, wanted: (rows,) int64, wanted at most available.
        seed: of the generator.

    Returns:
        The row and the number of each, int64, rising.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    inverted = wanted * 2 > available
    target = torch.where(inverted, available - wanted, wanted)
    width = max(int(available.max()), 1) if len(available) else 1
    finished: list[Tensor] = []
    keys = target[:0]
    missing = target
    while True:
        row = torch.repeat_interleave(missing)
        if not len(row):
            break
        lots = torch.randint(LOTS, (len(row),), generator=generator, device="cpu") % available[row]
        keys = torch.cat([keys, lots + row * width]).sort().values.unique_consecutive()
        row = keys.div(width, rounding_mode="floor")
        missing = (target - torch.bincount(row, minlength=len(target))) * (missing > 0)
        complete = missing[row] == 0
        finished.append(keys[complete])
        keys = keys[~complete]
    keys = union(finished) if finished else keys
    row, number = keys.div(width, rounding_mode="floor"), keys % width
    if not bool(inverted.any()):
        return row, number
    # Rows of which most is wanted, written out whole: what they keep is more than half of it.
    every = torch.where(inverted, available, 0)
    begins = every.cumsum(0) - every
    owner, rank = expand(every)
    kept = torch.ones(len(owner), dtype=torch.bool, device="cpu")
    omitted = inverted[row]
    kept[begins[row[omitted]] + number[omitted]] = False
    keys = union([keys[~omitted], (owner * width + rank)[kept]])
    return keys.div(width, rounding_mode="floor"), keys % width
