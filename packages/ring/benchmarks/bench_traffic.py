"""Bytes between ranks, computed from plans: dilated ring attention against a ring, all-gather and torchscale's formula.

    python bench_traffic.py                                  64k to 1 billion tokens, 2 to 1,024 ranks
    python bench_traffic.py --tokens 1048576 --ranks 8 64    some of them
    python bench_traffic.py --output results --no-plot      elsewhere, without the picture

Nothing here is measured but the check, which comes first: small plans of every pattern are run on virtual ranks,
forward and backward; the output must be the float64 definition's, and every rank must have received exactly the bytes
that its plan says. Then the same formulas are evaluated at sizes that no test can run. Writes JSON, a Markdown page
beside it and a picture (default: docs/benchmarks/ring_traffic.*); the picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from dilated_core import DilatedPattern, measure, reference
from dilated_ring import RingPlan, dilated_ring_attention, make_plan
from dilated_ring.comm import Comm, RecordingComm, run_ranks
from dilated_ring.plan.description import in_units

HEADS, HEAD_DIM, DTYPE = 16, 64, torch.bfloat16
ROW = HEADS * HEAD_DIM * DTYPE.itemsize  # bytes of one position of one tensor
TOKENS = [1 << 16, 1 << 18, 1 << 20, 1 << 24, 1 << 28, 1 << 30]
RANKS = [1 << power for power in range(1, 11)]
SHOWN = {(1 << 20, 8), (1 << 20, 64), (1 << 20, 1024), (1 << 24, 64), (1 << 24, 1024), (1 << 30, 64), (1 << 30, 1024)}

PICTURED = (8, 64)  # ranks of the plans that are drawn

# Weak scaling: tokens a rank, and up to so many ranks.
SHARDS = {1 << 17: 1 << 10, 1 << 20: 1 << 10}
SHOWN_RANKS = (8, 64, 1024)
FLOPS = 400e12  # a second and rank: what a good kernel reaches in bfloat16 on a current accelerator
BACKWARD = 2.5  # of a forward's operations: five matrix products where the forward has two
LINKS = {"NVLink, 450 GB/s": 450e9, "InfiniBand, 400 Gb/s": 50e9, "Ethernet, 100 Gb/s": 12.5e9}
TOLERANCE = 1e-12


def geometric(tokens: int) -> DilatedPattern:
    """Segments and rates that grow by 4 until one segment holds everything."""
    return DilatedPattern.geometric(2048, 1 + max(0, math.ceil(math.log(tokens / 2048, 4))), 4)


PATTERNS: dict[str, Callable[[int], DilatedPattern]] = {
    "paper": lambda tokens: DilatedPattern.longnet(),
    "GigaPath": lambda tokens: DilatedPattern.gigapath(),
    "geometric": geometric,
}


def plan_of(pattern: DilatedPattern, tokens: int, ranks: int) -> RingPlan:
    """The plan as a user gets it."""
    return make_plan(tokens, pattern.segment_lengths, pattern.dilation_rates, HEADS, ranks)


# ------------------------------------------------------------------------------------------------ the check


def check(pattern: DilatedPattern, ranks: int, tokens: int = 512, of: int = 1 << 20) -> dict[str, float]:
    """Run a pattern shortened by ``of / tokens`` on virtual ranks; what is wrong raises."""
    lengths = [
        max(rate, length * tokens // of)
        for length, rate in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)
    ]
    rates = pattern.dilation_rates
    generator = torch.Generator().manual_seed(ranks)
    rows = torch.randn(4, 1, tokens, HEADS, 8, dtype=torch.float64, generator=generator).unbind()
    plan = make_plan(tokens, lengths, rates, HEADS, ranks)

    def work(comm: Comm) -> tuple[torch.Tensor, list[int]]:
        recording = RecordingComm(comm)
        shard = slice(*plan.bounds[comm.rank : comm.rank + 2])
        *qkv, cotangent = (each[:, shard].clone() for each in rows)
        qkv = [each.requires_grad_() for each in qkv]
        out = dilated_ring_attention(*qkv, lengths, rates, group=recording)
        torch.autograd.grad(out, qkv, cotangent)
        return out.detach(), [recording.received_bytes(phase) for phase in ("forward", "backward")]

    results = run_ranks(ranks, work)
    exact, _ = reference.dilated_attention(*rows[:3], lengths, rates)
    deviation = float((torch.cat([out for out, _ in results], 1) - exact).abs().max() / exact.abs().max())
    if not deviation <= TOLERANCE:
        raise SystemExit(f"deviation from the definition: {deviation}; nothing is reported")
    for at, phase in enumerate(("forward", "backward")):
        planned = plan.bytes(torch.float64, 8, phase=phase)
        wire = [received[at] for _, received in results]
        if wire != [planned.of(rank) for rank in range(ranks)]:
            raise SystemExit(f"bytes on the wire, {phase}: {wire}; planned {planned.received}; nothing is reported")
    return {"ranks": ranks, "tokens": tokens, "deviation_from_definition": deviation}


# ------------------------------------------------------------------------------------------------ bytes


def torchscale(pattern: DilatedPattern, tokens: int, ranks: int) -> int:
    """What a rank receives in torchscale's forward: of every branch longer than a shard, all ranks' sparse keys.

    Its gather_kv all-gathers each shard's ceil(n / rate) selected rows of keys and values from all ranks, then drops
    those of other segments; the backward reduce-scatters as much.
    """
    shard = tokens // ranks
    rows = [
        -(-shard // rate)
        for length, rate in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)
        if length > shard
    ]
    return 2 * (ranks - 1) * sum(rows) * ROW


def torchscale_computes(pattern: DilatedPattern, tokens: int, ranks: int) -> str:
    """What comes of it; on one device it would be "the same" as with other semantics, but for zero keys."""
    shard = tokens // ranks
    longer = [length > shard for length in pattern.segment_lengths]
    if any(length % shard for length, crosses in zip(pattern.segment_lengths, longer, strict=True) if crosses):
        return "nothing: it asserts"
    if any(shard % length for length, crosses in zip(pattern.segment_lengths, longer, strict=True) if not crosses):
        return "other segments"
    if any(shard % rate for rate, crosses in zip(pattern.dilation_rates, longer, strict=True) if crosses):
        return "another grid"
    return "the same"


def traffic(name: str, tokens: int, ranks: int) -> dict[str, object]:
    """One row: bytes that the busiest rank receives, forward and with backward."""
    pattern = PATTERNS[name](tokens)
    plan = plan_of(pattern, tokens, ranks)
    forward = plan.bytes(DTYPE, HEAD_DIM)
    both = forward + plan.bytes(DTYPE, HEAD_DIM, phase="backward")
    shard = tokens // ranks
    others = 2 * (tokens - shard) * ROW  # keys and values of all other ranks
    sparse = torchscale(pattern, tokens, ranks)
    return {
        "pattern": name,
        "tokens": tokens,
        "ranks": ranks,
        "exchanges": plan.exchanges,
        "forward": {
            "ours": forward.of(forward.busiest),
            "ours_mean": forward.total / ranks,
            "torchscale": sparse,
            "ring": others,
            "all_gather": others,
        },
        "forward_backward": {
            "ours": both.of(both.busiest),
            "ours_mean": both.total / ranks,
            "torchscale": 2 * sparse,
            # Keys once more, and gradients all the way round to who owns them.
            "ring": 2 * others + 2 * tokens * ROW,
            "all_gather": 2 * others,
        },
        "torchscale_computes": torchscale_computes(pattern, tokens, ranks),
    }


# ------------------------------------------------------------------------------------------------ weak scaling


def scaling(name: str, shard: int, ranks: int) -> dict[str, object]:
    """One row: what a forward and backward take on paper, with as many tokens on every rank."""
    tokens = shard * ranks
    plan = plan_of(PATTERNS[name](tokens), tokens, ranks)
    both = plan.bytes(DTYPE, HEAD_DIM) + plan.bytes(DTYPE, HEAD_DIM, phase="backward")
    compute = [4 * HEAD_DIM * sum(pairs) * (1 + BACKWARD) / FLOPS for pairs in plan.pairs()]
    ideal = sum(compute) / ranks
    ring = 2 * (2 * (tokens - shard) + tokens) * ROW if ranks > 1 else 0

    def times(bandwidth: float) -> dict[str, float]:
        moving = [both.of(rank) / bandwidth for rank in range(ranks)]
        one_by_one = max(map(sum, zip(compute, moving, strict=True)))
        at_once = max(map(max, zip(compute, moving, strict=True)))
        return {
            "traffic_seconds": max(moving),
            "efficiency": ideal / one_by_one,
            "efficiency_overlapped": ideal / at_once,
            "ring_traffic_seconds": ring / bandwidth,
            "ring_efficiency_overlapped": ideal / max(ideal, ring / bandwidth),
        }

    return {
        "pattern": name,
        "tokens": tokens,
        "ranks": ranks,
        "tokens_a_rank": shard,
        "exchanges": plan.exchanges,
        "compute_seconds": {"busiest": max(compute), "mean": ideal},
        "received": both.of(both.busiest),
        "links": {link: times(bandwidth) for link, bandwidth in LINKS.items()},
    }


# ------------------------------------------------------------------------------------------------ the page


def count(number: int) -> str:
    """Tokens as people say them: 64k, 1M, 1G."""
    for power, letter in ((30, "G"), (20, "M"), (10, "k")):
        if number >= 1 << power and number % (1 << power) == 0:
            return f"{number >> power:,}{letter}"
    return f"{number:,}"


def traffic_table(rows: list[dict[str, object]]) -> str:
    """Bytes as Markdown."""
    lines = [
        (
            "| pattern | tokens | ranks | ours: forward | + backward | torchscale: forward | ring, all-gather: forward "
            "| over ring |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        forward, both = row["forward"], row["forward_backward"]
        ratio = f"**{forward['ring'] / forward['ours']:,.0f}**" if forward["ours"] else "nothing travels"
        computes = row["torchscale_computes"]
        sparse = in_units(forward["torchscale"]) + (f" ({computes})" if computes != "the same" else "")
        lines.append(
            f"| {row['pattern']} | {count(row['tokens'])} | {row['ranks']:,} | {in_units(forward['ours'])} "
            f"| {in_units(both['ours'])} | {sparse} | {in_units(forward['ring'])} "
            f"| {ratio} |"
        )
    return "\n".join(lines)


def scaling_table(rows: list[dict[str, object]]) -> str:
    """Weak scaling as Markdown."""
    links = list(LINKS)
    lines = [
        "| pattern | tokens | ranks | compute, s: mean, busiest | received | "
        + " | ".join(f"{link}: traffic, s; efficiency" for link in links)
        + f" | a ring, {links[1].split(',')[0]}: traffic, s |",
        "|---" * (6 + len(links)) + "|",
    ]
    for row in rows:
        cells = [
            f"{times['traffic_seconds']:.2g}; {times['efficiency']:.0%}, {times['efficiency_overlapped']:.0%}"
            for times in row["links"].values()
        ]
        compute = row["compute_seconds"]
        lines.append(
            f"| {row['pattern']} | {count(row['tokens'])} | {row['ranks']:,} | {compute['mean']:.3g}, "
            f"{compute['busiest']:.3g} | {in_units(row['received'])} | {' | '.join(cells)} "
            f"| {row['links'][links[1]]['ring_traffic_seconds']:.3g} |"
        )
    return "\n".join(lines)


def gigapath_note() -> str:
    """How the two figures that are often told of GigaPath's pattern come about."""
    pattern, ranks = PATTERNS["GigaPath"](1 << 20), 8
    chosen = plan_of(pattern, 1 << 20, ranks).bytes(DTYPE, HEAD_DIM)
    gather = make_plan(1 << 20, pattern.segment_lengths, pattern.dilation_rates, HEADS, ranks, exchange="gather")
    gathered = gather.bytes(DTYPE, HEAD_DIM)
    mean = gathered.total / ranks
    widest = [sum(of_branches[-1] for of_branches in each.received) / ranks for each in (gathered, chosen)]
    parts = " + ".join(f"{size / (1 << 20):.1f}" for size in chosen.received[chosen.busiest] if size)
    mib = [round(size / (1 << 20)) for size in (mean, *widest, mean - widest[0] + widest[1])]
    return (
        f"GigaPath's pattern at 1M tokens and {ranks} ranks, forward: if all branches gather, ranks receive {mib[0]} "
        f"MiB in the *mean*; with the widest branch by heads ({mib[2]} for {mib[1]}), {mib[3]} with lses. Of the "
        "other branches, segments of 185,363 bring most where a shard lies in two of them: the busiest rank receives "
        f"{in_units(gathered.of(gathered.busiest))} if all gather, and {in_units(chosen.of(chosen.busiest))} as "
        f"planned, {parts}."
    )


def page(results: dict[str, list[dict[str, object]]], environment: dict[str, object], picture: str | None) -> str:
    """The page that lands beside the JSON."""
    shown = [row for row in results["traffic"] if (row["tokens"], row["ranks"]) in SHOWN] or results["traffic"]
    weak = [row for row in results["scaling"] if row["ranks"] in SHOWN_RANKS] or results["scaling"]
    checked = " and ".join(sorted({str(row["ranks"]) for row in results["checks"]}, key=int))
    deviation = max(row["deviation_from_definition"] for row in results["checks"])
    text = (
        "# Bytes between ranks\n\n"
        f"{environment['date']}. **Computed, not measured**: from the plans, with {HEADS} heads of {HEAD_DIM}, "
        "bfloat16, batch 1, not causal, semantics paper, equal shards. The bytes are exact; left out are headers of "
        "messages and the agreement before the first (64 bytes a peer).\n\n"
        f"Checked in this run: small plans of every pattern, on {checked} virtual ranks, bring every rank exactly the "
        "bytes that they say, forward and backward, and the output is the float64 definition's (largest deviation "
        f"{deviation:.1e}).\n\n"
        "Patterns: *paper*, segments 2,048 to 32,768, rates 1, 2, 4, 6, 12; *GigaPath*, segments 1,024, 5,792, 32,768, "
        "185,363, 1,048,576, rates 1, 2, 4, 8, 16; *geometric*, segments 2,048 × 4^i, rates 4^i, until one segment "
        "holds the whole sequence. k, M and G are powers of 1,024.\n\n"
        "## What the busiest rank receives\n\n"
        f"All sizes, by default 64k to 1G tokens and 2 to 1,024 ranks, are in the JSON.\n\n{traffic_table(shown)}\n\n"
        "- *Ours*: `plan.bytes`; gathered rows are kept for the backward.\n"
        "- *Ring*: every rank sees the keys and values of all others, 2 (W - 1) / W · N rows of H · D numbers, "
        "whatever the pattern; with the backward as much again, and their gradients all the way round, 2 N rows, in "
        "bfloat16.\n"
        "- *All-gather*: the same bytes forward, and as much again by reduce-scatter backward; but a rank holds N "
        "keys.\n"
        "- *torchscale*: 2 (W - 1) ⌈n / r⌉ rows for each branch longer than a shard of n tokens, as its `gather_kv` "
        "collects a branch's selected rows from all ranks before it drops those of other segments; the backward "
        "reduce-scatters as much. It asserts where a shard does not divide a longer segment. With each shard it starts "
        "anew: *other segments* where shorter ones do not divide the shard, *another grid* where a rate does not.\n"
        f"- {gigapath_note()}\n"
    )
    if picture is not None:
        text += f"\n![Bytes of the busiest rank against ranks and tokens, and weak scaling]({picture})\n"
        for ranks in PICTURED:
            said = f"Who sends to whom: GigaPath's pattern, 1M tokens, {ranks} ranks, as `save_picture` draws it"
            text += f"\n{said}:\n\n![{said}]({plan_picture(Path(picture), ranks)})\n"
    text += (
        "\n## Weak scaling, on paper\n\n"
        "Forward and backward of one attention, as many tokens on every rank. Compute: 4 · D operations for each pair "
        f"that a rank attends, and {1 + BACKWARD} times that with the backward, at {FLOPS / 1e12:.0f} TFLOP/s; "
        "traffic: bytes received over the link's speed in one direction. Each efficiency is the mean compute "
        "over the busiest rank's time, first with traffic after compute, then with traffic hidden behind it. "
        "Left out are latency, contention, packing and merging; NVLink rarely joins 1,024 ranks.\n"
    )
    for shard in sorted({row["tokens_a_rank"] for row in weak}):
        rows = [row for row in weak if row["tokens_a_rank"] == shard]
        text += f"\n{count(shard)} tokens a rank:\n\n{scaling_table(rows)}\n"
    text += (
        "\nWhere the busiest rank computes more than the mean, a branch goes by heads whose segments do not align with "
        "the shards, and shares each one's work equally among ranks that hold unequal parts of it; or goes over "
        f'more ranks than there are heads ({HEADS}), so that some attend none of it. `exchange="gather"` evens both '
        "out, for more bytes.\n"
        f"\nRaw data: [ring_traffic.json](ring_traffic.json). Command, from the repository's root: "
        f"`python packages/ring/benchmarks/{environment['command']}`.\n"
    )
    return text


def draw(results: dict[str, list[dict[str, object]]], path: Path) -> None:
    """Busiest rank's bytes against ranks and against tokens, and the efficiency of weak scaling; a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, PercentFormatter

    colours = dict(zip(PATTERNS, ("#0072b2", "#d55e00", "#009e73"), strict=True))
    markers = dict(zip(PATTERNS, "osD", strict=True))
    figure = Figure(figsize=(15.5, 5.2), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    by_ranks, by_tokens, weak = figure.subplots(1, 3)
    for axes, along, fixed, value in ((by_ranks, "ranks", "tokens", 1 << 20), (by_tokens, "tokens", "ranks", 64)):
        rows = [row for row in results["traffic"] if row[fixed] == value]
        for name in PATTERNS:
            own = [row for row in rows if row["pattern"] == name]
            places = [row[along] for row in own]
            style = {"color": colours[name], "marker": markers[name], "markersize": 5}
            axes.plot(places, [row["forward"]["ours"] for row in own], label=f"ours, {name}", linewidth=2, **style)
            sparse = [
                math.nan if row["torchscale_computes"] == "other segments" else row["forward"]["torchscale"]
                for row in own
            ]
            style |= {"markersize": 3, "alpha": 0.6}
            axes.plot(places, sparse, label=f"torchscale, {name}", linestyle=":", linewidth=1.5, **style)
        ring = [row for row in rows if row["pattern"] == "paper"]
        places = [row[along] for row in ring]
        axes.plot(
            places, [row["forward"]["ring"] for row in ring], color="#222222", linewidth=2, label="ring, all-gather"
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog", linthresh=1 << 18, linscale=0.5)
        axes.yaxis.set_major_locator(FixedLocator([0, *(1 << power for power in range(18, 44, 4))]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: in_units(round(size)).replace(".0", "")))
        axes.set_ylim(-(1 << 16), None)
        axes.set_xticks(places, [count(place) for place in places])
        axes.set_xlabel(along)
        axes.set_title(f"Received by the busiest rank, forward, {count(value)} {fixed}", loc="left", fontsize=10)
    for name in PATTERNS:
        for shard, style in zip(SHARDS, ("--", "-"), strict=True):
            own = [row for row in results["scaling"] if (row["pattern"], row["tokens_a_rank"]) == (name, shard)]
            efficiency = [row["links"]["InfiniBand, 400 Gb/s"]["efficiency"] for row in own]
            weak.plot(
                [row["ranks"] for row in own],
                efficiency,
                color=colours[name],
                marker=markers[name],
                markersize=5,
                linestyle=style,
                linewidth=2,
                label=f"{name}, {count(shard)} a rank",
            )
    weak.set_xscale("log", base=2)
    weak.set_ylim(0, 1.05)
    weak.yaxis.set_major_formatter(PercentFormatter(1.0))
    weak.set_xticks([1 << power for power in range(0, 11, 2)], [f"{1 << power:,}" for power in range(0, 11, 2)])
    weak.set_xlabel("ranks")
    weak.set_title("Weak scaling on paper: efficiency, 400 Gb/s, no overlap", loc="left", fontsize=10)
    for axes in (by_ranks, by_tokens, weak):
        axes.minorticks_off()
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.legend(*by_ranks.get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower left", ncols=7)
    weak.legend(frameon=False, fontsize=8, loc="lower left")
    figure.suptitle(
        f"Computed, not measured: {HEADS} heads of {HEAD_DIM}, bfloat16",
        x=0.01,
        ha="left",
        fontsize=12,
        color="#222222",
    )
    figure.savefig(path, format="png")


def plan_picture(path: Path, ranks: int) -> Path:
    """Where the plan's own picture lies, beside another."""
    return path.with_name(f"{path.stem}_plan_{ranks}.png")


def draw_plan(ranks: int, path: Path) -> None:
    """Who sends to whom: GigaPath's pattern, 1M tokens; a PNG."""
    plan_of(PATTERNS["GigaPath"](1 << 20), 1 << 20, ranks).save_picture(path, dtype=DTYPE, head_dim=HEAD_DIM)


def redraw(record: Path, folder: Path) -> list[Path]:
    """Draw the pictures of a recorded run again; nothing is run, and only the plans of two pictures are made."""
    path = folder / "ring_traffic.png"
    draw(json.loads(record.read_text()), path)
    for ranks in PICTURED:
        draw_plan(ranks, plan_picture(path, ranks))
    return [path, *(plan_picture(path, ranks) for ranks in PICTURED)]


def main() -> None:
    """Check, compute, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--device", default="cpu", help="cpu; elsewhere there is nothing to compute")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    parser.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw the picture too")
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        print("traffic: this is computed, on any machine")
        return
    for tokens in arguments.tokens:
        for ranks in arguments.ranks:
            if tokens < 1 or ranks < 1 or tokens % ranks:
                parser.error(f"--tokens: expected multiples of --ranks, for equal shards, got {tokens} and {ranks}")
    torch.set_num_threads(1)
    results: dict[str, list[dict[str, object]]] = {
        "checks": [{"pattern": name, **check(PATTERNS[name](1 << 20), ranks)} for name in PATTERNS for ranks in (3, 8)],
        "traffic": [],
        "scaling": [],
    }
    print(traffic_table([]))
    for name in PATTERNS:
        for tokens in arguments.tokens:
            for ranks in arguments.ranks:
                row = traffic(name, tokens, ranks)
                results["traffic"].append(row)
                print(traffic_table([row]).splitlines()[-1], flush=True)
    for name in PATTERNS:
        for shard, most in SHARDS.items():
            results["scaling"] += [scaling(name, shard, ranks) for ranks in (1, *arguments.ranks) if ranks <= most]
    environment = measure.environment()
    arguments.output.mkdir(parents=True, exist_ok=True)
    picture = arguments.output / "ring_traffic.png" if arguments.plot else None
    if picture is not None:
        draw(results, picture)
        for ranks in PICTURED:
            draw_plan(ranks, plan_picture(picture, ranks))
    sizes = {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16", "flops": FLOPS, "links": LINKS}
    written = {"environment": environment, "sizes": sizes, **results}
    (arguments.output / "ring_traffic.json").write_text(json.dumps(written, indent=1) + "\n")
    (arguments.output / "ring_traffic.md").write_text(page(results, environment, picture and picture.name))


if __name__ == "__main__":
    main()
