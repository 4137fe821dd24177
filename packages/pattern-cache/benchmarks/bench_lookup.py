"""What a look-up costs: a hit against functools and cachetools, a hit against making the value, bytes of an entry.

    python bench_lookup.py                    under two minutes
    python bench_lookup.py --quick
    python bench_lookup.py --device cuda      values on the GPU against making them and moving them there

Writes JSON and a Markdown page (default: docs/benchmarks). What every candidate gives is looked at, and that none made
its value twice; what is generated is compared with a formula or a dense mask. Rows of cachetools are left out where
it is not installed.
"""

from __future__ import annotations

import gc
import tracemalloc
from argparse import Namespace
from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import repeat
from threading import Barrier, Lock, Thread
from typing import Any, NamedTuple

import recording
import torch
from layouts import block_layout, is_such_a_layout
from recording import Loop, Record, enough, interleaved, looped, require, shown, timed
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils import benchmark

from dilated_core import dilated_attention
from dilated_core.plan import make_tiles
from dilated_pattern_cache import (
    BlockLayoutKey,
    BlockMaskKey,
    DilatedIndexKey,
    DilatedPatternCache,
    PatternCache,
)
from dilated_pattern_cache.indices import DilatedIndices, dilated_indices

WITH_CACHETOOLS = find_spec("cachetools") is not None
GOAL_HIT = 0.6e-6
GOAL_THREADS = 1.2
GOAL_BYTES = 1_000_000
THREADS = 8
ENTRIES = 100
LENGTHS, RATES = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)  # LongNet's
LONGNET = DilatedIndexKey(65536, LENGTHS, RATES, heads=8)
FRESH = "a DilatedIndexKey made anew"
KEYS: dict[str, Hashable] = {
    "a tuple": ("dilated_core.tiles", LENGTHS, RATES, 65536, 8, "paper", False, range(8)),
    "a str": "dilated_s65536_seg2048-4096-8192-16384-32768_dil1-2-4-6-12_h8_paper",
    "a DilatedIndexKey": LONGNET,
    FRESH: LONGNET,
}
VALUES: dict[str, Callable[[], Any]] = {
    "an object": object,
    "a tensor": partial(torch.zeros, 16),
    "a tuple of 16 tensors": lambda: tuple(torch.zeros(16) for _ in range(16)),
}
LAYOUT: dict[str, Any] = {"window": 3, "global_columns": 2, "global_rows": 2, "random": 3}


# ------------------------------------------------------------------------------------------------ a hit


class Candidate:
    """A way to look a value up, in a loop.

    Args:
        statement: a look-up; it speaks of ``key``, which is replaced where the key is made anew, and of ``names``.
        get: the same as a function of the key.
        key: that is looked up.
        fresh: whether each look-up makes its own key.
        names: locals of the statement.
    """

    def __init__(
        self, statement: str, get: Callable[[Any], Any], key: Hashable, fresh: bool = False, **names: Any
    ) -> None:
        if fresh:
            statement = statement.replace("(key", "(Key(65536, lengths, rates, 8)").replace(
                "[key", "[Key(65536, lengths, rates, 8)"
            )
            names |= {"Key": DilatedIndexKey, "lengths": LENGTHS, "rates": RATES}
        self._get, self._key = get, key
        self.loop = looped(statement, key=key, **names)

    def value(self) -> Any:
        """What a look-up gives."""
        return self._get(self._key)


class Maker:
    """A ``create`` for one key after another, which remembers how often it was called."""

    def __init__(self, value: Any) -> None:
        self._value, self.calls = value, 0

    def __call__(self, key: Hashable = None) -> Any:
        """The value, whatever the key."""
        self.calls += 1
        return self._value


def candidates(
    key: Hashable, value: Any, fresh: bool
) -> tuple[dict[str, Candidate], list[Maker], PatternCache[Any, Any]]:
    """All ways, each holding ``ENTRIES`` values; what made these; and the cache of the first way."""
    others = [("another", number) for number in range(ENTRIES - 1)]
    makers = [Maker(value) for _ in range(5)]
    cache, second = PatternCache[Any, Any](max_entries=ENTRIES), PatternCache[Any, Any](max_entries=ENTRIES)
    locked_cache, bare, lock = lru_cache(maxsize=ENTRIES)(makers[2]), lru_cache(maxsize=ENTRIES)(makers[3]), Lock()

    def locked(key: Hashable) -> Any:
        with lock:
            return locked_cache(key)

    found = {
        "get_or_create": Candidate(
            "cache.get_or_create(key, create)",
            partial(cache.get_or_create, create=makers[0]),
            key, fresh, cache=cache, create=makers[0],
        ),
        "cache[key]": Candidate("cache[key]", second.__getitem__, key, fresh, cache=second),
        "lru_cache with a lock": Candidate("locked(key)", locked, key, fresh, locked=locked),
        "lru_cache bare": Candidate("bare(key)", bare, key, fresh, bare=bare),
    }  # fmt: skip
    if WITH_CACHETOOLS:
        import cachetools

        made = cachetools.cached(cachetools.LRUCache(ENTRIES), lock=Lock())(makers[4])
        found["cachetools with a lock"] = Candidate("made(key)", made, key, fresh, made=made)
    else:
        del makers[4]
    for other in (*others, key):
        second.get_or_create(other, makers[1])
        for name, one in found.items():
            if name != "cache[key]":
                one._get(other)
    return found, makers, cache


def look(found: dict[str, Candidate], makers: list[Maker], value: Any) -> None:
    """SystemExit where a candidate gives something else, or made something twice."""
    for name, candidate in found.items():
        require(candidate.value() is value, f"{name} gives the value")
    require(all(maker.calls == ENTRIES for maker in makers), "every value was made once")


def together(loop: Loop, number: int) -> float:
    """Seconds a look-up of the whole, where each of several threads runs ``number`` of them."""
    barrier = Barrier(THREADS)
    spans: list[tuple[float, float]] = []

    def work() -> None:
        barrier.wait(60)
        started = benchmark.timer()
        loop(number)
        spans.append((started, benchmark.timer()))

    threads = [Thread(target=work, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    require(len(spans) == THREADS, "all threads end")
    return (max(end for _, end in spans) - min(start for start, _ in spans)) / (number * THREADS)


def time_hits(record: Record, rounds: int, seconds: float) -> None:
    """One thread, by kind of key."""
    section = record.section(
        "hits",
        "A hit, by kind of key",
        f"Microseconds of one look-up of a plain object, by one thread, among {ENTRIES} entries, in a loop with no "
        "call around it. *lru_cache with a lock* is `with lock: return cached(key)` in a function: it makes a value "
        "once, and whoever wants another waits meanwhile. With *lru_cache bare* and `cachetools.cached(LRUCache, "
        "lock=...)` two threads may both make a value. A key made anew at each call costs what its checks and its "
        f"text cost, the same for all. The goal is {GOAL_HIT * 1e6:g} us with a kept key.",
        "each candidate gives the very object, and made each value once; the cache counted as many hits as were timed",
        ["key", *(f"{name}, us (spread)" for name in _names()), "goal met"],
    )
    for label, key in KEYS.items():
        value = object()
        found, makers, cache = candidates(key, value, label == FRESH)
        number = enough(found["get_or_create"].loop, seconds)
        before = cache.info().hits
        row = interleaved({name: partial(timed, one.loop, number) for name, one in found.items()}, rounds)
        counted = cache.info().hits - before
        require(counted == number * (rounds + 1), f"{number * (rounds + 1)} hits, the cache counted {counted}")
        look(found, makers, value)
        met = None if label == FRESH else row["median"]["get_or_create"] <= GOAL_HIT
        section.add(
            {"key": label, "calls_a_sample": number, **row, "goal_seconds": GOAL_HIT, "goal_met": met},
            label,
            *(shown(row, name) for name in found),
            _word(met),
        )


def time_guards(record: Record, rounds: int, seconds: float) -> None:
    """One thread, by value and guard."""
    ways = ("get_or_create", "cache[key]")
    section = record.section(
        "guards",
        "A hit, by value and guard",
        "As above, with the tuple as the key. *version* compares the version counters of all tensors, *contents* "
        f"compares every byte with a copy (tensors of 64 bytes here). The goal is {GOAL_HIT * 1e6:g} us.",
        "the very object; every look-up counted as a hit",
        ["value", "guard", *(f"{way}, us (spread)" for way in ways), "goal met"],
    )
    key = KEYS["a tuple"]
    for label, make in VALUES.items():
        for guard in ("version", None, "contents"):
            value = make()
            cache = PatternCache[Any, Any](max_entries=ENTRIES, guard=guard)
            create = Maker(value)
            cache.get_or_create(key, create)
            loops = {
                "get_or_create": looped("cache.get_or_create(key, create)", cache=cache, key=key, create=create),
                "cache[key]": looped("cache[key]", cache=cache, key=key),
            }
            number = enough(loops["get_or_create"], seconds)
            before = cache.info().hits
            row = interleaved({way: partial(timed, loop, number) for way, loop in loops.items()}, rounds)
            require(cache.info().hits - before == 2 * number * (rounds + 1), "every look-up is a hit")
            require(cache[key] is value and create.calls == 1, "the very object, made once")
            met = row["median"]["get_or_create"] <= GOAL_HIT
            named = {"value": label, "guard": guard, "calls_a_sample": number}
            section.add(
                {**named, **row, "goal_seconds": GOAL_HIT, "goal_met": met},
                label,
                guard,
                *(shown(row, way) for way in ways),
                _word(met),
            )


def time_threads(record: Record, rounds: int, seconds: float) -> None:
    """Several threads."""
    section = record.section(
        "threads",
        f"A hit, with {THREADS} threads",
        f"{THREADS} threads look the same key up, each in its loop, from a barrier on: microseconds from the first "
        "start to the last end, over the look-ups of all. Under the GIL no more than one runs at a time; what differs "
        f"is what they wait for beside it. The goal: at most {GOAL_THREADS} times lru_cache with a lock.",
        "each candidate gives the very object and made each value once; no hit is lost in the cache's count",
        ["key", *(f"{name}, us (spread)" for name in _names()), "times lru_cache with a lock", "goal met"],
    )
    for label, key in KEYS.items():
        value = object()
        found, makers, cache = candidates(key, value, label == FRESH)
        number = enough(found["get_or_create"].loop, seconds)
        before = cache.info().hits
        row = interleaved({name: partial(together, one.loop, number) for name, one in found.items()}, rounds)
        due = THREADS * number * (rounds + 1)
        require(cache.info().hits - before == due, f"{due} hits, the cache counted {cache.info().hits - before}")
        look(found, makers, value)
        times = row["median"]["get_or_create"] / row["median"]["lru_cache with a lock"]
        met = times <= GOAL_THREADS
        section.add(
            {"key": label, "threads": THREADS, "calls_a_sample": number, **row, "times": times, "goal_met": met},
            label,
            *(shown(row, name) for name in found),
            f"**{times:.2f}**",
            _word(met),
        )


# ------------------------------------------------------------------------------------------------ against making it


class Subject(NamedTuple):
    """Attributes: create: makes the value; right: whether a value is; goal: how many times a hit is to be faster."""

    name: str
    size: str
    key: Hashable
    create: Callable[[], Any]
    right: Callable[[Any], bool]
    goal: float | None
    call: str = "cache.get_or_create(key, create{device})"


def right_indices(key: DilatedIndexKey, found: DilatedIndices) -> bool:
    """Whether the positions are those of LongNet's formula, asked of every position."""
    everywhere = torch.arange(key.seq_len)
    for length, rate, offsets in zip(key.segment_lengths, key.dilation_rates, found, strict=True):
        if len(offsets) != min(rate, key.heads):
            return False
        for offset, positions in enumerate(offsets):
            if not torch.equal(positions.cpu(), everywhere[everywhere % length % rate == offset]):
                return False
    return True


def right_mask(found: Any, tokens: int, window: int, block: int = 128) -> bool:
    """Whether the blocks kept are those that hold a pair of the dense mask."""
    row = torch.arange(tokens)
    dense = (row[:, None] >= row) & (row[:, None] - row < window)
    blocks = dense.view(tokens // block, block, tokens // block, block).any(3).any(1)
    return bool((found.to_dense().cpu().view(blocks.shape).bool() == blocks).all())


def subjects(quick: bool, device: torch.device) -> list[Subject]:
    """What is made and looked up."""
    found = []
    api = "cache.dilated_indices(key.seq_len, key.segment_lengths, key.dilation_rates, key.heads{device})"
    for tokens in (4096, 65536) if quick else (4096, 8192, 16384, 32768, 65536):
        for heads in (8, 16) if not quick and tokens in (4096, 65536) else (8,):
            key = DilatedIndexKey(tokens, LENGTHS, RATES, heads)
            create, right = partial(dilated_indices, key), partial(right_indices, key)
            size = f"{tokens:,} tokens, {heads} heads"
            found.append(Subject("dilated indices, key kept", size, key, create, right, 40))
            found.append(Subject("dilated indices, key made anew", size, key, create, right, 40, call=api))
    if device.type == "cpu":
        found += [plan_of_the_core(tokens) for tokens in ((4096,) if quick else (8192, 65536))]
    rows = 64 if quick else 1024
    options: Any = {**LAYOUT, "seed": 0}  # any mapping will do
    found.append(
        Subject(
            "block layout",
            f"{rows:,} blocks a side",
            BlockLayoutKey(rows * 128, "bigbird", options=options),
            partial(block_layout, rows, **LAYOUT, device=device),
            partial(is_such_a_layout, **LAYOUT),
            None if quick else 1000,
        )
    )
    tokens, window = (512, 128) if quick else (8192, 1024)
    found.append(
        Subject(
            "create_block_mask, causal and window",
            f"{tokens:,} tokens",
            BlockMaskKey(tokens, tokens, "causal", options={"window": window}),  # type: ignore[arg-type]
            partial(
                create_block_mask,
                lambda batch, head, row, column: (row >= column) & (row - column < window),
                None, None, tokens, tokens, device=str(device),
            ),
            partial(right_mask, tokens=tokens, window=window),
            None,
        )
    )  # fmt: skip
    return found


def plan_of_the_core(tokens: int, heads: int = 8) -> Subject:
    """Tiles, by the key under which ``dilated_attention`` asks for them."""
    cache = DilatedPatternCache()
    x = torch.zeros(1, tokens, heads, 1)
    dilated_attention(x, x, x, LENGTHS, RATES, patterns=cache)
    key = ("dilated_core.tiles", LENGTHS, RATES, tokens, heads, "paper", False, range(heads))
    require(list(cache) == [key], f"dilated_attention asks for {key}, it asked for {list(cache)}")
    right = partial(list.__eq__, cache[key])
    create = partial(make_tiles, LENGTHS, RATES, tokens, heads, chosen=range(heads))
    return Subject("dilated_core's plan", f"{tokens:,} tokens, {heads} heads", key, create, right, None)


def on(device: torch.device, value: Any) -> Any:
    """The value there, where it is made on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(on(device, part) for part in value) if type(value) is tuple else value


def time_making(record: Record, arguments: Namespace, rounds: int, seconds: float) -> None:
    """A hit against making the value."""
    device = arguments.device
    section = record.section(
        "making",
        "A hit against making the value",
        "LongNet's pattern, segments "
        f"{', '.join(map(str, LENGTHS))} with rates {', '.join(map(str, RATES))}. Dilated indices of all branches and "
        "offsets of a layer, int64; with the key kept, and through `cache.dilated_indices`, which makes its key at "
        "each call. dilated_core's plan, by `make_tiles`, under the key that `dilated_attention` asks for. A block "
        "layout as BigBird's: a window of 3 blocks, 2 global blocks, 3 random ones in each row, made by dense tensor "
        "operations and kept as compressed rows. FlexAttention's block mask. PyTorch has one thread here: for "
        "operations this small a second one does not help, and where processors are busy it does harm. *Times*: how "
        "many times faster a hit is; the goal is 40 for dilated indices and 1,000 for a layout of 1,024 blocks a "
        "side."
        + ("" if device.type == "cpu" else " On a GPU: made and moved there, against `device=` with a copy kept."),
        "indices against the formula at every position, tiles against those that dilated_attention kept, the layout "
        "against a dense mask filled block by block, the block mask against the dense mask; a hit gives the same "
        "object at every look-up",
        ["what", "size", "making, us (spread)", "a hit, us (spread)", "times", "goal", "goal met"],
    )
    for subject in subjects(arguments.quick, device):
        cache = DilatedPatternCache()
        there: dict[str, Any] = {} if device.type == "cpu" else {"device": device}
        value = cache.get_or_create(subject.key, subject.create, **there)
        require(subject.right(value), f"{subject.name} of {subject.size} is right")
        hit = looped(
            subject.call.format(device=", device=device" if there else ""),
            cache=cache, key=subject.key, create=subject.create, device=device,
        )  # fmt: skip
        making = looped(
            "move(device, create())" if there else "create()", create=subject.create, move=on, device=device
        )
        loops = {"making": making, "hit": hit}
        numbers = {name: enough(loop, seconds) for name, loop in loops.items()}
        row = interleaved({name: partial(timed, loop, numbers[name]) for name, loop in loops.items()}, rounds)
        require(cache.info().creations == 1, f"{subject.name} was made once")
        require(cache.get_or_create(subject.key, subject.create, **there) is value, "a hit gives the same object")
        times = row["median"]["making"] / row["median"]["hit"]
        met = None if subject.goal is None else times >= subject.goal
        named = {"what": subject.name, "size": subject.size, "calls_a_sample": numbers}
        section.add(
            {**named, **row, "times": times, "goal": subject.goal, "goal_met": met},
            subject.name,
            subject.size,
            shown(row, "making"),
            shown(row, "hit"),
            f"**{times:,.0f}**",
            "-" if subject.goal is None else f"{subject.goal:,}",
            _word(met),
        )


# ------------------------------------------------------------------------------------------------ memory


def count_bytes(record: Record) -> None:
    """What the cache itself takes."""
    section = record.section(
        "bytes",
        "What the cache itself takes",
        f"Bytes that Python allocates (tracemalloc) for a cache of {ENTRIES} entries, each looked up ten times, beside "
        f"their keys and values. The goal is less than {GOAL_BYTES:,}.",
        f"{ENTRIES} entries and {10 * ENTRIES} hits are counted",
        ["value", "bytes", "bytes an entry", "goal met"],
    )
    for label, make in VALUES.items():
        keys, values = [("pattern", number) for number in range(ENTRIES)], [make() for _ in range(ENTRIES)]
        PatternCache[Any, Any]().put("first", make())  # imports what tensors need
        gc.collect()
        tracemalloc.start()
        try:
            cache = PatternCache[Any, Any](max_entries=ENTRIES)
            for key, value in zip(keys, values, strict=True):
                cache.put(key, value)
            for _ in repeat(None, 10):
                for key in keys:
                    cache[key]
            gc.collect()
            taken, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        info = cache.info()
        require((info.entries, info.hits) == (ENTRIES, 10 * ENTRIES), f"the cache holds and counts all: {info}")
        row = {"value": label, "entries": ENTRIES, "bytes": taken, "goal": GOAL_BYTES, "goal_met": taken < GOAL_BYTES}
        section.add(row, label, f"{taken:,}", f"{taken / ENTRIES:,.0f}", _word(taken < GOAL_BYTES))


def _names() -> list[str]:
    return [
        "get_or_create", "cache[key]", "lru_cache with a lock", "lru_cache bare",
        *(["cachetools with a lock"] if WITH_CACHETOOLS else []),
    ]  # fmt: skip


def _word(met: bool | None) -> str:
    return "-" if met is None else "yes" if met else "no"


def main() -> None:
    """Measure, print and write."""
    arguments = recording.parse(__doc__)
    record = Record("lookup", "What a look-up costs", arguments)
    rounds, seconds = (2, 1e-4) if arguments.quick else (11, 0.01)
    if arguments.device.type == "cpu":
        time_hits(record, rounds, seconds)
        time_guards(record, rounds, seconds)
        time_threads(record, rounds, seconds)
        count_bytes(record)
    else:
        print("hits by key, guard and thread, the bytes of an entry and dilated_core's plan know no device: skipped")
    torch.set_num_threads(1)
    time_making(record, arguments, rounds, seconds)


if __name__ == "__main__":
    main()
