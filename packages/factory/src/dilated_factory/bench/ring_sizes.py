"""The "Performance Benchmark Report": attention to all keys, taken in chunks by a ring on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dilated_factory.bench import claims, subjects
from dilated_factory.bench.cases import MIB, Case, Report, not_run, row, whole
from dilated_factory.bench.claims import Comparison
from dilated_factory.bench.measuring import Candidate, Measured, measured
from dilated_factory.bench.results import Row, Table
from dilated_factory.bench.subjects import Bench
from dilated_factory.hardware import Hardware

NAME = "ring-sizes"
TABLE = "scaling"
TABLES = (
    Table(
        TABLE,
        "Scaling Performance at 8,192 tokens",
        "Attention of every row to every key. *Extra memory* is the peak beyond inputs, output and log-sum-exp; "
        "reductions of it are against the same function with ring size 1. *Streamed* cuts queries and keys, *ring* "
        "keys only.",
        "The specification divides the memory of written-out scores, n² / ring_size. Kernels that write no scores "
        "begin far below that (column *of written-out scores*): streamed attention falls with the ring size until the "
        "kernel's own scratch is left, and a ring on one device holds the whole sequence, so that there is little to "
        "fall. The ring described attended inside each chunk only, which is less work than attention to all keys.",
    ),
)
SIZES = (1, 2, 4, 8, 16)
# Ring size -> (milliseconds, memory reduction in percent), of "RingAttentionCorrectV2".
SAID = {2: (877.1, 50.0), 4: (1043.3, 75.0), 8: (1230.9, 87.5), 16: (1396.2, 93.8)}
# "RingDilatedAttentionV2" with 8, against the row of 8 above.
DILATED_RING = (1023.8, 87.5)
STANDARD, FUSED = "standard attention, scores written out", "standard attention, fused kernel"
# Scores, their softmax, and what the operations between hold.
SCORES_HELD = 3
SHARE_OF_MEMORY = 0.5
EXTRA = "extra memory, MiB"
"""A column: beyond inputs and results."""


def cases(bench: Bench) -> list[Case]:
    """All of the report."""
    return [Case("scaling", _scale)]


def _scale(bench: Bench, seconds: float) -> list[Row]:
    length = bench.settings.ring_tokens
    tensors = subjects.inputs(bench, length)
    right = subjects.dense_expected(bench, tensors)
    runs, refused = _runs(bench, tensors)
    candidates = {name: Candidate(run, right.check) for name, run in runs.items()}
    found = measured(candidates, bench.settings, bench.device, seconds, tell=bench.tell)
    result_bytes = tensors[0].nbytes + 4 * tensors[0].numel() // bench.settings.head_dim
    rows = [
        row(
            NAME,
            TABLE,
            TABLE,
            name,
            one,
            facts=_facts(name, one, found, length, result_bytes),
            comparisons=_against(name, one, found, result_bytes),
        )
        for name, one in found.items()
    ]
    rows += [not_run(NAME, TABLE, TABLE, name, why, said) for name, (why, said) in refused.items()]
    return whole(rows)


def _runs(
    bench: Bench, tensors: tuple[Tensor, ...]
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, tuple[str, str]]]:
    """What can be run here, and of the rest why not, with the specification's words."""
    query, key, value = tensors
    batch, length, heads, _ = query.shape
    q, k, v = (tensor.transpose(1, 2) for tensor in tensors)

    def fused() -> Tensor:
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def written_out() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)

    runs: dict[str, Callable[[], Tensor]] = {FUSED: fused}
    refused: dict[str, tuple[str, str]] = {}
    needed = SCORES_HELD * batch * heads * length * length * query.element_size()
    memory = Hardware.detect(bench.device).memory_total
    if memory is not None and needed > SHARE_OF_MEMORY * memory:
        why = f"not run: its scores need about {needed / 2**30:.1f} GiB, the device has {memory / 2**30:.1f}"
        refused[STANDARD] = (why, "out of memory")
    else:
        runs[STANDARD] = written_out
    lacking = subjects.lacks_module("dilated_ring", "ring")
    if lacking:
        return runs, {**refused, "ring and streamed, 1 to 16": (lacking, "memory reduced by 50 to 93.8 %")}
    from dilated_ring import ring_attention, streamed_attention

    host = [tensor.cpu() for tensor in (key, value)]
    for size in SIZES:
        runs[f"ring {size}"] = partial(ring_attention, query, key, value, ring_size=size)
        runs[f"streamed {size}"] = partial(streamed_attention, query, *host, ring_size=size)
    # In the order of the table: rings, then streams.
    order = [FUSED, STANDARD, *(f"{name} {size}" for name in ("ring", "streamed") for size in SIZES)]
    return {name: runs[name] for name in order if name in runs}, refused


def _extra(one: Measured, result_bytes: int) -> int | None:
    """Peak beyond inputs and results, in bytes; None without a figure."""
    return None if one.why or one.peak_bytes is None else max(one.peak_bytes - result_bytes, 1)


def _facts(name: str, one: Measured, found: dict[str, Measured], length: int, result_bytes: int) -> dict[str, str]:
    """Memory in three ways: as it is, as a share of the baseline's, and against O(n / ring_size)."""
    extra = _extra(one, result_bytes)
    if extra is None:
        return {}
    facts = {"tokens": f"{length:,}", EXTRA: f"{extra / MIB:.3f}"}
    standard = _extra(found[STANDARD], result_bytes) if STANDARD in found else None
    if standard is not None and name != STANDARD:
        facts["of written-out scores"] = f"{extra / standard:.2%}"
    kind, _, size = name.partition(" ")
    first = _extra(found[f"{kind} 1"], result_bytes) if size.isdecimal() else None
    if first is not None:
        facts["over first / ring_size"] = f"{extra * int(size) / first:.2f}x"
    return facts


def _against(name: str, one: Measured, found: dict[str, Measured], result_bytes: int) -> list[Comparison]:
    """Time against ring size 2, memory against ring size 1."""
    extra = _extra(one, result_bytes)
    if name in (FUSED, STANDARD) or extra is None:
        return [claims.no_claim("all", "-", "out of memory")] if name == STANDARD else []
    kind, size = name.split()
    comparisons = []
    speed = one.speed_against(found[f"{kind} 2"])
    if speed is not None and size != "2":
        slower, noise = 1 / speed[0], speed[1]
        if int(size) in SAID:
            said = SAID[int(size)][0] / SAID[2][0]
            comparisons.append(claims.ratio("time against ring size 2", said, slower, noise=noise))
        else:
            comparisons.append(claims.no_claim("time against ring size 2", f"{slower:.2f}x"))
    first = _extra(found[f"{kind} 1"], result_bytes)
    if size != "1" and first is not None:
        left, reduction = extra / first, SAID[int(size)][1]
        memory = claims.ratio("extra memory left", 1 - reduction / 100, left, text=f"{100 - reduction:.1f} %")
        comparisons.append(replace(memory, ours=f"{100 * left:.1f} %"))
    if name == "streamed 8" and "ring 8" in found:
        quicker = one.speed_against(found["ring 8"])
        if quicker is not None:
            said = SAID[8][0] / DILATED_RING[0]
            comparisons.append(claims.ratio("speed against ring 8", said, quicker[0], noise=quicker[1]))
    return comparisons


REPORT = Report(NAME, "Performance Benchmark Report", TABLES, cases)
