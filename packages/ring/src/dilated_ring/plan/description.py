"""A plan in words: a page that says what crosses, how it travels and why, and what every rank receives and sends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import torch

from dilated_ring.plan.crossing import find_crossings
from dilated_ring.plan.traffic import Message, message, traffic

if TYPE_CHECKING:
    from dilated_ring.plan.ring_plan import RingPlan

_BAR = 30  # letters of the longest
_LINES = 24  # of ranks at most; others are summed up


def describe(plan: RingPlan, dtype: torch.dtype, head_dim: int) -> str:
    """See ``RingPlan.describe``."""
    form = message(dtype, head_dim, batch=1, phase="forward", masked=False, refetch=False, with_lse=False)
    return "\n\n".join((_heading(plan, form), _branches(plan, form), _ranks(plan, form), _summary(plan, form))) + "\n"


def in_units(count: int) -> str:
    """Bytes as people read them.

    >>> in_units(0), in_units(1000), in_units(5592405)
    ('0', '1000 B', '5.3 MiB')
    """
    if count < 1024:
        return f"{count} B" if count else "0"
    size, unit = count / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:,.1f} {unit}"


def shards(plan: RingPlan) -> str:
    """How many ranks there are, and of how many tokens.

    >>> from dilated_ring import make_plan
    >>> shards(make_plan(97, [8], [1], heads=1, world_size=4))
    '4 ranks of 24 to 25'
    """
    sizes = [high - low for low, high in pairwise(plan.bounds)]
    least, most = min(sizes), max(sizes)
    ranks = f"{len(sizes)} rank{'s' * (len(sizes) > 1)}"
    return f"{ranks} of {most:,}" if least == most else f"{ranks} of {least:,} to {most:,}"


def _heading(plan: RingPlan, form: Message) -> str:
    shared = f" ({plan.kv_heads} of keys)" if plan.kv_heads < plan.heads else ""
    causal = "causal" if plan.is_causal else "not causal"
    return (
        f"{plan.seq_len:,} tokens on {shards(plan)}; {plan.heads} heads{shared} of {form.head_dim}, "
        f"{str(form.dtype).removeprefix('torch.')}, {causal}, semantics {plan.semantics}"
    )


def _branches(plan: RingPlan, form: Message) -> str:
    rows = []
    for branch in plan.branches:
        crossings = plan.crossings(branch.number)
        sizes = [len(crossing.parts) for crossing in crossings]
        spread = f"{min(sizes)} to {max(sizes)}" if len(set(sizes)) > 1 else f"{max(sizes, default=1)}"
        rows.append(
            [
                f"{branch.number}",
                f"{plan.segment_lengths[branch.number]:,}",
                f"{branch.rate:,}",
                f"{-(-plan.seq_len // branch.segment_length):,}",
                f"{len(crossings):,}",
                spread,
                plan.exchanges[branch.number],
                _reason(plan, branch.number, form),
            ]
        )
    heads = ["branch", "segment", "rate", "segments", "crossing", "ranks each", "exchange", "why (busiest rank)"]
    return _table(heads, rows, left=2)


def _reason(plan: RingPlan, number: int, form: Message) -> str:
    chosen = plan.exchanges[number]
    if chosen == "none":
        return "every segment lies in one shard"
    most = {}
    for exchange in ("gather", "heads"):
        crossings = find_crossings(plan.bounds, plan.branches[number], by_heads=exchange == "heads")
        figures = traffic([crossings], plan.world_size, form)
        most[exchange] = figures.of(figures.busiest)
    other = "heads" if chosen == "gather" else "gather"
    return f"{in_units(most[chosen])}; by {other} {in_units(most[other])}"


def _ranks(plan: RingPlan, form: Message) -> str:
    forward = plan.bytes(form.dtype, form.head_dim)
    backward = plan.bytes(form.dtype, form.head_dim, phase="backward")
    figures = [
        (high - low, forward.of(rank), sum(forward.sent[rank]), backward.of(rank), sum(backward.sent[rank]))
        for rank, (low, high) in enumerate(pairwise(plan.bounds))
    ]
    most = max(max(each[1] for each in figures), 1)
    # Neighbours that have the same figures share a line.
    alike = [[rank for rank, _ in group] for _, group in groupby(enumerate(figures), key=lambda item: item[1])]
    rows = []
    for ranks in alike[:_LINES]:
        tokens, *moved = figures[ranks[0]]
        name = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        rows.append([name, f"{tokens:,}", *map(in_units, moved), "#" * round(_BAR * moved[0] / most)])
    heads = ["rank", "tokens", "forward: in", "out", "backward: in", "out", ""]
    lines = _table(heads, rows, left=1)
    left = [rank for ranks in alike[_LINES:] for rank in ranks]
    if left:
        incoming = [figures[rank][1] for rank in left]
        lines += (
            f"\nand ranks {left[0]}-{left[-1]}: forward, {in_units(min(incoming))} to {in_units(max(incoming))} in each"
        )
    return lines


def _summary(plan: RingPlan, form: Message) -> str:
    figures = plan.bytes(form.dtype, form.head_dim)
    busiest = figures.busiest
    low, high = plan.bounds[busiest : busiest + 2]
    ring = 2 * (plan.seq_len - high + low) * plan.kv_heads * form.head_dim * form.dtype.itemsize
    received = (
        f"Rank {busiest} receives most, {in_units(figures.of(busiest))} forward; a dense ring would bring it "
        f"{in_units(ring)}. All ranks together: {in_units(figures.total)}."
        if figures.total
        else "Nothing travels."
    )
    pairs = [sum(of_branches) for of_branches in plan.pairs()]
    if plan.world_size == 1 or not any(pairs):
        return received
    most = pairs.index(max(pairs))
    uneven = pairs[most] * plan.world_size / sum(pairs)
    return f"{received}\nRank {most} computes most, {uneven:.2f} times the mean."


def _table(heads: list[str], rows: Sequence[list[str]], left: int) -> str:
    """Columns at their widest; all but the last ``left`` of them flush right."""
    lines = [heads, *rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(heads))]
    cut = len(heads) - left
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at < cut else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
