"""Block sizes of block-sparse attention on this machine. Imports torch; dilated_block_sparse where it is installed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dilated_factory.registry import install_command
from dilated_factory.tuning.budget import FEWEST, Budget, OutOfTime
from dilated_factory.tuning.cells import TRAINING, Example, recorded, time_in_turns
from dilated_factory.tuning.probe import Probe
from dilated_factory.tuning.rules import Figure

if TYPE_CHECKING:
    from dilated_block_sparse import BlockLayout

SIZES = ((64, 64), (128, 64), (128, 128), (256, 128), (512, 128), (256, 256))
DENSITY = 0.1
# They are measured at the longest length up to here that there is time for.
LONGEST = 8192


def block_sizes(probe: Probe, budget: Budget, lengths: Sequence[int], dtype: str) -> dict[tuple[int, int], Figure]:
    """Block-sparse attention, forward and backward: (rows, columns) -> seconds a live pair of positions.

    Columns are drawn by lot for each row of blocks, a tenth of all. Such a layout favours no size but for its cost.
    """
    part = "block_size"
    length = lengths[0]
    kind = getattr(torch, dtype)
    what: dict[str, Any] = {"dtype": dtype}
    left_out = probe.too_large(probe.working_set(length, kind)) or budget.refusal(part, length)
    if importlib.util.find_spec("dilated_block_sparse") is None:
        left_out = f"dilated-block-sparse is not installed ({install_command('block_sparse')})"
    if left_out is not None:
        probe.measurements.append({"part": part, **what, "left_out": left_out})
        for size in SIZES:
            probe.step(f"block size {_name(size)}")
        return {}
    length = _affordable_length(probe, budget, lengths, kind)
    what["tokens"] = length
    pairs: dict[str, int] = {}
    runs: dict[str, Callable[[], object]] = {}
    deviations: dict[str, float] = {}
    dropped: dict[str, str] = {}
    for size in SIZES:
        name = _name(size)
        probe.step(f"block size {name}")
        if max(size) > length:
            dropped[name] = f"it is larger than {length:,} tokens"
        elif budget.left <= 0 and runs:
            dropped[name] = "no time was left for this part"
        else:
            attention, live, exact = _with_blocks(length, size)
            example = Example(probe.device, kind, length, probe.heads, probe.head_dim, exact)
            right, wrong = example.check({name: attention})
            deviations |= right
            dropped |= wrong
            if right:
                pairs[name] = live * probe.heads
                runs[name] = example.runs(attention, TRAINING)
    if not runs:
        probe.measurements.append({"part": part, **what, "dropped": dropped})
        return {}
    try:
        timed = time_in_turns(budget, runs)
    except OutOfTime as late:
        probe.measurements.append({"part": part, **what, "left_out": str(late), "dropped": dropped})
        return {}
    probe.measurements.append(
        {"part": part, **what, "pass": TRAINING, "pairs": pairs, "deviations": deviations, "dropped": dropped}
        | recorded(timed)
    )
    of = {size: _name(size) for size in SIZES if _name(size) in timed.figures}
    return {
        size: Figure(timed.figures[name].seconds / pairs[name], timed.figures[name].spread) for size, name in of.items()
    }


def _affordable_length(probe: Probe, budget: Budget, lengths: Sequence[int], dtype: torch.dtype) -> int:
    """The longest length at which all sizes fit the budget, foreseen from the shortest: pairs grow with its square."""
    shortest = lengths[0]
    attention, _, exact = _with_blocks(shortest, (min(SIZES[0][0], shortest), min(SIZES[0][1], shortest)))
    example = Example(probe.device, dtype, shortest, probe.heads, probe.head_dim, exact)
    example.check({"block_sparse": attention})  # the first call is slower than those after it
    start = time.monotonic()
    example.check({"block_sparse": attention})
    seconds = (time.monotonic() - start) * len(SIZES) * (2 + FEWEST)
    fitting = [
        length
        for length in lengths
        if length <= LONGEST
        and seconds * (length / shortest) ** 2 <= budget.left
        and probe.too_large(probe.working_set(length, dtype)) is None
    ]
    return max(fitting, default=shortest)


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _with_blocks(
    length: int, size: tuple[int, int]
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """The attention with blocks of that size, its live pairs in one head, and the definition of it."""
    from dilated_block_sparse import BlockLayout, block_sparse_attention

    rows, columns = size
    of_row = max(1, round(DENSITY * -(-length // columns)))
    layout = BlockLayout.random(length, of_row, block_size=size)
    live = _live(layout, length, columns)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return block_sparse_attention(query, key, value, layout)

    def exact(query: Tensor, key: Tensor, value: Tensor, checked: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", query[:, checked], key) / query.shape[-1] ** 0.5
        seen = live.to(query.device)[checked // rows]
        return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)

    pairs = int(live.sum(1)[torch.arange(length) // rows].sum())
    return attention, pairs, exact


def _live(layout: BlockLayout, length: int, columns: int) -> Tensor:
    """(rows of blocks, length), bool: which keys each row of blocks sees."""
    live = torch.zeros(layout.q_blocks, length, dtype=torch.bool)
    for row in range(layout.q_blocks):
        for column in layout.row(row):
            live[row, column * columns : (column + 1) * columns] = True
    return live
