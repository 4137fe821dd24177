"""Patterns by the share of blocks that they leave out, instead of by their own numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dilated_block_sparse.layout.checks import BlockSize
from dilated_block_sparse.patterns.anchors import global_keys
from dilated_block_sparse.patterns.grid import CompressedRows, Grid, bounds, same_for_all, union
from dilated_block_sparse.patterns.sampling import bigbird, bigbird_base, random
from dilated_block_sparse.patterns.strides import dilated_runs, strided_runs
from dilated_block_sparse.patterns.windows import window_runs
from dilated_core.checks import boolean, choice, positive_integer, probability
from dilated_core.checks import length as non_negative

PATTERNS = ("local_window", "dilated_sparse", "global_local", "random", "bigbird", "strided")


def named(
    pattern: str,
    seq_len: int,
    sparsity_ratio: float,
    *,
    block_size: BlockSize = 128,
    heads: int = 1,
    seed: int = 0,
    is_causal: bool = False,
) -> CompressedRows:
    """A pattern of the given name that leaves out ``sparsity_ratio`` of the blocks: **0.9 keeps one block in ten**.

    The ratio is the share of blocks that is LEFT OUT, not the density: among all blocks or, with ``is_causal``, among
    those that ``.causal()`` keeps. What comes is within one block a row of the request, on average over the rows;
    where the pattern cannot be had so, a UserWarning says what it gave.

    What is chosen for each name, where a row is to keep n blocks on average:

    - "local_window": the window of ``local``.
    - "dilated_sparse": the largest rate of ``dilated`` that keeps enough with one segment, then the segment. A rate
      above 1 keeps half at most; for more, the rate is 1 and the segments alone leave blocks out.
    - "global_local": n / 4 global columns and as many rows (below n = 4, one column and no row), then the window.
    - "random": the blocks of each row, at least 1.
    - "bigbird": a third of n in the window, a third global (n / 6 columns, n / 6 rows), then the random blocks.
    - "strided": the stride, at least that of the sparsest: no row has fewer than about 2 * sqrt(2 * kv_blocks) blocks.

    Args:
        pattern: one of the names above.
        seq_len: tokens.
        sparsity_ratio: in [0, 1), the share of blocks left out.
        block_size: tokens, (rows, columns) or one number for both.
        heads: layouts to make; "random" and "bigbird" draw each anew, the others are alike.
        seed: of "random" and "bigbird".
        is_causal: keep only what ``.causal()`` keeps, and count among that.

    Returns:
        indptr, int64 (heads, q_blocks + 1), and indices, int32 (live blocks,).

    >>> indptr, indices = named("local_window", 100 * 128, 0.9)
    >>> len(indices), 0.1 * 100 * 100
    (1070, 1000.0)
    """
    pattern = choice("pattern", pattern, PATTERNS)
    ratio = probability("sparsity_ratio", sparsity_ratio)
    heads, seed = positive_integer("heads", heads), non_negative("seed", seed)
    grid = Grid(seq_len, block_size, is_causal=boolean("is_causal", is_causal))
    seen = int(grid.limit.sum())
    wanted = seen - ratio * seen
    if pattern == "random":
        most = _closest(lambda k: int(grid.limit.clamp(max=k).sum()), wanted, 1, max(grid.kv_blocks, 1))
        drawn = random(seq_len, most, seed=seed, block_size=block_size, heads=heads, is_causal=is_causal)
    elif pattern == "bigbird":
        parts = _bigbird(grid, wanted)
        drawn = bigbird(seq_len, *parts, seed=seed, block_size=block_size, heads=heads, is_causal=is_causal)
    else:
        drawn = same_for_all(_KEYS[pattern](grid, wanted), grid, heads)
    live = len(drawn[1]) / heads
    if abs(live - wanted) > grid.q_blocks:
        warnings.warn(
            f"sparsity_ratio: {pattern!r} cannot leave out {ratio:.4g} of {grid.q_blocks} x {grid.kv_blocks} blocks "
            f"to one block a row; it leaves out {1 - live / seen:.4g}",
            UserWarning,
            stacklevel=3,
        )
    return drawn


def _enough(count: Callable[[int], int], wanted: float, low: int, high: int) -> int:
    """The first number from ``low`` to ``high`` whose count, rising with it, is at least ``wanted``; else ``high``."""
    while low < high:
        middle = (low + high) // 2
        if count(middle) < wanted:
            low = middle + 1
        else:
            high = middle
    return low


def _closest(count: Callable[[int], int], wanted: float, low: int, high: int) -> int:
    """The number from ``low`` to ``high`` whose count, which rises with it, is closest to ``wanted``."""
    enough = _enough(count, wanted, low, high)
    return min((max(enough - 1, low), enough), key=lambda number: abs(count(number) - wanted))


def _per_row(grid: Grid, wanted: float) -> float:
    return wanted / max(grid.q_blocks, 1)


def _local_window(grid: Grid, wanted: float) -> Tensor:
    window = _closest(lambda window: window_runs(grid, window).blocks, wanted, 0, grid.kv_blocks)
    return window_runs(grid, window).keys(grid.kv_blocks)


def _dilated_sparse(grid: Grid, wanted: float) -> Tensor:
    whole = max(grid.kv_blocks, 1)
    # Counted down from the highest rate, which keeps the least.
    rate = whole - _enough(lambda less: dilated_runs(grid, whole, whole - less).blocks, wanted, 0, whole - 1)
    segment = _closest(lambda segment: dilated_runs(grid, segment, rate).blocks, wanted, 1, whole)
    return union([dilated_runs(grid, segment, rate).keys(grid.kv_blocks)])


def _strided(grid: Grid, wanted: float) -> Tensor:
    whole = max(grid.kv_blocks, 1)
    span = int((grid.last - grid.first).max()) + 1 if grid.q_blocks else 1
    sparsest = min(max(math.isqrt(span * whole // 2), 1), whole)

    def count(stride: int) -> int:
        return sum(runs.blocks for runs in strided_runs(grid, stride))

    stride = _closest(count, wanted, sparsest, whole)
    return union([runs.keys(grid.kv_blocks) for runs in strided_runs(grid, stride)])


def _global_local(grid: Grid, wanted: float) -> Tensor:
    quarter = int(_per_row(grid, wanted) / 4)
    columns = torch.arange(min(max(quarter, 1), grid.kv_blocks), device="cpu")
    wide = torch.arange(min(quarter, grid.q_blocks), device="cpu")

    def count(window: int) -> int:
        runs = window_runs(grid, window)
        both = (len(columns) - runs.start).clamp(min=0)  # global columns inside the window
        live = runs.length + grid.limit.clamp(max=len(columns)) - torch.minimum(both, runs.length)
        return int(live[len(wide) :].sum() + grid.limit[wide].sum())

    window = _closest(count, wanted, 0, grid.kv_blocks)
    return union([window_runs(grid, window).keys(grid.kv_blocks), *global_keys(grid, columns, wide)])


def _bigbird(grid: Grid, wanted: float) -> tuple[int, int, int]:
    """The window, the global blocks and the random blocks a row."""
    kept = _per_row(grid, wanted)
    own = int((grid.last - grid.first).max()) + 1 if grid.q_blocks else 1
    window, anchors = max(int((kept / 3 - own) / 2), 0), int(kept / 6)
    base = bigbird_base(grid, window, anchors)
    free = grid.limit - bounds(base, grid.q_blocks, grid.kv_blocks).diff()
    lots = _closest(lambda k: len(base) + int(free.clamp(max=k).sum()), wanted, 0, grid.kv_blocks)
    return window, anchors, lots


_KEYS: dict[str, Callable[[Grid, float], Tensor]] = {
    "local_window": _local_window,
    "dilated_sparse": _dilated_sparse,
    "global_local": _global_local,
    "strided": _strided,
}
