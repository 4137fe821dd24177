"""How much work the Triton kernel walks, beside what is needed: a count, exact, that needs no GPU.

    python bench_triton_work.py
    python bench_triton_work.py --patterns paper --sizes 8192 --blocks 64x64

A program takes a tile of rows and walks, for each branch, blocks of keys (for the gradients of keys: of queries). Where
the rows of a tile differ in what they meet, it computes scores that nobody needs. The same numbers as in the kernel's
``plan_walk`` are found here for all tiles at once, and say how many. Nothing is timed.

Work over needed: scores computed, over pairs of query and key that meet. A kernel that does R operations a second
shows as R over this, where operations are counted as ``DilatedPattern.flops`` does. Writes JSON and a Markdown table
(default: docs/benchmarks).
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Iterable, Iterator
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core import DilatedPattern, measure
from dilated_core.kernels.triton.blocks import Pass, choose_blocks
from dilated_core.kernels.triton.schedule import Branches, make_tables
from dilated_core.plan import head_phases

# With the heads of their models.
PATTERNS = {"paper": (DilatedPattern.longnet(), 12), "gigapath": (DilatedPattern.gigapath(), 16)}
PASSES: tuple[Pass, ...] = ("forward", "grad_query", "grad_key_value")
ORDERS = ("chosen", "as they come")
BLOCKS = ((64, 64), (128, 64), (128, 128), (64, 128))
CPU = torch.device("cpu")
# The table shows the blocks chosen for this card, head_dim and dtype; GigaPath's 48 takes the same.
CARD, HEAD_DIM, DTYPE = (9, 0), 64, torch.bfloat16
PROCESSORS = 132  # of an H100 or H200
FAR = 2**31 - 1


class Met(NamedTuple):
    """What every tile meets of one branch, as numbers along its grid: (tiles,) each, see ``plan_walk``.

    Attributes:
        low, high: the first number, and one beyond the last.
        first, last: of the tile's own rows; beyond all numbers, and -1, where none lies on the grid.
        same: whether all rows of the tile lie on the grid in one segment.
    """

    low: Tensor
    high: Tensor
    first: Tensor
    last: Tensor
    same: Tensor


class Walk(NamedTuple):
    """What every tile walks, (tiles,) each.

    Attributes:
        plain, masked: blocks without and with a mask.
        read: rows read of the side that is walked.
    """

    plain: Tensor
    masked: Tensor
    read: Tensor

    @property
    def blocks(self) -> Tensor:
        """Both kinds."""
        return self.plain + self.masked


def cut(order: Tensor, rows: int) -> Tensor:
    """An order as tiles, (tiles, rows), -1 where there is no row."""
    tiles = -(-len(order) // rows)
    padded = order.new_full((tiles * rows,), -1)
    padded[: len(order)] = order
    return padded.view(tiles, rows)


def meet(tiles: Tensor, pair: tuple[int, int], phase: int, seq_len: int) -> Met:
    """What tiles of positions meet of a branch of (segment length, rate), in a head of this phase."""
    length, rate = min(pair[0], seq_len), pair[1]
    whole = max((length - phase + rate - 1) // rate, 1)
    full = (seq_len - 1) // length
    total = full * whole + max((seq_len - full * length - phase + rate - 1) // rate, 0)
    valid = tiles >= 0
    segment = tiles // length
    inside = tiles - segment * length
    member = valid & (inside % rate == phase)
    lowest = segment.where(member, FAR).amin(1)
    highest = segment.where(member, -1).amax(1)
    number = segment * whole + (inside - phase) // rate
    some = highest >= 0
    return Met(
        low=torch.where(some, lowest * whole, 0),
        high=torch.where(some, ((highest + 1) * whole).clamp(max=total), 0),
        first=number.where(member, FAR).amin(1),
        last=number.where(member, -1).amax(1),
        same=(lowest == highest) & ~(valid & ~member).any(1),
    )


def walk(met: Met, which: Pass, others: int, is_causal: bool) -> Walk:
    """What tiles walk of a branch, ``others`` rows at a time."""
    low, high, first, last, same = met
    if which == "grad_key_value":
        common = low
        if is_causal:
            low = torch.minimum(first, high)
            common = torch.minimum(high, low + -(-(last - low).clamp(min=0) // others) * others)
        common = common.where(same, high)
        plain = (high - common) // others
        end = common + plain * others
        masked = -(-(common - low) // others) - (-(high - end) // others)
    else:
        common = high
        if is_causal:
            high = torch.minimum(high, last + 1)
            common = torch.minimum(high, first + 1)
        common = common.where(same, low)
        plain = (common - low) // others
        masked = -(-(high - low) // others) - plain
    return Walk(plain, masked, high - low)


def meet_all(orders: Iterable[Tensor], branches: Branches, heads: Iterable[int], rows: int) -> Iterator[list[Met]]:
    """What all tiles meet of every branch, one head after the other: its order, (rows,), and its number."""
    for order, head in zip(orders, heads, strict=True):
        tiles = cut(order, rows)
        yield [
            meet(tiles, pair, phases[head], len(order))
            for pair, phases in zip(branches.pairs, branches.phases, strict=True)
        ]


def walk_all(met: Iterable[list[Met]], which: Pass, others: int, is_causal: bool) -> Walk:
    """What all tiles walk of all branches, one head after the other."""
    of_heads = []
    for of_branches in met:
        found = [walk(branch, which, others, is_causal) for branch in of_branches]
        of_heads.append(Walk(*(torch.stack(parts).sum(0) for parts in zip(*found, strict=True))))
    return Walk(*(torch.cat(parts) for parts in zip(*of_heads, strict=True)))


def makespan(times: Iterable[int], processors: int) -> int:
    """When the last program ends, if each processor takes the next one as soon as it is free."""
    free = [0] * processors
    for time in times:
        heapq.heapreplace(free, free[0] + time)
    return max(free)


def make_branches(pattern: DilatedPattern, heads: int) -> Branches:
    """The pattern in the paper's semantics, as the kernel is told of it."""
    rates = pattern.dilation_rates
    phases = (head_phases("paper", branch, len(rates), rate, heads) for branch, rate in enumerate(rates))
    numbers = tuple(tuple(-1 if phase is None else phase for phase in of_heads) for of_heads in phases)
    return Branches(tuple(zip(pattern.segment_lengths, rates, strict=True)), numbers)


def count(
    pattern: DilatedPattern, heads: int, seq_len: int, blocks: Iterable[tuple[int, int]], orders: Iterable[str] = ORDERS
) -> Iterator[dict[str, object]]:
    """One row for each order, size of blocks and pass, causal and not: of all heads, one of every class walked."""
    branches = make_branches(pattern, heads)
    first, of_head = branches.head_classes()
    tables = make_tables(branches, [(0, seq_len)], CPU)
    as_they_come = torch.arange(seq_len, dtype=torch.int32)
    ordered = [as_they_come] * len(first) if tables.order is None else list(tables.order)
    for name in orders:
        lines = ordered if name == "chosen" else [as_they_come] * len(first)
        for rows, of_rows in groupby(sorted(blocks), key=itemgetter(0)):
            met = list(meet_all(lines, branches, first, rows))
            for (_, others), which, is_causal in product(of_rows, PASSES, (False, True)):
                walked = walk_all(met, which, others, is_causal)
                of_heads = Walk(*(part.view(len(first), -1)[of_head].flatten() for part in walked))
                needed = pattern.pairs(seq_len, heads, is_causal=is_causal)
                case = {"order": name, "pass": which, "is_causal": is_causal}
                yield {**case, **summary(of_heads, (rows, others), needed)}


def summary(walked: Walk, sizes: tuple[int, int], needed: int) -> dict[str, object]:
    """What the walks of all heads, tile by tile as they are launched, come to."""
    rows, others = sizes
    blocks = walked.blocks
    total, heaviest = int(blocks.sum()), int(blocks.max())
    # No order of launches can end before all work is shared out evenly, nor before the heaviest program.
    best = max(total / PROCESSORS, heaviest)
    return {
        "rows": rows,
        "others": others,
        "computed": total * rows * others,
        "needed": needed,
        "work_over_needed": total * rows * others / needed,
        "masked_share": int(walked.masked.sum()) / total,
        "max_over_mean": heaviest * len(blocks) / total,
        # Of keys and values, or of queries and their gradients: two rows of a head each.
        "bytes_read": int(walked.read.sum()) * 2 * HEAD_DIM * DTYPE.itemsize,
        "makespan": makespan(blocks.tolist(), PROCESSORS) / best,
        "makespan_heaviest_first": makespan(sorted(blocks.tolist(), reverse=True), PROCESSORS) / best,
    }


# ------------------------------------------------------------------------------------------------ page

HEADER = (
    "| pattern, heads | tokens | causal | forward | grad_query | grad_key_value | forward, rows as they come "
    "| masked | heaviest tile | read, GB | launched as is | heaviest first |\n" + "|---" * 12 + "|"
)


def chosen(which: Pass) -> tuple[int, int]:
    """The rows and others that blocks.py chooses."""
    return choose_blocks(which, CARD, HEAD_DIM, DTYPE)[:2]


def table(rows: list[dict[str, object]]) -> list[str]:
    """Lines of Markdown, for the chosen blocks."""
    found = {
        (row["pattern"], row["heads"], row["tokens"], row["is_causal"], row["pass"], row["order"]): row
        for row in rows
        if (row["rows"], row["others"]) == chosen(row["pass"])
    }
    lines = []
    for pattern, heads, tokens, is_causal in dict.fromkeys(key[:4] for key in found):
        of_passes = [found.get((pattern, heads, tokens, is_causal, which, "chosen")) for which in PASSES]
        plain = found.get((pattern, heads, tokens, is_causal, "forward", "as they come"))
        forward = of_passes[0]
        if plain is None or forward is None or None in of_passes:
            continue
        lines.append(
            f"| {pattern}, {heads} | {tokens:,} | {'yes' if is_causal else 'no'} | "
            + " | ".join(f"{row['work_over_needed']:.2f}" for row in of_passes)
            + f" | {plain['work_over_needed']:.2f} | {forward['masked_share']:.0%} | {forward['max_over_mean']:.2f} "
            f"| {forward['bytes_read'] / 1e9:.2f} | {forward['makespan']:.2f} "
            f"| {forward['makespan_heaviest_first']:.2f} |"
        )
    return lines


def gain(rows: list[dict[str, object]]) -> str:
    """What the order brings, over all rows of the forward with the chosen blocks."""
    shown = [row for row in rows if (row["pass"], row["rows"], row["others"]) == ("forward", *chosen("forward"))]
    ordered, plain = ([row["work_over_needed"] for row in shown if row["order"] == name] for name in ORDERS)
    ratios = [without / with_it for with_it, without in zip(ordered, plain, strict=True)]
    return f"The order divides the work of the forward by {min(ratios):.1f} to {max(ratios):.1f}.\n\n" if ratios else ""


def report(rows: list[dict[str, object]], environment: dict[str, object]) -> str:
    """The page that lands beside the JSON."""
    blocks = ", ".join(f"{which} {' x '.join(map(str, chosen(which)))}" for which in PASSES)
    return (
        '# What the kernel "triton" walks\n\n'
        f"{environment['date']}. **A count, not a measurement**: exact, made without a GPU, and not yet measured on "
        "one.\n\n"
        "A program takes a tile of rows and walks blocks of the keys that its rows meet, branch by branch. Where the "
        "rows of a tile differ in what they meet, some scores that it computes are masked away. Columns 4 to 7 are "
        "scores computed over pairs that meet; what FLOPs a second a kernel shows, counted as `DilatedPattern.flops` "
        "does, is at most the card's peak over this. *Rows as they come*: without the order of `schedule.row_order`."
        "\n\n"
        "The last five columns are of the forward. *Masked*: the share of blocks that need a mask. *Heaviest tile*: "
        "its blocks over the mean. *Read*: keys and values that all tiles read, head_dim "
        f"{HEAD_DIM}, {str(DTYPE).removeprefix('torch.')}, before any cache. *Launched as is* and *heaviest first*: "
        f"when {PROCESSORS} processors that take one program at a time would be done, if a block took one unit of "
        "time, over the earliest possible: a model, in which launch order alone matters.\n\n"
        f"Rows x others of a block, as chosen for head_dim {HEAD_DIM} on compute capability "
        f"{'.'.join(map(str, CARD))}: {blocks}. Others are in the JSON. One head of every class is counted, with the "
        "number of heads that are like it. In Triton's interpreter the kernel itself takes as many steps as are "
        "counted here (`tests/test_triton_work.py`, in small).\n\n"
        + gain(rows)
        + "\n".join([HEADER, *table(rows)])
        + "\n\nRaw data: [triton_work.json](triton_work.json). Command, from the repository's root: "
        f"`python packages/dilated-core/benchmarks/{environment['command']}`.\n"
    )


def parse_blocks(text: str) -> tuple[int, int]:
    """'64x128' as (64, 128)."""
    rows, others = map(int, text.split("x"))
    return rows, others


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu; with a card there is nothing more to learn")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=list(PATTERNS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 32768, 100_000, 131072, 1048576])
    parser.add_argument("--blocks", type=parse_blocks, nargs="+", default=BLOCKS, help="rows x others, as 64x128")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    if torch.device(arguments.device).type != "cpu":
        print(f"this is a count that needs no card; nothing to do on {arguments.device}")
        return
    environment = measure.environment()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    print(HEADER)
    for name in arguments.patterns:
        pattern, heads = PATTERNS[name]
        for seq_len in arguments.sizes:
            of_case = {"pattern": name, "heads": heads, "tokens": seq_len}
            counted = [{**of_case, **row} for row in count(pattern, heads, seq_len, arguments.blocks)]
            rows += counted
            print("\n".join(table(counted)), flush=True)
            results = {"environment": environment, "rows": rows}
            (arguments.output / "triton_work.json").write_text(json.dumps(results, indent=1) + "\n")
            (arguments.output / "triton_work.md").write_text(report(rows, environment))


if __name__ == "__main__":
    main()
