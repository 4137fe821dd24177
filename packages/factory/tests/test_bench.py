"""`dilated bench`: its rules, its gate, what it keeps, and every report from end to end in tiny sizes."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dilated_core
import dilated_factory
import dilated_memory_pool
import dilated_pattern_cache
from dilated_factory.bench import auto_enable, claims, command, journal, pattern_cache, run, session, writing
from dilated_factory.bench.cases import compared, row
from dilated_factory.bench.journal import Journal
from dilated_factory.bench.measuring import Candidate, Expected, Measured, measured
from dilated_factory.bench.results import Check, Results, Row, Table
from dilated_factory.bench.settings import FULL, QUICK, BenchSettings
from dilated_factory.bench.subjects import Bench
from dilated_factory.cli import main
from dilated_factory.demo.screen import Bar, Screen

CPU = torch.device("cpu")
TINY = BenchSettings(
    heads=2,
    head_dim=8,
    longest=1024,
    ring_tokens=64,
    longest_dense=512,
    buffer_mebibytes=(1, 2),
    checked_rows=4,
    lookups=2,
    fewest=1,
    most=1,
    seconds=3600.0,  # each is measured once, which takes seconds: nothing is left out on a machine however slow
)


class SilentScreen(Screen):
    """Writes to memory, and calls `act` with the words of every step of a bar."""

    def __init__(self, act: Any = lambda words: None) -> None:
        rich = pytest.importorskip("rich.console")
        pytest.importorskip("matplotlib")
        self.output, self.act = io.StringIO(), act
        super().__init__(rich.Console(file=self.output, force_terminal=False, width=200))

    @contextmanager
    def bar(self, name: str, total: float) -> Iterator[Bar]:
        yield lambda done, words: self.act(words)

    @property
    def text(self) -> str:
        return " ".join(self.output.getvalue().split())


def tiny(folder: Path, *reports: str, screen: SilentScreen | None = None, **options: Any) -> Results:
    return run(
        reports or None, output=folder, settings=TINY, screen=SilentScreen() if screen is None else screen, **options
    )


# ------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("claimed", "ours", "noise", "verdict"),
    [
        (1.72, 1.72, 0.02, "reproduced"),
        (1.72, 1.72 * 1.2, 0.02, "reproduced"),
        (1.72, 1.72 * 1.21, 0.02, "direction only"),
        (1.72, 1.03, 0.02, "direction only"),
        (1.72, 1.03, 0.05, "not reproduced"),
        (1.03, 1.0, 0.02, "not reproduced"),
        (1.03, 0.9, 0.02, "not reproduced"),
        (0.57, 0.5, 0.02, "reproduced"),
        (0.57, 0.9, 0.02, "direction only"),
        (0.57, 1.3, 0.02, "not reproduced"),
        (1.0, 1.01, 0.02, "reproduced"),
        (1.0, 1.1, 0.02, "not reproduced"),
    ],
)
def test_a_ratio_is_reproduced_on_its_side_of_one_and_within_a_fifth(
    claimed: float, ours: float, noise: float, verdict: str
) -> None:
    assert claims.ratio("speed", claimed, ours, noise=noise).verdict == verdict


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (1.7, "reproduced"),
        (2.8, "reproduced"),
        (2.9, "direction only"),
        (1.1, "direction only"),
        (1.0, "not reproduced"),
    ],
)
def test_a_range_is_reproduced_by_what_lies_in_it(ours: float, verdict: str) -> None:
    assert claims.memory_within(1.7, 2.8, ours, "70 to 180 % more").verdict == verdict


@pytest.mark.parametrize(
    ("claimed", "ours", "verdict"),
    [
        (-8.0, -9.5, "reproduced"),
        (-8.0, -20.0, "direction only"),
        (-8.0, -0.5, "not reproduced"),
        (-8.0, 9.0, "not reproduced"),
        (0.0, 0.9, "reproduced"),
        (0.0, -3.0, "not reproduced"),
    ],
)
def test_a_change_in_memory_goes_by_its_sign_and_a_fifth(claimed: float, ours: float, verdict: str) -> None:
    assert claims.change("peak memory", claimed, ours, 100.0).verdict == verdict


def test_noise_is_half_the_sum_of_the_spreads_and_more_with_few_rounds() -> None:
    from dilated_core.measure import Timing

    steady, wild = Measured(timing=Timing((1.0,) * 5)), Measured(timing=Timing((1.0, 1.0, 2.0, 3.0, 3.0)))
    few = Measured(timing=Timing((1.0,) * 4))
    assert steady.speed_against(steady) == (1.0, 0.02)
    assert wild.speed_against(steady) == (0.5, 0.5)
    assert few.speed_against(steady) == (1.0, 0.1)
    assert steady.speed_against(Measured(why="wrong")) is None


# ------------------------------------------------------------------------------------------- the gate


def problem() -> tuple[Tensor, Expected]:
    right = torch.arange(12.0).view(1, 12, 1, 1)
    rows = torch.tensor([0, 5, 11])
    return right, Expected(right[:, rows].double(), "a formula", 1e-5, rows)


def test_what_is_right_has_figures() -> None:
    right, expected = problem()
    found = measured({"right": Candidate(right.clone, expected.check)}, replace(TINY, fewest=3, most=3), CPU, 1.0)
    one = found["right"]
    assert one.check == Check(0.0, 1e-5, "a formula")
    assert len(one.seconds) == 3
    assert one.peak_bytes == 48
    assert not one.why


def test_what_is_wrong_has_no_figure_and_the_others_go_on() -> None:
    right, expected = problem()
    calls: list[int] = []

    def wrong() -> Tensor:
        calls.append(1)
        return right + 1.0

    def nan() -> Tensor:
        return right * float("nan")

    def raises() -> Tensor:
        raise MemoryError("no room\nand more")

    def short() -> Tensor:
        return right[..., :0]

    runs = {"right": right.clone, "wrong": wrong, "nan": nan, "raises": raises, "short": short}
    found = measured({name: Candidate(one, expected.check) for name, one in runs.items()}, TINY, CPU, 1.0)
    assert found["right"].seconds
    assert len(calls) == 1, "it was neither weighed nor timed"
    for name in ("wrong", "nan", "raises", "short"):
        assert not found[name].seconds
        assert found[name].peak_bytes is None
    assert "differs from a formula by 9.1e-02, allowed are 1e-05" in found["wrong"].why
    assert "by no number" in found["nan"].why
    assert found["raises"].why == "MemoryError: no room"
    assert "another shape, (1, 3, 1, 0)" in found["short"].why

    made = row("r", "t", "c", "wrong", found["wrong"], comparisons=compared(found["right"], found["right"]))
    assert made.failed
    assert (made.seconds, made.peak_bytes, made.comparisons) == ((), None, ())
    assert compared(found["wrong"], found["right"]) == []


def test_what_goes_wrong_while_it_is_timed_loses_its_figures() -> None:
    right, expected = problem()
    calls: list[int] = []

    def wears_out() -> Tensor:
        calls.append(1)
        return right + (len(calls) > 3)

    found = measured({"it": Candidate(wears_out, expected.check)}, TINY, CPU, 1.0)["it"]
    assert len(calls) == 4, "checked, weighed, timed, checked again"
    assert found.why.startswith("after it was timed: its output differs")
    assert not found.seconds


def test_a_wrong_pattern_is_noticed() -> None:
    size = pattern_cache.Size(12, (4, 8), (1, 2), 1.0)
    indices = ((torch.arange(12),), (torch.arange(0, 12, 2), torch.arange(1, 12, 2)))
    assert pattern_cache._right_indices(size, 2, indices).passed
    assert not pattern_cache._right_indices(size, 2, (indices[0], indices[1][::-1])).passed


# ------------------------------------------------------------------------------------------- every report


def test_the_policy_takes_the_pool_that_the_specification_says_at_every_length() -> None:
    bench = Bench(replace(TINY, heads=1, longest=8192), CPU)
    cases = [case for case in auto_enable.cases(bench) if case.name.startswith("verification")]
    rows = [one for case in cases for one in case.measure(bench, 1.0)]
    assert [one.name for one in rows] == ["512 tokens", "2,048 tokens", "4,096 tokens", "8,192 tokens"]
    assert [one.comparisons[0].ours for one in rows] == ["off", "off", "lightweight", "full"]
    assert all(one.check is not None and one.check.passed for one in rows)
    assert all(one.comparisons[0].verdict == "reproduced" for one in rows)


@pytest.mark.slow
def test_every_report_runs_and_is_written(tmp_path: Path) -> None:
    results = tiny(tmp_path)
    assert not results.failed
    assert not results.left_out
    for name, (title, tables) in results.reports.items():
        assert f'## "{title}"' in (tmp_path / "report.md").read_text()
        for table in tables:
            rows = results.rows_of(name, table.name)
            assert rows, f"{name}: {table.title}"
            assert all(one.why or one.seconds or one.peak_bytes or one.comparisons or one.facts for one in rows)
            assert all(one.check is not None and one.check.passed for one in rows if one.seconds)
            assert {one.of for one in rows if one.case == rows[0].case} == {
                sum(other.case == rows[0].case for other in results.rows_of(name))
            }
    # What runs anywhere has figures; longer sequences are listed, and say why they are not run.
    named = {(one.report, one.name): one for one in results.rows}
    assert named["auto-enable", "improved, 512 tokens, policy"].seconds
    assert "longer than the 1,024 tokens" in named["auto-enable", "improved, 8,192 tokens"].why
    assert named["stages", "Phase 1.3 (FA3)"].why.startswith("not run: ")
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["auto-enable.png", "pattern-cache.png", "pool-modes.png", *pictures[3:]]
    assert "stages.png" in pictures

    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["complete"]
    assert kept["settings"] == TINY.as_dict()
    again = []
    for values in kept["rows"]:
        values.pop("median"), values.pop("spread")
        again.append(Row.from_dict(values))
    assert again == results.rows
    assert writing.as_dict(results) == json.loads((tmp_path / "report.json").read_text())


def test_cache_statistics_are_those_of_the_cache(tmp_path: Path) -> None:
    bench = Bench(replace(TINY, longest=8192), CPU)
    [case] = [case for case in pattern_cache.cases(bench) if case.name == "statistics"]
    ours = {one.name: one.comparisons[0].ours for one in case.measure(bench, 1.0)}
    assert ours["hit rate after warm-up"] == "100%"
    assert ours["patterns kept"] == "3"
    assert ours["evictions"] == "0"


@pytest.mark.slow
def test_packages_that_are_missing_are_named_with_their_extra(tmp_path: Path) -> None:
    drawing = (pytest.importorskip("rich"), pytest.importorskip("matplotlib"))
    needed = (dilated_core, dilated_factory, dilated_memory_pool, dilated_pattern_cache, *drawing)
    folders = [str(Path(str(package.__file__)).parents[1]) for package in needed]
    script = f"""
import importlib.util, sys
if importlib.util.find_spec("dilated_ring") or importlib.util.find_spec("dilated_block_sparse"):
    sys.exit(7)
from dilated_factory.bench import run
from dilated_factory.bench.settings import BenchSettings
settings = BenchSettings(**{asdict(TINY)!r})
run(["auto-enable", "ring-sizes"], output={str(tmp_path)!r}, settings=settings)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=120, check=False)
    if ran.returncode == 7:
        pytest.skip("they are installed beside this distribution")
    assert ran.returncode == 0, ran.stderr.decode()
    listed = json.loads((tmp_path / "report.json").read_text())["rows"]
    rows = {one["name"]: one for one in reversed(listed)}
    assert 'pip install "dilated-factory[ring]"' in rows["ring, 512 tokens"]["why"]
    assert 'pip install "dilated-factory[block-sparse]"' in rows["block_sparse, 1,024 tokens"]["why"]
    assert 'pip install "dilated-factory[ring]"' in rows["ring and streamed, 1 to 16"]["why"]
    assert rows["improved, 512 tokens, policy"]["seconds"]


@pytest.mark.parametrize("module", ["rich", "matplotlib"])
def test_without_the_extra_the_call_says_what_to_install(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module}.*, not installed: pip install "dilated-factory\[bench\]"'):
        run(output=tmp_path / "none", settings=TINY)
    assert not (tmp_path / "none").exists()
    assert main(["bench", "--output", str(tmp_path / "none")]) == 1


# ------------------------------------------------------------------------------------------- going on


def make_rows(case: str, count: int) -> list[Row]:
    return [Row("stages", "t", case, f"row {index}", of=count, seconds=(0.5, 0.25)) for index in range(count)]


def test_a_journal_goes_on_with_whole_cases_only(tmp_path: Path) -> None:
    first = Journal(tmp_path, {"torch": "2", "settings": {"sizes": (1, 2)}})
    first.add(make_rows("a", 2))
    first.add(make_rows("b", 2))
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text()[:-30])  # cut off in the middle of the last line
    second = Journal(tmp_path, {"torch": "2", "settings": {"sizes": (1, 2)}})
    assert second.started == "resumed"
    assert second.rows == make_rows("a", 2)
    assert second.has("stages", "a")
    assert not second.has("stages", "b")
    second.add(make_rows("b", 2))
    assert Journal(tmp_path, {"torch": "2", "settings": {"sizes": (1, 2)}}).rows == make_rows("a", 2) + make_rows(
        "b", 2
    )


@pytest.mark.parametrize("change", [{"torch": "3"}, {"settings": {"sizes": [1]}}, {"device": "cuda"}])
def test_another_version_machine_or_setting_starts_anew_and_says_so(change: dict[str, Any], tmp_path: Path) -> None:
    identity = {"torch": "2", "settings": {"sizes": [1, 2]}}
    Journal(tmp_path, identity).add(make_rows("a", 1))
    other = Journal(tmp_path, identity | change)
    assert (other.started, other.differs, other.rows) == ("anew", list(change), [])
    assert "row 0" in (tmp_path / journal.PREVIOUS).read_text()


def test_the_digest_of_the_sources_is_steady() -> None:
    assert journal.code_digest() == journal.code_digest()
    assert len(journal.code_digest()) == 16


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    SilentScreen()  # skips where it cannot be made
    script = f"""
import os, signal
from contextlib import contextmanager
from dilated_factory.bench import run
from dilated_factory.bench.settings import BenchSettings
from dilated_factory.demo.screen import Screen
def die(done, words):
    if words == "look-up, Large: timing":
        os.kill(os.getpid(), signal.SIGKILL)
class Deadly(Screen):
    @contextmanager
    def bar(self, name, total):
        yield die
settings = BenchSettings(**{asdict(TINY)!r})
run(["pattern-cache"], output={str(tmp_path)!r}, settings=settings, screen=Deadly())
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120, check=False)
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
    before = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()[1:]]
    assert {one["case"] for one in before} == {"look-up, Small", "look-up, Medium"}

    screen = SilentScreen()
    results = tiny(tmp_path, "pattern-cache", screen=screen)
    assert "going on with 4 rows" in screen.text
    assert "2 of 12 cases were measured before" in screen.text
    after = {(one.case, one.name): one for one in results.rows}
    assert len(after) == len(results.rows), "none was measured twice"
    for one in before:
        assert after[one["case"], one["name"]].seconds == tuple(one["seconds"])
    assert {"look-up, Large", "statistics"} <= {one.case for one in results.rows}

    words: list[str] = []
    tiny(tmp_path, "pattern-cache", screen=SilentScreen(words.append), resume=True)
    assert not words, "everything was there"


def test_ctrl_c_keeps_what_was_measured_and_says_how_to_go_on(tmp_path: Path) -> None:
    def interrupt(words: str) -> None:
        if words == "look-up, Medium: timing":
            signal.raise_signal(signal.SIGINT)

    screen = SilentScreen(interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny(tmp_path, "pattern-cache", screen=screen)
    assert f"interrupted; the same command with --output {tmp_path} goes on where it was" in screen.text
    kept = json.loads((tmp_path / "report.json").read_text())
    assert (kept["interrupted"], kept["complete"], len(kept["rows"])) == (True, False, 2)
    assert "This run was interrupted" in (tmp_path / "report.md").read_text()


def test_cases_without_time_are_left_out_and_named_and_measured_later(tmp_path: Path) -> None:
    screen = SilentScreen()
    results = tiny(tmp_path, "pattern-cache", screen=screen, seconds=1e-6)
    assert len(results.left_out) == 12
    assert "no time was left for 12 cases" in screen.text
    assert "pattern-cache: statistics" in (tmp_path / "report.md").read_text()
    assert not json.loads((tmp_path / "report.json").read_text())["complete"]
    assert not tiny(tmp_path, "pattern-cache", resume=True).left_out


# ------------------------------------------------------------------------------------------- pages


def test_a_page_shows_why_there_is_no_figure_and_escapes_bars() -> None:
    table = Table("t", "A table", "About it.", "a reason")
    results = Results(
        {"date": "now", "torch": "2", "processor": "p", "cpu_capability": "c", "cores": 1, "threads": 1, "command": ""},
        TINY.as_dict(),
        "cpu",
        {"stages": ("A report", [table])},
        rows=[
            Row("stages", "t", "a", "x | y", check=Check(None, 1e-5, "it"), why="its output differs"),
            Row(
                "stages",
                "t",
                "b",
                "z",
                check=Check(1e-7, 1e-5, "it"),
                seconds=(0.001, 0.002, 0.003),
                peak_bytes=2**20,
                comparisons=(claims.ratio("speed", 2.0, 2.1), claims.no_claim("memory", "1 MiB")),
            ),
        ],
    )
    page = writing.markdown(results, {})
    assert "| x \\| y | - | - | - | - | its output differs | - |" in page
    assert (
        "| z | 2 (50%) | 1.0 | 1e-07 | speed: 2.00x | speed: 2.10x<br>memory: 1 MiB | reproduced<br>no claim |" in page
    )
    assert "Claims: 1 reproduced." in page
    assert "Why: a reason" in page
    assert results.failed == results.rows[:1]
    assert "![A report](stages.png)" in writing.markdown(results, {"stages": Path("any/stages.png")})


# ------------------------------------------------------------------------------------------- arguments


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dilated bench")
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_defaults() -> None:
    arguments = parsed()
    assert (arguments.reports, arguments.output, arguments.device) == ([], Path("bench-report"), "cpu")
    assert (arguments.quick, arguments.resume, arguments.fresh, arguments.seconds) == (False, False, False, None)
    assert FULL.seconds * len(command.NAMES) <= 15 * 60
    assert QUICK.seconds * len(command.NAMES) <= 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "0"], "--seconds: expected a positive number of seconds, got '0'"),
        (["--seconds", "inf"], "--seconds: expected a positive number of seconds, got 'inf'"),
        (["--resume", "--fresh"], "not allowed with argument"),
    ],
)
def test_wrong_arguments_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed(*words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["everything"], "reports: expected some of auto-enable, pool-modes"),
        (["--device", "gpu9"], "device: expected cpu or cuda[:index], got 'gpu9'"),
        (["--device", "meta"], "device: expected cpu or cuda[:index], got 'meta'"),
        (["--device", "cuda:99"], "device: expected a device that is here, got 'cuda:99'"),
        (["--resume"], "--resume: there are no rows in"),
    ],
)
def test_what_cannot_be_used_is_an_error_before_any_work(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SilentScreen()
    assert command.run(parsed("--output", str(tmp_path), *words)) == 2
    assert message in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SilentScreen()
    (tmp_path / "file").write_text("")
    assert command.run(parsed("--output", str(tmp_path / "file" / "report"))) == 2
    assert "output: expected a folder" in capsys.readouterr().out


def test_exit_codes_of_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    SilentScreen()
    monkeypatch.setattr(session, "QUICK", TINY)
    words = ["bench", "auto-enable", "--quick", "--output", str(tmp_path)]
    assert main(words) == 0
    assert "starting anew" not in capsys.readouterr().out
    assert main([*words, "--resume"]) == 0

    monkeypatch.setattr(session, "QUICK", replace(TINY, checked_rows=3))
    assert main([*words, "--resume"]) == 2
    assert "are of another run: settings differ" in " ".join(capsys.readouterr().out.split())

    # An output is never as exact as this, so each is wrong.
    monkeypatch.setattr(Bench, "tolerance", 0.0)
    assert main(words) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "starting anew: settings changed; the rows that were there are in rows.previous.jsonl" in shown
    assert "no figure: auto-enable, improved, 512 tokens, policy: its output differs" in shown
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert not any(one["seconds"] or one["comparisons"] for one in rows if one["check"])

    @contextmanager
    def interrupted(self: Screen, name: str, total: float) -> Iterator[Bar]:
        signal.raise_signal(signal.SIGINT)
        yield lambda done, words: None

    monkeypatch.setattr(Screen, "bar", interrupted)
    assert main([*words, "--fresh"]) == 130
    assert "starting anew: as was asked for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reports": "stages"}, TypeError, "reports: expected a sequence of names, got the str 'stages'"),
        ({"reports": ["none"]}, ValueError, "reports: expected some of"),
        ({"seconds": "1"}, TypeError, "seconds: expected a positive number, got '1'"),
        ({"seconds": -1.0}, ValueError, "seconds: expected a positive number, got -1.0"),
        ({"settings": {}}, TypeError, "settings: expected a BenchSettings or None"),
        ({"resume": "yes"}, TypeError, "resume: expected True, False or None, got 'yes'"),
    ],
)
def test_the_library_call_refuses_what_it_does_not_know(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(output=tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heads": 0}, ValueError, "heads: expected a positive number, got 0"),
        ({"lookups": 1.5}, TypeError, "lookups: expected a positive number, got 1.5"),
        ({"buffer_mebibytes": (1, 0)}, ValueError, "buffer_mebibytes: expected a positive number"),
        ({"fewest": 2}, ValueError, "fewest: expected at most `most` = 1, got 2"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(TINY, **change)
