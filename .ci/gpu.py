"""What needs a CUDA device: tests, NVIDIA's sanitizer, benchmarks. `nox -s gpu` calls it; it needs no nox itself.

    python .ci/gpu.py                                         all of it, for every package
    python .ci/gpu.py tests                                   one part: tests, sanitizer or benchmarks
    python .ci/gpu.py dilated-core ring benchmarks            some packages
    python .ci/gpu.py bench_card --sizes 8192                 one benchmark, with its own options
    python .ci/gpu.py --minutes=9 --resume                    so long at most; go on where an earlier one stopped

A card may be at hand for minutes only. So every step has a limit of time and leaves what it measured, no red step hides
the next, and what passed before from the same sources can be left out. How each ended is kept beside the figures, in
docs/benchmarks/<card>/session.md. It uses the Python that runs it and the sources as they lie here, and installs
nothing: machines with an accelerator come with a torch built for it, and that is the one to test.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PACKAGES = {path.parent.name: path.parent for path in sorted(ROOT.glob("packages/*/pyproject.toml"))}
PARTS = ("tests", "sanitizer", "benchmarks")
# Seconds after which a step is stopped; what it measured until then is kept.
LIMITS = {"tests": 300.0, "sanitizer": 240.0, "benchmarks": 570.0}
# Seconds for what was interrupted to write what it has.
LAST_WORDS = 20.0
# A step is not begun with fewer seconds left than this.
FEWEST_SECONDS = 45.0

# Options of a benchmark on a card, where its own defaults are meant for a processor. All take --device, and those that
# have nothing to measure there say so and end.
ON_A_CARD: dict[str, list[str]] = {
    "bench_density": ["--suites", "bfloat16", "--tokens", "16384"],
    "bench_recall": ["--seconds=20"],
    "bench_tune": ["--budget=60"],
    "bench_streaming": ["--sizes", "65536", "--dtypes", "bf16", "--threads", "8"],
}
# What is measured by a command of a package, after its scripts. RESULTS stands for the card's folder.
RESULTS = "RESULTS"
COMMANDS: dict[str, dict[str, list[str]]] = {
    "factory": {
        "bench": ["-m", "dilated_factory", "bench", "--device=cuda", "--seconds=40", f"--output={RESULTS}/bench"]
    },
}


class Sanitized(NamedTuple):
    """What runs under compute-sanitizer.

    Attributes:
        package: whose tests.
        tool: of the sanitizer.
        tests: which of those marked gpu, as pytest takes it (-k).
        uncached: whether every tensor is an allocation of CUDA's own. Torch cuts its tensors from larger pieces, in
            which memcheck cannot see one from the next.
    """

    package: str
    tool: str
    tests: str
    uncached: bool = False


# The smallest tests of each kind of device code. Races in shared memory are looked for in the programs that are ours.
# The tests fill what torch leaves uninitialised with NaN, so that initcheck has nothing to add.
SANITIZED = (
    Sanitized("dilated-core", "memcheck", "smallest or (N131 and bfloat16)", uncached=True),
    Sanitized("dilated-core", "racecheck", "triton and (smallest or N131)"),
    Sanitized("memory-pool", "memcheck", "test_gpu and (record_stream_keeps or each_stream or dlpack)"),
    Sanitized("pattern-cache", "memcheck", "test_gpu and of_all_kinds"),
    Sanitized("ring", "memcheck", "test_cuda and N13 and bfloat16", uncached=True),
)
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# The sanitizer's exit status where it found something, and pytest's where it chose no test.
FOUND, NO_TEST = 86, 5


# ------------------------------------------------------------------------------------------------ what is asked for


class Wanted(NamedTuple):
    """What the words ask for.

    Attributes:
        packages, parts, benchmarks: names; all packages and parts where none is named, no benchmark for all.
        minutes: for everything.
        resume: whether what passed before, from the same sources, is left out.
        options: for pytest, or for the one benchmark that is named.
    """

    packages: tuple[str, ...]
    parts: tuple[str, ...]
    benchmarks: tuple[str, ...]
    minutes: float
    resume: bool
    options: tuple[str, ...]


def understand(words: Sequence[str]) -> Wanted:
    """Names first, then options; --minutes= and --resume anywhere.

    Raises:
        ValueError: a name that is none, options that are nobody's, or minutes that are no number.
    """
    minutes, resume = math.inf, False
    names: list[str] = []
    options: list[str] = []
    for word in words:
        if word == "--resume":
            resume = True
        elif word.startswith("--minutes="):
            minutes = float(word.partition("=")[2])
        elif options or word.startswith("-"):
            options.append(word)
        else:
            names.append(word)
    packages = tuple(name for name in names if name in PACKAGES)
    parts = tuple(name for name in names if name in PARTS)
    benchmarks = tuple(name for name in names if name not in (*PACKAGES, *PARTS))
    known = [name for package in PACKAGES for name in benchmarks_of(package)]
    if unknown := [name for name in benchmarks if name not in known]:
        raise ValueError(f"expected a package, {', '.join(PARTS)} or a benchmark, got {', '.join(unknown)}")
    if not minutes > 0:
        raise ValueError(f"--minutes: expected a positive number, got {minutes}")
    if benchmarks and not parts:
        parts = ("benchmarks",)
    parts = parts or PARTS
    if options and not (parts == ("tests",) or (parts == ("benchmarks",) and len(benchmarks) == 1)):
        raise ValueError(f"options go to the tests alone, or to one benchmark: who is {' '.join(options)} for?")
    return Wanted(packages or tuple(PACKAGES), parts, benchmarks, minutes, resume, tuple(options))


def benchmarks_of(package: str) -> dict[str, list[str]]:
    """Name -> what follows `python`, of a package's scripts and commands."""
    scripts = {
        path.stem: [str(path.relative_to(ROOT)), "--device=cuda", *ON_A_CARD.get(path.stem, [])]
        for path in sorted(PACKAGES[package].glob("benchmarks/bench_*.py"))
    }
    return {**scripts, **COMMANDS.get(package, {})}


# ------------------------------------------------------------------------------------------------ the card, the record


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, with the sources of every package on Python's path."""
    paths = [*(str(folder / "src") for folder in PACKAGES.values()), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", **(extra or {})}


def the_card() -> dict[str, str]:
    """What there is to test on: its name, its folder, versions. SystemExit where torch sees no CUDA device."""
    look = (
        "import json, platform, torch\n"
        "from dilated_core import measure\n"
        "found = {'python': platform.python_version(), 'torch': torch.__version__, 'CUDA': str(torch.version.cuda)}\n"
        "if torch.cuda.is_available():\n"
        "    name = torch.cuda.get_device_name()\n"
        "    found |= {'card': name, 'folder': measure.card_folder(name)}\n"
        "print(json.dumps(found))"
    )
    command = [sys.executable, "-c", look]
    ran = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, timeout=300, check=False)
    if ran.returncode:
        raise SystemExit(f"{sys.executable} cannot import torch and dilated_core (above): nothing was tested")
    found: dict[str, str] = json.loads(ran.stdout.splitlines()[-1])
    if "card" not in found:
        raise SystemExit(f"no CUDA device: torch {found['torch']} (CUDA {found['CUDA']}) sees none; nothing was tested")
    return found


def digest_of(package: str) -> str:
    """Of all that a package's steps depend on: the sources of every package, and its own tests and benchmarks."""
    folders = [folder / "src" for folder in PACKAGES.values()]
    folders += [PACKAGES[package] / "tests", PACKAGES[package] / "benchmarks"]
    paths = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:16]


class Ledger:
    """Which steps ran on a card and how they ended: session.json and session.md, written after each.

    Args:
        card: of ``the_card``; what another card or other versions gave is not kept.
        folder: of the files.
    """

    def __init__(self, card: dict[str, str], folder: Path) -> None:
        self.folder, self._card = folder, card
        self._steps: dict[str, dict[str, Any]] = {}
        path = folder / "session.json"
        if path.exists():
            earlier = json.loads(path.read_text())
            self._steps = earlier["steps"] if earlier["card"] == card else {}

    def passed(self, step: str, digest: str) -> bool:
        """Whether it passed before, from the same sources."""
        before = self._steps.get(step)
        return before is not None and before["digest"] == digest and before["outcome"] == "passed"

    def add(self, step: str, digest: str, outcome: str, seconds: float, details: str) -> None:
        """Keep how a step ended."""
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._steps[step] = {
            "outcome": outcome,
            "seconds": round(seconds, 1),
            "details": details,
            "date": date,
            "digest": digest,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"card": self._card, "steps": self._steps}, indent=1)
        (self.folder / "session.json").write_text(content + "\n")
        (self.folder / "session.md").write_text(self._page())

    def _page(self) -> str:
        versions = ", ".join(f"{name} {value}" for name, value in self._card.items() if name != "folder")
        lines = ["# What ran on this card", "", f"`nox -s gpu`, {versions}.", ""]
        lines += ["| step | outcome | seconds | details | date (UTC) |", "|---|---|---|---|---|"]
        for name, one in sorted(self._steps.items()):
            cells = (name, one["outcome"], f"{one['seconds']:.0f}", one["details"].replace("|", "/"), one["date"])
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------ steps


def run_for(seconds: float, command: Sequence[str], extra: Mapping[str, str] | None = None) -> int | None:
    """The command's exit status; None where its time was up: it was interrupted as by Ctrl-C, and could still write."""
    print(f"\n==> {' '.join(command)}    (at most {seconds:.0f} s)", flush=True)
    # A process group of its own, so that what it starts ends with it.
    with subprocess.Popen(command, cwd=ROOT, env=environment(extra), preexec_fn=os.setpgrp) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # whatever it left running
                os.killpg(process.pid, signal.SIGKILL)


def counts(report: Path) -> str:
    """What pytest's report says, in a line: how many passed, failed and were skipped; which failed, and why skipped."""
    if not report.exists():
        return "no report"
    # By name: a test whose clean-up fails too is there twice.
    cases = {
        (one.get("classname"), one.get("name")): one for one in ElementTree.parse(report).iter("testcase")
    }.values()
    red = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [one for case in cases if (one := case.find("skipped")) is not None]
    told = f"{len(cases) - len(red) - len(skipped)} passed, {len(red)} failed, {len(skipped)} skipped"
    if red:
        told += ": " + ", ".join(str(case.get("name")) for case in red[:10]) + (", ..." if len(red) > 10 else "")
    why = sorted({" ".join(str(one.get("message")).split())[:120] for one in skipped})
    return told + (f" ({'; '.join(why[:8])})" if why else "")


def find_sanitizer() -> str | None:
    """NVIDIA's compute-sanitizer: on the path, or where CUDA is installed."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


class Steps:
    """Everything that is asked for, step by step; ``red`` names what did not pass."""

    def __init__(self, wanted: Wanted, ledger: Ledger) -> None:
        self.wanted, self.ledger = wanted, ledger
        self.red: list[str] = []
        self._until = time.monotonic() + 60 * wanted.minutes

    def tests(self, package: str) -> None:
        """All that are marked gpu."""
        report = ROOT / "reports" / f"{package}-gpu.xml"
        command = self._pytest(package, report, *self.wanted.options)
        self._step(package, "tests", "tests", command, partial(_pytest_words, report))

    def sanitizer(self, package: str) -> None:
        """The smallest of them under compute-sanitizer; where that cannot run, it says so."""
        for one in SANITIZED:
            if one.package != package:
                continue
            program, lack = self._sanitizer
            if program is None:
                print(f"\n==> {package}: {one.tool} is skipped: {lack}")
                self.ledger.add(f"{package}: {one.tool}", digest_of(package), "skipped", 0.0, lack)
                continue
            report = ROOT / "reports" / f"{package}-gpu-{one.tool}.xml"
            tests = self._pytest(package, report, "-k", one.tests)
            command = [*program, f"--tool={one.tool}", *tests]
            words = partial(_pytest_words, report)
            self._step(package, one.tool, "sanitizer", command, words, UNCACHED if one.uncached else None)

    def benchmarks(self, package: str) -> None:
        """Each checks what it measures."""
        for name, words in benchmarks_of(package).items():
            if not self.wanted.benchmarks or name in self.wanted.benchmarks:
                placed = [word.replace(RESULTS, str(self.ledger.folder)) for word in words]
                command = [sys.executable, *placed, *self.wanted.options]
                self._step(package, name, "benchmarks", command, _exit_words)

    def _step(
        self,
        package: str,
        name: str,
        kind: str,
        command: Sequence[str],
        words: Callable[[int | None], str],
        extra: Mapping[str, str] | None = None,
    ) -> None:
        """Run a command and keep how it ended, unless it passed before or no time is left.

        Args:
            kind: of PARTS; words: what an exit status means; extra: of the environment.
        """
        step, digest, left = f"{package}: {name}", digest_of(package), self._until - time.monotonic()
        if self.wanted.resume and self.ledger.passed(step, digest):
            print(f"\n==> {step}: passed before, from the same sources")
            return
        if left < FEWEST_SECONDS:
            print(f"\n==> {step}: no time is left; --resume goes on with it")
            self.red.append(f"{step} (not begun)")
            return
        started = time.monotonic()
        status = run_for(min(LIMITS[kind], left - LAST_WORDS), command, extra)
        outcome = "out of time" if status is None else "failed"
        if status == 0:
            outcome = "passed"
        elif status == NO_TEST and kind != "benchmarks":
            outcome = "skipped"
        details = words(status)
        self.ledger.add(step, digest, outcome, time.monotonic() - started, details)
        print(f"==> {step}: {outcome}, {details}", flush=True)
        if outcome in ("failed", "out of time"):
            self.red.append(f"{step} ({outcome})")

    def _pytest(self, package: str, report: Path, *options: str) -> list[str]:
        report.parent.mkdir(exist_ok=True)
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", f"--config-file={ROOT / 'pyproject.toml'}", f"--rootdir={ROOT}"]
        results = [f"--junitxml={report}", "--override-ini", f"junit_suite_name={report.stem}"]
        return [*command, *results, "-m", "gpu", *options, str(PACKAGES[package] / "tests")]

    @cached_property
    def _sanitizer(self) -> tuple[list[str] | None, str]:
        """What to put before a command, or None and why not."""
        program = find_sanitizer()
        if program is None:
            return None, "compute-sanitizer is neither on PATH nor in CUDA_HOME or /usr/local/cuda"
        # Torch asks CUDA questions that end in errors, and handles those: the report is of what kernels do.
        command = [program, f"--error-exitcode={FOUND}", "--report-api-errors=no", "--print-limit=20"]
        addition = [sys.executable, "-c", "import torch; torch.ones(1, device='cuda').add_(1).item()"]
        status = run_for(120.0, [*command, *addition])
        return (command, "") if status == 0 else (None, f"{program} cannot run here: one addition ends in {status}")


def _exit_words(status: int | None) -> str:
    return "stopped at its limit" if status is None else f"exit status {status}"


def _pytest_words(report: Path, status: int | None) -> str:
    if status == NO_TEST:
        return "no test is chosen"
    return ("the sanitizer found something; " if status == FOUND else "") + counts(report)


def main(words: Sequence[str]) -> None:
    """Run what is asked for; SystemExit names what did not pass."""
    if "--help" in words:
        print(__doc__)
        return
    try:
        wanted = understand(words)
    except ValueError as error:
        raise SystemExit(f"{error}\n\n{__doc__}") from error
    card = the_card()
    ledger = Ledger(card, ROOT / "docs" / "benchmarks" / card["folder"])
    steps = Steps(wanted, ledger)
    # All tests before the first figure.
    for part in PARTS:
        for package in wanted.packages:
            if part in wanted.parts:
                getattr(steps, part)(package)
    record = ledger.folder / "session.md"
    if steps.red:
        raise SystemExit(f"\nnot passed: {'; '.join(steps.red)}. The record: {record}")
    print(f"\nall passed. The record: {record}")


if __name__ == "__main__":
    main(sys.argv[1:])
