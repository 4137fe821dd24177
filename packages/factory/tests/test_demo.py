"""The demo: its corpus, its baselines, its clock, and one quick run from end to end."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import lzma
import math
import struct
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from dilated_core import DilatedPattern
from dilated_factory.demo import command, comparison, stages, training
from dilated_factory.demo.baselines import measure_baselines, unigram_bits
from dilated_factory.demo.comparison import Check, compare
from dilated_factory.demo.corpus import is_held_out, load_corpus
from dilated_factory.demo.report import DemoReport
from dilated_factory.demo.screen import Screen
from dilated_factory.demo.settings import FULL, QUICK
from dilated_factory.demo.training import HeldOutCheck, Precision, Step, TrainingRecord, Windows
from dilated_factory.models import LongNetLM

CPU = torch.device("cpu")
DAY = 86_400.0  # seconds that no test takes


def silent_screen() -> tuple[Screen, io.StringIO]:
    output = io.StringIO()
    return Screen(Console(file=output, force_terminal=False, width=110)), output


# ------------------------------------------------------------------------------------------- text


def test_no_module_is_on_both_sides_of_the_split() -> None:
    corpus = load_corpus()
    learnt, held_out = (
        {name.split("/")[0] for name in files} for files in (corpus.training_files, corpus.held_out_files)
    )
    assert learnt
    assert held_out
    assert not learnt & held_out
    assert all(is_held_out(module) for module in held_out)
    assert len(corpus.held_out) >= stages.FEWEST_WINDOWS * FULL.context
    assert not any("test" in name.split("/")[:-1] for name in (*corpus.training_files, *corpus.held_out_files))


def test_the_corpus_is_whole_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "site-packages").mkdir()
    texts = {"argparse.py": b"A", "package/b.py": b"B", "package/a.py": b"a", "random.py": b"R"}
    for name, text in {**texts, "package/site-packages/no.py": b"!", "notes.txt": b"!"}.items():
        (tmp_path / name).write_bytes(text)
    corpus = load_corpus(tmp_path)
    assert not is_held_out("package")
    assert (corpus.training, corpus.training_files) == (b"AaB", ("argparse.py", "package/a.py", "package/b.py"))
    assert (corpus.held_out, corpus.held_out_files) == (b"R", ("random.py",))


def test_no_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Python sources"):
        load_corpus(tmp_path)


def test_windows_begin_with_the_start_byte_and_predict_every_byte() -> None:
    windows = Windows(bytes(range(1, 11)), 4, CPU)
    inputs, targets = windows.at(3)
    assert inputs.tolist() == [[0, 4, 5, 6]]
    assert targets.tolist() == [[4, 5, 6, 7]]
    drawn = [windows.draw(3, torch.Generator().manual_seed(seed))[1].tolist()[0] for seed in range(60)]
    assert {each[0] for each in drawn} == set(range(1, 9))
    assert all(each == list(range(each[0], each[0] + 3)) for each in drawn)
    with pytest.raises(ValueError, match="at least one window of 11 bytes, got 10"):
        Windows(bytes(10), 11, CPU)


# ------------------------------------------------------------------------------------------- baselines


def test_unigram_is_exact_on_a_small_text() -> None:
    # Of "aab", with one added to each of 256 counts: p(a) = 3/259, p(b) = 2/259, p(any other) = 1/259.
    expected = 2 * math.log2(259 / 3) + math.log2(259 / 2) + math.log2(259)
    assert math.isclose(unigram_bits(b"aab", b"abac"), expected, rel_tol=1e-12)


def test_compressors_are_counted_whole() -> None:
    text, primer = b"def f(x):\n    return x\n" * 40, b"def f(x):\n    return x\n" * 3
    found = measure_baselines(primer, text, primed_bytes=len(primer))
    assert found.gzip == 8 * len(gzip.compress(text, 9)) / len(text)
    assert found.xz == 8 * len(lzma.compress(text)) / len(text)
    assert found.primed_bytes == len(primer)
    assert found.xz_primed is not None
    assert 0 <= found.xz_primed < found.xz
    assert found.deflate_primed < found.gzip
    assert measure_baselines(primer, text, primed_bytes=0).xz_primed is None
    with pytest.raises(ValueError, match="text: expected at least one byte"):
        measure_baselines(primer, b"", primed_bytes=0)


# ------------------------------------------------------------------------------------------- training


def test_learning_rate_rises_then_falls() -> None:
    settings = replace(FULL, warm_up=0.1, peak_learning_rate=1.0)
    rates = [training.learning_rate(progress, settings) for progress in (0.0, 0.05, 0.1, 0.55, 1.0, 1.2)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0, 0.0])


def test_window_lengths_grow_to_the_context() -> None:
    lengths = [training.window_length(step / 100, FULL) for step in range(101)]
    assert lengths == sorted(lengths)
    assert lengths[-1] == FULL.context


def test_evaluation_of_an_untrained_uniform_model_is_8_bits() -> None:
    model = LongNetLM(256, 16, 2, 1, [64], [1])
    torch.nn.init.zeros_(model.output_projection.weight)
    windows = Windows(bytes(1000), 100, CPU)
    bits = training.evaluate(model, windows, Precision("float32", {}, "cpu"))
    assert bits == pytest.approx(8.0, abs=1e-6)
    assert model.training


def test_speed_and_loss_of_an_empty_record_are_unknown() -> None:
    record = TrainingRecord()
    assert math.isnan(record.recent_bits())
    assert math.isnan(record.bytes_per_second())
    record.steps += [Step(1.0, 100, 3.0, 0.1), Step(2.0, 300, 2.0, 0.1)]
    assert (record.recent_bits(), record.bytes_per_second()) == (2.5, 200.0)


# ------------------------------------------------------------------------------------------- comparison


def test_compare_checks_before_it_measures() -> None:
    pattern = DilatedPattern([64, 256], [1, 2])
    results = list(compare(pattern, [64, 200], 2, 8, CPU, DAY, seed=0))
    assert [result.length for result in results] == [64, 200]
    for result in results:
        assert all(check.passed and check.rows == comparison.CHECKED_ROWS for check in result.checks.values())
        assert set(result.measurements) == {"dense", "dilated"}
        for measurement in result.measurements.values():
            assert len(measurement.seconds) >= 1
            assert measurement.peak_bytes >= result.length * 2 * 8 * 4  # the output at least
            assert measurement.flops == pytest.approx(4 * 8 * 2 * result.length * (result.length + 1) / 2, rel=0.6)


def test_a_wrong_output_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    right = comparison.dilated_attention
    monkeypatch.setattr(comparison, "dilated_attention", lambda *args, **options: right(*args, **options) * 1.001)
    (result,) = compare(DilatedPattern([64], [1]), [64], 2, 8, CPU, DAY, seed=0)
    assert result.checks["dense"].passed
    assert not result.checks["dilated"].passed
    assert not result.measurements
    assert "differs from the definition" in result.skipped


def test_a_length_without_time_is_skipped_and_says_so() -> None:
    # On any machine: a round of 64 tokens takes less than minutes, and more than a microsecond.
    short, long = compare(DilatedPattern([64], [1]), [64, 2**20], 2, 8, CPU, 600.0, seed=0)
    assert short.measurements
    assert not long.measurements
    assert "s were left" in long.skipped


def test_nan_fails_a_check() -> None:
    assert not Check(math.nan, 1.0, 3).passed


# ------------------------------------------------------------------------------------------- whole runs


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def written(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    json.dumps(report, allow_nan=False)
    return report


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a quarter of a second after the one before: so many steps on any machine."""
    looks = count()
    steady = SimpleNamespace(perf_counter=lambda: 0.25 * next(looks))
    for module in (stages, training, comparison):
        monkeypatch.setattr(module, "time", steady)


@pytest.mark.slow
@pytest.mark.usefixtures("clock")
def test_quick_run_from_end_to_end(tmp_path: Path) -> None:
    screen, output = silent_screen()
    status = stages.run_stages(tmp_path / "new" / "folder", quick=True, seed=3, screen=screen)
    folder = tmp_path / "new" / "folder"
    report = written(folder)
    assert status == 0, output.getvalue()
    assert report["complete"]
    assert report["interrupted_in"] is None
    assert report["seed"] == 3
    assert report["settings"]["context"] == 8192
    assert {"python", "torch", "processor", "threads", "date"} <= set(report["environment"])
    assert set(report["stage_seconds"]) == {"reading", "training", "held-out text", "sample", "comparison"}

    losses = [step["bits_per_byte"] for step in report["training"]["steps"]]
    assert losses[0] > 7
    assert min(losses[-5:]) < losses[0] - 2
    assert report["held_out"]["bits_per_byte"] < report["baselines"]["unigram"]
    assert report["held_out"]["text_bytes"] == report["corpus"]["evaluated_bytes"]
    assert not set(report["corpus"]["training_files"]) & set(report["corpus"]["held_out_files"])

    sizes = report["comparison"]["sizes"]
    assert [size["length"] for size in sizes] == list(QUICK.comparison_lengths)
    measured = [size for size in sizes if size["measurements"]]
    assert [size["length"] for size in measured] == [2048], "there is no time left for more, by this clock"
    assert all("s were left" in size["skipped"] for size in sizes[1:])
    for size in measured:
        assert all(check["passed"] for check in size["checks"].values())
        assert size["speedup"] > 0
        for measurement in size["measurements"].values():
            assert len(measurement["seconds"]) >= 1

    for name in ("learning.png", "comparison.png", "pattern.png"):
        width, height = png_size(folder / name)
        assert width > 1000
        assert height > 500
    text = (folder / "report.md").read_text()
    for name in ("learning.png", "comparison.png", "pattern.png", "byte unigram", "xz", "this LongNet"):
        assert name in text
    assert "\x1b" not in output.getvalue(), "no terminal, no escape codes"
    assert "bits/byte" in output.getvalue()


@pytest.mark.parametrize("stage", ["reading", "training", "comparison"])
def test_interruption_keeps_what_was_measured(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def train(run: stages._Run) -> None:
        run.report.training.steps.append(Step(1.0, 8192, 5.0, 0.1))
        run.report.training.checks.append(HeldOutCheck(1.0, 8192, 5.1))

    def train_then_interrupt(run: stages._Run) -> None:
        train(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(stages._Run, "read", interrupt if stage == "reading" else lambda run: None)
    monkeypatch.setattr(stages._Run, "train", train_then_interrupt if stage == "training" else train)
    monkeypatch.setattr(stages._Run, "evaluate", lambda run: None)
    monkeypatch.setattr(stages._Run, "sample", lambda run: None)
    monkeypatch.setattr(stages._Run, "compare", interrupt)
    screen, output = silent_screen()
    assert stages.run_stages(tmp_path, quick=True, screen=screen) == 130
    report = written(tmp_path)
    assert not report["complete"]
    assert report["interrupted_in"] == stage
    assert len(report["training"]["steps"]) == (0 if stage == "reading" else 1)
    assert (tmp_path / "learning.png").exists() == (stage != "reading")
    assert "Interrupted" in (tmp_path / "report.md").read_text()
    assert "Interrupted" in output.getvalue()


def test_ctrl_c_within_training_keeps_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = training.bits_per_byte
    calls = 0

    def interrupted_at_the_fourth(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(*args)

    text = Windows(bytes(range(32, 127)) * 20, 64, CPU)
    settings = replace(QUICK, context=64, length_warm_up=())
    record = TrainingRecord()
    monkeypatch.setattr(training, "bits_per_byte", interrupted_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        training.train(
            LongNetLM(256, 16, 2, 1, [64], [1]),
            text,
            text,
            replace(settings, held_out_checks=1),
            Precision("float32", {}, "cpu"),
            DAY,
            0,
            record,
            lambda _: None,
        )
    assert len(record.steps) == 3
    assert (
        DemoReport({"cuda": []}, settings, 0, "cpu", training=record).as_dict()["training"]["steps"][2]["bytes_read"]
        == 192
    )


# ------------------------------------------------------------------------------------------- arguments


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dilated demo")
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_defaults() -> None:
    arguments = parsed()
    assert (arguments.output, arguments.quick, arguments.device) == (Path("demo-report"), False, "cpu")
    assert (arguments.seed, arguments.minutes) == (0, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "--minutes: expected a positive number of minutes, got '0'"),
        (["--minutes", "nan"], "--minutes: expected a positive number of minutes, got 'nan'"),
        (["--minutes", "soon"], "--minutes: expected a positive number of minutes, got 'soon'"),
        (["--seed", "-1"], "--seed: expected a whole number from 0"),
        (["--seed", "1.5"], "--seed: expected a whole number from 0"),
    ],
)
def test_wrong_arguments_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed(*words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu9", "device: expected cpu or cuda[:index], got 'gpu9'"),
        ("meta", "device: expected cpu or cuda[:index], got 'meta'"),
        ("cuda", "sees 0 CUDA devices"),
    ],
)
def test_a_device_that_cannot_be_used_is_an_error_before_any_work(
    device: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert command.run(parsed("--device", device, "--output", str(tmp_path / "none"))) == 2
    assert message in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert command.run(parsed("--output", str(tmp_path / "file" / "report"))) == 2
    assert "output: expected a folder" in capsys.readouterr().out
