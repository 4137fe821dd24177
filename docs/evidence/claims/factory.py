"""Figures of dilated-factory: the demo, GigaPath's encoder, what semantics and patterns change, the command `bench`."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

from evidence.claim import Claim, Quote

README = "README.md"
TORCHSCALE = "docs/guides/torchscale.md"
CHOOSE = "docs/choose.md"
RECIPE = "docs/recipes/gigapath.md"
TRAINING = "docs/recipes/train-64k.md"
SEMANTICS = "docs/semantics.md"


def _demo(record: Any) -> dict[str, Any]:
    minutes = sum(record["stage_seconds"].values()) / 60
    return {
        "bits": record["held_out"]["bits_per_byte"],
        "unigram": record["baselines"]["unigram"],
        "gzip": record["baselines"]["gzip"],
        "xz": record["baselines"]["xz"],
        "minutes": minutes,
        "about": ("no", "one", "two", "three", "four", "five")[round(minutes)],
    }


def _comparison(record: Any) -> dict[str, float]:
    speedup = {size["length"]: size["speedup"] for size in record["comparison"]["sizes"]}
    memory = record["comparison"]["sizes"][-1]["measurements"]
    return {
        "shortest": speedup[2048],
        "at_4k": speedup[4096],
        "at_8k": speedup[8192],
        "longest": speedup[32768],
        "dense": memory["dense"]["peak_bytes"] / 2**20,
        "dilated": memory["dilated"]["peak_bytes"] / 2**20,
    }


def _gigapath(record: Any) -> dict[str, float]:
    memory, encoder = record["peak_bytes"]["attention"], record["peak_bytes"]["encoder"]
    share = record["layers"] * record["median"]["attention"]["ours"] / record["median"]["encoder"]["ours"]
    return {
        **record["speedup"],
        "mib": encoder["ours"] / 2**20,
        "mib_torchscale": encoder["torchscale"] / 2**20,
        "rest": 100 * (1 - share),
        "tiles": record["tiles"],
        "seconds": record["median"]["encoder"]["ours"],
        "seconds_torchscale": record["median"]["encoder"]["torchscale"],
        "part": memory["torchscale"] / memory["ours"],
        "deviation": record["deviation"]["the two embeddings"],
    }


def _training(record: Any) -> dict[str, float]:
    context = record["settings"]["context"]
    seconds = median(seconds for length, seconds, _ in record["steps"] if length == context)
    by_context = [bits for _, bits in record["by_context"]]
    return {
        "context": context,
        "parameters": record["parameters"],
        "minutes": sum(seconds for _, seconds, _ in record["steps"]) / 60,
        "step": seconds,
        "rate": context / seconds,
        "kept": record["activations"]["kept"]["peak_bytes"] / 2**20,
        "recomputed": record["activations"]["recomputed"]["peak_bytes"] / 2**20,
        "bits": record["held_out"],
        "unigram": record["baselines"]["unigram"],
        "gzip": record["baselines"]["gzip"],
        "xz": record["baselines"]["xz"],
        "given_little": by_context[0],
        "given_all": by_context[-1],
    }


def _semantics(record: Any) -> dict[str, float]:
    differs = record["relative_difference"]
    return {
        f"{name}_{part}": 100 * differs[part][f"{name}, torchscale"]
        for name in ("paper", "grouped")
        for part in ("attention", "embedding")
    } | {"tiles": record["tiles"], "deviation": max(record["deviation_from_oracle"].values())}


def _minilm(record: Any) -> dict[str, float]:
    rows = [row for row in record["rows"] if row["implementation"] == "dilated"]
    [halved] = [row for row in rows if row["entry"] == {"segment_lengths": [256], "dilation_rates": [1]}]
    return {
        "texts": record["texts"],
        "deviation": max(each["max_abs"] for each in record["deviation_from_sdpa"].values()),
        "halved": halved["texts"]["mean"],
        "nearest": 100 * halved["texts"]["same_nearest"],
    }


def _tune(record: Any) -> dict[str, float]:
    counts = Counter(row["verdict"] for row in record["rows"])
    return {
        "rows": len(record["rows"]),
        "wins": counts["wins"],
        "loses": counts["loses"],
        "from_mib": record["profile"]["pool_min_bytes"] / 2**20,
    }


def _overhead(record: Any) -> dict[str, float]:
    noise = "a second direct module"
    calls = [(name, row["added"]) for rows in record["calls"].values() for name, row in rows.items()]
    seconds = {name: median(taken) for name, taken in record["seconds"].items()}
    return {
        "most": max(added for name, added in calls if name != noise),
        "noise": max(abs(added) for name, added in calls if name == noise),
        "import_ms": 1e3 * seconds["from dilated_factory import create_dilated_attention"],
        "info": seconds["dilated info"],
    }


def _bench(record: Any) -> dict[str, int]:
    verdicts = Counter(one["verdict"] for row in record["rows"] for one in row["comparisons"])
    found = {name.replace(" ", "_"): verdicts[name] for name in ("reproduced", "direction only", "not reproduced")}
    return {**found, "all": sum(found.values())}


CLAIMS = (
    Claim(
        "factory",
        "In {minutes:.1f} minutes on two cores `dilated demo` trains a LongNet that needs {bits:.1f} bits a byte for "
        "text it has never seen; byte frequencies need {unigram:.1f}, gzip {gzip:.1f}, xz {xz:.1f}",
        "demo/report",
        _demo,
        (
            Quote(
                README,
                "the model needs {bits:.1f} bits a byte for text it has never seen, against {unigram:.1f} for byte "
                "frequencies and {gzip:.1f} for gzip",
            ),
            Quote(README, "({about} minutes on two cores, after installation)"),
            Quote("docs/start.md", "It takes {about} minutes on two cores"),
        ),
    ),
    Claim(
        "factory",
        "Causal, with 4 heads, dilated attention is {longest:.1f} times as fast as dense attention at 32,768 tokens, "
        "{at_8k:.1f} at 8,192, {at_4k:.2f} at 4,096 and {shortest:.2f} at 2,048; it takes {dilated:.0f} MiB at 32,768 "
        "where dense takes {dense:.0f}",
        "demo/report",
        _comparison,
    ),
    Claim(
        "factory",
        "After {minutes:.0f} minutes on two cores a model of {parameters:,} parameters and {context:,} bytes of "
        "context needs {bits:.2f} bits a byte for text it has never seen, byte frequencies {unigram:.2f}, gzip "
        "{gzip:.2f}, xz {xz:.2f}; a step over the whole context takes {step:.1f} s and {kept:,.0f} MiB, "
        "{recomputed:,.0f} MiB with activations recomputed",
        "train_64k",
        _training,
        (
            Quote(TRAINING, "{minutes:.0f} minutes of training on two cores"),
            Quote(
                TRAINING,
                "{bits:.2f} bits a byte for text it has never seen, against {unigram:.2f} for byte "
                "frequencies, {gzip:.2f} for gzip and {xz:.2f} for xz",
            ),
            Quote(TRAINING, "a step over {context:,} bytes took {step:.1f} s"),
            Quote(TRAINING, "{kept:,.0f} MiB beside the model, or {recomputed:,.0f} MiB with `--recompute`"),
            Quote(TRAINING, "{given_little:.2f} bits a byte after 1,024 bytes and {given_all:.2f} after all"),
        ),
    ),
    Claim(
        "factory",
        "Over {tiles:,} tiles in float32, one attention of Prov-GigaPath's encoder takes {attention:.2f} times less "
        "than torchscale's own code on the same CPU operator and 1/{part:.0f} of its memory, the 12-layer encoder "
        "{encoder:.2f} times less: {seconds:.1f} s and {seconds_torchscale:.1f} s, embeddings equal to {deviation:.1e}",
        "gigapath",
        _gigapath,
        (
            Quote(TORCHSCALE, "one attention takes {attention:.2f} times less than torchscale's own code"),
            Quote(TORCHSCALE, "the 12-layer encoder {encoder:.2f} times less"),
            Quote(CHOOSE, "one attention over {tiles:,} tiles takes {attention:.2f} times less time"),
            Quote(CHOOSE, "the whole encoder {encoder:.2f} times less"),
            Quote(RECIPE, "{tiles:,} tiles through 12 layers take {seconds:.1f} seconds on two cores in float32"),
            Quote(RECIPE, "torchscale's way of computing the same takes {encoder:.2f} times as long"),
        ),
    ),
    Claim(
        "factory",
        "That encoder takes {mib:.0f} MiB beside weights and tiles where torchscale's code takes {mib_torchscale:.0f}; "
        "{rest:.0f} % of its time is not attention but its linear layers and norms",
        "gigapath",
        _gigapath,
        (Quote(RECIPE, "with {mib:.0f} MiB beside weights and tiles"),),
    ),
    Claim(
        "factory",
        "With the same weights, the paper's semantics instead of torchscale's changes an attention layer's output by "
        '{paper_attention:.1f} % and GigaPath\'s slide embedding by {paper_embedding:.1f} %; "grouped" by '
        "{grouped_attention:.1f} and {grouped_embedding:.1f} %; each is within {deviation:.1e} of its own definition",
        "semantics",
        _semantics,
        (
            Quote(
                TORCHSCALE,
                "| paper instead of torchscale | {paper_attention:.1f}% | {paper_embedding:.1f}% |",
            ),
            Quote(
                TORCHSCALE,
                "| grouped instead of torchscale | {grouped_attention:.1f}% | {grouped_embedding:.1f}% |",
            ),
            Quote(SEMANTICS, 'under "paper" differs by {paper_embedding:.1f} % from the one under "torchscale"'),
            Quote(SEMANTICS, 'under "grouped" by {grouped_embedding:.1f} %'),
            Quote(SEMANTICS, "each of them is within {deviation:.1e} of its own definition"),
        ),
    ),
    Claim(
        "factory",
        "A trained MiniLM whose attention is swapped for one segment over everything, or all blocks, gives the same "
        "embeddings (largest difference {deviation:.1e}); with segments of half the length, {texts} texts keep a mean "
        "cosine of {halved:.2f}, and {nearest:.0f} % of them their nearest neighbour",
        "minilm",
        _minilm,
    ),
    Claim(
        "factory",
        "On this machine a tuned profile wins over the fixed thresholds in {wins} of {rows} cells and loses in "
        "{loses}; a pool is faster than `torch.empty` from {from_mib:.0f} MiB a tensor on",
        "tune",
        _tune,
    ),
    Claim(
        "factory",
        "The factory adds at most {most:.0f} us to a call (a second module like it differs by up to {noise:.0f} us), "
        "its import takes {import_ms:.0f} ms after torch, `dilated info` {info:.2f} s",
        "overhead",
        _overhead,
    ),
    Claim(
        "factory",
        "Of {all} figures that the specification claims, {reproduced} are reproduced on this machine, {direction_only} "
        "in direction only, {not_reproduced} are not",
        "bench/report",
        _bench,
    ),
)
