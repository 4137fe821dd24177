"""The "Pattern Caching Performance Analysis Report": what a cached pattern saves, in time and in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_factory.bench import claims, subjects
from dilated_factory.bench.cases import MIB, Case, Report, Said, compared, not_run, row, too_long, whole
from dilated_factory.bench.measuring import Candidate, Measured, measured
from dilated_factory.bench.results import Check, Row, Table
from dilated_factory.bench.settings import SEGMENT_LENGTHS
from dilated_factory.bench.subjects import Bench
from dilated_pattern_cache import DilatedIndexKey, DilatedPatternCache
from dilated_pattern_cache.indices import DilatedIndices, dilated_indices

NAME = "pattern-cache"
STATISTICS_CALLS = 5
TABLES = (
    Table(
        "lookup",
        "1. Pattern Generation vs Cache Lookup",
        "One pattern as index tensors: generated, and looked up with a key that is made anew at every call. The sizes "
        "are ours: the specification names its configurations only.",
        "A look-up here is that of a dictionary and does not grow with the pattern; that described takes 0.04 ms, and "
        "keeps patterns on the CPU and transfers them on demand. Neither says much of attention, which takes "
        "milliseconds to seconds.",
    ),
    Table(
        "forward",
        "2. End-to-End Forward Pass Performance",
        "A forward pass with the cache against without.",
        "Improved attention needs no index tensors: its plan is a few ranges and strides, made in less than a "
        "millisecond, so that there is little for a cache to save. The standard type keeps no plans, and takes no "
        "cache.",
    ),
    Table(
        "memory",
        "3. Memory Usage Analysis",
        f"Segments {list(SEGMENT_LENGTHS)}, batch 2, 4,096 tokens; the memory of what the cache holds included.",
        "What the specification saves are index tensors and what gathers by them leave; strides need neither, so that "
        "there is nothing to save.",
    ),
    Table(
        "statistics",
        "4. Cache Statistics",
        f"One improved attention with a fresh cache, called {STATISTICS_CALLS} times at each length of table 2.",
        "As described, and without an index tensor among what is kept. The hit rate is that after the first call of "
        "each length; the overhead is that of 100 entries, without their values.",
    ),
)


class Size(NamedTuple):
    """A configuration, and what the specification says of it: generation over look-up."""

    length: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    said: float


SIZES = {
    "Small": Size(1024, (256, 512), (1, 2), 1.47),
    "Medium": Size(4096, (1024, 2048, 4096), (1, 2, 4), 2.03),
    "Large": Size(16384, (2048, 4096, 8192), (1, 2, 4), 2.25),
    "XLarge": Size(32768, (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12), 2.42),
}
FORWARD_LENGTHS = {"small": 1024, "medium": 4096, "large": 8192}
# "ImprovedDilatedAttention ... (up to 5.84x speedup on small configs)"; the standard one "modest improvements".
FORWARD_SAID = {("improved", "small"): Said(5.84, None, "up to 5.84x")}
MODEST = "modest improvements"
MEMORY_LENGTH, MEMORY_BATCH = 4096, 2
SAVED, SAVED_OF = -64.0, 276.01


def cases(bench: Bench) -> list[Case]:
    """All of the report."""
    return [
        *(Case(f"look-up, {name}", partial(_look_up, name)) for name in SIZES),
        *(
            Case(f"{kind}, {size}", partial(_forward, kind, size), FORWARD_LENGTHS[size] / 1024)
            for kind in ("improved", "standard")
            for size in FORWARD_LENGTHS
        ),
        Case("memory", _memory, 4.0),
        Case("statistics", _statistics, 2.0),
    ]


def _look_up(name: str, bench: Bench, seconds: float) -> list[Row]:
    size = SIZES[name]
    heads, loops = bench.settings.heads, bench.settings.lookups
    cache = DilatedPatternCache()

    def generate() -> DilatedIndices:
        return dilated_indices(DilatedIndexKey(size.length, size.segment_lengths, size.dilation_rates, heads))

    def look_up() -> DilatedIndices:
        return cache.dilated_indices(size.length, size.segment_lengths, size.dilation_rates, heads)

    fewer = max(loops // 20, 1)  # a generation takes far longer
    check = partial(_right_indices, size, heads)
    found = measured(
        {
            "generated": Candidate(partial(_repeat, generate, fewer), check, weigh=False, loops=fewer),
            "looked up": Candidate(partial(_repeat, look_up, loops), check, weigh=False, loops=loops),
        },
        bench.settings,
        bench.device,
        seconds,
        tell=bench.tell,
    )
    facts = {"pattern": f"{size.length:,} tokens, {len(size.segment_lengths)} branches"}
    case = f"look-up, {name}"
    comparisons = compared(found["looked up"], found["generated"], Said(size.said))
    return whole(
        [
            row(NAME, "lookup", case, f"{name}, generated", found["generated"], facts=facts),
            row(NAME, "lookup", case, f"{name}, looked up", found["looked up"], facts=facts, comparisons=comparisons),
        ]
    )


def _repeat(run: Callable[[], Any], loops: int) -> Any:
    """The last of so many results."""
    for _ in range(loops - 1):
        run()
    return run()


def _right_indices(size: Size, heads: int, found: DilatedIndices) -> Check:
    """Against LongNet's formula, position by position."""
    positions = torch.arange(size.length)
    right = True
    for branch, (length, rate) in enumerate(zip(size.segment_lengths, size.dilation_rates, strict=True)):
        for head in range(heads):
            expected = positions[(positions % length) % rate == head % rate]
            right = right and torch.equal(found[branch][head % rate], expected)
    return Check(0.0 if right else None, 0.0, "the formula, position by position")


def _forward(kind: str, size: str, bench: Bench, seconds: float) -> list[Row]:
    length, case = FORWARD_LENGTHS[size], f"{kind}, {size}"
    label = f"{kind}, {length:,} tokens"
    refusal = too_long(bench, length)
    if refusal:
        return [not_run(NAME, "forward", case, label, refusal)]
    said = FORWARD_SAID.get((kind, size), Said(None, None, MODEST if kind == "standard" else "mixed results"))
    try:
        found = _with_and_without(kind, subjects.inputs(bench, length), bench, seconds)
    except TypeError as error:
        # A type that no cache can be given to.
        return [not_run(NAME, "forward", case, label, f"not run: {error}", said.text)]
    speed = [one for one in compared(found["cache"], found["no cache"], said) if one.what == "speed"]
    return whole(
        [
            row(NAME, "forward", case, f"{label}, no cache", found["no cache"]),
            row(NAME, "forward", case, f"{label}, cache", found["cache"], comparisons=speed),
        ]
    )


def _with_and_without(
    kind: str, tensors: tuple[Tensor, ...], bench: Bench, seconds: float, *, timed: bool = True
) -> dict[str, Measured]:
    right = subjects.expected(bench, tensors)
    made = {
        name: subjects.attention(bench, kind, **subjects.OFF, enable_pattern_cache=cached)
        for name, cached in (("no cache", False), ("cache", True))
    }
    candidates = {
        name: Candidate(
            partial(subject.module, *tensors),
            right.check,
            lambda subject=subject: subject.resources.cache_info().nbytes,  # type: ignore[misc]
        )
        for name, subject in made.items()
    }
    return measured(candidates, bench.settings, bench.device, seconds, tell=bench.tell, timed=timed)


def _memory(bench: Bench, seconds: float) -> list[Row]:
    length = min(MEMORY_LENGTH, bench.settings.longest)
    tensors = subjects.inputs(bench, length, MEMORY_BATCH)
    found = _with_and_without("improved", tensors, bench, seconds, timed=False)
    cached, plain = found["cache"], found["no cache"]
    comparisons = []
    if cached.peak_bytes is not None and plain.peak_bytes is not None:
        saved = (cached.peak_bytes - plain.peak_bytes) / MIB
        comparisons = [
            claims.change("peak memory", SAVED, saved, plain.peak_bytes / MIB),
            claims.ratio(
                "peak memory left",
                1 + SAVED / SAVED_OF,
                cached.peak_bytes / plain.peak_bytes,
                text=f"{1 + SAVED / SAVED_OF:.2f}x",
            ),
        ]
    label = f"improved, batch {MEMORY_BATCH}, {length:,} tokens"
    return whole(
        [
            row(NAME, "memory", "memory", f"{label}, no cache", plain),
            row(NAME, "memory", "memory", f"{label}, cache", cached, comparisons=comparisons),
        ]
    )


def _statistics(bench: Bench, seconds: float) -> list[Row]:
    lengths = [length for length in FORWARD_LENGTHS.values() if length <= bench.settings.longest]
    if not lengths:
        return [not_run(NAME, "statistics", "statistics", "cache", too_long(bench, min(FORWARD_LENGTHS.values())))]
    subject = subjects.attention(bench, "improved", **subjects.OFF, enable_pattern_cache=True)
    checks = []
    warm = subject.resources.cache_info()
    for call in range(STATISTICS_CALLS):
        for length in lengths:
            tensors = subjects.inputs(bench, length)
            checks.append(subjects.expected(bench, tensors).check(subject.module(*tensors)))
        if not call:
            warm = subject.resources.cache_info()
    worst = min(checks, key=lambda check: (check.passed, -(check.error or 0.0)))
    info = subject.resources.cache_info()
    later = info.hits - warm.hits + info.misses - warm.misses + info.waits - warm.waits
    rate = (info.hits - warm.hits) / later if later else 0.0
    kept = subject.resources.cache
    found = Measured(worst, why="" if worst.passed else f"its output differs from {worst.against}")
    figures = [
        ("hit rate after warm-up", claims.equal("hit rate", "100%", f"{rate:.0%}")),
        ("patterns kept", claims.equal("kept", True, 2 <= len(kept) <= 3)),
        ("evictions", claims.equal("evictions", 0, info.evictions)),
        ("overhead", claims.at_most("overhead", 1.0, _overhead() / 1e6, "MB")),
    ]
    said = {"patterns kept": ("2 to 3", str(len(kept)))}
    rows = []
    for name, comparison in figures:
        if name in said:
            claimed, ours = said[name]
            comparison = claims.Comparison(comparison.what, claimed, ours, comparison.verdict)
        rows.append(row(NAME, "statistics", "statistics", name, found, comparisons=[comparison]))
    return whole(rows)


def _overhead() -> int:
    """Bytes that a cache takes for 100 entries beyond their values."""
    keys = [("bench.overhead", number) for number in range(100)]
    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        cache = DilatedPatternCache(max_entries=len(keys))
        for key in keys:
            cache.get_or_create(key, object)
        now, _ = tracemalloc.get_traced_memory()
    finally:
        if not was_tracing:
            tracemalloc.stop()
    return now - before


REPORT = Report(NAME, "Pattern Caching Performance Analysis Report", TABLES, cases)
