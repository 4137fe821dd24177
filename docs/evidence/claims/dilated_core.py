"""Figures of dilated-core: attention, decoding, short calls, matrix products on a CPU, work of the Triton kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from evidence.claim import Claim, Quote

README = "packages/dilated-core/README.md"
TORCHSCALE = "docs/guides/torchscale.md"
MIB = 1 << 20
GIB = 1 << 30


def _passes(record: Any) -> list[Any]:
    """The columns of the README's table."""
    found = {(row["dtype"], row["pass"]): row for row in record["rows"]}
    return [found[dtype, way] for dtype in ("float32", "bfloat16") for way in ("forward", "forward+backward")]


def _cells(figures: Iterable[float]) -> str:
    return " | ".join(f"{figure:.1f}" for figure in figures)


def _attention(record: Any) -> dict[str, Any]:
    rows = _passes(record)
    dense = [row["speedup_over_dense"] for row in rows]
    torchscale = [row["speedup_over_torchscale"] for row in rows]
    memory = [row["extra_memory_in_outputs"] for row in rows]
    return {
        "tokens": rows[0]["seq"],
        "flops": rows[0]["flop_ratio_to_dense"],
        "least": min(dense),
        "most": max(dense),
        "least_torchscale": min(torchscale),
        "most_torchscale": max(torchscale),
        "least_memory": min(each["ours"] for each in memory),
        "most_memory": max(each["ours"] for each in memory),
        "least_memory_torchscale": min(each["torchscale"] for each in memory),
        "most_memory_torchscale": max(each["torchscale"] for each in memory),
        "share": 100 * min(row["kernel_share"] for row in rows),
        "dense_row": _cells(dense),
        "torchscale_row": _cells(torchscale),
        "memory_row": " | ".join(f"{each['ours']:.1f}, {each['torchscale']:.1f}" for each in memory),
    }


def _decode(record: Any) -> dict[str, float]:
    by_tokens = {row["tokens"]: row for row in record["rows"]}
    longest = by_tokens[1 << 20]
    return {
        "ms": longest["median"]["ours"] * 1e3,
        "times": longest["speedup_over_dense"],
        "mib": longest["bytes_at_most"] / MIB,
        "gib": longest["bytes_of_dense"] / GIB,
        "at_1k": by_tokens[1024]["speedup_over_dense"],
        "at_4k": by_tokens[4096]["speedup_over_dense"],
    }


def _short(record: Any) -> dict[str, float]:
    beyond = [1e3 * (row["median"]["ours"] - row["median"]["dense"]) for row in record["rows"] if row["seq"] <= 256]
    return {"least": min(beyond), "most": max(beyond)}


def _products(record: Any) -> dict[str, float]:
    fields: dict[str, float] = {}
    for threads in (1, 2):
        for way in ("forward", "backward"):
            ratios = [
                row["median"][f"cpu_flash {way}"] / row["median"][f"cpu_matmul {way}"]
                for row in record["rows"]
                if row["threads"] == threads
            ]
            fields |= {f"least_{way}_{threads}": min(ratios), f"most_{way}_{threads}": max(ratios)}
    return fields


def _work(record: Any) -> dict[str, float]:
    """Of the forward, with the blocks that are chosen for head_dim 64."""
    rows = [row for row in record["rows"] if (row["pass"], row["rows"], row["others"]) == ("forward", 128, 64)]

    def ends(name: str, kept: Iterable[Any]) -> dict[str, float]:
        work = [row["work_over_needed"] for row in kept]
        return {f"least_{name}": min(work), f"most_{name}": max(work)}

    chosen = [row for row in rows if row["order"] == "chosen"]
    return {
        **ends("full", (row for row in chosen if not row["is_causal"])),
        **ends("causal", (row for row in chosen if row["is_causal"])),
        **ends("plain", (row for row in rows if row["order"] == "as they come")),
    }


def _compiled(record: Any) -> dict[str, float]:
    rows = record["rows"]
    return {
        "programs": len(rows),
        "registers": max(row["registers"] for row in rows),
        "spilling": sum(row["loop_spills"] > 0 for row in rows),
        "fewest": min(row["blocks_per_processor"] for row in rows),
    }


def _peers(record: Any) -> dict[str, float]:
    found = record["deviations"]
    main = {
        f"{what}_{dtype}": found[f"torchscale main, dilated attention, {what}, {dtype}"]
        for what in ("output", "gradients")
        for dtype in ("float64", "float32")
    }
    return {
        **main,
        "dense": max(found[f"torchscale 0.3.0, dense attention, {what}"] for what in ("output", "gradients")),
        "gigapath": found["Prov-GigaPath, examples/gigapath.py, every layer, float32"],
        "grouped": max(found[f"dilated-attention-pytorch 0.2.0, {what}, float64"] for what in ("output", "gradients")),
    }


CLAIMS = (
    Claim(
        "dilated-core",
        "The paper's pattern at {tokens:,} tokens is {least:.1f} to {most:.1f} times as fast as dense attention, which "
        "does {flops:.1f} times its operations: forward and with the backward, fp32 and bf16",
        "dilated_attention",
        _attention,
        (
            Quote(README, "| faster than dense SDPA ({flops:.1f} by FLOPs) | {dense_row} |"),
            Quote(README, "{share:.0f} % of that time is PyTorch's flash operator itself"),
            Quote(
                "docs/choose.md", "the paper's pattern costs {flops:.1f} times fewer operations at {tokens:,} tokens"
            ),
        ),
    ),
    Claim(
        "dilated-core",
        "It is {least_torchscale:.1f} to {most_torchscale:.1f} times as fast as the torchscale formula on the same "
        "flash operator, and takes {least_memory:.1f} to {most_memory:.1f} outputs of memory beyond its results where "
        "the formula takes {least_memory_torchscale:.1f} to {most_memory_torchscale:.1f}",
        "dilated_attention",
        _attention,
        (
            Quote(README, "| faster than the torchscale formula on the same flash operator | {torchscale_row} |"),
            Quote(README, "| memory beyond the result, in outputs: ours, torchscale formula | {memory_row} |"),
        ),
    ),
    Claim(
        "dilated-core",
        "After a million tokens a decoded token costs {ms:.1f} ms, {times:.0f} times less than with a dense cache, and "
        "the cache keeps {mib:.0f} MiB instead of {gib:.0f} GiB",
        "decode",
        _decode,
        (
            Quote(
                README,
                "a decoded token costs {ms:.1f} ms after a million tokens, {times:.0f} times less than with a dense "
                "cache, and keeps {mib:.0f} MiB instead of {gib:.0f} GiB.",
            ),
            Quote(README, "(`cache.nbytes <= cache.max_nbytes`, {mib:.0f} MiB here for any length)"),
        ),
    ),
    Claim(
        "dilated-core",
        "After 1,024 tokens a decoded token is {at_1k:.1f} times as fast as with a dense cache, after 4,096 "
        "{at_4k:.1f} times",
        "decode",
        _decode,
    ),
    Claim(
        "dilated-core",
        "Up to 256 tokens a call of the paper's five branches takes {least:.1f} to {most:.1f} ms beyond a dense call "
        "of the same FLOPs",
        "short",
        _short,
        (Quote(README, "{least:.1f} to {most:.1f} ms up to 256 tokens for this pattern's five branches"),),
    ),
    Claim(
        "dilated-core",
        "In bfloat16 the kernel of matrix products is {least_forward_1:.1f} to {most_forward_1:.1f} times as fast as "
        "the flash operator forward and {least_backward_1:.2f} to {most_backward_1:.1f} backward with one thread, "
        "{least_forward_2:.1f} to {most_forward_2:.1f} and {least_backward_2:.1f} to {most_backward_2:.1f} with two",
        "cpu_matmul",
        _products,
        (
            Quote(
                README,
                "{least_forward_1:.1f} to {most_forward_1:.1f} times the flash operator forward and "
                "{least_backward_1:.2f} to {most_backward_1:.1f} backward with one thread",
            ),
            Quote(
                README,
                "With two it is {least_forward_2:.1f} to {most_forward_2:.1f} and {least_backward_2:.1f} to "
                "{most_backward_2:.1f} times",
            ),
        ),
    ),
    Claim(
        "dilated-core",
        "By count, the Triton kernel computes {least_full:.2f} to {most_full:.2f} times the scores that are needed, "
        "causal {least_causal:.2f} to {most_causal:.2f}; with rows as they come {least_plain:.1f} to {most_plain:.1f}. "
        "No time: not yet measured on a GPU",
        "triton_work",
        _work,
        (
            Quote(
                "docs/guides/gpu.md",
                "{least_full:.2f} to {most_full:.2f} times the scores that are needed, causal {least_causal:.2f} to "
                "{most_causal:.2f}",
            ),
            Quote("docs/guides/gpu.md", "rows as they come would take {least_plain:.1f} to {most_plain:.1f} times"),
        ),
    ),
    Claim(
        "dilated-core",
        "As the compiler makes them, {programs} programs of the Triton kernel take at most {registers} registers a "
        "thread, {spilling} spill inside a loop, and a multiprocessor holds at least {fewest} block of each. No time: "
        "not yet measured on a GPU",
        "triton_compile",
        _compiled,
    ),
    Claim(
        "dilated-core",
        "Beside torchscale's own code, outputs agree to {output_float64:.1e} in float64 and {output_float32:.1e} in "
        "float32, every gradient to {gradients_float64:.1e} and {gradients_float32:.1e}",
        "interop",
        _peers,
        (
            Quote(
                README,
                "outputs agree to {output_float64:.1e} in float64 and {output_float32:.1e} in float32, gradients to "
                "{gradients_float64:.1e} and {gradients_float32:.1e}",
            ),
            Quote("docs/choose.md", "weights, and results to {output_float64:.1e} in float64"),
            Quote(TORCHSCALE, "`DilatedAttention` | output | {output_float64:.1e} | {output_float32:.1e} |"),
            Quote(TORCHSCALE, "| | every gradient | {gradients_float64:.1e} | {gradients_float32:.1e} |"),
            Quote(TORCHSCALE, "(one segment, rate 1) | output and every gradient | | {dense:.1e} |"),
        ),
    ),
    Claim(
        "dilated-core",
        "Beside Prov-GigaPath's own slide encoder, with the same weights, the embeddings of all twelve layers agree to "
        "{gigapath:.1e} in float32; beside dilated-attention-pytorch 0.2.0, outputs and gradients to {grouped:.1e} in "
        "float64",
        "interop",
        _peers,
        (
            Quote(TORCHSCALE, "| embeddings of every layer | | {gigapath:.1e} |"),
            Quote(TORCHSCALE, '(`"grouped"`) | output and every gradient | {grouped:.1e} | |'),
            Quote("docs/choose.md", '`semantics="grouped"` gives its results to {grouped:.1e}'),
        ),
    ),
)
