"""What an allocation costs: time of allocate and free, of small tensors left to PyTorch, and what size classes waste.

    python bench_allocate.py                    the full tables, a minute
    python bench_allocate.py --quick
    python bench_allocate.py --device cuda      against PyTorch's caching allocator, a minute

Writes JSON and a Markdown page (default: docs/benchmarks). Before a candidate is timed, what it hands out is looked
at; afterwards the pool's own counters must show that every timed call was served in the way that the row says.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import recording
import torch
import traces
from contenders import makers
from recording import MIB, Record, Sample, interleaved, ratio, require, show, summary, timed

from dilated_memory_pool import MemoryPool
from dilated_memory_pool.sizes import Exact, Geometric, SizeClasses

GOAL_MICROSECONDS = 5.0
GOAL_WASTE = 0.05
SIZES = tuple(1 << power for power in (12, 14, 16, 18, 20, 22, 24, 26))
SMALL = tuple(1 << power for power in (12, 14, 16, 17, 18, 19))  # below the default of min_bytes
CLASSES: dict[str, SizeClasses] = {
    "power_of_two": Geometric(1),
    "4 a doubling": Geometric(4),
    "8 a doubling (default)": Geometric(8),
    "16 a doubling": Geometric(16),
    "exact (pages)": Exact(),
}
SMALLEST, LARGEST = MIB, 256 * MIB


class Candidate:
    """Something to time, and what it must have done to its pool by then.

    Args:
        make: allocates; what it returns is released at once.
        pool: that ``make`` draws from; None for PyTorch alone.
        served: the counter of the pool that every call must raise by one: "hits" or "bypasses".
    """

    def __init__(self, make: Callable[[], Any], pool: MemoryPool | None = None, served: str = "hits") -> None:
        self._make, self._pool, self._served = make, pool, served
        self._calls = 0
        self._before = self._counters()

    def look(self, nbytes: int) -> None:
        """SystemExit where what it hands out is wrong. Once before the counters start."""
        owner = self._make()
        found = owner.nbytes, str(owner.device).split(":")[0]
        if isinstance(owner, torch.Tensor):
            owner[0], owner[-1] = 7, 9
            require(
                owner.is_contiguous() and (owner[0].item(), owner[-1].item()) == (7, 9), "tensors keep what is written"
            )
        if self._pool is not None:
            require(
                found == (nbytes, self._pool.device.split(":")[0]), f"{nbytes} bytes on {self._pool.device}: {found}"
            )
            require(self._pool.owns(owner) == (self._served == "hits"), f"{self._pool} is the one that serves")
        del owner
        self._before = self._counters()

    def sample(self, number: int) -> Sample:
        """One of ``number`` calls."""
        self._calls += number
        return timed(self._make, number=number)

    def audit(self) -> None:
        """SystemExit where a timed call was not served as told, or something is still held."""
        before, now = self._before, self._counters()
        if before is not None and now is not None:
            change = {name: now[name] - before[name] for name in now}
            expected = {name: self._calls * (name == self._served) for name in ("hits", "misses", "bypasses")}
            require(change == expected | {"allocated": 0}, f"{self._pool} served {expected}, it counted {change}")

    def _counters(self) -> dict[str, int] | None:
        if self._pool is None:
            return None
        seen = self._pool.statistics()
        counters = {"hits": seen.hits, "misses": seen.misses, "bypasses": seen.bypasses}
        return counters | {"allocated": seen.allocated_bytes}


def written(make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """``make`` and a first write."""
    return lambda: make().fill_(1)


def pooled(pool: MemoryPool, nbytes: int, served: str = "hits", write: bool = False) -> Candidate:
    """``pool.empty`` of so many bytes; a candidate has its pool alone, so that its counters are its own."""
    make = partial(pool.empty, (nbytes // 4,), dtype=torch.float32)
    return Candidate(written(make) if write else make, pool, served)


def busy(pool: MemoryPool, blocks: int) -> list[object]:
    """Fill ``pool`` with blocks of 64 KiB to 4 MiB and free every other one: what it has to search in real use."""
    draw = random.Random(0)
    held: list[object] = [pool.allocate(draw.randrange(1 << 16, 1 << 22)) for _ in range(blocks)]
    del held[::2]
    return held


def compare(candidates: dict[str, Candidate], nbytes: int, rounds: int, number: int) -> dict[str, Any]:
    """Look, time in turns, audit."""
    for candidate in candidates.values():
        candidate.look(nbytes)
    taken = interleaved({name: partial(one.sample, number) for name, one in candidates.items()}, rounds=rounds)
    for candidate in candidates.values():
        candidate.audit()
    return {"nbytes": nbytes, "calls_a_sample": number, **summary(taken)}


def time_allocations(record: Record, arguments: argparse.Namespace, rounds: int, number: int, blocks: int) -> None:
    """Allocate and free, not written to."""
    device = arguments.device
    names = [*makers(device), *(f"{name}, busy" for name in makers(device) if "full" in name)]
    section = record.section(
        "allocate",
        "Allocate and free",
        f"Microseconds of one `torch.empty` and of one `pool.empty` of the same size in fp32, released at once and not "
        f"written to; `min_bytes=0`, so that every size is the pool's own. *Blocks*: `pool.allocate`, without PyTorch. "
        f"*Busy*: beside {blocks // 2} live blocks and as many holes. The goal is {GOAL_MICROSECONDS:.0f} us.",
        "size, device, first and last element of what is handed out; that the pool owns it; that its counters show one "
        "hit for every timed call and nothing held at the end",
        ["size", "torch.empty, us", *(f"{name}, us (spread)" for name in names), "blocks, us", "within the goal"],
    )
    for nbytes in SIZES[:: 3 if arguments.quick else 1]:
        candidates = {
            "torch.empty": Candidate(partial(torch.empty, (nbytes // 4,), dtype=torch.float32, device=device))
        }
        for name, make in makers(device).items():
            candidates[name] = pooled(make(min_bytes=0), nbytes)
            pool = make()
            candidates[f"{name}, blocks"] = Candidate(partial(pool.allocate, nbytes), pool)
        held = []
        for name, make in makers(device).items():
            if f"{name}, busy" in names:
                pool = make(min_bytes=0)
                held.append(busy(pool, blocks))
                candidates[f"{name}, busy"] = pooled(pool, nbytes)
        row = compare(candidates, nbytes, rounds, number)
        del held
        row["goal_seconds"] = GOAL_MICROSECONDS / 1e6
        micro = {name: seconds * 1e6 for name, seconds in row["median"].items()}
        row["within_goal"] = {
            name: found <= GOAL_MICROSECONDS for name, found in micro.items() if name != "torch.empty"
        }
        section.add(
            row,
            show(nbytes),
            f"{micro['torch.empty']:.2f}",
            *(f"{micro[name]:.2f} ({row['spread'][name]:.0%})" for name in names),
            ", ".join(f"{found:.2f}" for name, found in micro.items() if name.endswith("blocks")),
            "yes" if all(row["within_goal"].values()) else "no",
        )


def time_small(record: Record, arguments: argparse.Namespace, rounds: int, number: int) -> None:
    """Below min_bytes, where PyTorch serves."""
    device = arguments.device
    names = list(makers(device))
    section = record.section(
        "pass_through",
        "Below min_bytes",
        "`pool.empty` of less than 1 MiB is left to `torch.empty`. How many times faster than plain `torch.empty`, "
        "bare and with a first write (`fill_`); and with `min_bytes=0` and a first write: what the limit is there for.",
        "as above, and one bypass counted for every timed call, with `min_bytes=0` one hit",
        [
            "size",
            "torch.empty, us: bare, written",
            *(f"{name}: bare; written; written, min_bytes=0" for name in names),
        ],
    )
    for nbytes in SMALL[:: 3 if arguments.quick else 1]:
        plain = partial(torch.empty, (nbytes // 4,), dtype=torch.float32, device=device)
        candidates = {"torch.empty": Candidate(plain), "torch.empty, written": Candidate(written(plain))}
        for name, make in makers(device).items():
            candidates[name] = pooled(make(), nbytes, "bypasses")
            candidates[f"{name}, written"] = pooled(make(), nbytes, "bypasses", write=True)
            candidates[f"{name}, written, min_bytes=0"] = pooled(make(min_bytes=0), nbytes, write=True)
        row = compare(candidates, nbytes, rounds, number)
        micro = {name: seconds * 1e6 for name, seconds in row["median"].items()}
        cells = [
            f"{ratio(row, name, 'torch.empty')}; {ratio(row, f'{name}, written', 'torch.empty, written')}; "
            f"{ratio(row, f'{name}, written, min_bytes=0', 'torch.empty, written')}"
            for name in names
        ]
        section.add(row, show(nbytes), f"{micro['torch.empty']:.2f}, {micro['torch.empty, written']:.2f}", *cells)


def waste_of(classes: SizeClasses, sizes: Sequence[int]) -> dict[str, float]:
    """Of what is allocated, the part nobody asked for: on average over the requests, and over the bytes."""
    rounded = [classes.round_up(nbytes) for nbytes in sizes]
    return {
        "mean": sum(1 - nbytes / given for nbytes, given in zip(sizes, rounded, strict=True)) / len(sizes),
        "of_bytes": 1 - sum(sizes) / sum(rounded),
    }


def count_waste(record: Record, requests: int) -> None:
    """Size classes on three kinds of sizes."""
    draw = random.Random(0)
    doublings = (LARGEST // SMALLEST).bit_length() - 1
    tokens = [length * nbytes for length in traces.lengths(requests) for nbytes in traces.TOKEN_BYTES]
    kinds = {
        "log-uniform": [int(SMALLEST * 2 ** (doublings * draw.random())) for _ in range(requests)],
        "uniform": [draw.randrange(SMALLEST, LARGEST) for _ in range(requests)],
        "attention": [nbytes for nbytes in tokens if nbytes >= SMALLEST],
    }
    section = record.section(
        "waste",
        "What size classes waste",
        f"Sizes from {show(SMALLEST)} to {show(LARGEST)}, evenly over their logarithm and evenly; and the tensors of "
        f"an attention layer ({traces.HEADS} heads of {traces.HEAD_DIM}, fp32 and bf16) of 1k to 64k tokens, evenly "
        "over the logarithm, where they are of 1 MiB and more. Of the memory handed out, what nobody asked for: "
        f"on average over the requests, and of all bytes. The goal is {GOAL_WASTE:.0%}.",
        "no class is smaller than what it serves",
        ["classes", *(f"{kind}: mean, of bytes" for kind in kinds), "within the goal"],
    )
    for name, classes in CLASSES.items():
        require(
            all(classes.round_up(size) >= size for sizes in kinds.values() for size in sizes),
            "classes are large enough",
        )
        waste = {kind: waste_of(classes, sizes) for kind, sizes in kinds.items()}
        within = all(found["mean"] <= GOAL_WASTE for found in waste.values())
        row = {"classes": name, "requests": requests, "waste": waste, "goal": GOAL_WASTE, "within_goal": within}
        cells = [f"{found['mean']:.1%}, {found['of_bytes']:.1%}" for found in waste.values()]
        section.add(row, name, *cells, "yes" if within else "no")


def count_hits(record: Record, counts: Sequence[int]) -> None:
    """How often sizes that change from call to call meet a free block of their class."""
    section = record.section(
        "hits",
        "How often classes meet again",
        "A sequence of lengths that change from call to call, 1k to 64k tokens, evenly over the logarithm; at each "
        "call three tensors of the length are alive at once (the output and two of scratch). Hit rate, and the memory "
        "reserved at the peak over the memory asked for at the peak. `full` splits and joins, with exact sizes. (What "
        "dilated attention really asks for is replayed in bench_attention.)",
        "nothing is held at the end, and hits and misses add up to the requests",
        ["classes", *(f"{count} calls: hits; reserved over asked for" for count in counts)],
    )
    pools: dict[str, Callable[[], MemoryPool]] = {
        name: partial(MemoryPool, "host", size_classes=classes) for name, classes in CLASSES.items()
    }
    pools["full"] = partial(MemoryPool, "host", mode="full")
    for name, make in pools.items():
        row: dict[str, Any] = {"classes": name, "calls": {}}
        for count in counts:
            trace = three_at_once(traces.lengths(count))
            pool = make()
            traces.replay(trace, pool.allocate)
            seen = pool.statistics()
            require(seen.requested_bytes == 0 and seen.hits + seen.misses == 3 * count, f"{name} balances its books")
            pooling = seen.peak_reserved_bytes / traces.peak_bytes(trace)
            row["calls"][count] = {"hit_rate": seen.hit_rate, "reserved_over_requested": pooling}
        section.add(
            row,
            name,
            *(f"{found['hit_rate']:.0%}; {found['reserved_over_requested']:.2f}" for found in row["calls"].values()),
        )


def three_at_once(lengths: Sequence[int]) -> list[traces.Event]:
    """For each length three tensors of it, released together."""
    trace: list[traces.Event] = []
    for call, length in enumerate(lengths):
        keys = range(3 * call, 3 * call + 3)
        trace += [traces.Event(key, length * traces.TOKEN_BYTES[0]) for key in keys]
        trace += [traces.Event(key, 0) for key in keys]
    return trace


def main() -> None:
    """Measure, print and write."""
    arguments = recording.parse(__doc__)
    record = Record("allocate", "What an allocation costs", arguments)
    rounds, number, blocks = (2, 20, 20) if arguments.quick else (21, 2000, 1000)
    if arguments.device.type == "cuda" and not arguments.quick:
        number = 500  # two backends to time, and a tensor of a device costs more to make
    time_allocations(record, arguments, rounds, number, blocks)
    time_small(record, arguments, rounds, number)
    if arguments.device.type == "cpu":
        count_waste(record, 1000 if arguments.quick else 100_000)
        count_hits(record, (10,) if arguments.quick else (40, 400))
    else:
        print("what size classes waste and how often they meet again know no device: see the record of the CPU")


if __name__ == "__main__":
    main()
