"""What was aimed at, and whether a recorded run reached it: read from the records, met or missed.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

from evidence.records import load


class Goal(NamedTuple):
    """One goal over some cases.

    Attributes:
        record: where it was measured.
        aim: in words, with its number.
        met: how many cases reached it.
        missed: those that did not, each with its figure.
    """

    record: str
    aim: str
    met: int
    missed: list[str]


def goals() -> list[Goal]:
    """All, in the order of the records."""
    return [goal for read in (_block_sparse, _core, _memory_pool, _pattern_cache, _factory) for goal in read()]


def _of(record: str, aim: str, cases: dict[str, bool]) -> Goal:
    return Goal(record, aim, sum(cases.values()), [case for case, met in cases.items() if not met])


def _block_sparse() -> Iterator[Goal]:
    name = "block_sparse_density"
    reached = {}
    for row in load(name)["rows"]:
        for way, goal, efficiency in zip(("forward", "both"), row["goal"], row["efficiency"], strict=True):
            if goal is not None:
                case = f"{row['case']}, {row['tokens']:,} tokens, {row['dtype']}, {way}: {efficiency:.2f} of {goal:.2f}"
                reached[case] = efficiency >= goal
    yield _of(name, "dense time x density / time of 0.55 to 0.85, each layout its own", reached)
    name = "block_sparse_layouts"
    goal = load(name)["goal"]
    [row] = [
        row for row in load(name)["layouts"] if (row["pattern"], row["tokens"]) == (goal["pattern"], goal["tokens"])
    ]
    met = row["peak_bytes"] < goal["bytes"] and median(row["seconds"]["build"]) < goal["seconds"]
    aim = f"a layout for {goal['tokens']:,} tokens below {goal['bytes'] / 1e6:.0f} MB and {goal['seconds']:.0f} s"
    yield _of(name, aim, {goal["pattern"]: met})


def _core() -> Iterator[Goal]:
    name = "short"
    reached = {
        f"{row['seq']:,} tokens, {row['dtype']}, {row['threads']} threads": row["median"]["ours"] <= row["allowed"]
        for row in load(name)["rows"]
    }
    yield _of(name, "a call within 300 us of a dense one of the same FLOPs at 0.9 of its rate", reached)


def _memory_pool() -> Iterator[Goal]:
    name = "memory_pool_allocate"
    record = load(name)
    reached = {
        f"{mode}, {row['nbytes']:,} bytes: {1e6 * row['median'][mode]:.1f} us": met
        for row in record["allocate"]
        for mode, met in row["within_goal"].items()
    }
    yield _of(name, "an allocation and its release within 5 us", reached)
    [default] = [row for row in record["waste"] if row["classes"].endswith("(default)")]
    yield _of(name, "the default size classes waste at most 5 %", {default["classes"]: default["within_goal"]})
    name = "memory_pool_first_write"
    reached = {
        f"{mode}, {row['nbytes'] >> 20} MiB": met
        for row in load(name)["again"]
        for mode, met in row.get("goal_met", {}).items()
    }
    yield _of(name, "warm memory 2.5 times as fast as `torch.empty` at 32, 64 and 256 MiB", reached)
    name = "memory_pool_attention"
    record = load(name)
    reached = {
        f"{mode}, {row['dtype']}: {row['ratio'][mode]:.2f}": met
        for row in record["forward"]
        for mode, met in row.get("goal_met", {}).items()
    }
    yield _of(name, "attention over 65,536 tokens 1.2 times as fast with a pool", reached)
    reached = {
        f"{mode}, {row['pass']} pass: {row['ratio'][mode]:.2f}": met
        for row in record["dynamic"]
        for mode, met in row.get("goal_met", {}).items()
    }
    yield _of(name, "attention over changing lengths 1.3 times as fast with a pool", reached)


def _pattern_cache() -> Iterator[Goal]:
    def judged(rows: list[Any], case: Any) -> dict[str, bool]:
        return {case(row): row["goal_met"] for row in rows if row["goal_met"] is not None}

    name = "pattern_cache_lookup"
    record = load(name)
    yield _of(name, "a hit within 0.6 us, with a kept key", judged(record["hits"], lambda row: row["key"]))

    def guarded(row: Any) -> str:
        return f"{row['value']}, guard {row['guard']}: {1e6 * row['median']['get_or_create']:.3g} us"

    yield _of(name, "the same by value and guard", judged(record["guards"], guarded))
    aim = "8 threads at once: at most 1.2 times `lru_cache` with a lock"
    yield _of(name, aim, judged(record["threads"], lambda row: row["key"]))
    yield _of(name, "a cache of 100 entries below 1 MB", judged(record["bytes"], lambda row: row["value"]))
    aim = "a hit 40 times faster than making dilated indices, 1,000 times than a block layout"
    yield _of(name, aim, judged(record["making"], lambda row: f"{row['what']}, {row['size']}: {row['times']:.0f}"))
    name = "pattern_cache_planning"
    aim = "planning below 1 % of a forward once it is cached"
    yield _of(name, aim, judged(load(name)["planning"], lambda row: row["forward"]))


def _factory() -> Iterator[Goal]:
    name = "gigapath"
    record = load(name)
    found = record["speedup"]["encoder"]
    aim = f"the encoder {record['goal']} times as fast as with torchscale's own code"
    yield _of(name, aim, {f"{found:.2f}": found >= record["goal"]})
    name = "overhead"
    record = load(name)
    limit = record["goals"]
    added = {
        f"{module}, {case}: {row['added']:.0f} us": row["added"] <= limit["call"]
        for module, rows in record["calls"].items()
        for case, row in rows.items()
        if case not in ("direct", "direct, two lengths", "a second direct module")
    }
    yield _of(name, f"at most {limit['call']:.0f} us added to a call", added)
    seconds = {what: median(taken) for what, taken in record["seconds"].items()}
    imports = {
        f"`{what}`: {1e3 * taken:.0f} ms": 1e3 * taken <= limit["import"]
        for what, taken in seconds.items()
        if "import" in what
    }
    yield _of(name, f"an import within {limit['import']:.0f} ms after torch", imports)
    yield _of(name, f"`dilated info` within {limit['info']} s", {"info": seconds["dilated info"] <= limit["info"]})
