"""The page of bench_gigapath: what was measured in words and tables, which goals are met, and what is wrong.

Made from the results as they are in gigapath.json alone, so that rows an earlier run left read like those of this one.
"""

from __future__ import annotations

from collections.abc import Iterator

from gigapath_candidates import AUTO, HEAD_DIM, HEADS, PATTERN, PEER, SEMANTICS, Row

# Goals: all layers over so many tiles on a card; times faster than torchscale's way on a CPU.
GOAL_LAYERS, GOAL_TILES, GOAL_SECONDS = 12, 100_000, 2.0
GOAL_SPEEDUP = 1.5
# What too little memory raises: a slide may be too long for a card, and that is no fault.
OUT_OF_MEMORY = ("OutOfMemoryError", "PoolLimitError", "PoolMemoryError")

WHAT = (
    "*bf16*: weights and tiles in bfloat16. *fp16-autocast*: float32 weights under autocast to float16, as "
    "Prov-GigaPath's own inference runs. *fp32*: products in PyTorch's default float32 precision, on a card without "
    "TF32. *All layers*: from tokens to hidden states. *Tiles to embedding*: the whole model, with the positions of "
    "the tiles, which are computed on the CPU. Times are medians of runs in turns, the spread is the interquartile "
    "range over the median. *Memory*: the peak of all layers beside weights and tokens, with what pools reserve.\n"
)
CHECKED = (
    "Checked before a candidate was timed: its encoder, all rows over a small slide, against a float64 encoder of the "
    "same weights that attends by the definition; its attention of the first layer, in rows drawn from the whole "
    "slide, against the definition in float64; its layers, in the same rows, against the first candidate's. "
    "*Deviation*: the larger of the largest difference over the largest magnitude and that of norms.\n"
)


def timed(row: Row, part: str) -> dict[str, Row]:
    """Of the candidates that have figures of that part, these, our fastest first and torchscale's way last."""
    found = {name: one[part] for name, one in row["candidates"].items() if "median" in one.get(part, ())}
    return dict(sorted(found.items(), key=lambda item: (item[0] == PEER, item[1]["median"])))


def failures(rows: list[Row]) -> Iterator[str]:
    """What is wrong: a candidate that deviates, or one of ours that raised and did not only run out of memory."""
    for row in rows:
        for name, one in row["candidates"].items():
            deviates = "why" in one and "deviation" in one
            for why in _whys(one):
                if deviates or not (name == PEER or why.startswith(OUT_OF_MEMORY)):
                    yield f"{name}, {label(row)}: {why}"


def _whys(one: Row) -> list[str]:
    return [part["why"] for part in (one, *one.values()) if isinstance(part, dict) and "why" in part]


def label(row: Row) -> str:
    """A row in words."""
    return f"{row['tiles']:,} tiles, {row['precision']}"


HEADER = (
    "| tiles | precision | kernel | deviation: attention, encoder | all layers, s (spread) | tiles to embedding, s "
    "(spread) | one attention, ms (spread) | its TFLOP/s | layers' memory, GiB |\n" + "|---" * 9 + "|"
)


def lines(row: Row) -> Iterator[str]:
    """A row as Markdown, a line a candidate."""
    for name, one in row["candidates"].items():
        shown = [one.get("deviation", {}).get(key) for key in ("attention", "encoder")]
        layers, slide, attention = (one.get(part, {}) for part in ("layers", "slide", "attention"))
        rate = f"{row['attention_flops'] / attention['median'] / 1e12:.3g}" if "median" in attention else "-"
        cells = [
            f"{row['tiles']:,}",
            row["precision"],
            f"auto ({row['auto']})" if name == AUTO else name,
            ", ".join("-" if found is None else f"{found:.1e}" for found in shown),
            _seconds(layers),
            _seconds(slide),
            _seconds(attention, 1e3),
            rate,
            f"{layers['peak_bytes'] / 2**30:.3g}" if "peak_bytes" in layers else "-",
        ]
        yield f"| {' | '.join(cells)} |"


def _seconds(part: Row, unit: float = 1.0) -> str:
    return f"{part['median'] * unit:.3f} ({part['spread']:.0%})" if "median" in part else "-"


def goals(rows: list[Row], device_type: str) -> Iterator[str]:
    """On a card the layers over 100,000 tiles, in each precision; on a CPU times faster than torchscale's way."""
    if device_type == "cpu":
        text = f"Tiles to embedding {GOAL_SPEEDUP} times as fast as torchscale's way"
        own = [row for row in rows if {AUTO, PEER} <= timed(row, "slide").keys() & timed(row, "attention").keys()]
        for row in own:
            times, alone = (
                of[PEER]["median"] / of[AUTO]["median"] for of in (timed(row, "slide"), timed(row, "attention"))
            )
            verdict = "met" if times >= GOAL_SPEEDUP else "not met"
            yield f"- {text}, {label(row)}: **{verdict}**, {times:.2f} times; the attention alone {alone:.2f} times."
    else:
        text = f"{GOAL_LAYERS} layers over {GOAL_TILES:,} tiles under {GOAL_SECONDS:g} s"
        own = [row for row in rows if (row["tiles"], row["layers"]) == (GOAL_TILES, GOAL_LAYERS)]
        for row in own:
            medians = {name: one["median"] for name, one in timed(row, "layers").items() if name != PEER}
            verdict = "met" if medians and min(medians.values()) < GOAL_SECONDS else "not met"
            told = (
                ", ".join(f"{median:.3f} s by {name}" for name, median in medians.items()) or "no kernel has a figure"
            )
            whole = timed(row, "slide").get(AUTO)
            rest = "" if whole is None else f"; from tiles to embedding {whole['median']:.3f} s by {AUTO}"
            yield f"- {text}, {row['precision']}: **{verdict}**, {told}{rest}."
    if not own:
        yield f"- {text}: not measured in this run."


def page(results: Row) -> str:
    """All of it."""
    rows, environment, settings = results["rows"], results["environment"], results["settings"]
    on_card = settings["device_type"] != "cpu"
    place = (
        f"{settings['device_name']}, CUDA {environment['cuda_runtime']}"
        if on_card
        else f"{environment['processor']} ({environment['cpu_capability']}), {environment['threads']} threads"
    )
    wrong, peers = list(failures(rows)), dict.fromkeys(row["peer"] for row in rows if row["peer"])
    notes = [
        f"- {name}, {label(row)}: {why}"
        for row in rows
        for name, one in row["candidates"].items()
        for why in _whys(one)
        if f"{name}, {label(row)}: {why}" not in wrong
    ]
    absent = dict.fromkeys(f"- {name}: {why}" for row in rows for name, why in row["left_out"].items())
    absent |= dict.fromkeys(f"- {one}" for one in results["left_out"])
    about = (
        f"{environment['date']}, torch {environment['torch']}, {place}. {settings['layers']} layers, random weights, "
        f"random tiles, inference; segments {list(PATTERN.segment_lengths)}, rates {list(PATTERN.dilation_rates)}, "
        f'{HEADS} heads of {HEAD_DIM}, semantics "{SEMANTICS}".\n'
    )
    parts = [
        f"# Prov-GigaPath's slide encoder on a {'card' if on_card else 'CPU'}\n",
        about,
        WHAT,
        CHECKED,
        *(f"*{PEER}* is torchscale's way of computing the same attention: {one}.\n" for one in peers),
        "## Goals\n",
        "\n".join(goals(rows, settings["device_type"])) + "\n",
    ]
    if wrong:
        parts += ["## Wrong, or not run\n", "\n".join(f"- {one}" for one in wrong) + "\n"]
    parts += ["## Figures\n", "\n".join([HEADER, *(line for row in rows for line in lines(row))]) + "\n"]
    if notes:
        parts += ["## Without a figure\n", "\n".join(notes) + "\n"]
    parts += ["## Left out\n", "\n".join(absent) + "\n"]
    parts.append(
        "Raw data: [gigapath.json](gigapath.json). Command, from the repository's root: "
        f"`python packages/factory/benchmarks/{environment['command']}`.\n"
    )
    return "\n".join(parts)
