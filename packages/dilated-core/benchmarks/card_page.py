"""The page of bench_card: tables, which kernel is fastest where, and the goals, met or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from card_cases import DENSE, PATTERNS
from card_measuring import Ceilings

Row = dict[str, Any]

HOW = (
    "Each candidate's rows, drawn from the whole length, were compared with the float64 definition before it was "
    "timed: output, or output and all gradients; a candidate that deviates has no figure. Times are medians of "
    "runs taken in turns, the spread is the interquartile range over the median, and short calls are repeated in a "
    "row, so that what fits into the card's cache is read from there. *Backward* is the backward alone. TFLOP/s "
    "count two matrix products a forward and five a backward, of the pairs that are attended. *Over the roofline*: "
    "time over the larger of FLOPs over the first ceiling and fewest bytes over the second. *Over dense flash*: "
    "its time over this one's. *Extra memory*: the peak beyond inputs and results; of a backward, its forward "
    "included.\n"
)

# The goals, and where they are looked for.
RATE_TO_DENSE = {"forward": 0.85, "backward": 0.80}
SPEEDUP_OVER_DENSE = 6.5
SPEEDUP_PATTERN, SPEEDUP_SEQ = "paper", 32768
LONGEST = 1 << 20
GIB = 1 << 30


def timed(row: Row) -> dict[str, dict[str, Any]]:
    """The candidates that have figures."""
    return {name: one for name, one in row["candidates"].items() if "median" in one}


def ours(row: Row) -> dict[str, dict[str, Any]]:
    """The kernels of dilated_attention that have figures, the fastest first."""
    found = {name: one for name, one in timed(row).items() if name not in DENSE}
    return dict(sorted(found.items(), key=lambda item: item[1]["median"]))


def failures(rows: Sequence[Row]) -> list[str]:
    """What is wrong: a candidate that deviates, or a kernel of ours that raised."""
    return [
        f"{name}, {label(row)}: {one['why']}"
        for row in rows
        for name, one in row["candidates"].items()
        if "why" in one and (name not in DENSE or "deviation" in one)
    ]


def label(row: Row) -> str:
    """A row in words."""
    return f"{row['pattern']}, {row['seq']:,} tokens, head_dim {row['head_dim']}, {row['pass']}"


# ------------------------------------------------------------------------------------------------ tables


def line(row: Row, name: str, one: dict[str, Any]) -> str:
    """One candidate of a row as Markdown."""
    shown = one.get("deviation")
    cells = [f"{row['seq']:,}", name, "-" if shown is None else f"{shown:.1e}"]
    if "median" not in one:
        return f"| {' | '.join([*cells, '-', '-', '-', '-', '-', '-'])} |"
    flash = timed(row).get("dense flash")
    cells += [
        f"{one['median'] * 1e3:.3f} ({one['spread']:.0%})",
        f"{one['flops_per_second'] / 1e12:.3g}",
        f"{one['of_ceiling']:.2f}",
        f"{one['over_roofline']:.2f}",
        "-" if flash is None else f"{flash['median'] / one['median']:.2f}",
        f"{one['extra_bytes'] / GIB:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| tokens | kernel | deviation | ms (spread) | TFLOP/s | of the ceiling | over the roofline | over dense flash "
    "| extra memory, GiB |\n" + "|---" * 9 + "|"
)


def lines(row: Row) -> list[str]:
    """A row as Markdown: one line a candidate."""
    return [line(row, name, one) for name, one in row["candidates"].items()]


def sections(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each pattern, head_dim and pass, with what is missing and why."""
    for key in dict.fromkeys((row["pattern"], row["head_dim"], row["pass"]) for row in rows):
        own = [row for row in rows if (row["pattern"], row["head_dim"], row["pass"]) == key]
        pattern, head_dim, way = key
        yield f"## {pattern}, head_dim {head_dim}, {way}\n"
        yield "\n".join([HEADER, *(one for row in own for one in lines(row))]) + "\n"
        notes = [
            f"{name} at {row['seq']:,} tokens: {one['why']}"
            for row in own
            for name, one in row["candidates"].items()
            if "why" in one
        ]
        if notes:
            yield "No figure:\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def absent(rows: Sequence[Row]) -> Iterator[str]:
    """Who was not measured at all in some rows, and why."""
    for name in dict.fromkeys(name for row in rows for name in row["left_out"]):
        for why in dict.fromkeys(row["left_out"][name] for row in rows if name in row["left_out"]):
            yield f"- {name}: {why}"


def fastest(rows: Sequence[Row]) -> str:
    """Which kernel is fastest where, and how far the one that "auto" takes is from it."""
    columns = "pattern, tokens, head_dim, pass, fastest, ahead of the next, auto takes, its time over the fastest"
    found = [f"| {' | '.join(columns.split(', '))} |", "|---" * 8 + "|"]
    for row in rows:
        ranked = list(ours(row).items())
        if not ranked:
            continue
        name, best = ranked[0]
        ahead = f"{ranked[1][1]['median'] / best['median']:.2f} ({ranked[1][0]})" if len(ranked) > 1 else "-"
        auto = dict(ranked).get(row["auto"])
        behind = "-" if auto is None else f"{auto['median'] / best['median']:.2f}"
        cells = [row["pattern"], f"{row['seq']:,}", row["head_dim"], row["pass"], name, ahead, row["auto"], behind]
        found.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(found)


def tuning(trials: Sequence[Row]) -> Iterator[str]:
    """The block sizes that were fastest, beside those that the code would take, which are tried first."""
    yield "| pass | head_dim | rows, others, warps, stages | ms | of the code | ms | tried | did not fit |"
    yield "|---" * 8 + "|"
    for which, head_dim in dict.fromkeys((one["pass"], one["head_dim"]) for one in trials):
        own = [one for one in trials if (one["pass"], one["head_dim"]) == (which, head_dim)]
        ranked = sorted((one for one in own if one["seconds"] is not None), key=lambda one: one["seconds"])
        cells = [which, head_dim]
        for one in (ranked[0], own[0]) if ranked else (own[0], own[0]):
            taken = "-" if one["seconds"] is None else f"{one['seconds'] * 1e3:.3f}"
            cells += [", ".join(map(str, one["blocks"])), taken]
        yield f"| {' | '.join(map(str, [*cells, len(own), len(own) - len(ranked)]))} |"


# ------------------------------------------------------------------------------------------------ goals


def _verdict(holds: bool | None) -> str:
    return "not measured" if holds is None else "**met**" if holds else "**not met**"


def rate_goal(rows: Sequence[Row], way: str) -> str:
    """The rate beside dense flash attention's, at the same length or, beyond, at the longest that was measured."""
    goal = RATE_TO_DENSE[way]
    found = []
    for row in rows:
        if row["pass"] != way or not ours(row):
            continue
        dense = [
            one for one in rows
            if (one["pass"], one["head_dim"]) == (way, row["head_dim"])
            and one["seq"] <= row["seq"]
            and "dense flash" in timed(one)
        ]  # fmt: skip
        if not dense:
            continue
        beside = max(dense, key=lambda one: (one["seq"], one["pattern"] == row["pattern"]))
        name, best = next(iter(ours(row).items()))
        ratio = best["flops_per_second"] / timed(beside)["dense flash"]["flops_per_second"]
        found.append((ratio, name, row))
    text = f"Dilated {way} at least {goal:.2f} of dense flash attention's FLOP rate at the same head_dim"
    if not found:
        return f"- {text}: {_verdict(None)}."
    met = [one for one in found if one[0] >= goal]
    (low, low_name, lowest), (high, high_name, highest) = min(found, key=_first), max(found, key=_first)
    return (
        f"- {text}: {_verdict(len(met) == len(found))}, in {len(met)} of {len(found)} rows by the fastest kernel of "
        f"each; lowest {low:.2f} ({low_name}: {label(lowest)}), highest {high:.2f} ({high_name}: {label(highest)})."
    )


def _first(one: tuple[float, str, Row]) -> float:
    return one[0]


def speedup_goal(rows: Sequence[Row]) -> Iterator[str]:
    """Times over dense at 32,768 tokens with the paper's pattern, for each head_dim."""
    own = [
        row
        for row in rows
        if (row["pattern"], row["seq"], row["pass"]) == (SPEEDUP_PATTERN, SPEEDUP_SEQ, "forward")
        and ours(row)
        and any(name in DENSE for name in timed(row))
    ]
    text = f"At {SPEEDUP_SEQ:,} tokens at least {SPEEDUP_OVER_DENSE} times faster than dense, with the paper's pattern"
    if not own:
        yield f"- {text}: {_verdict(None)}."
    for row in own:
        name, best = next(iter(ours(row).items()))
        over = {dense: one["median"] / best["median"] for dense, one in timed(row).items() if dense in DENSE}
        holds = min(over.values()) >= SPEEDUP_OVER_DENSE
        told = ", ".join(f"{times:.2f} times over {dense}" for dense, times in over.items())
        yield f"- {text}, head_dim {row['head_dim']}: {_verdict(holds)} against all of them, {told} ({name})."


def memory_goal(rows: Sequence[Row], card_bytes: int | None) -> Iterator[str]:
    """A million tokens, forward and backward, in one card's memory."""
    own = [row for row in rows if row["seq"] == LONGEST and row["pass"] == "backward"]
    text = f"{LONGEST:,} tokens forward and backward in one card's memory"
    if not own:
        yield f"- {text}: {_verdict(None)}."
    for row in own:
        found = ours(row)
        about = f"{row['pattern']}, head_dim {row['head_dim']}"
        if not found:
            yield f"- {text}, {about}: {_verdict(False)}: " + "; ".join(failures([row])) + "."
            continue
        # Inputs, with the cotangent; out and three gradients, each like one of them; and what came beyond.
        each = row["input_bytes"] * 2
        peaks = {name: each + one["extra_bytes"] for name, one in found.items()}
        told = ", ".join(f"{peak / GIB:.1f} GiB by {name}" for name, peak in peaks.items())
        card = "" if card_bytes is None else f" of {card_bytes / GIB:.1f}"
        yield f"- {text}, {about}: {_verdict(True)}, {told}{card}, inputs and results included."


# ------------------------------------------------------------------------------------------------ the page


def page(results: dict[str, Any]) -> str:
    """All of it."""
    rows, environment, settings = results["rows"], results["environment"], results["settings"]
    patterns = "; ".join(
        f"{name}: segments {list(PATTERNS[name].segment_lengths)}, rates {list(PATTERNS[name].dilation_rates)}"
        for name in dict.fromkeys(row["pattern"] for row in rows)
    )
    wrong = failures(rows)
    goals = [
        *(rate_goal(rows, way) for way in RATE_TO_DENSE),
        *speedup_goal(rows),
        *memory_goal(rows, settings["device_bytes"]),
    ]
    about = (
        f"{environment['date']}, torch {environment['torch']}, CUDA {environment['cuda_runtime']}, "
        f"{settings['device_name']}. Batch {settings['batch']}, {settings['heads']} heads, {settings['dtype']}, "
        f"{'causal' if settings['is_causal'] else 'not causal'}. {patterns}.\n"
    )
    told = ceilings_told([Ceilings(*one) for one in results["ceilings"]]) + "\n"
    parts = ["# Dilated attention on a card\n", about, told, HOW, "## Goals\n", "\n".join(goals) + "\n"]
    if wrong:
        parts += ["## Wrong, or not run\n", "\n".join(f"- {one}" for one in wrong) + "\n"]
    parts += sections(rows)
    if results["tuning"]:
        parts += ["## Block sizes of the Triton kernel\n", "\n".join(tuning(results["tuning"])) + "\n"]
    parts += ["## Not measured\n", "\n".join(absent(rows)) + "\n"]
    parts += ["## Which kernel is fastest\n", fastest(rows) + "\n"]
    parts.append(
        "Raw data: [card.json](card.json). Command, from the repository's root: "
        f"`python packages/dilated-core/benchmarks/{environment['command']}`."
    )
    return "\n".join(parts) + "\n"


def ceilings_told(found: Sequence[Ceilings]) -> str:
    """The ceilings, and how far they moved from one measurement to the next."""
    best = max(found, key=lambda one: one.flops)
    flops, bandwidth = [one.flops for one in found], [one.bandwidth for one in found]
    return (
        f"Ceilings, measured {len(found)} times in these runs: {min(flops) / 1e12:.4g} to {max(flops) / 1e12:.4g} "
        f"TFLOP/s in a matrix product of random numbers, the best of several ({' x '.join(map(str, best.shape))}); "
        f"{min(bandwidth) / 1e12:.3g} to {max(bandwidth) / 1e12:.3g} TB/s in a copy, read and written bytes."
    )
