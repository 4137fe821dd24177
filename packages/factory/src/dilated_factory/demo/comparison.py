"""Dense attention against dilated attention on this machine: time, memory, and proof that both are right.

Every size is checked before it is timed: a sample of query rows, in float64, against the definition in
``dilated_core.reference``. A figure whose check fails is not reported. Dense is torch's scaled_dot_product_attention,
causal, at the same sizes. May import torch and dilated_core.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dilated_core import DilatedPattern, dilated_attention, measure, reference

CHECKED_ROWS = 32
"""Query rows compared with the definition at each size: the first, the last and others spread between."""

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Largest error allowed, over the largest magnitude of the exact rows: a few units of each dtype's rounding."""


MAX_REPEATS = 9
MIN_REPEATS = 3
"""Fewer are taken where the time left does not allow three, and the report says so."""

SHORT_SHARE = 0.05
"""Share of the time left that a length may take in any case: short lengths cost next to nothing."""


@dataclass(frozen=True)
class Check:
    """One output against the definition in float64.

    Attributes:
        error: largest absolute difference over the largest magnitude.
        tolerance: what is allowed.
        rows: how many query rows were compared, in all heads.
    """

    error: float
    tolerance: float
    rows: int

    @property
    def passed(self) -> bool:
        """Whether figures of this output may be reported. NaN does not pass."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Measurement:
    """Cost of one candidate at one size.

    Attributes:
        seconds: every timed repeat, in order.
        median, spread: of them; spread is the interquartile range over the median.
        peak_bytes: tensor memory allocated beyond query, key and value, the output included.
        flops: of its two matrix products, causal.
    """

    seconds: tuple[float, ...]
    median: float
    spread: float
    peak_bytes: int
    flops: int


@dataclass(frozen=True)
class SizeResult:
    """One length.

    Attributes:
        length: tokens.
        checks: of "dense" and "dilated".
        measurements: of the same, or empty where not measured.
        skipped: why nothing was measured, or empty.
    """

    length: int
    checks: dict[str, Check]
    measurements: dict[str, Measurement]
    skipped: str

    @property
    def speedup(self) -> float:
        """Median time of dense over median time of dilated."""
        return self.measurements["dense"].median / self.measurements["dilated"].median


def compare(
    pattern: DilatedPattern,
    lengths: Sequence[int],
    heads: int,
    head_dim: int,
    device: torch.device,
    seconds: float,
    seed: int,
    on_size: Callable[[int, str], None] = lambda length, what: None,
) -> Iterator[SizeResult]:
    """Measure each length, shortest first, within about ``seconds`` in all.

    A length is given a share of the remaining time that grows with its cost, foreseen from the length before: dense
    grows with the square of the length. One that cannot be run even once in the time left is skipped, saying so.

    Args:
        pattern: of the dilated attention.
        lengths: in tokens, ascending.
        heads, head_dim: sizes of one batch row.
        device: a CPU computes in float32, a GPU in bfloat16.
        seconds: time for everything, checks included.
        seed: of the random query, key and value.
        on_size: told the length and what is being done, for a progress display.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    deadline = time.perf_counter() + seconds
    # What one round of both candidates costs at the length before, for lack of anything better 0 at the first.
    previous_length, previous_round = lengths[0], 0.0
    for index, length in enumerate(lengths):
        growth = (length / previous_length) ** 2
        left = deadline - time.perf_counter()
        # A check runs each candidate once, the memory measurement once more, and at least one timed round follows.
        if 3 * previous_round * growth > left:
            foreseen = f"one round would take about {previous_round * growth:.0f} s, {max(left, 0):.0f} s were left"
            yield SizeResult(length, {}, {}, foreseen)
            continue
        query, key, value = _inputs(length, heads, head_dim, dtype, device, seed)
        candidates = _candidates(query, key, value, pattern)

        on_size(length, "checking")
        checks = {name: _check(name, run, query, key, value, pattern) for name, run in candidates.items()}
        if not all(check.passed for check in checks.values()):
            yield SizeResult(length, checks, {}, "an output differs from the definition")
            continue

        on_size(length, "memory")
        peaks = {}
        started = time.perf_counter()
        for name, run in candidates.items():
            peaks[name] = measure.peak_memory(run, device)
        previous_length, previous_round = length, time.perf_counter() - started

        on_size(length, "timing")
        repeats = _repeats(previous_round, lengths[index:], deadline - time.perf_counter())
        timings = measure.interleaved(candidates, repeats=repeats, warmup=0)
        flops = {
            "dense": DilatedPattern([length], [1]).flops(length, heads, head_dim, is_causal=True),
            "dilated": pattern.flops(length, heads, head_dim, is_causal=True),
        }
        measurements = {
            name: Measurement(tuple(timing.seconds), timing.median, timing.spread, peaks[name], flops[name])
            for name, timing in timings.items()
        }
        yield SizeResult(length, checks, measurements, "")


def _repeats(round_seconds: float, lengths: Sequence[int], left: float) -> int:
    """Rounds to time at ``lengths[0]``, keeping what later lengths need for their checks and MIN_REPEATS rounds.

    >>> _repeats(1.0, [1024], 20.0), _repeats(1.0, [1024], 5.0), _repeats(1.0, [1024], 0.1)
    (9, 5, 1)
    >>> _repeats(0.1, [1024, 2048], 2.6)  # 2 s of it are kept for 2,048 tokens
    6
    """
    later = sum((2 + MIN_REPEATS) * round_seconds * (length / lengths[0]) ** 2 for length in lengths[1:])
    here = max(left - later, SHORT_SHARE * left)
    return max(1, min(MAX_REPEATS, int(here / max(round_seconds, 1e-9) + 1e-6)))


def _inputs(
    length: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, length, heads, head_dim, generator=generator).to(device, dtype).unbind()
    return query, key, value


def _candidates(query: Tensor, key: Tensor, value: Tensor, pattern: DilatedPattern) -> dict[str, Callable[[], Tensor]]:
    def dense() -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def dilated() -> Tensor:
        return dilated_attention(query, key, value, pattern.segment_lengths, pattern.dilation_rates, is_causal=True)

    return {"dense": dense, "dilated": dilated}


def _check(
    name: str, run: Callable[[], Tensor], query: Tensor, key: Tensor, value: Tensor, pattern: DilatedPattern
) -> Check:
    """The candidate's output at some rows against the float64 definition, of which dense is one segment of rate 1."""
    length = query.shape[1]
    if name == "dense":
        pattern = DilatedPattern([length], [1])
    rows = torch.linspace(0, length - 1, min(CHECKED_ROWS, length)).round().long().unique().to(query.device)
    exact, _ = reference.dilated_attention(
        query.double(),
        key.double(),
        value.double(),
        pattern.segment_lengths,
        pattern.dilation_rates,
        is_causal=True,
        rows=rows,
    )
    found = run()[:, rows].double()
    error = ((found - exact).abs().max() / exact.abs().max()).item()
    return Check(error, TOLERANCE[query.dtype], len(rows))
