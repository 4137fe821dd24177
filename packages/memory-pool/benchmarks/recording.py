"""What these benchmarks share: options, times taken in turns, page faults, other processes, and the record on disk.

A figure is a ratio of medians taken in turns in one run, so that a machine that slows down slows all alike. The clock
(which waits for a GPU) and the statistics are those of ``torch.utils.benchmark``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from time import sleep
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.utils import benchmark

from dilated_memory_pool.sizes import format_bytes

MIB = 1 << 20
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


# ------------------------------------------------------------------------------------------------ measuring


class Sample(NamedTuple):
    """Attributes: seconds: of one run; faults: pages that the system had to bring in meanwhile."""

    seconds: float
    faults: float


def page_faults() -> int:
    """Minor page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def timed(call: Callable[[], object], look: Callable[[Any], None] | None = None, number: int = 1) -> Sample:
    """One of ``number`` calls, with the release of its result: giving memory back is part of what is measured.

    ``look`` is shown the last result off the clock, before it is released; it raises where the result is wrong.
    """
    faults, started = page_faults(), benchmark.timer()
    for _ in range(number - 1):
        call()
    result = call()
    seconds, faults = benchmark.timer() - started, page_faults() - faults
    if look is not None:
        look(result)
    before, started = page_faults(), benchmark.timer()
    del result
    seconds += benchmark.timer() - started
    faults += page_faults() - before
    return Sample(seconds / number, faults / number)


def interleaved(
    candidates: Mapping[str, Callable[[], Sample]], *, rounds: int, warmup: int = 1
) -> dict[str, list[Sample]]:
    """name -> samples of the candidates, in turns: all once, then all again. Warm-up rounds are not kept."""
    taken: dict[str, list[Sample]] = {name: [] for name in candidates}
    for round_ in range(warmup + rounds):
        for name, candidate in candidates.items():
            sample = candidate()
            if round_ >= warmup:
                taken[name].append(sample)
    return taken


def summary(taken: Mapping[str, Sequence[Sample]]) -> dict[str, dict[str, Any]]:
    """JSON-ready: all seconds, their median, their spread (interquartile range over median), median page faults."""
    measured = {
        name: benchmark.Measurement(1, [sample.seconds for sample in samples], benchmark.TaskSpec(name, ""))
        for name, samples in taken.items()
    }
    return {
        "seconds": {name: found.times for name, found in measured.items()},
        "median": {name: found.median for name, found in measured.items()},
        "spread": {name: found.iqr / found.median for name, found in measured.items()},
        "page_faults": {name: median(sample.faults for sample in samples) for name, samples in taken.items()},
    }


def ratio(row: Mapping[str, Any], name: str, base: str) -> str:
    """How many times faster than ``base`` a candidate is, with its spread, for a table."""
    return f"**{row['median'][base] / row['median'][name]:.2f}** ({row['spread'][name]:.0%})"


def require(holds: bool, claim: str) -> None:
    """End the program where a check fails: no figure without one."""
    if not holds:
        raise SystemExit(f"check failed: {claim}; nothing more is reported")


# ------------------------------------------------------------------------------------------------ processes

# glibc reads these when a process starts. They keep freed memory of up to 1 GiB a block in the process.
KEEP_FREED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
# PyTorch's own switch for transparent huge pages in CPU tensors.
TORCH_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
# What to try before a pool: name -> environment.
ALTERNATIVES = (
    {
        "MALLOC_ variables": KEEP_FREED,
        "THP_MEM_ALLOC_ENABLE": TORCH_HUGE_PAGES,
        "both": {**KEEP_FREED, **TORCH_HUGE_PAGES},
    }
    if platform.libc_ver()[0] == "glibc"
    else {}
)
SERVE = "--serve"
# OpenMP's threads go on spinning for a moment when their work is done; another process's turn waits until they sleep.
SETTLE_SECONDS = 0.02


class Worker(AbstractContextManager["Worker"]):
    """The same script in another process, which answers one question at a time, so that processes take turns too.

    Args:
        script: its path; called with ``--serve`` it is expected to call ``serve``.
        environment: variables to add to this process's.
    """

    def __init__(self, script: str, environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, script, SERVE],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer; SystemExit where the process has none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        sleep(SETTLE_SECONDS)
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        sleep(SETTLE_SECONDS)
        require(bool(line), f"another process answers {question}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def sample(self, **question: Any) -> Sample:
        """The answer's seconds and page faults."""
        answer = self.ask(**question)
        return Sample(answer["seconds"], answer["faults"])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # closes its input, which ends it


def serve(answer: Callable[..., Mapping[str, Any]]) -> None:
    """Answer the questions of a ``Worker``, until there are no more."""
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


# ------------------------------------------------------------------------------------------------ the record


def parse(description: str | None) -> argparse.Namespace:
    """The options that every benchmark here has; ``device`` becomes a torch.device with an index where it is a GPU."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:index] (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works: no figures to quote")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.device = torch.device(arguments.device)
    if arguments.device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device: PyTorch finds no CUDA device")
        arguments.device = torch.device("cuda", arguments.device.index or 0)
        torch.cuda.set_device(arguments.device)
        from dilated_core import measure  # not needed on a CPU

        arguments.output = measure.results_folder(arguments.output, arguments.device)
    return arguments


def environment() -> dict[str, Any]:
    """What a figure depends on. JSON-ready."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "transparent_huge_pages": {name: _chosen(HUGE_PAGES / name) for name in ("enabled", "defrag")},
        "allocator_variables": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM", "PYTORCH_"))
        },
        "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


class Record:
    """The results of one benchmark: printed as they come and written after every row, so that a run that is cut short
    keeps what it measured.

    Args:
        name: of the files: memory_pool_NAME.json and .md.
        title: of the page.
        arguments: of ``parse``.
    """

    def __init__(self, name: str, title: str, arguments: argparse.Namespace) -> None:
        self._path = arguments.output / f"memory_pool_{name}"
        self._results: dict[str, Any] = {
            "environment": environment(),
            "device": str(arguments.device),
            "quick": arguments.quick,
        }
        where = self._results["environment"]
        pages = where["transparent_huge_pages"]
        self._page = [
            f"# {title}\n",
            f"{where['date']}, torch {where['torch']}, {where['processor']}, {where['cores']} cores, "
            f"{where['threads']} threads, kernel {where['kernel']}, {where['libc']}, transparent huge pages "
            f"{pages['enabled']}, {', '.join(where['cuda']) or 'no GPU'}."
            + (" **A quick run, to see that it works: no figures to quote.**" if arguments.quick else ""),
            "",
            (
                "Times are medians of runs taken in turns; the spread in brackets is the interquartile range over the "
                "median. A ratio above 1 means faster than the plain way."
            ),
        ]

    def section(self, key: str, heading: str, text: str, checked: str, columns: Sequence[str]) -> Section:
        """A table; its rows are the list ``key`` of the JSON."""
        self._results[key] = []
        head = [f"\n## {heading}\n", f"{text}\n", f"Checked in this run: {checked}.\n"]
        head += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        print("\n".join(head), flush=True)
        self._page += head
        return Section(self, key, checked)

    def add(self, key: str, row: Mapping[str, Any], line: str) -> None:
        """Keep a row, print it, write all."""
        print(line, flush=True)
        self._results[key].append(row)
        self._page.append(line)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.with_suffix(".json").write_text(json.dumps(self._results, indent=1) + "\n")
        source = (
            f"Raw data: [{self._path.name}.json]({self._path.name}.json). Command, from the repository's root: "
            f"`python packages/memory-pool/benchmarks/{self._results['environment']['command']}`."
        )
        self._path.with_suffix(".md").write_text("\n".join([*self._page, "", source]) + "\n")


class Section(NamedTuple):
    """Attributes: record: it belongs to; key: in the JSON; checked: what its rows have passed."""

    record: Record
    key: str
    checked: str

    def add(self, row: Mapping[str, Any], *cells: object) -> None:
        """One row, of which the table shows ``cells``."""
        self.record.add(self.key, {**row, "checked": self.checked}, f"| {' | '.join(map(str, cells))} |")


def show(nbytes: float) -> str:
    """Bytes for a table."""
    return format_bytes(int(nbytes))


def _chosen(path: Path) -> str:
    """The word in brackets in a kernel setting; "none" where there is no such setting."""
    try:
        return next(word.strip("[]") for word in path.read_text().split() if word.startswith("["))
    except (OSError, StopIteration):
        return "none"


def _processor() -> str:
    """From /proc where there is one: platform.processor() is empty on most Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
