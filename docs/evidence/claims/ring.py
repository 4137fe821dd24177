"""Figures of dilated-ring: bytes between ranks (computed), CPU time of ranks, keys streamed from host memory."""

from __future__ import annotations

from typing import Any

from evidence.claim import Claim, Quote

README = "packages/ring/README.md"
MIB = 1 << 20


def size(count: int) -> str:
    """Bytes as the README's table has them."""
    mib = count / MIB
    if mib == 0:
        return "0"
    if mib < 10:
        return f"{mib:.1f} MiB"
    return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def _traffic(record: Any) -> dict[str, Any]:
    found = {(row["pattern"], row["tokens"], row["ranks"]): row for row in record["traffic"]}
    fields: dict[str, Any] = {"deviation": max(row["deviation_from_definition"] for row in record["checks"])}
    for pattern, key in (("paper", "paper"), ("GigaPath", "giga")):
        for ranks in (8, 64):
            row = found[pattern, 1 << 20, ranks]
            forward = row["forward"]
            fields |= {f"{key}_{ranks}_{name}": size(forward[name]) for name in ("ours", "torchscale")}
            fields[f"{key}_{ranks}_ring"] = f"{forward['ring'] / MIB:,.0f} MiB"
            if forward["ours"]:
                fields[f"{key}_{ranks}_times"] = forward["ring"] / forward["ours"]
    return fields


def _ranks(record: Any) -> dict[str, float]:
    fields: dict[str, float] = {}
    for ranks in (2, 4):
        for name, way in (("forward", "forward"), ("both", "forward+backward")):
            rows = [row for row in record["rows"] if (row["ranks"], row["pass"]) == (ranks, way)]
            ratios = [row["ratio_to_single"] for row in rows]
            fields |= {f"least_{name}_{ranks}": min(ratios), f"most_{name}_{ranks}": max(ratios)}
    beside = [row["ratio_to_single_side_by_side"] for row in record["rows"] if row["ranks"] == 4]
    fields |= {"least_beside": min(beside), "most_beside": max(beside)}
    for name, causal in (("causal", True), ("full", False)):
        less = [times for row in record["peer"] if row["is_causal"] == causal for times in row["times_less"].values()]
        fields |= {f"least_{name}": min(less), f"most_{name}": max(less)}
    return fields


def _streaming(record: Any) -> dict[str, float]:
    """Of all rows: both dtypes, both kinds of keys, forward and backward."""
    rows = record["rows"]
    saved = [
        100 * (1 - row["memory_to_first"])
        for row in rows
        if row["ring_size"] == 16 and row["memory_to_first"] is not None
    ]
    times = [row["time_to_first"] for row in rows if row["ring_size"] == 8]
    return {
        "tokens": rows[0]["seq"],
        "least_saved": min(saved),
        "most_saved": max(saved),
        "least_times": min(times),
        "most_times": max(times),
    }


CLAIMS = (
    Claim(
        "ring",
        "At 1,048,576 tokens, 16 heads of 64 in bf16, the busiest of 64 ranks receives {paper_64_ours} forward with "
        "the paper's pattern and {giga_64_ours} with Prov-GigaPath's, where a ring brings it {paper_64_ring}: "
        "{paper_64_times:.0f} and {giga_64_times:.0f} times as much. Computed from the plans",
        "ring_traffic",
        _traffic,
        (
            Quote(README, "| the paper's | 8 | {paper_8_ours} | {paper_8_torchscale} | {paper_8_ring} |"),
            Quote(README, "| the paper's | 64 | {paper_64_ours} | {paper_64_torchscale} | {paper_64_ring} |"),
            Quote(
                README,
                "| Prov-GigaPath's | 8 | {giga_8_ours} | {giga_8_torchscale} (its code asserts) | {giga_8_ring} |",
            ),
            Quote(
                README,
                "| Prov-GigaPath's | 64 | {giga_64_ours} | {giga_64_torchscale} (its code asserts) | {giga_64_ring} |",
            ),
        ),
    ),
    Claim(
        "ring",
        "All ranks together take {least_both_2:.2f} to {most_both_2:.2f} of one process's CPU time with two ranks, "
        "{least_both_4:.2f} to {most_both_4:.2f} with four on two cores, forward and backward; forward alone "
        "{least_forward_2:.2f} to {most_forward_2:.2f} and {least_forward_4:.2f} to {most_forward_4:.2f}",
        "ring_ranks",
        _ranks,
        (
            Quote(
                README,
                "| forward + backward | {least_both_2:.2f} to {most_both_2:.2f} | {least_both_4:.2f} to "
                "{most_both_4:.2f} |",
            ),
            Quote(
                README,
                "| forward | {least_forward_2:.2f} to {most_forward_2:.2f} | {least_forward_4:.2f} to "
                "{most_forward_4:.2f} |",
            ),
        ),
    ),
    Claim(
        "ring",
        "Over four processes that compute the whole sequence side by side, four ranks take {least_beside:.2f} to "
        "{most_beside:.2f} of the CPU time",
        "ring_ranks",
        _ranks,
        (Quote(README, "four ranks are {least_beside:.2f} to {most_beside:.2f}"),),
    ),
    Claim(
        "ring",
        "As dense attention over 4,096 tokens it takes {least_causal:.1f} to {most_causal:.1f} times less CPU time "
        "than ring-attention-pytorch forward where it is causal, and {least_full:.1f} to {most_full:.1f} times less "
        "where it is not",
        "ring_ranks",
        _ranks,
        (
            Quote(
                README,
                "{least_causal:.1f} to {most_causal:.1f} times less CPU time than ring-attention-pytorch 0.5.20 "
                "forward where it is causal, and {least_full:.1f} to {most_full:.1f} times less where it is not",
            ),
            Quote("docs/choose.md", "on a CPU {least_full:.1f} to {most_causal:.1f} times less time"),
        ),
    ),
    Claim(
        "ring",
        "Keys streamed in 16 chunks save {least_saved:.0f} to {most_saved:.0f} % of the memory that one chunk takes "
        "beyond inputs and results; 8 chunks take {least_times:.1f} to {most_times:.2f} times the time; {tokens:,} "
        "tokens",
        "ring_streaming",
        _streaming,
        (
            Quote(README, "16 chunks save {least_saved:.0f} to {most_saved:.0f} % of that memory"),
            Quote(README, "there 8 chunks cost {least_times:.1f} to {most_times:.2f} times the time"),
        ),
    ),
)
