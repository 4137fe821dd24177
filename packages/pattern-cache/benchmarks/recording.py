"""What these benchmarks share: options, loops timed in turns, and the record on disk.

A figure is compared with others taken in turns in one run, so that a machine that slows down slows all alike. The
clock (which waits for a GPU) and the statistics are those of ``torch.utils.benchmark``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils import benchmark

Loop: TypeAlias = Callable[[int], None]


# ------------------------------------------------------------------------------------------------ measuring


def looped(statement: str, **names: Any) -> Loop:
    """A function of a number that runs the statement so often, with no call around it; ``names`` are its locals."""
    defaults = "".join(f", {name}={name}" for name in names)
    source = f"def loop(number, repeat=repeat{defaults}):\n    for _ in repeat(None, number):\n        {statement}\n"
    scope = {"repeat": repeat, **names}
    exec(source, scope)  # a call of a function that holds the statement would be half of what is measured
    loop: Loop = scope["loop"]
    return loop


def timed(loop: Loop, number: int) -> float:
    """Seconds of one run of ``number``."""
    started = benchmark.timer()
    loop(number)
    return (benchmark.timer() - started) / number


def settle(loop: Loop, seconds: float) -> None:
    """Run it for so long off the clock: the threads of PyTorch take a moment until they keep step."""
    end = benchmark.timer() + seconds
    while benchmark.timer() < end:
        loop(1)


def enough(loop: Loop, seconds: float) -> int:
    """How many runs take that long, to the next power of two. It warms up, too."""
    number = 1
    while timed(loop, number) * number < seconds:
        number *= 2
    return number


def interleaved(candidates: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of the candidates, in turns: all once, then all again; the first round is not kept.

    Returns:
        JSON-ready: all seconds, their median, their spread (interquartile range over median), by name.
    """
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(1 + rounds):
        for name, candidate in candidates.items():
            seconds = candidate()
            if round_ > 0:
                taken[name].append(seconds)
    measured = {
        name: benchmark.Measurement(1, seconds, benchmark.TaskSpec(name, "")) for name, seconds in taken.items()
    }
    return {
        "seconds": {name: found.times for name, found in measured.items()},
        "median": {name: found.median for name, found in measured.items()},
        "spread": {name: found.iqr / found.median for name, found in measured.items()},
    }


def shown(row: Mapping[str, Any], name: str, unit: float = 1e-6) -> str:
    """The median in units of so many seconds, with its spread, for a table."""
    return f"{row['median'][name] / unit:.3g} ({row['spread'][name]:.0%})"


def require(holds: bool, claim: str) -> None:
    """End the program where a check fails: no figure without one."""
    if not holds:
        raise SystemExit(f"check failed: {claim}; nothing more is reported")


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
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "switch_interval": sys.getswitchinterval(),
        "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


class Record:
    """The results of one benchmark: printed as they come and written after every row, so that a run that is cut short
    keeps what it measured.

    Args:
        name: of the files: pattern_cache_NAME.json and .md.
        title: of the page.
        arguments: of ``parse``.
    """

    def __init__(self, name: str, title: str, arguments: argparse.Namespace) -> None:
        self._path = arguments.output / f"pattern_cache_{name}"
        self._results: dict[str, Any] = {
            "environment": environment(),
            "device": str(arguments.device),
            "quick": arguments.quick,
        }
        where = self._results["environment"]
        self._page = [
            f"# {title}\n",
            f"{where['date']}, Python {where['python']}, torch {where['torch']}, {where['processor']}, "
            f"{where['cores']} cores, {where['threads']} threads, kernel {where['kernel']}, "
            f"{', '.join(where['cuda']) or 'no GPU'}."
            + (" **A quick run, to see that it works: no figures to quote.**" if arguments.quick else ""),
            "",
            (
                "Times are medians of runs taken in turns; the spread in brackets is the interquartile range over the "
                "median."
            ),
        ]

    def say(self, text: str) -> None:
        """A paragraph of the page."""
        print(f"\n{text}", flush=True)
        self._page += ["", text]

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
            f"`python packages/pattern-cache/benchmarks/{self._results['environment']['command']}`."
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


def _processor() -> str:
    """From /proc where there is one: platform.processor() is empty on most Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
