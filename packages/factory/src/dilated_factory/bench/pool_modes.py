"""The "Memory Pool Integration Summary Report": off, lightweight and full, changing lengths, and kinds of buffers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dilated_factory.bench import claims, subjects
from dilated_factory.bench.auto_enable import TYPES, pool_on_and_off, pools_in_turns
from dilated_factory.bench.cases import MIB, Case, Report, Said, compared, not_run, row, too_long, whole
from dilated_factory.bench.measuring import Candidate, Expected, Measured, measured
from dilated_factory.bench.results import Row, Table
from dilated_factory.bench.subjects import Bench
from dilated_factory.resources import SharedResources
from dilated_memory_pool.attention import BufferKind

NAME = "pool-modes"
TABLES = (
    Table(
        "modes",
        "Performance Results: short, medium and long sequences",
        "Improved attention without a pool, with a lightweight and with a full one.",
        "A pool pays where memory that PyTorch would map anew is written once and thrown away. Here each byte is "
        "worked on for long: recorded runs of dilated-memory-pool put attention on a CPU at 0.97 to 1.06 times, with "
        "either mode. What a pool has reserved it keeps, so peak memory rises.",
    ),
    Table(
        "special",
        "Special Implementations",
        "Types that the specification singles out, with a pool against without.",
        "A pool leaves tensors below 1 MiB to PyTorch, which is most of what 512 and 1,024 tokens need, so that "
        "neither the gain nor the overhead described has a cause here. The standard type takes no pool.",
    ),
    Table(
        "dynamic",
        "Lessons Learned: dynamic workloads and peak memory",
        "Lengths that change at every call. *Attention*: forward passes. *Buffers*: two at a time are made, filled, "
        "looked at and thrown away.",
        "The 3.47x is one of allocation: large bare buffers, which the C library gives back to the system at every "
        "call, show it and more; attention, which needs few of them and computes for long, does not. Peak memory "
        "rises because pools keep memory of the sizes that they were asked for, and a full one takes it from the "
        "system in large pieces.",
    ),
    Table(
        "kinds",
        "Buffer Types (AttentionBufferManager)",
        "What each kind of buffer was asked for in calls of one improved attention made with `buffer_manager=True`.",
        "There are ten kinds, as described. A forward pass writes no scores and no weights at all: the kernel keeps "
        "them in tiles. Cache, communication and mask belong to decoding, rings and padding.",
    ),
)

# A medium sequence's lightweight pool: "3-28 % performance improvement"; the long one's full pool: 72 %.
MODES: dict[int, dict[str, Said]] = {
    1024: {name: Said((1 / 1.47, 1 / 1.09), 0.0, "9 to 47 % slower") for name in ("lightweight", "full")},
    4096: {"lightweight": Said((1.03, 1.28), -3.0, "3 to 28 % faster")},
    8192: {"full": Said(1.72, -8.0, "72 % faster")},
}
POOLS = {"off": subjects.OFF, "lightweight": subjects.LIGHTWEIGHT, "full": subjects.FULL}
SPECIAL_WORDS = {"ring": "58 % faster", "standard": "28 % faster", "block_sparse": "some overhead"}
DYNAMIC_LENGTHS = (1024, 4096, 512, 8192, 2048, 6144, 768, 3072)
REUSE = 3.47
PEAK = (1.7, 2.8)
KINDS_LENGTH, KINDS_CALLS = 8192, 4


def cases(bench: Bench) -> list[Case]:
    """All of the report."""
    special = [
        (name, length, Said(said.speed, None, SPECIAL_WORDS[name]))
        for name, length, said in TYPES
        if name in SPECIAL_WORDS
    ]
    return [
        *(Case(f"modes at {n:,}", partial(_modes, n), n / 1024) for n in MODES),
        *(
            Case(f"{name} at {n:,}", partial(pool_on_and_off, NAME, "special", name, n, said), n / 1024)
            for name, n, said in special
        ),
        Case("dynamic attention", _dynamic_attention, 20.0),
        Case("dynamic buffers", _dynamic_buffers, 6.0),
        Case("kinds", _kinds, 4.0),
    ]


def _modes(length: int, bench: Bench, seconds: float) -> list[Row]:
    case = f"modes at {length:,}"
    return pools_in_turns(NAME, "modes", case, "improved", length, POOLS, MODES[length], bench, seconds)


def _dynamic_attention(bench: Bench, seconds: float) -> list[Row]:
    lengths = [length for length in DYNAMIC_LENGTHS if length <= bench.settings.longest]
    if len(lengths) < 2:
        return [not_run(NAME, "dynamic", "dynamic attention", "attention", too_long(bench, max(DYNAMIC_LENGTHS)))]
    tensors = {length: subjects.inputs(bench, length) for length in lengths}
    each = {length: subjects.expected(bench, tensors[length]) for length in lengths}
    exact = torch.cat([each[length].values for length in lengths], 1)
    right = Expected(exact, f"{subjects.DEFINITION}, at every length", bench.tolerance)
    made = {pool: subjects.attention(bench, "improved", **options) for pool, options in POOLS.items()}

    def series(subject: subjects.Subject) -> Tensor:
        return torch.cat([subject.module(*tensors[length])[:, each[length].rows] for length in lengths], 1)

    candidates = {
        pool: Candidate(partial(series, subject), right.check, subject.pool_bytes) for pool, subject in made.items()
    }
    found = measured(candidates, bench.settings, bench.device, seconds, tell=bench.tell)
    what = f"attention, {len(lengths)} lengths of {min(lengths):,} to {max(lengths):,}"
    return _dynamic_rows("dynamic attention", what, found)


def _dynamic_rows(case: str, what: str, found: dict[str, Measured]) -> list[Row]:
    rows = []
    for number, (pool, one) in enumerate(found.items()):
        against = compared(one, found["off"], Said(REUSE)) if number else []
        against = [comparison for comparison in against if comparison.what == "speed"]
        peak, before = one.peak_bytes, found["off"].peak_bytes
        if number and peak and before:
            against.append(claims.memory_within(*PEAK, peak / before, "70 to 180 % more"))
        rows.append(row(NAME, "dynamic", case, f"{what}, {pool}", one, comparisons=against))
    return whole(rows)


def _dynamic_buffers(bench: Bench, seconds: float) -> list[Row]:
    numbers = [mebibytes * MIB // 4 for mebibytes in bench.settings.buffer_mebibytes]
    # Each filled with a number of its own: memory that two living tensors share holds the later one's.
    corners = [float(sign * (index + 1)) for index in range(len(numbers)) for sign in (1, 1, -1, -1)]
    right = Expected(torch.tensor(corners, dtype=torch.float64), "the numbers they were filled with", 0.0)
    resources = {pool: SharedResources() for pool in ("lightweight", "full")}

    def plain(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=bench.device)

    def pooled(pool: Any, count: int) -> Tensor:
        tensor: Tensor = pool.empty((count,), dtype=torch.float32, device=bench.device)
        return tensor

    def series(empty: Callable[[int], Tensor]) -> Tensor:
        seen = []
        for index, count in enumerate(numbers):
            first, second = empty(count).fill_(index + 1), empty(count).fill_(-index - 1)
            seen += [first[0], first[-1], second[0], second[-1]]
        return torch.stack([one.clone() for one in seen])

    candidates = {"off": Candidate(partial(series, plain), right.check)}
    for mode, own in resources.items():
        pool = own.pool(bench.device, mode)  # type: ignore[arg-type]
        candidates[mode] = Candidate(
            partial(series, partial(pooled, pool)),
            right.check,
            lambda pool=pool: pool.statistics().peak_reserved_bytes,  # type: ignore[misc]
        )
    found = measured(candidates, bench.settings, bench.device, seconds, tell=bench.tell)
    sizes = bench.settings.buffer_mebibytes
    return _dynamic_rows("dynamic buffers", f"buffers of {min(sizes)} to {max(sizes)} MiB", found)


def _kinds(bench: Bench, seconds: float) -> list[Row]:
    length = min(KINDS_LENGTH, bench.settings.longest)
    tensors = subjects.inputs(bench, length)
    right = subjects.expected(bench, tensors)
    managed = subjects.attention(bench, "improved", buffer_manager=True)
    plain = subjects.attention(bench, "improved", **subjects.OFF)
    candidates = {
        "no pool": plain.candidate(tensors, right),
        "buffer_manager=True": managed.candidate(tensors, right),
    }
    found = measured(candidates, bench.settings, bench.device, seconds, tell=bench.tell)
    rows = [row(NAME, "kinds", "kinds", f"improved, {length:,} tokens, {name}", one) for name, one in found.items()]
    numbers = managed.resources.statistics()
    kinds = [kind for _, kind in numbers]
    facts = {
        kind: {
            "requests": f"{one.hits + one.misses + one.bypasses:,}",
            "reused": f"{one.hits:,}",
            "new memory": f"{one.misses:,}",
            "left to PyTorch": f"{one.bypasses:,}",
            "at once, MiB": f"{one.peak_requested_bytes / MIB:.1f}",
        }
        for (_, kind), one in numbers.items()
    }
    count = claims.equal("kinds", 10, len(BufferKind))
    manager = found["buffer_manager=True"]
    rows[1] = row(
        NAME,
        "kinds",
        "kinds",
        rows[1].name,
        manager,
        comparisons=[*compared(manager, found["no pool"]), count],
    )
    for kind in BufferKind:
        used = kind.value in kinds
        rows.append(
            Row(
                NAME,
                "kinds",
                "kinds",
                kind.value,
                facts=facts.get(kind.value, {}),
                why="" if used and not manager.why else (manager.why or "not asked for in a forward pass"),
            )
        )
    return whole(rows)


REPORT = Report(NAME, "Memory Pool Integration Summary Report", TABLES, cases)
