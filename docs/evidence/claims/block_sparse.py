"""Figures of dilated-block-sparse: speed over density, layouts, what is lost by choosing blocks."""

from __future__ import annotations

from statistics import mean, median
from typing import Any

from evidence.claim import Claim, Quote

README = "packages/block-sparse/README.md"


def _line(row: Any) -> str:
    """A row of the README's table."""
    faster = [dense / sparse for dense, sparse in zip(row["dense"], row["sparse"], strict=True)]
    return (
        f"| {row['case']} | {row['tokens']:,} | {row['density']:.1%} | {faster[0]:.1f} ({faster[1]:.1f}) "
        f"| {row['flex'] / row['sparse'][0]:.1f} | {row['efficiency'][0]:.2f} ({row['efficiency'][1]:.2f}) |"
    )


def _speed(record: Any) -> dict[str, Any]:
    rows = [row for row in record["rows"] if row["suite"] == "float32"]
    faster = [row["dense"][0] / row["sparse"][0] for row in rows]
    over_flex = [row["flex"] / row["sparse"][0] for row in rows]
    return {
        "table": " ".join(map(_line, rows)),
        "cases": len(rows),
        "least": min(faster),
        "most": max(faster),
        "sparsest": 100 * min(row["density"] for row in rows),
        "densest": 100 * max(row["density"] for row in rows),
        "least_flex": min(over_flex),
        "most_flex": max(over_flex),
    }


def _sweep(record: Any) -> dict[str, float]:
    rows = [row for row in record["rows"] if row["suite"] == "sweep"]
    slowest = min(rows, key=lambda row: row["dense"][0] / row["sparse"][0])
    return {
        "sparsest": 100 * min(row["density"] for row in rows),
        "least": slowest["dense"][0] / slowest["sparse"][0],
        "at": 100 * slowest["density"],
        "memory": max(row["extra_memory"][0] for row in record["rows"]),
        "memory_both": max(row["extra_memory"][1] for row in record["rows"]),
    }


def _layouts(record: Any) -> dict[str, float]:
    [row] = [row for row in record["layouts"] if (row["pattern"], row["tokens"]) == ("local + global", 1 << 20)]
    return {
        "ms": 1e3 * median(row["seconds"]["build"]),
        "peak": row["peak_bytes"] / 1e6,
        "mb": row["bytes"] / 1e6,
        "live": row["live"],
    }


def _recall(record: Any) -> dict[str, float]:
    def of(selector: str) -> list[Any]:
        return [row for row in record["rows"] if row["selector"] == selector and row.get("keep") == 0.25]

    def recall(selector: str) -> float:
        return 100.0 * float(mean(share for row in of(selector) for share in row["recall"]))

    return {name: recall(name) for name in ("oracle", "scorer", "random")} | {
        "density": 100 * mean(row["density"] for row in of("oracle")),
    }


CLAIMS = (
    Claim(
        "block-sparse",
        "{cases} layouts of {sparsest:.0f} to {densest:.0f} % of the blocks, 8,192 and 16,384 tokens, float32, one "
        "core: forward {least:.1f} to {most:.1f} times as fast as dense attention, and {least_flex:.1f} to "
        "{most_flex:.1f} times as fast as compiled FlexAttention",
        "block_sparse_density",
        _speed,
        (
            Quote(README, "{table}"),
            Quote("docs/choose.md", "the forward takes {least_flex:.1f} to {most_flex:.1f} times its speed"),
        ),
    ),
    Claim(
        "block-sparse",
        "Random blocks at densities from {sparsest:.0f} % to all are never below {least:.2f} of dense attention's "
        "speed (at {at:.0f} %)",
        "block_sparse_density",
        _sweep,
        (Quote(README, "random blocks were never below {least:.2f} of dense attention's speed there (at {at:.0f}%)"),),
    ),
    Claim(
        "block-sparse",
        "It takes at most {memory:.1f} outputs of memory beyond its results forward, {memory_both:.1f} with the "
        "backward",
        "block_sparse_density",
        _sweep,
        (
            Quote(
                README,
                "Extra memory, beyond the results, in outputs: at most {memory:.1f} forward, {memory_both:.1f} with "
                "the backward.",
            ),
        ),
    ),
    Claim(
        "block-sparse",
        "A layout of {live:,} live blocks for 1,048,576 tokens is built in {ms:.0f} ms; the process holds {peak:.0f} "
        "MB more at its peak, {mb:.1f} MB stay",
        "block_sparse_layouts",
        _layouts,
    ),
    Claim(
        "block-sparse",
        "In a small trained model, a quarter of the blocks of each row ({density:.0f} % with those that are always "
        "kept) holds {scorer:.0f} % of the attention's mass where a learned scorer chooses, {oracle:.0f} % by the true "
        "masses, {random:.0f} % at random",
        "block_sparse_recall",
        _recall,
    ),
)
