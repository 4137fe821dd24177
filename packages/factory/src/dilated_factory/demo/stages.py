"""The demo from beginning to end: each stage adds to one report, which is written whatever stops the run.

The whole is given a number of seconds. Every stage but training has a share of them, and training takes what is
left; a slower machine reads less text and repeats less often, and ends in time all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from dilated_core import DilatedPattern, measure
from dilated_factory.cli.arguments import FAILED, INTERRUPTED, UnusableError
from dilated_factory.demo import training
from dilated_factory.demo.baselines import measure_baselines
from dilated_factory.demo.comparison import SizeResult, compare
from dilated_factory.demo.corpus import load_corpus
from dilated_factory.demo.report import DemoReport, HeldOut, Sample, printable
from dilated_factory.demo.screen import Screen
from dilated_factory.demo.settings import FULL, QUICK, DemoSettings
from dilated_factory.demo.training import TrainingRecord, Windows
from dilated_factory.hardware.device import usable_device
from dilated_factory.models import DilatedTransformerDecoderLayer, LongNetLM

SAMPLE_PROMPT = b"def read_lines(path):\n"
SAMPLE_TEMPERATURE = 0.7
SAMPLE_TOP_K = 40
SAMPLE_CHUNK = 16
"""Bytes generated between two looks at the clock."""

FEWEST_WINDOWS = 4
"""Held-out windows that are evaluated even where there is no time for more."""


def run_stages(
    output: Path,
    *,
    quick: bool = False,
    device_name: str = "cpu",
    seed: int = 0,
    minutes: float | None = None,
    screen: Screen | None = None,
) -> int:
    """Run every stage and write the report into ``output``; see ``command.run`` for the exit status."""
    started = time.perf_counter()
    settings = QUICK if quick else FULL
    if minutes is not None:
        settings = replace(settings, minutes=minutes)
    device = _usable_device(device_name)
    _check_folder(output)
    screen = Screen() if screen is None else screen
    report = DemoReport(measure.environment(), settings, seed, str(device))
    run = _Run(report, screen, device, started)
    stages: list[tuple[str, Callable[[], None]]] = [
        ("reading", run.read),
        ("training", run.train),
        ("held-out text", run.evaluate),
        ("sample", run.sample),
        ("comparison", run.compare),
    ]
    screen.title(
        "dilated demo: a LongNet learns Python, and is weighed against dense attention",
        f"about {settings.minutes:g} minutes on {device}; Ctrl-C stops and keeps what was measured",
    )
    name = ""
    try:
        for name, stage in stages:
            stage_started = time.perf_counter()
            stage()
            report.stage_seconds[name] = time.perf_counter() - stage_started
    except KeyboardInterrupt:
        report.interrupted_in = name
    return _finish(report, screen, output, started)


class _Run:
    """The stages of one run, sharing a report, a clock, a model and its text."""

    model: LongNetLM
    training_text: Windows
    held_out_text: Windows

    def __init__(self, report: DemoReport, screen: Screen, device: torch.device, started: float) -> None:
        self.report = report
        self.settings = report.settings
        self.screen = screen
        self.device = device
        self.started = started
        self.total = report.settings.minutes * 60

    def read(self) -> None:
        """Text, model, precision, and the baselines on the bytes the model will be judged by."""
        report, settings = self.report, self.settings
        report.corpus = corpus = load_corpus()
        self.screen.stage("Text")
        self.screen.note(
            f"Python's standard library: {len(corpus.training) / 1e6:.1f} MB in {len(corpus.training_files)} files to "
            f"learn from; {len(corpus.held_out) / 1e6:.2f} MB in {len(corpus.held_out_files)} files held out"
        )
        self.training_text = Windows(corpus.training, settings.context, self.device)
        self.model = _create_model(settings, self.device, report.seed)
        report.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        first = self.model.layers[0]
        assert isinstance(first, DilatedTransformerDecoderLayer)
        report.decision = first.self_attn.decision.summary()
        report.precision, forward_seconds = training.choose_precision(
            lambda: _create_model(settings, self.device, report.seed), self.training_text, settings, self.device
        )

        available = len(corpus.held_out) // settings.context
        affordable = int(settings.held_out_share * self.total / forward_seconds)
        count = min(available, max(FEWEST_WINDOWS, affordable))
        spread = [available * index // count * settings.context for index in range(count)]
        text = b"".join(corpus.held_out[start : start + settings.context] for start in spread)
        report.evaluated_bytes = len(text)
        self.held_out_text = Windows(text, settings.context, self.device)
        primed = len(corpus.training) if settings.prime_xz else 0
        report.baselines = known = measure_baselines(corpus.training, text, primed_bytes=primed)
        self.screen.note(
            f"bits per byte to compare with, on {len(text) / 1e6:.2f} MB of the latter: byte unigram "
            f"{known.unigram:.2f}, gzip {known.gzip:.2f}, xz {known.xz:.2f}"
        )

    def train(self) -> None:
        """Train for the time that the other stages leave."""
        report, settings = self.report, self.settings
        assert report.precision is not None
        later = settings.held_out_share + settings.sample_share + settings.comparison_share + settings.writing_share
        seconds = max(self._left() - later * self.total, settings.least_training_share * self.total)
        self.screen.stage("Training")
        self.screen.note(
            f"LongNetLM, {report.parameters:,} parameters, {settings.context:,} bytes of context, segments "
            f"{list(settings.segment_lengths)}, rates {list(settings.dilation_rates)}, {report.precision.name}"
        )
        self.screen.note(report.decision)
        with self.screen.bar("training", seconds) as bar:
            training.train(
                self.model,
                self.training_text,
                self.held_out_text,
                settings,
                report.precision,
                seconds,
                report.seed,
                report.training,
                lambda record: bar(record.steps[-1].seconds, _progress(record)),
            )

    def _left(self) -> float:
        """Seconds of the whole that are not spent."""
        return self.total - (time.perf_counter() - self.started)

    def evaluate(self) -> None:
        """The model on the whole held-out text."""
        report = self.report
        assert report.precision is not None
        windows = report.evaluated_bytes // self.settings.context
        done = 0
        with self.screen.bar("held-out text", windows) as bar:

            def count() -> None:
                nonlocal done
                done += 1
                bar(done, f"{done} of {windows} windows")

            bits = training.evaluate(self.model, self.held_out_text, report.precision, on_window=count)
        report.held_out = HeldOut(bits, windows, report.evaluated_bytes)
        rows = [(name, f"{value:.3f}", what) for name, value, what in report.predictors()]
        header = ("predictor of the held-out text", "bits per byte", "what it knew")
        self.screen.table(header, rows, words=(0, 2), emphasised="this LongNet")
        self.screen.note(report.verdict())

    def sample(self) -> None:
        """A continuation, as long as its share of time allows."""
        report, settings = self.report, self.settings
        deadline = time.perf_counter() + settings.sample_share * self.total
        generator = torch.Generator(self.device).manual_seed(report.seed)
        start = bytes([training.START_BYTE]) + SAMPLE_PROMPT
        tokens = torch.tensor([list(start)], device=self.device)
        longest = len(start) + settings.sample_bytes
        while tokens.shape[1] < longest and time.perf_counter() < deadline:
            tokens = self.model.generate(
                tokens,
                min(SAMPLE_CHUNK, longest - tokens.shape[1]),
                temperature=SAMPLE_TEMPERATURE,
                top_k=SAMPLE_TOP_K,
                generator=generator,
            )
        written = bytes(tokens[0, len(start) :].tolist())
        report.sample = Sample(SAMPLE_PROMPT, written, SAMPLE_TEMPERATURE, SAMPLE_TOP_K)
        self.screen.stage("A sample")
        self.screen.quote(printable(SAMPLE_PROMPT + written).rstrip())

    def compare(self) -> None:
        """Dense and dilated attention by length."""
        report, settings = self.report, self.settings
        report.comparison_pattern = pattern = DilatedPattern.longnet()
        self.screen.stage("Dense against dilated attention")
        self.screen.note(
            f"the paper's pattern, causal, {settings.comparison_heads} heads of {settings.comparison_head_dim}; every "
            "size is checked against the definition in float64 before it is timed"
        )
        # Half of its share at least: a late run still has something to show.
        share = settings.comparison_share * self.total
        seconds = max(self._left() - settings.writing_share * self.total, share / 2)
        lengths = settings.comparison_lengths
        with self.screen.bar("comparison", len(lengths)) as bar:
            results = compare(
                pattern,
                lengths,
                settings.comparison_heads,
                settings.comparison_head_dim,
                self.device,
                seconds,
                report.seed,
                lambda length, what: bar(lengths.index(length), f"{length:,} tokens: {what}"),
            )
            for result in results:
                report.comparison.append(result)
                bar(len(report.comparison), f"{result.length:,} tokens: done")
        header = ("tokens", "dense", "dilated", "speed-up", "dense memory", "dilated memory", "runs", "check")
        self.screen.table(header, [_comparison_row(result) for result in report.comparison])


def _finish(report: DemoReport, screen: Screen, output: Path, started: float) -> int:
    files = report.write(output)
    if report.interrupted_in is not None:
        screen.note(f"\nInterrupted in the stage “{report.interrupted_in}”; what was measured before it is written.")
    screen.note(f"\n{time.perf_counter() - started:.0f} s in all. Written: {', '.join(str(path) for path in files)}")
    if report.interrupted_in is not None:
        return INTERRUPTED
    wrong = [result.length for result in report.comparison if not all(check.passed for check in result.checks.values())]
    if wrong:
        screen.note(f"FAILED: outputs differ from the definition at {wrong} tokens")
    assert report.held_out is not None
    assert report.baselines is not None
    learnt = report.held_out.bits_per_byte < report.baselines.unigram
    if not learnt:
        screen.note("FAILED: the model predicts no better than byte frequencies; it had too little time, see --minutes")
    return FAILED if wrong or not learnt else 0


def _create_model(settings: DemoSettings, device: torch.device, seed: int) -> LongNetLM:
    torch.manual_seed(seed)
    return LongNetLM(
        training.BYTE_VALUES,
        settings.embed_dim,
        settings.num_heads,
        settings.num_layers,
        settings.segment_lengths,
        settings.dilation_rates,
        sequence_length=settings.context,
        device=device,
    )


def _usable_device(name: str) -> torch.device:
    try:
        return usable_device(name)
    except (TypeError, ValueError) as error:
        raise UnusableError(str(error)) from error


def _check_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnusableError(f"output: expected a folder that can be written to, got {output}: {error}") from error


def _progress(record: TrainingRecord) -> str:
    words = f"{record.recent_bits():.2f} bits/byte"
    if len(record.steps) > 1:
        words += f"  {record.bytes_per_second():,.0f} tokens/s"
    if record.checks:
        words += f"  held out {record.checks[-1].bits_per_byte:.2f}"
    return words


def _comparison_row(result: SizeResult) -> tuple[str, ...]:
    verdict = "–"
    if result.checks:
        verdict = "passed" if all(check.passed for check in result.checks.values()) else "FAILED"
    if not result.measurements:
        return (f"{result.length:,}", result.skipped, "", "", "", "", "", verdict)
    dense, dilated = result.measurements["dense"], result.measurements["dilated"]
    return (
        f"{result.length:,}",
        f"{1e3 * dense.median:,.0f} ms ± {dense.spread:.0%}",
        f"{1e3 * dilated.median:,.0f} ms ± {dilated.spread:.0%}",
        f"{result.speedup:.2f}×",
        f"{dense.peak_bytes / 2**20:,.0f} MiB",
        f"{dilated.peak_bytes / 2**20:,.0f} MiB",
        f"{len(dense.seconds)}",
        verdict,
    )
