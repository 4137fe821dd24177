"""Allocate, fill, release: PyTorch's own memory against a pool's, and against what environment variables bring.

    python bench_first_write.py                 1 to 256 MiB, a minute
    python bench_first_write.py --quick
    python bench_first_write.py --device cuda

Writes JSON and a Markdown page (default: docs/benchmarks). The contents of every timed tensor are checked, off the
clock, against a value that changes from run to run. The variables (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_
of glibc, THP_MEM_ALLOC_ENABLE of PyTorch) are read when a process starts, so another process runs each of them and
takes its turn with the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import Any

import recording
import torch
from contenders import makers
from recording import ALTERNATIVES, MIB, Record, Sample, Worker, interleaved, ratio, require, summary, timed

from dilated_memory_pool import MemoryPool
from dilated_memory_pool.backends import HostBackend

GOAL = 2.5
GOAL_MIB = (32, 64, 256)
SIZES_MIB = (1, 4, 16, 32, 64, 128, 256)
# Calls a sample: so that the short ones take a while too. The first write of 64 MiB takes about twenty milliseconds.
BYTES_A_SAMPLE = 64 * MIB

_values = count(1)


def fill(empty: Callable[..., torch.Tensor], nbytes: int, number: int) -> Sample:
    """Allocate, fill and release, one of ``number``; SystemExit where the last does not hold what was written."""
    value = next(_values)

    def look(tensor: torch.Tensor) -> None:
        require(bool((tensor == value).all()), f"a tensor of {nbytes} bytes holds {value} everywhere")

    return timed(lambda: empty((nbytes // 4,), dtype=torch.float32).fill_(value), look, number)


def answer(nbytes: int, number: int) -> dict[str, Any]:
    """What another process does when it is asked."""
    return fill(torch.empty, nbytes, number)._asdict()


def pools(device: torch.device) -> dict[str, Callable[[], MemoryPool]]:
    """The pools to compare; on a host one without huge pages too."""
    found: dict[str, Callable[[], MemoryPool]] = dict(makers(device))
    if device.type == "cpu":
        found["lightweight, small pages"] = lambda: MemoryPool(HostBackend(huge_pages=False), mode="lightweight")
    return found


def cells(row: dict[str, Any], names: list[str]) -> list[str]:
    """Times of plain ``torch.empty``, ratios of the others, and the page faults of all."""
    faults = row["page_faults"]
    plain = f"{row['median']['torch.empty'] * 1e3:.2f} ({row['spread']['torch.empty']:.0%})"
    others = [f"{ratio(row, name, 'torch.empty')}; {faults[name]:.0f}" for name in names]
    return [f"{plain}; {faults['torch.empty']:.0f}", *others]


def time_again(
    record: Record,
    device: torch.device,
    alternatives: dict[str, dict[str, str]],
    sizes: tuple[int, ...],
    rounds: int,
) -> None:
    """Memory that was used before: what a pool is for."""
    names = [*pools(device), *alternatives]
    section = record.section(
        "again",
        "Memory that was used before",
        "`torch.empty(...).fill_(...)` against `pool.empty(...).fill_(...)`, fp32: how many times faster, with the "
        "spread; then the page faults of one run. The environment variables are measured with plain `torch.empty` in "
        f"a process of their own. The goal is {GOAL} at {', '.join(map(str, GOAL_MIB))} MiB.",
        "every element of the last tensor of every sample",
        ["MiB", "torch.empty, ms (spread); faults", *(f"{name}: ratio (spread); faults" for name in names), "goal met"],
    )
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(__file__, variables)) for name, variables in alternatives.items()}
        for mib in sizes:
            nbytes, number = mib * MIB, max(1, BYTES_A_SAMPLE // (mib * MIB))
            candidates = {"torch.empty": partial(fill, partial(torch.empty, device=device), nbytes, number)}
            made = {name: make() for name, make in pools(device).items()}
            candidates |= {name: partial(fill, pool.empty, nbytes, number) for name, pool in made.items()}
            candidates |= {
                name: partial(worker.sample, nbytes=nbytes, number=number) for name, worker in workers.items()
            }
            row: dict[str, Any] = {
                "nbytes": nbytes,
                "calls_a_sample": number,
                **summary(interleaved(candidates, rounds=rounds)),
            }
            for name, pool in made.items():
                seen = pool.statistics()
                require(seen.misses == 1 and seen.hits == (rounds + 1) * number - 1, f"{name} reused one block: {seen}")
            plain = row["median"]["torch.empty"]
            met = {name: plain / row["median"][name] >= GOAL for name in made} if mib in GOAL_MIB else {}
            row |= {"ratio": {name: plain / row["median"][name] for name in candidates}, "goal": GOAL, "goal_met": met}
            section.add(
                row,
                mib,
                *cells(row, names),
                ", ".join(f"{name}: {'yes' if is_met else 'no'}" for name, is_met in met.items()) or "-",
            )


def time_first(record: Record, device: torch.device, sizes: tuple[int, ...], rounds: int) -> None:
    """Memory that was never used: the first call of a new pool."""
    names = list(pools(device))
    section = record.section(
        "first",
        "The very first use",
        "The same of a new pool's first tensor: what it costs to bring memory in, and what huge pages save of it.",
        "every element",
        ["MiB", "torch.empty, ms (spread); faults", *(f"{name}: ratio (spread); faults" for name in names)],
    )

    def plain(nbytes: int) -> Sample:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # or it is not the first use
        return fill(partial(torch.empty, device=device), nbytes, 1)

    def fresh(make: Callable[[], MemoryPool], nbytes: int) -> Sample:
        pool = make()
        pool.empty(0)  # imports what tensors need
        return fill(pool.empty, nbytes, 1)

    for mib in sizes:
        nbytes = mib * MIB
        candidates = {"torch.empty": partial(plain, nbytes)}
        candidates |= {name: partial(fresh, make, nbytes) for name, make in pools(device).items()}
        row: dict[str, Any] = {"nbytes": nbytes, **summary(interleaved(candidates, rounds=rounds))}
        section.add(
            row,
            mib,
            *cells(row, names),
        )


def main() -> None:
    """Measure, print and write."""
    arguments = recording.parse(__doc__)
    record = Record("first_write", "Allocate, fill, release", arguments)
    sizes, rounds = ((1, 4), 2) if arguments.quick else (SIZES_MIB, 15)
    alternatives = ALTERNATIVES if arguments.device.type == "cpu" else {}
    if arguments.quick:  # each is a process that imports torch
        alternatives = dict(list(alternatives.items())[:1])
    time_again(record, arguments.device, alternatives, sizes, rounds)
    time_first(record, arguments.device, sizes, rounds)


if __name__ == "__main__":
    if recording.SERVE in sys.argv:
        recording.serve(answer)
    else:
        main()
