"""A plan in words: a page that says what every rank needs of which others, computes, receives and sends."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import torch

from dilated_ring.plan.description import in_units

if TYPE_CHECKING:
    from dilated_block_sparse.ring.plan import BlockSparseRingPlan

_BAR = 30  # letters of the longest
_LINES = 24  # of ranks at most; others are summed up


def describe(plan: BlockSparseRingPlan, dtype: torch.dtype, head_dim: int) -> str:
    """See ``BlockSparseRingPlan.describe``."""
    return "\n\n".join(
        (_heading(plan, dtype, head_dim), _ranks(plan, dtype, head_dim), _summary(plan, dtype, head_dim))
    )


def _heading(plan: BlockSparseRingPlan, dtype: torch.dtype, head_dim: int) -> str:
    layout = plan.layout
    rows, columns = layout.block_size
    ranks = f"{plan.world_size} rank{'s' * (plan.world_size > 1)}"
    shared = "one layout for all heads" if layout.heads == 1 else f"layouts of {layout.heads} heads"
    return (
        f"{plan.seq_len:,} tokens on {ranks}; {plan.kv_heads} key heads of {head_dim}, "
        f"{str(dtype).removeprefix('torch.')}, {'causal' if plan.is_causal else 'not causal'}; {shared}, blocks of "
        f"{rows} x {columns}, {layout.live:,} live, density {layout.density:.3g}"
    )


def _ranks(plan: BlockSparseRingPlan, dtype: torch.dtype, head_dim: int) -> str:
    forward = plan.bytes(dtype, head_dim)
    backward = plan.bytes(dtype, head_dim, phase="backward")
    figures = [
        (
            high - low,
            plan.live(rank),
            len(plan.peers(rank).receives_from),
            forward.of(rank),
            sum(forward.sent[rank]),
            backward.of(rank),
            sum(backward.sent[rank]),
        )
        for rank, (low, high) in enumerate(pairwise(plan.bounds))
    ]
    most = max(max(each[3] for each in figures), 1)
    # Neighbours that have the same figures share a line.
    alike = [[rank for rank, _ in group] for _, group in groupby(enumerate(figures), key=lambda item: item[1])]
    lines = [["rank", "tokens", "live", "sources", "forward: in", "out", "backward: in", "out", ""]]
    for ranks in alike[:_LINES]:
        tokens, live, sources, *moved = figures[ranks[0]]
        name = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        bar = "#" * round(_BAR * moved[0] / most)
        lines.append([name, f"{tokens:,}", f"{live:,}", f"{sources}", *map(in_units, moved), bar])
    left = [rank for ranks in alike[_LINES:] for rank in ranks]
    page = _table(lines)
    if left:
        incoming = [figures[rank][3] for rank in left]
        page += f"\nand ranks {left[0]}-{left[-1]}: forward, {in_units(min(incoming))} to {in_units(max(incoming))} in"
    return page


def _summary(plan: BlockSparseRingPlan, dtype: torch.dtype, head_dim: int) -> str:
    figures = plan.bytes(dtype, head_dim)
    if not figures.total:
        return "Nothing travels.\n"
    busiest = figures.busiest
    low, high = plan.bounds[busiest : busiest + 2]
    ring = 2 * (plan.seq_len - high + low) * plan.kv_heads * head_dim * dtype.itemsize
    live = [plan.live(rank) for rank in range(plan.world_size)]
    most = live.index(max(live))
    return (
        f"Rank {busiest} receives most, {in_units(figures.of(busiest))} forward; a dense ring would bring it "
        f"{in_units(ring)}. All ranks together: {in_units(figures.total)}.\n"
        f"Rank {most} has most live blocks, {live[most] * plan.world_size / sum(live):.2f} times the mean.\n"
    )


def _table(lines: list[list[str]]) -> str:
    """Columns at their widest, flush right, but for the last one."""
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    return "\n".join(
        "  ".join([*(cell.rjust(width) for cell, width in zip(line[:-1], widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )
