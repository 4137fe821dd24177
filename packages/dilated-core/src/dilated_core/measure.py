"""Measuring: interleaved times, peak memory and the environment, for every benchmark of the project.

A figure is a ratio of medians taken in turns in one run, so that a machine that slows down slows all alike.
"""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch.autograd.profiler import profile

# In one timed run, however short a call is: a clock may stand still between two readings.
MOST_CALLS = 1000


@dataclass(frozen=True)
class Timing:
    """Wall times of one candidate.

    Attributes:
        seconds: one entry a repeat, in the order they were taken.

    >>> Timing((3.0, 1.0, 2.0)).median
    2.0
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median; 0 with fewer than two repeats."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    enough: float = math.inf,
    shortest: float = 0.0,
) -> dict[str, Timing]:
    """Time the candidates in turns: all once, then all again.

    Args:
        candidates: name -> what to run. CUDA work is waited for.
        repeats: timed rounds.
        warmup: rounds before them that are not counted.
        enough: seconds after which a candidate's timed runs are enough, and it sits out the remaining rounds.
        shortest: seconds that a timed run should take. A quicker candidate is called several times in a row, and their
            mean counts, so that waiting for the device and reading the clock weigh little beside the work.

    Returns:
        name -> Timing, of one call each.

    Raises:
        ValueError: repeats is below 1, or shortest below 0.

    >>> sorted(interleaved({"a": lambda: 1, "b": lambda: 2}, repeats=3))
    ['a', 'b']
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    if not 0 <= shortest < math.inf:
        raise ValueError(f"shortest: expected a number of seconds, at least 0, got {shortest}")
    for _ in range(warmup):
        for run in candidates.values():
            _timed(run, 1)
    calls = dict.fromkeys(candidates, 1)
    if shortest > 0:
        for name, run in candidates.items():
            calls[name] = math.ceil(min(MOST_CALLS, max(1.0, shortest / _timed(run, 1))))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            if sum(seconds[name]) * calls[name] < enough:
                seconds[name].append(_timed(run, calls[name]) / calls[name])
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def peak_memory(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes of tensor memory that ``run`` has at most beyond what was there before, its result included.

    On a CPU from the allocator's own events, so exact and free of what malloc keeps; on CUDA from its statistics.

    Args:
        run: what to measure; called once.
        device: whose memory.

    Returns:
        Bytes.

    >>> peak_memory(lambda: torch.empty(1000, dtype=torch.uint8))
    1000
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Not torch.profiler's: that one makes a tree of Python objects of all events, which takes longer than the run.
    with _quiet_standard_error(), profile(use_cpu=True, use_kineto=True, profile_memory=True) as profiler:
        result = run()
    del result
    held = peak = 0
    events = profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def environment() -> dict[str, object]:
    """What a figure depends on: versions, processor, threads, devices, date (UTC), command. JSON-ready.

    >>> sorted(environment())[:4]
    ['command', 'cores', 'cpu_capability', 'cuda']
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(terse=True),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda_runtime": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def results_folder(output: Path | str, device: torch.device | str) -> Path:
    """Where a benchmark's figures of this device belong: ``output`` itself, or on CUDA a folder below it for each card.

    Args:
        output: the folder of all figures.
        device: what is measured.

    Raises:
        ValueError: a CUDA device that is not there.

    >>> results_folder("docs/benchmarks", "cpu").as_posix()
    'docs/benchmarks'
    """
    device = torch.device(device)
    if device.type != "cuda":
        return Path(output)
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"device: expected one of {count} CUDA devices, got {device}")
    return Path(output) / card_folder(torch.cuda.get_device_name(index))


def card_folder(name: str) -> str:
    """A card's name, as CUDA has it, for a folder.

    >>> card_folder("NVIDIA H200"), card_folder("NVIDIA H100 80GB HBM3"), card_folder("NVIDIA A100-SXM4-80GB")
    ('h200', 'h100-80gb-hbm3', 'a100-sxm4-80gb')
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower().removeprefix("nvidia ")).strip("-.")


@contextmanager
def _quiet_standard_error() -> Iterator[None]:
    """Keep file descriptor 2 silent: torch 2.13's profiler announces itself there, from C++, at every use."""
    descriptor = 2
    sys.stderr.flush()
    kept = os.dup(descriptor)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), descriptor)
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


def _processor() -> str:
    """The processor's name: from /proc where there is one (platform.processor() is empty on most Linux systems)."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _timed(run: Callable[[], object], calls: int) -> float:
    """Seconds of so many calls, from an idle device to an idle device."""
    _wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
