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

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

from gpu_session.plan import PARTS, RESULTS, SANITIZED, Checkout, Wanted, understand
from gpu_session.processes import LAST_WORDS, run_for
from gpu_session.record import Ledger, counts

ROOT = Path(__file__).resolve().parents[1]
# Seconds after which a step is stopped; what it measured until then is kept.
LIMITS = {"tests": 300.0, "sanitizer": 240.0, "benchmarks": 570.0}
# A step is not begun with fewer seconds left than this.
FEWEST_SECONDS = 45.0
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# The sanitizer's exit status where it found something, and pytest's where it chose no test.
FOUND, NO_TEST = 86, 5
RED = ("failed", "out of time", "not begun")


def environment(checkout: Checkout, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, with the sources of every package on Python's path."""
    paths = [*(str(folder / "src") for folder in checkout.packages.values()), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", **(extra or {})}


def the_card(checkout: Checkout) -> dict[str, str]:
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
    env = environment(checkout)
    try:
        ran = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        raise SystemExit("torch did not say within 300 s whether there is a CUDA device: nothing was tested") from None
    if ran.returncode:
        raise SystemExit(f"{sys.executable} cannot import torch and dilated_core (above): nothing was tested")
    found: dict[str, str] = json.loads(ran.stdout.splitlines()[-1])
    if "card" not in found:
        raise SystemExit(f"no CUDA device: torch {found['torch']} (CUDA {found['CUDA']}) sees none; nothing was tested")
    return found


def find_sanitizer() -> str | None:
    """NVIDIA's compute-sanitizer: on the path, or where CUDA is installed."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


class Steps:
    """Everything that is asked for, step by step.

    Attributes:
        ended: step -> passed, failed, out of time, skipped, passed before or not begun.

    Args:
        until: of ``time.monotonic``; no step goes on after it.
    """

    def __init__(self, checkout: Checkout, wanted: Wanted, ledger: Ledger, until: float = math.inf) -> None:
        self.checkout, self.wanted, self.ledger = checkout, wanted, ledger
        self.ended: dict[str, str] = {}
        self._until = until

    def tests(self, package: str) -> None:
        """All that are marked gpu."""
        report = self.checkout.root / "reports" / f"{package}-gpu.xml"
        command = self._pytest(package, report, *self.wanted.options)
        # A choice of tests is a step of its own: that it passed says nothing of the others.
        name = " ".join(["tests", *self.wanted.options])
        self._step(package, name, "tests", command, partial(_of_pytest, report))

    def sanitizer(self, package: str) -> None:
        """The smallest of them under compute-sanitizer; where that cannot run, it says so."""
        for one in SANITIZED:
            if one.package != package:
                continue
            words = [one.tool, one.tests, str(one.uncached)]
            program, lack = self._sanitizer
            if program is None:
                step = f"{package}: {one.tool}"
                print(f"\n==> {step} is skipped: {lack}")
                self.ledger.add(step, self.checkout.digest_of(package, words), "skipped", 0.0, lack)
                self.ended[step] = "skipped"
                continue
            report = self.checkout.root / "reports" / f"{package}-gpu-{one.tool}.xml"
            command = [*program, f"--tool={one.tool}", *self._pytest(package, report, "-k", one.tests)]
            extra = UNCACHED if one.uncached else None
            self._step(package, one.tool, "sanitizer", command, partial(_of_pytest, report), words, extra)

    def benchmarks(self, package: str) -> None:
        """Each checks what it measures."""
        for name, words in self.checkout.benchmarks_of(package).items():
            if not self.wanted.benchmarks or name in self.wanted.benchmarks:
                placed = [word.replace(RESULTS, str(self.ledger.folder)) for word in words]
                command = [sys.executable, *placed, *self.wanted.options]
                step = " ".join([name, *self.wanted.options])
                self._step(package, step, "benchmarks", command, _of_benchmark, words)

    def _step(
        self,
        package: str,
        name: str,
        kind: str,
        command: Sequence[str],
        meaning: Callable[[int | None], tuple[str, str]],
        words: Sequence[str] = (),
        extra: Mapping[str, str] | None = None,
    ) -> None:
        """Run a command and keep how it ended, unless it passed before or no time is left.

        Args:
            kind: of PARTS; meaning: outcome and details of an exit status; words: what is this file's of the command,
                without paths; extra: of the environment.
        """
        step, digest, left = f"{package}: {name}", self.checkout.digest_of(package, words), self._left()
        if self.wanted.resume and self.ledger.passed(step, digest):
            print(f"\n==> {step}: passed before, from the same sources")
            self.ended[step] = "passed before"
            return
        if left < FEWEST_SECONDS:
            print(f"\n==> {step}: no time is left; --resume goes on with it")
            self.ended[step] = "not begun"
            return
        started = time.monotonic()
        status = self._run(min(LIMITS[kind], left - LAST_WORDS), command, extra)
        outcome, details = meaning(status)
        self.ledger.add(step, digest, outcome, time.monotonic() - started, details)
        print(f"==> {step}: {outcome}, {details}", flush=True)
        self.ended[step] = outcome

    def _left(self) -> float:
        return self._until - time.monotonic()

    def _run(self, seconds: float, command: Sequence[str], extra: Mapping[str, str] | None = None) -> int | None:
        return run_for(seconds, command, self.checkout.root, environment(self.checkout, extra))

    def _pytest(self, package: str, report: Path, *options: str) -> list[str]:
        root = self.checkout.root
        report.parent.mkdir(exist_ok=True)
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", f"--config-file={root / 'pyproject.toml'}", f"--rootdir={root}"]
        results = [f"--junitxml={report}", "--override-ini", f"junit_suite_name={report.stem}"]
        return [*command, *results, "-m", "gpu", *options, str(self.checkout.packages[package] / "tests")]

    @cached_property
    def _sanitizer(self) -> tuple[list[str] | None, str]:
        """What to put before a command, or None and why not."""
        program = find_sanitizer()
        if program is None:
            return None, "compute-sanitizer is neither on PATH nor in CUDA_HOME or /usr/local/cuda"
        # Torch asks CUDA questions that end in errors, and handles those: the report is of what kernels do.
        command = [program, f"--error-exitcode={FOUND}", "--report-api-errors=no", "--print-limit=20"]
        addition = [sys.executable, "-c", "import torch; torch.ones(1, device='cuda').add_(1).item()"]
        left = self._left()
        if left < FEWEST_SECONDS:
            return command, ""  # no step will begin
        status = self._run(min(120.0, left - LAST_WORDS), [*command, *addition])
        return (command, "") if status == 0 else (None, f"{program} cannot run here: one addition ends in {status}")


def _of_benchmark(status: int | None) -> tuple[str, str]:
    if status is None:
        return "out of time", "stopped at its limit"
    return ("failed" if status else "passed"), f"exit status {status}"


def _of_pytest(report: Path, status: int | None) -> tuple[str, str]:
    if status == NO_TEST:
        return "skipped", "no test is chosen"
    passed, details = counts(report)
    if status is None:
        return "out of time", details
    if status == 0:
        # What is green because every test was skipped shows nothing.
        return ("passed" if passed else "skipped"), details
    return "failed", ("the sanitizer found something; " if status == FOUND else f"exit status {status}; ") + details


def session(checkout: Checkout, wanted: Wanted, card: dict[str, str], until: float = math.inf) -> None:
    """Run what is asked for on a card; SystemExit names what did not pass."""
    ledger = Ledger(card, checkout.root / "docs" / "benchmarks" / card["folder"])
    steps = Steps(checkout, wanted, ledger, until)
    # All tests before the first figure.
    for part in PARTS:
        for package in wanted.packages:
            if part in wanted.parts:
                getattr(steps, part)(package)
    red = [f"{step} ({outcome})" for step, outcome in steps.ended.items() if outcome in RED]
    record = ledger.folder / "session.md"
    if red:
        raise SystemExit(f"\nnot passed: {'; '.join(red)}. The record: {record}")
    passed = [step for step, outcome in steps.ended.items() if outcome != "skipped"]
    if not passed:
        raise SystemExit("\nnothing was tested: what was asked for has no step here, or every step was skipped")
    left_out = f", {len(steps.ended) - len(passed)} skipped" if len(passed) < len(steps.ended) else ""
    print(f"\n{len(passed)} passed{left_out}. The record: {record}")


def main(words: Sequence[str], root: Path = ROOT) -> None:
    """Understand the words, look for a card, and run; SystemExit where any of it fails."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return
    started, checkout = time.monotonic(), Checkout(root)
    try:
        wanted = understand(words, checkout)
    except ValueError as error:
        raise SystemExit(f"{error}\n\n{__doc__}") from error
    session(checkout, wanted, the_card(checkout), started + 60 * wanted.minutes)


if __name__ == "__main__":
    main(sys.argv[1:])
