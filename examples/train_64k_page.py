"""The record of a run of train_64k.py as a page of Markdown: what was checked, what it cost, what was learnt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

MIB = 2**20


def page(record: dict[str, Any]) -> str:
    """The whole page, every figure of it from the record."""
    settings, machine, sample = record["settings"], record["environment"], record["sample"]
    context = settings["context"]
    devices = ", ".join(machine["cuda"]) or "no GPU"
    worst = max(check["deviation"] for check in record["checks"])
    steps, spent = record["steps"], sum(seconds for _, seconds, _ in record["steps"])
    read = sum(length for length, _, _ in steps)
    lines = [
        f"# A language model with {context:,} bytes of context",
        "",
        (
            f"{machine['date']}, torch {machine['torch']}, {machine['processor']} ({machine['cpu_capability']}), "
            f"{machine['threads']} threads, {devices}."
        ),
        (
            f"{record['parameters']:,} parameters, {settings['num_layers']} layers of {settings['embed_dim']}, "
            f"{settings['num_heads']} heads, segments {list(settings['segment_lengths'])}, "
            f"rates {list(settings['dilation_rates'])}, {record['precision']}; {record['decision']}."
        ),
        "",
        (
            f"Before training, each layer's attention over {context:,} bytes was compared with the float64 definition "
            f"at {record['checked_rows']} rows: it deviates by {worst:.1e} of the largest magnitude at most "
            f"({record['checks'][0]['dtype']}, tolerance {record['checks'][0]['tolerance']:.0e})."
        ),
        "",
        (
            f"It read {read / 1e6:.1f} MB in {len(steps)} steps and {spent:.0f} s, in windows that grow to "
            f"{context:,} bytes."
        ),
        "",
        "## Speed and memory",
        "",
        *table(
            ("window, bytes", "steps", "median s a step", "bytes/s", "bits a byte, mean of the last 20"),
            (
                (f"{length:,}", len(group), f"{median(times):.3f}", f"{length / median(times):,.0f}", f"{bits:.2f}")
                for length, group in by_length(steps)
                for times in [[seconds for _, seconds, _ in group]]
                for bits in [fmean(bits for _, _, bits in group[-20:])]
            ),
        ),
        "",
        f"Forward and backward over one window of {context:,} bytes; memory is the peak of tensors beside the model:",
        "",
        *table(
            ("activations", "s", "MiB"),
            (
                (name, f"{of['seconds']:.2f}", f"{of['peak_bytes'] / MIB:,.0f}")
                for name, of in record["activations"].items()
            ),
        ),
        "",
        "## What was learnt",
        "",
        "Text that was never trained on, during training:",
        "",
        *table(
            ("steps", "s of training", "bits a byte"),
            ((int(count), f"{seconds:.0f}", f"{bits:.3f}") for count, seconds, bits in record["curve"]),
        ),
        "",
        f"After it, over {record['text']['scored']:,} bytes, the compressors as one stream:",
        "",
        *table(
            ("predictor", "bits a byte"),
            [
                ("byte frequencies of the training text", f"{record['baselines']['unigram']:.3f}"),
                ("**this model**", f"**{record['held_out']:.3f}**"),
                ("gzip -9", f"{record['baselines']['gzip']:.3f}"),
                ("xz -6", f"{record['baselines']['xz']:.3f}"),
            ],
        ),
        "",
        (
            f"The same last {settings['segment_lengths'][0]:,} bytes of each held-out window, given more and more of "
            "the window (what is given includes those scored):"
        ),
        "",
        *table(
            ("bytes given", "bits a byte"), ((f"{int(given):,}", f"{bits:.3f}") for given, bits in record["by_context"])
        ),
        "",
        (
            f"After {sample['prompt_bytes']:,} bytes of such text, of which the last are shown, it wrote the rest in "
            f"{sample['seconds']:.1f} s, reading included (temperature {sample['temperature']}, the {sample['top_k']} "
            "likeliest bytes):"
        ),
        "",
        *quote(sample["prompt_end"].lstrip() + sample["text"]),
        "",
        (
            "Raw data: [train_64k.json](train_64k.json). Command, from the repository's root: "
            f"`python examples/{machine['command']}`."
        ),
        "",
    ]
    return "\n".join(lines)


def by_length(steps: Sequence[Sequence[float]]) -> list[tuple[int, list[Sequence[float]]]]:
    """Steps by the bytes of their window, in the order in which lengths were first used."""
    groups: dict[int, list[Sequence[float]]] = {}
    for step in steps:
        groups.setdefault(int(step[0]), []).append(step)
    return list(groups.items())


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Markdown, a line a row."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def quote(text: str) -> list[str]:
    """A fenced block of what a model may write: no fence within, and no other control character than line ends."""
    shown = "".join(each if each.isprintable() or each == "\n" else "·" for each in text)
    return ["```text", *shown.replace("```", "···").split("\n"), "```"]
