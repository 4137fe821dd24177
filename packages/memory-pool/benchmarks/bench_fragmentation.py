"""What pooling costs in memory over a day: a trace of many thousand allocations, replayed on every kind of pool.

    python bench_fragmentation.py                   50,000 allocations, a minute
    python bench_fragmentation.py --quick
    python bench_fragmentation.py --device cuda     10,000, beside PyTorch's caching allocator, a minute

Writes JSON and a Markdown page (default: docs/benchmarks). The trace comes from a seed and nothing is written to the
memory, so all figures but the times are the same at every run. Each pool is first replayed under a watch that finds
blocks which overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

import recording
import torch
import traces
from contenders import KINDS, LIGHTWEIGHT_EXACT, backends, named
from recording import Record, Sample, interleaved, require, show, summary

from dilated_memory_pool import MemoryPool, PoolLimitError

TORCH = "torch's caching allocator"
# Of what is asked for at the peak: what the limited runs may reserve.
LIMIT = 1.2
SAMPLES = 50


def kinds(device: torch.device) -> dict[str, Callable[..., MemoryPool]]:
    """name -> what makes such a pool on ``device``; it takes a limit."""
    return {
        named(chosen["backend"], name): partial(MemoryPool, **chosen, **arguments)
        for chosen in backends(device)
        for name, arguments in KINDS.items()
        if name != LIGHTWEIGHT_EXACT  # it would keep nearly every request of the day
    }


def moment(pool: MemoryPool) -> dict[str, float]:
    """What is sampled on the way."""
    seen = pool.statistics()
    return {
        "requested_bytes": seen.requested_bytes,
        "reserved_bytes": seen.reserved_bytes,
        "fragmentation": seen.fragmentation,
        "waste": seen.waste,
    }


def look_through(name: str, make: Callable[..., MemoryPool], trace: list[traces.Event]) -> dict[str, Any]:
    """Replay under watch; SystemExit where blocks overlap, or something is held at the end."""
    pool = make()
    watch = traces.Watch(pool.allocate, lambda block: int(block.address))
    replayed = traces.replay(trace, watch, sample=partial(moment, pool), samples=SAMPLES)
    seen = pool.statistics()
    requests, peak = traces.requests(trace), traces.peak_bytes(trace)
    require(watch.overlaps == 0, f"no two live blocks of {name} overlap")
    require(seen.requested_bytes == seen.allocated_bytes == 0, f"{name} holds nothing at the end: {seen}")
    require(seen.hits + seen.misses == requests, f"{name} served {requests} requests: {seen}")
    require(seen.peak_requested_bytes == peak, f"{name} saw the trace's peak of {peak} bytes: {seen}")
    return {
        "peak_requested_bytes": peak,
        "peak_reserved_bytes": seen.peak_reserved_bytes,
        "reserved_over_requested": seen.peak_reserved_bytes / peak,
        "hit_rate": seen.hit_rate,
        "arenas": seen.misses,
        "fragmentation": fmean(sample["fragmentation"] for sample in replayed.samples),
        "waste": fmean(sample["waste"] for sample in replayed.samples),
        "samples": replayed.samples,
    }


def look_through_torch(device: torch.device, trace: list[traces.Event]) -> dict[str, Any]:
    """The same of PyTorch's own allocator, from its own counters."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)
    watch = traces.Watch(torch_empty(device), lambda tensor: int(tensor.data_ptr()))
    traces.replay(trace, watch)
    seen = torch.cuda.memory_stats(device)
    require(watch.overlaps == 0, f"no two live tensors of {TORCH} overlap")
    requests, peak = traces.requests(trace), traces.peak_bytes(trace)
    arenas = seen["num_device_alloc"] - before["num_device_alloc"]
    reserved = seen["reserved_bytes.all.peak"] - before["reserved_bytes.all.current"]
    return {
        "peak_requested_bytes": peak,
        "peak_reserved_bytes": reserved,
        "reserved_over_requested": reserved / peak,
        "hit_rate": 1 - arenas / requests,
        "arenas": arenas,
        # Its counters do not tell the largest free block, so there is no fragmentation to compare.
        "fragmentation": None,
        "waste": 1 - seen["requested_bytes.all.peak"] / seen["allocated_bytes.all.peak"],
    }


def torch_empty(device: torch.device) -> Callable[[int], torch.Tensor]:
    """Bytes from PyTorch."""
    return lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=device)


def time_blocks(make: Callable[..., MemoryPool], trace: list[traces.Event]) -> Sample:
    """Seconds of one operation with ``pool.allocate``, in a new pool."""
    return an_operation(traces.replay(trace, make().allocate), trace)


def time_tensors(make: Callable[..., MemoryPool], trace: list[traces.Event]) -> Sample:
    """Seconds of one operation with ``pool.empty``, in a new pool."""
    pool = make(min_bytes=0)
    pool.empty(0)  # imports what tensors need
    return an_operation(traces.replay(trace, lambda nbytes: pool.empty(nbytes, dtype=torch.uint8)), trace)


def time_torch(device: torch.device, trace: list[traces.Event]) -> Sample:
    """Seconds of one operation with PyTorch's own allocator, which has nothing cached at first."""
    torch.cuda.empty_cache()
    return an_operation(traces.replay(trace, torch_empty(device)), trace)


def an_operation(replayed: traces.Replay, trace: list[traces.Event]) -> Sample:
    """Nothing is written to, so page faults are not counted."""
    return Sample(replayed.seconds / len(trace), 0)


def measure(record: Record, device: torch.device, trace: list[traces.Event], rounds: int) -> None:
    """Without a limit."""
    section = record.section(
        "unlimited",
        "Without a limit",
        f"{traces.requests(trace):,} allocations of attention-like sizes with lifetimes from ten "
        f"to {max(mean for _, mean in traces.LIFETIMES):,} allocations on average, {show(traces.peak_bytes(trace))} "
        "alive at the peak. *Reserved over asked for*: the peaks of both, the price of pooling. *Fragmentation*: 1 - "
        "largest free span / all that is free, the mean of samples over the day (in lightweight mode, where every "
        "block is its own arena, it says how many blocks are cached). *Waste*: of what is handed out, what nobody "
        "asked for. *An operation*: an allocation or a release, as blocks without PyTorch and as tensors.",
        "no two live blocks overlap at any time; peaks, hits and misses agree with the trace; nothing is held at last",
        [
            "pool",
            "reserved over asked for",
            "hits",
            "arenas mapped",
            "fragmentation",
            "waste",
            "us an operation (spread)",
        ],
    )
    makers = kinds(device)
    rows = {name: look_through(name, make, trace) for name, make in makers.items()}
    runs: dict[str, Callable[[], Sample]] = {}
    for name, make in makers.items():
        runs[name] = partial(time_blocks, make, trace)
        runs[f"{name}, tensors"] = partial(time_tensors, make, trace)
    if device.type == "cuda":
        rows[TORCH] = look_through_torch(device, trace)
        runs[f"{TORCH}, tensors"] = partial(time_torch, device, trace)
    times = summary(interleaved(runs, rounds=rounds, warmup=0))
    for name, row in rows.items():
        ways = {"blocks": name, "tensors": f"{name}, tensors"}
        timing = {
            key: {way: times[key][run] for way, run in ways.items() if run in times[key]}
            for key in ("seconds", "median", "spread")
        }
        section.add(
            {"pool": name, **row, **timing},
            name,
            f"**{row['reserved_over_requested']:.2f}**",
            f"{row['hit_rate']:.1%}",
            row["arenas"],
            "-" if row["fragmentation"] is None else f"{row['fragmentation']:.0%}",
            f"{row['waste']:.1%}",
            ", ".join(
                f"{way} {found * 1e6:.1f} ({timing['spread'][way]:.0%})" for way, found in timing["median"].items()
            ),
        )


def squeeze(record: Record, device: torch.device, trace: list[traces.Event]) -> None:
    """Under a limit."""
    requests, limit = traces.requests(trace), int(LIMIT * traces.peak_bytes(trace))
    section = record.section(
        "limited",
        "Under a limit",
        f"The same with a limit of {LIMIT} times the peak of what is asked for, {show(limit)}: how many requests are "
        "refused. A pool gives back what is idle before it refuses.",
        "the reserved bytes never exceed the limit; every request is served or refused; nothing is held at last",
        ["pool", "refused", "of the requests", "peak reserved over the limit", "arenas mapped", "arenas given back"],
    )
    for name, make in kinds(device).items():
        pool = make(limit=limit)
        replayed = traces.replay(trace, pool.allocate, refusal=PoolLimitError)
        seen = pool.statistics()
        require(seen.peak_reserved_bytes <= limit, f"{name} stays within its limit: {seen}")
        require(seen.hits + seen.misses + replayed.failed == requests, f"{name} answers all requests: {seen}")
        require(seen.ooms == replayed.failed and seen.allocated_bytes == 0, f"{name} balances its books: {seen}")
        row: dict[str, Any] = {
            "pool": name,
            "limit_bytes": limit,
            "refused": replayed.failed,
            "requests": requests,
            "peak_reserved_bytes": seen.peak_reserved_bytes,
            "arenas": seen.misses,
            "trims": seen.trims,
            "seconds": replayed.seconds,
        }
        peak = f"{seen.peak_reserved_bytes / limit:.2f}"
        section.add(row, name, replayed.failed, f"{replayed.failed / requests:.2%}", peak, seen.misses, seen.trims)
    if device.type == "cuda":
        row = squeeze_torch(device, trace, limit)
        peak = f"{row['peak_reserved_bytes'] / limit:.2f}"
        section.add(row, TORCH, row["refused"], f"{row['refused'] / requests:.2%}", peak, row["arenas"], row["trims"])


def squeeze_torch(device: torch.device, trace: list[traces.Event], limit: int) -> dict[str, Any]:
    """The same of PyTorch's own allocator, whose limit is a fraction of the device's memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)
    held = before["reserved_bytes.all.current"]
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((held + limit) / total, device)
    try:
        replayed = traces.replay(trace, torch_empty(device), refusal=torch.cuda.OutOfMemoryError)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    seen = torch.cuda.memory_stats(device)
    return {
        "pool": TORCH,
        "limit_bytes": limit,
        "refused": replayed.failed,
        "requests": traces.requests(trace),
        "peak_reserved_bytes": seen["reserved_bytes.all.peak"] - held,
        "arenas": seen["num_device_alloc"] - before["num_device_alloc"],
        "trims": seen["num_device_free"] - before["num_device_free"],
        "seconds": replayed.seconds,
    }


def main() -> None:
    """Measure, print and write."""
    arguments = recording.parse(__doc__)
    record = Record("fragmentation", "A day of allocations", arguments)
    is_gpu = arguments.device.type == "cuda"  # with two backends, and arenas that wait for the device when they go
    trace = traces.day(400 if arguments.quick else 10_000 if is_gpu else 50_000)
    measure(record, arguments.device, trace, rounds=2 if arguments.quick else 3 if is_gpu else 5)
    squeeze(record, arguments.device, trace)


if __name__ == "__main__":
    main()
