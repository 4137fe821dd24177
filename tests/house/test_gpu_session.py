"""`nox -s gpu` without a GPU: what it understands, runs, stops, leaves out and keeps, on a repository of two packages.

Its steps are real processes, pytest and scripts. Only the card is made up; its record stays in a folder of the test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / ".ci"))

import gpu
from gpu_session.plan import COMMANDS, ON_A_CARD, SANITIZED, Checkout, understand
from gpu_session.processes import run_for
from gpu_session.record import Ledger

ROOT = Path(__file__).parents[2]
CARD = {"python": "3", "torch": "0", "CUDA": "none", "card": "The card of a test", "folder": "test-card"}
GREEN = """
import dilated_core
import pytest

@pytest.mark.gpu
def test_the_smallest_is_right():
    assert dilated_core.answer == 42

@pytest.mark.gpu
def test_the_largest_is_right():
    assert dilated_core.answer == 42

def test_without_a_card():
    raise AssertionError("it is not marked")
"""
RED = """
import pytest

@pytest.fixture
def unclean():
    yield
    raise RuntimeError("unclean")

@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2])
def test_that_fails(size, unclean):
    assert size == 2

@pytest.mark.gpu
def test_that_passes():
    pass

@pytest.mark.gpu
def test_that_lacks_something():
    pytest.skip("no CuPy | here")
"""
SKIPPED = """
import pytest

@pytest.mark.gpu
def test_that_lacks_something():
    pytest.skip("no CuPy here")
"""
BENCHMARK = """
import sys
from pathlib import Path
import dilated_core
with Path("ran.txt").open("a") as file:
    print("one", *sys.argv[1:], file=file)
"""
# Seconds until a program is stopped: where it was not far enough by then, a slow machine gives it longer.
UNTIL_STARTED = (0.5, 5.0, 60.0)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """dilated-core, with two tests for a card and a benchmark; and other, with neither."""
    write(tmp_path, "pyproject.toml", '[tool.pytest.ini_options]\nmarkers = ["gpu: needs a card"]\n')
    write(tmp_path, "packages/dilated-core/pyproject.toml", "")
    write(tmp_path, "packages/dilated-core/src/dilated_core/__init__.py", "answer = 42\n")
    write(tmp_path, "packages/dilated-core/tests/test_core.py", GREEN)
    write(tmp_path, "packages/dilated-core/benchmarks/bench_one.py", BENCHMARK)
    write(tmp_path, "packages/other/pyproject.toml", "")
    write(tmp_path, "packages/other/src/other.py", "")
    write(tmp_path, "packages/other/tests/test_other.py", "def test_without_a_card():\n    pass\n")
    return Checkout(tmp_path)


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def run(checkout: Checkout, *words: str, seconds: float = 300.0) -> None:
    gpu.session(checkout, understand(words, checkout), CARD, time.monotonic() + seconds)


def text_of(path: Path) -> str:
    """What a program has written; nothing where it was stopped before or in the midst of it."""
    return path.read_text() if path.exists() else ""


def record(checkout: Checkout) -> dict[str, tuple[str, str]]:
    """Step -> outcome and details."""
    kept = json.loads((checkout.root / "docs/benchmarks/test-card/session.json").read_text())
    return {step: (one["outcome"], one["details"]) for step, one in kept["steps"].items()}


def ran(checkout: Checkout) -> list[str]:
    """A line for each run of the benchmark: its options."""
    path = checkout.root / "ran.txt"
    return path.read_text().splitlines() if path.exists() else []


# ------------------------------------------------------------------------------------------------ words


def test_no_word_means_everything(checkout: Checkout) -> None:
    wanted = understand([], checkout)
    assert wanted.packages == ("dilated-core", "other")
    assert wanted.parts == ("tests", "sanitizer", "benchmarks")
    assert (wanted.benchmarks, wanted.resume, wanted.options) == ((), False, ())
    assert wanted.minutes == float("inf")


def test_names_may_come_in_any_order_and_what_follows_is_for_pytest(checkout: Checkout) -> None:
    wanted = understand(["tests", "other", "--minutes=9", "-k", "one", "--resume"], checkout)
    assert wanted.packages == ("other",)
    assert wanted.parts == ("tests",)
    assert wanted.options == ("-k", "one")
    assert (wanted.minutes, wanted.resume) == (9.0, True)


def test_a_benchmark_by_name_is_the_only_step(checkout: Checkout) -> None:
    wanted = understand(["bench_one", "--sizes", "8192"], checkout)
    assert (wanted.parts, wanted.benchmarks) == (("benchmarks",), ("bench_one",))
    assert wanted.options == ("--sizes", "8192")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench_two"], r"a package \(dilated-core, other\) or a benchmark \(bench_one\), got bench_two"),
        (["--minutes=soon"], "--minutes: expected a positive number, as in --minutes=9, got 'soon'"),
        (["--minutes=0"], "--minutes: expected a positive number"),
        (["--minutes=nan"], "--minutes: expected a positive number"),
        (["--minutes", "9"], "--minutes: expected a positive number, as in --minutes=9"),
        (["-k", "one"], "who is -k one for"),
        (["tests", "benchmarks", "-k", "one"], "who is -k one for"),
        (["other", "bench_one"], "bench_one is a benchmark of dilated-core: name that package too"),
        (["tests", "bench_one"], "bench_one is a benchmark: name the part benchmarks too"),
    ],
)
def test_words_that_mean_nothing_are_refused(checkout: Checkout, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        understand(words, checkout)


def test_what_is_planned_for_a_card_is_there() -> None:
    checkout = Checkout(ROOT)
    scripts = {name for package in checkout.packages for name in checkout.benchmarks_of(package)}
    assert set(ON_A_CARD) <= scripts
    assert set(COMMANDS) | {one.package for one in SANITIZED} <= set(checkout.packages)


def test_every_benchmark_script_is_told_the_device() -> None:
    checkout = Checkout(ROOT)
    for package in checkout.packages:
        assert all("--device=cuda" in words for words in checkout.benchmarks_of(package).values())


# ------------------------------------------------------------------------------------------------ a session


def test_a_session_runs_what_is_marked_and_keeps_how_it_ended(
    checkout: Checkout, capfd: pytest.CaptureFixture[str]
) -> None:
    run(checkout, "tests", "benchmarks")
    assert record(checkout) == {
        "dilated-core: tests": ("passed", "2 passed, 0 failed, 0 skipped"),
        "dilated-core: bench_one": ("passed", "exit status 0"),
        "other: tests": ("skipped", "no test is chosen"),
    }
    assert ran(checkout) == ["one --device=cuda"]
    out = capfd.readouterr().out
    assert out.index("other: tests: skipped") < out.index("bench_one: passed")  # all tests before the first figure
    assert out.splitlines()[-1].startswith("2 passed, 1 skipped. The record: ")
    page = (checkout.root / "docs/benchmarks/test-card/session.md").read_text().splitlines()
    assert page[:3] == [
        "# What ran on this card",
        "",
        "`nox -s gpu`, python 3, torch 0, CUDA none, card The card of a test.",
    ]
    assert [line.split(" | ")[:2] for line in page[-3:]] == [
        ["| dilated-core: bench_one", "passed"],
        ["| dilated-core: tests", "passed"],
        ["| other: tests", "skipped"],
    ]


def test_a_red_step_is_named_and_hides_no_other(checkout: Checkout) -> None:
    write(checkout.root, "packages/dilated-core/tests/test_core.py", RED)
    with pytest.raises(SystemExit, match=r"not passed: dilated-core: tests \(failed\)\. The record: "):
        run(checkout, "tests", "benchmarks")
    outcome, details = record(checkout)["dilated-core: tests"]
    assert outcome == "failed"
    assert details == (
        "exit status 1; 1 passed, 2 failed, 1 skipped: test_that_fails[1], test_that_fails[2] (no CuPy | here)"
    )
    assert ran(checkout) == ["one --device=cuda"]
    page = (checkout.root / "docs/benchmarks/test-card/session.md").read_text()
    assert "(no CuPy / here)" in page  # a bar would end the table's cell


def test_tests_that_are_all_skipped_have_not_passed(checkout: Checkout) -> None:
    write(checkout.root, "packages/dilated-core/tests/test_core.py", SKIPPED)
    with pytest.raises(SystemExit, match="nothing was tested"):
        run(checkout, "tests", "dilated-core")
    assert record(checkout) == {"dilated-core: tests": ("skipped", "0 passed, 0 failed, 1 skipped (no CuPy here)")}


def test_a_session_without_a_step_is_an_error(checkout: Checkout) -> None:
    with pytest.raises(SystemExit, match="nothing was tested"):
        run(checkout, "other", "sanitizer")


def test_resume_leaves_out_what_passed_from_the_same_sources(
    checkout: Checkout, capfd: pytest.CaptureFixture[str]
) -> None:
    run(checkout, "bench_one")
    run(checkout, "bench_one", "--resume")
    assert "bench_one: passed before, from the same sources" in capfd.readouterr().out
    assert len(ran(checkout)) == 1
    write(checkout.root, "packages/other/src/other.py", "changed = True\n")
    run(checkout, "bench_one", "--resume")
    run(checkout, "bench_one")
    assert len(ran(checkout)) == 3


def test_resume_runs_again_what_passed_with_other_options(checkout: Checkout) -> None:
    run(checkout, "bench_one", "--quick")
    run(checkout, "bench_one", "--resume")
    assert ran(checkout) == ["one --device=cuda --quick", "one --device=cuda"]
    assert set(record(checkout)) == {"dilated-core: bench_one", "dilated-core: bench_one --quick"}


def test_resume_runs_again_what_failed(checkout: Checkout) -> None:
    write(checkout.root, "packages/dilated-core/benchmarks/bench_one.py", BENCHMARK + "raise SystemExit(3)\n")
    for _ in range(2):
        with pytest.raises(SystemExit, match="not passed"):
            run(checkout, "bench_one", "--resume")
    assert len(ran(checkout)) == 2
    assert record(checkout) == {"dilated-core: bench_one": ("failed", "exit status 3")}


def test_a_step_past_its_limit_keeps_what_it_wrote(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = BENCHMARK + "import time\ntry:\n    time.sleep(300)\nfinally:\n    Path('last.txt').write_text('kept')\n"
    write(checkout.root, "packages/dilated-core/benchmarks/bench_one.py", slow)
    for seconds in UNTIL_STARTED:
        monkeypatch.setitem(gpu.LIMITS, "benchmarks", seconds)
        with pytest.raises(SystemExit, match=r"bench_one \(out of time\)"):
            run(checkout, "bench_one")
        if text_of(checkout.root / "last.txt"):
            break
    assert record(checkout) == {"dilated-core: bench_one": ("out of time", "stopped at its limit")}
    assert text_of(checkout.root / "last.txt") == "kept"


def test_no_step_begins_without_time(checkout: Checkout) -> None:
    with pytest.raises(SystemExit, match=r"bench_one \(not begun\)"):
        run(checkout, "bench_one", seconds=10.0)
    assert ran(checkout) == []


# ------------------------------------------------------------------------------------------------ the sanitizer


def sanitizer(root: Path, monkeypatch: pytest.MonkeyPatch, *, probe: int, found: int) -> None:
    """A program in compute-sanitizer's place: it ends as told on the first addition, and where pytest is green."""
    program = root / "bin" / "compute-sanitizer"
    write(
        root,
        "bin/compute-sanitizer",
        '#!/bin/sh\nwhile case "$1" in --*) true;; *) false;; esac; do shift; done\n'
        f'if [ "$2" = -c ]; then exit {probe}; fi\n"$@" || exit $?\nexit {found}\n',
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_what_the_sanitizer_finds_is_red(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    sanitizer(checkout.root, monkeypatch, probe=0, found=gpu.FOUND)
    with pytest.raises(SystemExit, match=r"not passed: dilated-core: memcheck \(failed\)"):
        run(checkout, "sanitizer", "dilated-core")
    assert record(checkout) == {
        "dilated-core: memcheck": ("failed", "the sanitizer found something; 1 passed, 0 failed, 0 skipped"),
        "dilated-core: racecheck": ("skipped", "no test is chosen"),
    }


def test_a_sanitizer_that_cannot_run_is_skipped_and_says_why(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    sanitizer(checkout.root, monkeypatch, probe=1, found=0)
    run(checkout, "sanitizer", "benchmarks", "dilated-core")
    outcome, details = record(checkout)["dilated-core: memcheck"]
    assert outcome == "skipped"
    assert details.endswith("compute-sanitizer cannot run here: one addition ends in 1")


# ------------------------------------------------------------------------------------------------ parts of it


def test_another_card_or_other_versions_begin_a_new_record(tmp_path: Path) -> None:
    Ledger(CARD, tmp_path).add("a step", "digest", "passed", 1.0, "")
    assert Ledger(CARD, tmp_path).passed("a step", "digest")
    assert not Ledger(CARD, tmp_path).passed("a step", "another digest")
    assert not Ledger({**CARD, "torch": "1"}, tmp_path).passed("a step", "digest")


def test_a_digest_follows_what_a_step_depends_on(checkout: Checkout) -> None:
    before = checkout.digest_of("other")
    assert checkout.digest_of("other", ["--size=1"]) != before
    write(checkout.root, "packages/dilated-core/tests/test_core.py", "")
    assert checkout.digest_of("other") == before
    write(checkout.root, "packages/dilated-core/src/dilated_core/__init__.py", "answer = 43\n")
    changed = checkout.digest_of("other")
    assert changed != before
    (checkout.root / "packages/other/src/other.py").rename(checkout.root / "packages/other/src/another.py")
    assert checkout.digest_of("other") != changed


def test_what_a_command_starts_ends_with_it(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time, pathlib, signal\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "time.sleep(300)\n"
    )
    command = [sys.executable, "-c", program]
    for seconds in UNTIL_STARTED:
        assert run_for(seconds, command, tmp_path, os.environ, last_words=0.2) is None
        if text_of(tmp_path / "child"):
            break
    child = int(text_of(tmp_path / "child"))
    for _ in range(2400):  # killed at once; a busy machine may take its time to end and to bury it
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child goes on")


def test_a_command_that_ends_gives_its_exit_status(tmp_path: Path) -> None:
    assert run_for(60.0, [sys.executable, "-c", "raise SystemExit(7)"], tmp_path, os.environ) == 7


def test_without_a_card_nothing_is_tested() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "gpu.py"), "tests"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1
    assert "no CUDA device: torch" in ended.stderr
    assert "nothing was tested" in ended.stderr


def test_help_needs_no_card(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--help"])
    assert "--resume" in capsys.readouterr().out
