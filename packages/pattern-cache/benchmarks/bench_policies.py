"""What leaves first: LRU against "gdsf" on recorded traces, under limits of bytes.

    python bench_policies.py                    under a minute
    python bench_policies.py --quick

Writes JSON and a Markdown page (default: docs/benchmarks). The traces are those of record_traces. Every replay runs
through PatternCache itself, and each of its look-ups must be the hit or the miss that a model of a few lines says.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import recording
import traces
from recording import Record, require
from traces import Trace

from dilated_pattern_cache import PatternCache

SHARES = (0.05, 0.1, 0.2, 0.4, 0.8)
NEVER = 1 << 60


# ------------------------------------------------------------------------------------------------ replays


def replay(trace: Trace, policy: str, limit: int) -> list[bool]:
    """Whether each look-up is a hit in a PatternCache of so many bytes. A value stands for its bytes."""
    cache = PatternCache[int, int](max_entries=None, max_bytes=limit, policy=policy, size_of=lambda nbytes: nbytes)
    found = []
    for place in trace.lookups:
        found.append(cache.get(place) is not None)
        key = trace.keys[place]
        if not found[-1] and key.nbytes <= limit:
            cache.put(place, key.nbytes, seconds=key.seconds)
    info = cache.info()
    require(
        info.hits == sum(found) and info.nbytes <= limit, f"the cache counts {sum(found)} hits, in its limit: {info}"
    )
    return found


def lru(trace: Trace, limit: int) -> list[bool]:
    """A model: what was used last is at the end."""
    held: OrderedDict[int, int] = OrderedDict()
    found = []
    for place in trace.lookups:
        found.append(place in held)
        if found[-1]:
            held.move_to_end(place)
        elif (nbytes := trace.keys[place].nbytes) <= limit:
            held[place] = nbytes
            while sum(held.values()) > limit:
                held.popitem(last=False)
    return found


def gdsf(trace: Trace, limit: int) -> list[bool]:
    """A model: H = L + frequency * seconds / bytes, the least of which leaves; of equals, who came first."""
    bases: dict[int, float] = {}
    uses: dict[int, int] = {}
    inflation = 0.0
    found = []

    def worth(place: int) -> float:
        return bases[place] + uses[place] * trace.keys[place].seconds / max(trace.keys[place].nbytes, 1)

    for place in trace.lookups:
        found.append(place in bases)
        if not found[-1]:
            if trace.keys[place].nbytes > limit:
                continue
            while sum(trace.keys[held].nbytes for held in (*bases, place)) > limit:
                first = min(bases, key=worth)
                inflation = max(inflation, worth(first))
                del bases[first]
            uses[place] = 0
        bases[place] = inflation
        uses[place] += 1
    return found


def farthest(trace: Trace, limit: int) -> list[bool]:
    """What nobody can do: know what is asked for next, and give up what is needed last. It looks at no size or cost."""
    comes_next: list[int] = [NEVER] * len(trace.lookups)
    last: dict[int, int] = {}
    for now in reversed(range(len(trace.lookups))):
        comes_next[now] = last.get(trace.lookups[now], NEVER)
        last[trace.lookups[now]] = now
    held: dict[int, int] = {}  # place -> when it is needed next
    found = []
    for now, place in enumerate(trace.lookups):
        found.append(place in held)
        if trace.keys[place].nbytes <= limit and comes_next[now] < NEVER:
            held[place] = comes_next[now]
        else:
            held.pop(place, None)
        while sum(trace.keys[other].nbytes for other in held) > limit:
            del held[max(held, key=held.__getitem__)]
    return found


MODELS: dict[str, Callable[[Trace, int], list[bool]]] = {"lru": lru, "gdsf": gdsf}


# ------------------------------------------------------------------------------------------------ the record


def scores(trace: Trace, found: Sequence[bool]) -> dict[str, float]:
    """Rates of hits, by number and by bytes, and the seconds that the misses take to make."""
    pairs = [(trace.keys[place], hit) for place, hit in zip(trace.lookups, found, strict=True)]
    return {
        "hit_rate": sum(found) / len(found),
        "byte_hit_rate": sum(key.nbytes for key, hit in pairs if hit) / sum(key.nbytes for key, _ in pairs),
        "seconds_missed": sum(key.seconds for key, hit in pairs if not hit),
    }


def compare(record: Record, trace: Trace, shares: Sequence[float]) -> None:
    """One trace, by limit."""
    once = sum(key.seconds for key in trace.keys)
    section = record.section(
        trace.name,
        f"The trace of {trace.name}",
        f"{trace.about} {len(trace.lookups):,} look-ups of {len(trace.keys)} keys, {trace.footprint / 2**20:.1f} MiB "
        f"in all; {trace.seconds:.2f} s with no cache, {once:.2f} s where each value is made once, the least. "
        "*gdsf to lru*: seconds missed with gdsf over those with LRU; above 1 gdsf does more work.",
        "each look-up of each replay is the hit or miss of an independent model of the policy; the cache's own count "
        "of hits and its limit",
        [
            "limit",
            *(f"{policy}: hits, bytes hit, s missed" for policy in (*MODELS, "farthest next use")),
            "gdsf to lru",
        ],
    )
    for share in shares:
        limit = int(share * trace.footprint)
        results = {"farthest next use": scores(trace, farthest(trace, limit))}
        for policy, model in MODELS.items():
            found = replay(trace, policy, limit)
            require(found == model(trace, limit), f"{policy} with {limit} bytes hits where its model does")
            results[policy] = scores(trace, found)
        ratio = results["gdsf"]["seconds_missed"] / results["lru"]["seconds_missed"]
        cells = [
            f"{score['hit_rate']:.1%}, {score['byte_hit_rate']:.1%}, {score['seconds_missed']:.3g}"
            for score in (results[policy] for policy in (*MODELS, "farthest next use"))
        ]
        row = {"limit": share, "limit_bytes": limit, "policies": results, "seconds_once": once, "gdsf_to_lru": ratio}
        section.add(row, f"{share:.0%}, {limit / 2**20:.1f} MiB", *cells, f"**{ratio:.2f}**")


def main() -> None:
    """Replay, print and write."""
    arguments = recording.parse(__doc__)
    if arguments.device.type != "cpu":
        print("a replay knows no device: nothing is measured there, see the record of the CPU")
        return
    record = Record("policies", "What leaves first", arguments)
    record.say(
        "The sequences of requests are synthetic: lengths drawn from the distributions stated below, with a seed. "
        "Costs and sizes are measured: the time to make each value (median of three) and its bytes, when the traces "
        "were recorded (record_traces.py). The limit is a share of what all values of the trace take together. "
        "*Farthest next use* knows the future, and looks at neither size nor cost: a reference, not a bound on seconds."
    )
    for path in sorted(traces.FOLDER.glob("*.json")):
        compare(record, traces.load(path), SHARES[1:4:2] if arguments.quick else SHARES)


if __name__ == "__main__":
    main()
