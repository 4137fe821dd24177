"""The "Factory Auto-Enable Benchmark Report" again: which pool the policy takes, and what that pool brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from dilated_factory.bench import claims, subjects
from dilated_factory.bench.cases import Case, Report, Said, compared, not_run, row, too_long, whole
from dilated_factory.bench.measuring import Measured, measured
from dilated_factory.bench.results import Row, Table
from dilated_factory.bench.subjects import Bench

NAME = "auto-enable"
TABLES = (
    Table(
        "verification",
        "Auto-Enable Logic Verification",
        "The pool that `module.decision` names after a call of that length, of a module that was told no length.",
        "The thresholds are the specification's own, as data in `Policy`, so these rows agree by construction; what is "
        "shown is that a call's own length decides, and that its output is right.",
    ),
    Table(
        "performance",
        "Performance Impact by Sequence Length",
        "Improved attention with the pool that the policy takes, against the same attention without one.",
        "Where the policy takes no pool both sides run the same code, and what differs is noise. From 4,096 tokens "
        "this attention works through a window at a time and asks for little memory: on a CPU page faults, which are "
        "all that a pool can save, are 1 to 2 % of its time, and a pool keeps what it has reserved. The pool of the "
        "library described handed one memory to two living tensors, which takes less of it, and its attention is not "
        "the one named.",
    ),
    Table(
        "implementations",
        "Implementation-Specific Results",
        "Each type with a pool against the same without, at the specification's length.",
        "At 512 and 1,024 tokens tensors are about as small as what a pool leaves to PyTorch. The standard type is a "
        "plain composition of PyTorch's operations, which allocate for themselves, so that no pool can be given to it. "
        "The ring is one rank, whose work is that of improved attention; the ring described attended inside each chunk "
        "only.",
    ),
)

POOLS = {512: "off", 2048: "off", 4096: "lightweight", 8192: "full"}
SAID = {
    512: Said(0.91, 0.0, "9 % slower"),
    2048: Said(1.29, 0.0),
    4096: Said(1.03, -3.0),
    8192: Said(1.72, -8.0),
}
# "Short sequences: pools correctly disabled, avoiding 9-47 % overhead": times longer by that much.
FORCED = Said((1 / 1.47, 1 / 1.09), None, "9 to 47 % slower")
NOTHING = "nothing"
"""What a pool served; then both sides do the same work, and their ratio is noise."""

TYPES: Sequence[tuple[str, int, Said]] = (
    ("improved", 8192, Said(1.72, -8.0)),
    ("standard", 4096, Said(1.28, -3.0)),
    ("ring", 512, Said(1.58, 1.1)),
    ("block_sparse", 1024, Said(0.57, -1.0)),
)


def cases(bench: Bench) -> list[Case]:
    """All of the report."""
    return [
        *(Case(f"verification of {n:,}", partial(_verify, n), 0.2) for n in POOLS),
        *(Case(f"performance at {n:,}", partial(_perform, n), n / 512) for n in SAID),
        *(
            Case(f"{name} at {n:,}", partial(pool_on_and_off, NAME, "implementations", name, n, said), n / 512)
            for name, n, said in TYPES
        ),
    ]


def _verify(length: int, bench: Bench, seconds: float) -> list[Row]:
    case, name = f"verification of {length:,}", f"{length:,} tokens"
    refusal = too_long(bench, length)
    if refusal:
        return [not_run(NAME, "verification", case, name, refusal, POOLS[length])]
    tensors = subjects.inputs(bench, length)
    subject = subjects.attention(bench, "improved")
    candidates = {name: subject.candidate(tensors, subjects.expected(bench, tensors))}
    found = measured(candidates, bench.settings, bench.device, seconds, tell=bench.tell, timed=False)[name]
    chosen = subject.module.decision.pool_mode
    comparisons = [claims.equal("pool", POOLS[length], chosen)]
    return [row(NAME, "verification", case, name, found, comparisons=comparisons)]


def _perform(length: int, bench: Bench, seconds: float) -> list[Row]:
    case = f"performance at {length:,}"
    pools = {"no pool": subjects.OFF, "policy": subjects.POLICY}
    said = {"policy": SAID[length]}
    if POOLS[length] == "off":
        pools["pool all the same"] = {"enable_memory_pool": True}
        said["pool all the same"] = FORCED
    return pools_in_turns(NAME, "performance", case, "improved", length, pools, said, bench, seconds)


def pool_on_and_off(
    report: str, table: str, name: str, length: int, said: Said, bench: Bench, seconds: float
) -> list[Row]:
    """A type with the pool of the policy, or a lightweight one where that takes none, and without."""
    pools = {"no pool": subjects.OFF, "pool": {"enable_memory_pool": True}}
    return pools_in_turns(report, table, f"{name} at {length:,}", name, length, pools, {"pool": said}, bench, seconds)


def pools_in_turns(
    report: str,
    table: str,
    case: str,
    name: str,
    length: int,
    pools: Mapping[str, Mapping[str, Any]],
    said: Mapping[str, Said],
    bench: Bench,
    seconds: float,
) -> list[Row]:
    """One attention with several pools; the first is the baseline, and should be none."""
    refusal = too_long(bench, length) or subjects.lacks(name)
    label = f"{name}, {length:,} tokens"
    said_of_all = "; ".join(dict.fromkeys(one.text for one in said.values()))
    if refusal:
        return [not_run(report, table, case, label, refusal, said_of_all)]
    tensors = subjects.inputs(bench, length)
    try:
        made = {pool: subjects.attention(bench, name, **options) for pool, options in pools.items()}
    except (ImportError, TypeError, ValueError) as error:
        # Such as a type that no pool can be given to.
        return [not_run(report, table, case, label, f"not run: {error}", said_of_all)]
    right = subjects.expected(bench, tensors, next(iter(made.values())))
    candidates = {pool: subject.candidate(tensors, right) for pool, subject in made.items()}
    found = measured(candidates, bench.settings, bench.device, seconds, tell=bench.tell)
    baseline: Measured = next(iter(found.values()))
    rows = []
    for number, (pool, subject) in enumerate(made.items()):
        served = _served(subject)
        against = compared(found[pool], baseline, said.get(pool), same_work=served == NOTHING) if number else ()
        facts = {"pool": subject.module.decision.pool_mode, "served by it": served if number else "-"}
        rows.append(row(report, table, case, f"{label}, {pool}", found[pool], facts=facts, comparisons=against))
    return whole(rows)


def _served(subject: subjects.Subject) -> str:
    """What the pool did: requests that it served, those without new memory among them."""
    numbers = list(subject.resources.statistics().values())
    served = sum(one.hits + one.misses for one in numbers)
    reused = sum(one.hits for one in numbers)
    return f"{reused:,} of {served:,} reused" if served else NOTHING


REPORT = Report(NAME, "Factory Auto-Enable Benchmark Report", TABLES, cases)
