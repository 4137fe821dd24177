"""Figures of dilated-memory-pool: allocations, warm memory, attention with a pool, waste and fragmentation."""

from __future__ import annotations

from typing import Any

from evidence.claim import Claim, Quote

README = "packages/memory-pool/README.md"
MIB = 1 << 20
MODES = ("lightweight", "full")


def _allocate(record: Any) -> dict[str, float]:
    rows = record["allocate"]
    ours = [1e6 * row["median"][mode] for row in rows for mode in MODES]
    bare = [1e6 * row["median"]["torch.empty"] for row in rows]
    [largest] = [1e6 * row["median"]["torch.empty"] for row in rows if row["nbytes"] == 64 * MIB]
    return {"least": min(ours), "most": max(ours), "torch": bare[0], "largest": largest}


def _bypass(record: Any) -> dict[str, float]:
    rows = record["pass_through"]
    added, bare, written = [], [], []
    for median in (row["median"] for row in rows):
        for mode in MODES:
            added.append(1e6 * (median[mode] - median["torch.empty"]))
            bare.append(median["torch.empty"] / median[mode])
            written.append(median["torch.empty, written"] / median[f"{mode}, written"])
    return {
        "added": sum(added) / len(added),
        "bare": sum(bare) / len(bare),
        "least_written": min(written),
        "most_written": max(written),
    }


def _waste(record: Any) -> dict[str, float]:
    [default] = [row["waste"] for row in record["waste"] if row["classes"] == "8 a doubling (default)"]
    [half] = [row["waste"] for row in record["waste"] if row["classes"] == "4 a doubling"]
    return {"mean": 100 * default["log-uniform"]["mean"], "mean_4": 100 * half["log-uniform"]["mean"]}


def _first_write(record: Any) -> dict[str, Any]:
    def of(part: str, name: str) -> list[float]:
        rows = [row["median"] for row in record[part] if row["nbytes"] in (32 * MIB, 64 * MIB, 256 * MIB)]
        return [median["torch.empty"] / median[name] for median in rows]

    def joined(ratios: list[float], form: str) -> str:
        return ", ".join(format(ratio, form) for ratio in ratios)

    again = [row for row in record["again"] if row["nbytes"] in (32 * MIB, 64 * MIB, 256 * MIB)]
    return {
        "again": joined(of("again", "full"), ".0f"),
        "glibc": joined(of("again", "MALLOC_ variables"), ".0f"),
        "first": joined(of("first", "full"), ".1f"),
        "faults": sum(row["page_faults"]["full"] for row in again),
    }


def _attention(record: Any) -> dict[str, float]:
    fields: dict[str, float] = {}
    for part in ("forward", "training", "dynamic"):
        ratios = [row["ratio"][mode] for row in record[part] for mode in MODES]
        fields |= {f"least_{part}": min(ratios), f"most_{part}": max(ratios)}
    memory = record["dynamic"][0]["memory"]
    for mode in MODES:
        fields[mode] = memory[mode]["rise_bytes"] / memory["no pool"]["rise_bytes"]
    return fields


def _fragmentation(record: Any) -> dict[str, float]:
    over = {row["pool"]: row["reserved_over_requested"] for row in record["unlimited"]}
    refused = {row["pool"]: row["refused"] for row in record["limited"]}
    full, light = "full, exact (default)", "lightweight, 8 a doubling (default)"
    return {
        "requests": record["limited"][0]["requests"],
        "full": over[full],
        "light": over[light],
        "refused": refused[full],
        "refused_light": refused[light],
    }


CLAIMS = (
    Claim(
        "memory-pool",
        "To allocate and free 4 KiB to 64 MiB takes {least:.1f} to {most:.1f} us in either mode; `torch.empty` takes "
        "{torch:.1f}, and {largest:.1f} at 64 MiB",
        "memory_pool_allocate",
        _allocate,
        (
            Quote(
                README,
                "| allocate and free, 4 KiB to 64 MiB, either mode | {least:.1f} to {most:.1f} us (`torch.empty` "
                "{torch:.1f}; {largest:.1f} at 64 MiB) |",
            ),
        ),
    ),
    Claim(
        "memory-pool",
        "What is left to `torch.empty`, below `min_bytes`, costs {added:.1f} us more than without a pool: {bare:.2f} "
        "of its speed bare, {least_written:.2f} to {most_written:.2f} with a first write",
        "memory_pool_allocate",
        _bypass,
        (
            Quote(
                README,
                "{added:.1f} us more than calling it yourself: {bare:.2f} of its speed bare, {least_written:.2f} to "
                "{most_written:.2f} with a first write",
            ),
        ),
    ),
    Claim(
        "memory-pool",
        "The default size classes of lightweight mode waste {mean:.1f} % on average, four a doubling {mean_4:.1f} %",
        "memory_pool_allocate",
        _waste,
        (
            Quote(README, "| waste of the default size classes in lightweight mode | {mean:.1f} % on average |"),
            Quote(README, "8 per doubling: {mean:.0f} % waste on average"),
            Quote(
                "packages/memory-pool/src/dilated_memory_pool/sizes.py",
                "waste {mean_4:.1f} % on average with 4 steps, {mean:.1f} % with 8",
            ),
        ),
    ),
    Claim(
        "memory-pool",
        "To allocate and fill 32, 64 and 256 MiB that a pool in full mode had before is {again} times as fast as "
        "`torch.empty`; told by two variables to keep freed memory, glibc alone is {glibc} times as fast",
        "memory_pool_first_write",
        _first_write,
        (
            Quote(
                README,
                "| allocate and fill 32, 64, 256 MiB that the pool had before | {again} times faster than "
                "`torch.empty`, without a page fault |",
            ),
            Quote(
                README,
                "| the same with glibc told to keep freed memory (two environment variables, no pool) | {glibc} times "
                "faster |",
            ),
        ),
    ),
    Claim(
        "memory-pool",
        "A new pool's first 32, 64 and 256 MiB are {first} times as fast, by huge pages",
        "memory_pool_first_write",
        _first_write,
        (Quote(README, "| a new pool's first 32, 64, 256 MiB | {first} times faster, by huge pages |"),),
    ),
    Claim(
        "memory-pool",
        "Dilated attention on a CPU gains nothing from a pool: {least_forward:.2f} to {most_forward:.2f} times the "
        "speed forward, {least_training:.2f} to {most_training:.2f} with the backward, {least_dynamic:.2f} to "
        "{most_dynamic:.2f} with lengths that change at every call",
        "memory_pool_attention",
        _attention,
        (
            Quote(
                README,
                "{least_forward:.2f} to {most_forward:.2f} times at 4k to 64k tokens forward, {least_training:.2f} to "
                "{most_training:.2f} with the backward pass, {least_dynamic:.2f} to {most_dynamic:.2f} with lengths "
                "that change at every call",
            ),
            Quote("docs/limits.md", "{least_forward:.2f} to {most_forward:.2f} times forward"),
            Quote(
                "packages/factory/src/dilated_factory/bench/pool_modes.py",
                "put attention on a CPU at {least_forward:.2f} to {most_training:.2f} times",
            ),
        ),
    ),
    Claim(
        "memory-pool",
        "With lengths that change, a pool multiplies what attention adds to the process's peak memory by "
        "{lightweight:.1f} in lightweight mode and by {full:.1f} in full mode",
        "memory_pool_attention",
        _attention,
        (
            Quote(
                README,
                "pool in lightweight mode raises the peak memory of changing lengths by {lightweight:.1f}, in full "
                "mode by {full:.1f}",
            ),
        ),
    ),
    Claim(
        "memory-pool",
        "Over {requests:,} allocations of a day, a pool reserves {full:.2f} times the peak of what is asked for in "
        "full mode and {light:.2f} times in lightweight mode; under a limit of 1.2 times that peak it refuses "
        "{refused} and {refused_light} requests",
        "memory_pool_fragmentation",
        _fragmentation,
    ),
)
