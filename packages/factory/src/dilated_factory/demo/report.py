"""The demo's results in one object, written as report.json, report.md and pictures: also when only a part is there.

May import the demo's other rooms; draws through ``plots``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dilated_core import DilatedPattern
from dilated_factory.demo import plots
from dilated_factory.demo.baselines import Baselines
from dilated_factory.demo.comparison import Measurement, SizeResult
from dilated_factory.demo.corpus import HELD_OUT_ONE_IN, Corpus
from dilated_factory.demo.settings import DemoSettings
from dilated_factory.demo.training import HeldOutCheck, Precision, Step, TrainingRecord

JSON_FORMAT = 1
"""Of report.json; raised when a key changes its meaning."""


@dataclass(frozen=True)
class HeldOut:
    """The model on held-out text: bits per byte over ``windows`` windows of ``text_bytes`` bytes, all predicted."""

    bits_per_byte: float
    windows: int
    text_bytes: int


@dataclass(frozen=True)
class Sample:
    """Text the model continued: bytes, and how they were drawn."""

    prompt: bytes
    continuation: bytes
    temperature: float
    top_k: int


@dataclass
class DemoReport:
    """Everything the demo knows, filled from the top as it runs; None or empty where it did not get so far."""

    environment: Mapping[str, object]
    settings: DemoSettings
    seed: int
    device: str
    corpus: Corpus | None = None
    evaluated_bytes: int = 0
    parameters: int = 0
    decision: str = ""
    precision: Precision | None = None
    baselines: Baselines | None = None
    training: TrainingRecord = field(default_factory=TrainingRecord)
    held_out: HeldOut | None = None
    sample: Sample | None = None
    comparison_pattern: DilatedPattern | None = None
    comparison: list[SizeResult] = field(default_factory=list)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    interrupted_in: str | None = None

    def write(self, folder: Path) -> list[Path]:
        """Write what there is into ``folder``, created where missing; return the files, the report first."""
        folder.mkdir(parents=True, exist_ok=True)
        pictures = self.draw(folder)
        report, raw = folder / "report.md", folder / "report.json"
        report.write_text(self.markdown(pictures), encoding="utf-8")
        raw.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        return [report, raw, *pictures.values()]

    def as_dict(self) -> dict[str, Any]:
        """report.json: plain values, times in seconds, sizes in bytes, losses in bits per byte."""
        return {
            "format": JSON_FORMAT,
            "complete": self.interrupted_in is None,
            "interrupted_in": self.interrupted_in,
            "environment": dict(self.environment),
            "seed": self.seed,
            "device": self.device,
            "settings": self.settings.as_dict(),
            "stage_seconds": self.stage_seconds,
            "corpus": None if self.corpus is None else _corpus(self.corpus, self.evaluated_bytes),
            "model": {"parameters": self.parameters, "decision": self.decision},
            "precision": None if self.precision is None else asdict(self.precision),
            "baselines": None if self.baselines is None else asdict(self.baselines),
            "training": asdict(self.training),
            "held_out": None if self.held_out is None else asdict(self.held_out),
            "sample": None if self.sample is None else _sample(self.sample),
            "comparison": {
                "pattern": None if self.comparison_pattern is None else asdict(self.comparison_pattern),
                "sizes": [_size(result) for result in self.comparison],
            },
        }

    def markdown(self, pictures: Mapping[str, Path]) -> str:
        """report.md: the same for people, with links to the pictures given by name."""
        parts = [self._opening(), self._learning(pictures), self._sample(), self._comparison(pictures)]
        parts += [self._pattern(pictures), self._conditions()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def predictors(self) -> list[tuple[str, float, str]]:
        """(predictor, bits per byte, what it knew) on the same held-out bytes, worst first."""
        rows = []
        if self.baselines is not None:
            known = self.baselines
            rows += [
                ("byte unigram", known.unigram, "byte frequencies of the training text"),
                ("gzip -9", known.gzip, "nothing before; adapts along the whole text, 32 KiB back"),
                (
                    "deflate -9, primed",
                    known.deflate_primed,
                    "the last 32 KiB of the training text; adapts, 32 KiB back",
                ),
                ("xz -6", known.xz, "nothing before; adapts along the whole text, all of it"),
            ]
            if known.xz_primed is not None:
                what = f"{_megabytes(known.primed_bytes)} of training text, word for word; adapts along the whole text"
                rows.append(("xz -6, primed", known.xz_primed, what))
        if self.held_out is not None:
            read = self.training.steps[-1].bytes_read
            what = (
                f"{_megabytes(read)} of training text, through its weights; looks {self.settings.context:,} bytes back"
            )
            rows.append(("this LongNet", self.held_out.bits_per_byte, what))
        return sorted(rows, key=lambda row: -row[1])

    def verdict(self) -> str:
        """One or two sentences: where the model stands between the unigram and the compressors."""
        if self.held_out is None or self.baselines is None:
            return ""
        bits = self.held_out.bits_per_byte
        against = [
            ("the byte unigram", self.baselines.unigram),
            ("gzip", self.baselines.gzip),
            ("xz", self.baselines.xz),
        ]
        if self.baselines.xz_primed is not None:
            against.append(("xz that has read the training text", self.baselines.xz_primed))
        words = [
            f"{abs(bits / other - 1):.0%} {'fewer' if bits < other else 'more'} than {name} ({other:.2f})"
            for name, other in against
        ]
        return f"The model needs {bits:.2f} bits per byte: " + ", ".join(words[:-1]) + f" and {words[-1]}."

    def draw(self, folder: Path) -> dict[str, Path]:
        """Draws what there is into an existing folder; name -> PNG."""
        pictures = {}
        if self.training.steps:
            held_out = None if self.held_out is None else self.held_out.bits_per_byte
            pictures["learning"] = folder / "learning.png"
            plots.draw_learning(pictures["learning"], self.training, self.baselines, held_out)
        if any(result.measurements for result in self.comparison):
            pictures["comparison"] = folder / "comparison.png"
            title = f"Causal attention, {self.settings.comparison_heads} heads of {self.settings.comparison_head_dim}"
            plots.draw_comparison(pictures["comparison"], self.comparison, f"{title}, {self._processor()}")
        pictures["pattern"] = folder / "pattern.png"
        pattern = DilatedPattern(self.settings.segment_lengths, self.settings.dilation_rates)
        plots.draw_pattern(pictures["pattern"], pattern, range(min(2, self.settings.num_heads)))
        return pictures

    def _processor(self) -> str:
        cuda = self.environment["cuda"]
        if self.device.startswith("cuda") and isinstance(cuda, list) and cuda:
            return str(cuda[0])
        return f"{self.environment['processor']}, {self.environment['threads']} threads"

    def _opening(self) -> str:
        lines = ["# A LongNet learns Python on this machine"]
        if self.interrupted_in is not None:
            lines.append(f"**Interrupted in the stage “{self.interrupted_in}”.** What was measured before is below.")
        if self.held_out is not None:
            last = self.training.steps[-1]
            lines.append(
                f"A causal LongNet of {self.parameters:,} parameters, made by `dilated_factory`, read "
                f"{_megabytes(last.bytes_read)} of the Python standard library in {last.seconds:.0f} s on "
                f"{self._processor()}, in windows that grow to {self.settings.context:,} bytes. {self.verdict()}"
            )
        return "\n\n".join(lines)

    def _learning(self, pictures: Mapping[str, Path]) -> str:
        lines = []
        if self.predictors() and self.corpus is not None:
            lines += ["## Predicting text it has never seen", ""]
            lines += ["| predictor | bits per byte | what it knew |", "|---|---:|---|"]
            lines += [
                f"| **{name}** | **{bits:.3f}** | {what} |"
                if name == "this LongNet"
                else f"| {name} | {bits:.3f} | {what} |"
                for name, bits, what in self.predictors()
            ]
            lines += ["", self._fairness(self.corpus)]
        if "learning" in pictures:
            lines += ["", f"![bits per byte against time]({pictures['learning'].name})"]
        return "\n".join(lines)

    def _fairness(self, corpus: Corpus) -> str:
        return (
            f"All figures are for the same {self.evaluated_bytes:,} bytes, from {len(corpus.held_out_files)} files of "
            "modules and packages of which no file was trained on, cut into windows of "
            f"{self.settings.context:,}. The model predicts every byte of a window from those before it in the window, "
            "the first from nothing. The compressors code all windows as one stream, which shows them more context; "
            "their headers are counted, the model's own size is not. A module is held out when a hash of its name is "
            f"a multiple of {HELD_OUT_ONE_IN}. Training text: {len(corpus.training_files)} files, "
            f"{_megabytes(len(corpus.training))}; tests and generated tables are left out of both."
        )

    def _sample(self) -> str:
        if self.sample is None:
            return ""
        text = printable(self.sample.prompt + self.sample.continuation)
        how = f"temperature {self.sample.temperature:g}, the {self.sample.top_k} likeliest bytes, seed {self.seed}"
        prompt = printable(self.sample.prompt)
        body = "\n".join(f"    {line}" for line in text.split("\n"))
        return f"## What it writes\n\nAfter `{prompt.strip()}` ({how}):\n\n{body}"

    def _comparison(self, pictures: Mapping[str, Path]) -> str:
        if not self.comparison or self.comparison_pattern is None:
            return ""
        pattern = self.comparison_pattern
        dtype = "bfloat16" if self.device.startswith("cuda") else "float32"
        size = f"{self.settings.comparison_heads} heads of {self.settings.comparison_head_dim}"
        how = (
            f"One causal forward pass, {size}, {dtype}, batch 1. Dilated: the paper's pattern, segments "
            f"{list(pattern.segment_lengths)}, rates {list(pattern.dilation_rates)}. Dense: torch's "
            "`scaled_dot_product_attention`. Times are medians of runs taken in turns (± interquartile range); memory "
            "is what is allocated beyond query, key and value, the output included."
        )
        caveat = (
            "Errors are the largest difference from the definition in float64 over its largest magnitude, dense then "
            "dilated, at a sample of rows in the same run; a size whose check fails reports no figures. Where the "
            "sequence is no longer than the shortest segment, every branch covers it anew and dilated attention costs "
            "more than dense: it is made for the long end."
        )
        columns = (
            "tokens",
            "dense (ms)",
            "dilated (ms)",
            "speed-up",
            "fewer operations",
            "dense (MiB)",
            "dilated (MiB)",
        )
        lines = ["## Dense against dilated attention", "", how, ""]
        lines += [f"| {' | '.join(columns)} | runs | errors |", "|---:" * 8 + "|---|"]
        lines += [_row(result) for result in self.comparison]
        lines += ["", caveat]
        if "comparison" in pictures:
            lines += ["", f"![time and memory against length]({pictures['comparison'].name})"]
        return "\n".join(lines)

    def _pattern(self, pictures: Mapping[str, Path]) -> str:
        pattern = DilatedPattern(self.settings.segment_lengths, self.settings.dilation_rates)
        share = pattern.density(self.settings.context, self.settings.num_heads)
        return (
            "## What the trained model attends to\n\n"
            f"Segments {list(pattern.segment_lengths)} with rates {list(pattern.dilation_rates)}: at "
            f"{self.settings.context:,} tokens it computes {share:.1%} of the pairs that dense attention would.\n\n"
            f"![which keys each row may reach]({pictures['pattern'].name})"
        )

    def _conditions(self) -> str:
        lines = ["## Conditions", ""]
        lines += [f"- {name}: {value}" for name, value in self.environment.items()]
        lines += [
            f"- seed: {self.seed} (weights, window order, sample; the number of steps follows from the machine's speed)"
        ]
        if self.precision is not None:
            taken = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.precision.seconds.items())
            lines.append(f"- training precision: {self.precision.name}, the fastest of: {taken} a step")
        if self.decision:
            lines.append(f"- attention, as the factory decided: {self.decision}")
        if self.stage_seconds:
            lines.append("- time: " + ", ".join(f"{name} {taken:.0f} s" for name, taken in self.stage_seconds.items()))
        command = str(self.environment["command"]).replace("__main__.py", "python -m dilated_factory")
        source = f"Raw data: [report.json](report.json). Command, from the repository's root: `{command}`."
        return "\n".join([*lines, "", source])


def redraw(record: Path, folder: Path) -> list[Path]:
    """Draw the pictures of a report.json again, into an existing folder; nothing is trained or measured."""
    recorded = json.loads(record.read_text(encoding="utf-8"))
    settings, training, baselines, held_out = (
        recorded[name] for name in ("settings", "training", "baselines", "held_out")
    )
    report = DemoReport(
        recorded["environment"],
        DemoSettings(**settings),
        recorded["seed"],
        recorded["device"],
        baselines=None if baselines is None else Baselines(**baselines),
        training=TrainingRecord(
            [Step(**step) for step in training["steps"]], [HeldOutCheck(**check) for check in training["checks"]]
        ),
        held_out=None if held_out is None else HeldOut(**held_out),
        comparison=[
            SizeResult(
                size["length"],
                {},
                {name: Measurement(**each) for name, each in size["measurements"].items()},
                size["skipped"],
            )
            for size in recorded["comparison"]["sizes"]
        ],
    )
    return list(report.draw(folder).values())


def printable(text: bytes) -> str:
    r"""Bytes a model wrote, for a terminal or a page: undecodable and control characters are replaced.

    >>> printable(b"a\tb\x1b[1m\xff")
    'a    b�[1m�'
    """
    decoded = text.decode("utf-8", errors="replace").expandtabs(4)
    return "".join(each if each == "\n" or each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in decoded)


def _row(result: SizeResult) -> str:
    errors = " / ".join(f"{check.error:.0e}" for check in result.checks.values())
    if not result.measurements:
        return f"| {result.length:,} | not measured: {result.skipped} | | | | | | | {errors} |"
    dense, dilated = result.measurements["dense"], result.measurements["dilated"]
    cells = [
        f"{result.length:,}",
        f"{1e3 * dense.median:,.1f} ± {dense.spread:.0%}",
        f"{1e3 * dilated.median:,.1f} ± {dilated.spread:.0%}",
        f"{result.speedup:.2f}×",
        f"{dense.flops / dilated.flops:.2f}×",
        f"{dense.peak_bytes / 2**20:,.1f}",
        f"{dilated.peak_bytes / 2**20:,.1f}",
        f"{len(dense.seconds)}",
        errors,
    ]
    return f"| {' | '.join(cells)} |"


def _size(result: SizeResult) -> dict[str, Any]:
    checks = {name: {**asdict(check), "passed": check.passed} for name, check in result.checks.items()}
    # JSON has no NaN: a check that ended in one failed, and its error is null.
    for check in checks.values():
        check["error"] = check["error"] if math.isfinite(check["error"]) else None
    return {
        "length": result.length,
        "checks": checks,
        "measurements": {name: asdict(each) for name, each in result.measurements.items()},
        "speedup": result.speedup if result.measurements else None,
        "skipped": result.skipped,
    }


def _corpus(corpus: Corpus, evaluated_bytes: int) -> dict[str, Any]:
    return {
        "root": corpus.root.name,
        "training_bytes": len(corpus.training),
        "held_out_bytes": len(corpus.held_out),
        "evaluated_bytes": evaluated_bytes,
        "training_files": list(corpus.training_files),
        "held_out_files": list(corpus.held_out_files),
    }


def _sample(sample: Sample) -> dict[str, Any]:
    return {
        "prompt": sample.prompt.decode("latin-1"),
        "continuation": sample.continuation.decode("latin-1"),
        "encoding": "latin-1: one character a byte",
        "temperature": sample.temperature,
        "top_k": sample.top_k,
    }


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
