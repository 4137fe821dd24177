"""Figures of dilated-pattern-cache: a hit, a hit against making the value, planning in a forward, what leaves first."""

from __future__ import annotations

from typing import Any

from evidence.claim import Claim, Quote

README = "packages/pattern-cache/README.md"
SERVICE = "docs/recipes/cache-in-a-service.md"
OURS, LOCKED, CACHETOOLS = "get_or_create", "lru_cache with a lock", "cachetools with a lock"


def _two_digits(number: float) -> str:
    """A whole number rounded to two digits, as in "about 240"."""
    return f"{int(float(f'{number:.2g}')):,}"


def _hits(record: Any) -> dict[str, float]:
    [one] = [row["median"] for row in record["hits"] if row["key"] == "a tuple"]
    [eight] = [row["median"] for row in record["threads"] if row["key"] == "a tuple"]
    guarded = {(row["value"], row["guard"]): 1e6 * row["median"][OURS] for row in record["guards"]}
    return {
        "ours": 1e6 * one[OURS],
        "locked": 1e6 * one[LOCKED],
        "cachetools": 1e6 * one[CACHETOOLS],
        "ours_8": 1e6 * eight[OURS],
        "locked_8": 1e6 * eight[LOCKED],
        "cachetools_8": 1e6 * eight[CACHETOOLS],
        "tensor": guarded["a tensor", "version"],
        "sixteen": guarded["a tuple of 16 tensors", "version"],
        "unguarded": guarded["a tensor", None] if ("a tensor", None) in guarded else guarded["a tensor", "None"],
    }


def _making(record: Any) -> dict[str, Any]:
    def times(what: str) -> list[float]:
        return [row["times"] for row in record["making"] if row["what"] == what]

    kept, anew = times("dilated indices, key kept"), times("dilated indices, key made anew")
    plans = [1e6 * row["median"]["making"] for row in record["making"] if row["what"] == "dilated_core's plan"]
    [mask] = [row["median"]["making"] for row in record["making"] if row["what"].startswith("create_block_mask")]
    [layout] = times("block layout")
    return {
        "least_anew": min(anew),
        "most_anew": max(anew),
        "least_kept": _two_digits(min(kept)),
        "most_kept": _two_digits(max(kept)),
        "layout": _two_digits(layout),
        "plan": sum(plans) / len(plans),
        "mask": mask,
    }


def _bytes(record: Any) -> dict[str, float]:
    taken = {row["value"]: row["bytes"] / 1e3 for row in record["bytes"]}
    return {"objects": taken["an object"], "tensors": taken["a tensor"]}


def _planning(record: Any) -> dict[str, float]:
    sparse, dilated = record["planning"]
    return {
        "cold": 100 * sparse["share"]["cold"],
        "warm": 100 * sparse["share"]["warm"],
        "dilated": 100 * dilated["share"]["cold"],
    }


def _policies(record: Any) -> dict[str, float]:
    ratios = [row["gdsf_to_lru"] for trace in ("curriculum", "service", "slides") for row in record[trace]]
    better = [ratio for ratio in ratios if ratio < 1]
    return {
        "least": min(better),
        "most": max(better),
        "better": len(better),
        "all": len(ratios),
        "worst": max(ratios),
    }


CLAIMS = (
    Claim(
        "pattern-cache",
        "A hit of a plain object by a tuple takes {ours:.2f} us; `functools.lru_cache` behind a lock takes "
        "{locked:.2f}, `cachetools` with a lock {cachetools:.2f}",
        "pattern_cache_lookup",
        _hits,
        (
            Quote(
                README,
                "| a hit of a plain object, by a tuple as key | {ours:.2f} us (`functools.lru_cache` behind a lock "
                "{locked:.2f}, `cachetools` with a lock {cachetools:.2f}) |",
            ),
            Quote(SERVICE, "a hit of a plain object takes {ours:.2f} us"),
        ),
    ),
    Claim(
        "pattern-cache",
        "With 8 threads at once a look-up takes {ours_8:.2f} us; the others take {locked_8:.1f} and {cachetools_8:.1f}",
        "pattern_cache_lookup",
        _hits,
        (
            Quote(
                README,
                "| the same by 8 threads at once | {ours_8:.2f} us a look-up ({locked_8:.1f} and {cachetools_8:.1f}) |",
            ),
            Quote(SERVICE, "{ours_8:.2f} us a look-up when 8 threads look up at once"),
        ),
    ),
    Claim(
        "pattern-cache",
        "A hit of one tensor takes {tensor:.2f} us, of a tuple of 16 {sixteen:.2f}, with their versions compared; "
        "{unguarded:.2f} of one tensor with `guard=None`",
        "pattern_cache_lookup",
        _hits,
        (
            Quote(
                README,
                "| a hit of one tensor, of a tuple of 16, with their versions compared | {tensor:.2f}, {sixteen:.2f} "
                "us; {unguarded:.2f} with `guard=None` |",
            ),
        ),
    ),
    Claim(
        "pattern-cache",
        "Dilated indices of a layer, 4k to 64k tokens, are found {least_anew:.0f} to {most_anew:.0f} times faster than "
        "they are made, {least_kept} to {most_kept} times with the key kept; a layout of 1,024 x 1,024 blocks {layout} "
        "times faster than with dense tensors",
        "pattern_cache_lookup",
        _making,
        (
            Quote(
                README,
                "{least_anew:.0f} to {most_anew:.0f} times faster through `cache.dilated_indices`, {least_kept} to "
                "{most_kept} with the key kept",
            ),
            Quote(
                README,
                "| a layout of 1,024 x 1,024 blocks, against making it with dense tensors | {layout} times faster |",
            ),
        ),
    ),
    Claim(
        "pattern-cache",
        "A plan of `dilated-core` takes {plan:.0f} us to make, a block mask of FlexAttention at 8k tokens {mask:.1f} s",
        "pattern_cache_lookup",
        _making,
        (
            Quote(README, "**Plans of `dilated-core` are cheap**: {plan:.0f} us each"),
            Quote(README, "FlexAttention's block masks ({mask:.1f} s at 8k tokens, made on a CPU)"),
        ),
    ),
    Claim(
        "pattern-cache",
        "At 100 entries the cache itself takes {objects:.0f} kB for objects, {tensors:.0f} kB for tensors",
        "pattern_cache_lookup",
        _bytes,
        (
            Quote(
                README,
                "| the cache itself, at 100 entries | {objects:.0f} kB for objects, {tensors:.0f} kB for tensors |",
            ),
            Quote(SERVICE, "{objects:.0f} kB for the cache itself at 100 entries"),
        ),
    ),
    Claim(
        "pattern-cache",
        "Planning is {cold:.2f} % of a block-sparse forward of 8,192 tokens without a cache, {warm:.3f} % with; of "
        "dilated attention {dilated:.3f} % without",
        "pattern_cache_planning",
        _planning,
        (
            Quote(README, "{cold:.2f} % of its time without a cache, {warm:.3f} % with"),
            Quote(README, "{dilated:.3f} % of a forward pass at 8k tokens"),
        ),
    ),
    Claim(
        "pattern-cache",
        'GreedyDual-Size ("gdsf") leaves {least:.2f} to {most:.2f} times the seconds of work that LRU leaves in '
        "{better} of {all} combinations of trace and limit, and {worst:.1f} times in the worst",
        "pattern_cache_policies",
        _policies,
        (
            Quote(
                README,
                "left {least:.2f} to {most:.2f} times the seconds of work that LRU left, in {better} of {all} "
                "combinations of trace and limit, and {worst:.1f} times in one",
            ),
        ),
    ),
)
