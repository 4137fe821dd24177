"""Candidates of one case: checked, weighed, timed in turns, and checked again. Without both checks there is no figure.

Imports torch and dilated_core.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dilated_core import measure
from dilated_factory.bench.claims import FEW, LEAST_NOISE, NOISE_OF_FEW
from dilated_factory.bench.results import Check
from dilated_factory.bench.settings import BenchSettings

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Of outputs, relative to the largest magnitude of the exact rows."""


@dataclass(frozen=True)
class Expected:
    """Some rows of an output as the definition has them.

    Attributes:
        values: float64, (batch, rows, heads, head_dim), on the CPU.
        against: the definition, in words.
        tolerance: as in Check.
        rows: which rows; None where what is run returns no others.
    """

    values: Tensor
    against: str
    tolerance: float
    rows: Tensor | slice | None = None

    def check(self, output: Any) -> Check:
        """Compare an output with it."""
        found = output if self.rows is None else output[:, self.rows]
        found = found.detach().double().cpu()
        if found.shape != self.values.shape:
            return Check(None, self.tolerance, f"{self.against}: another shape, {tuple(found.shape)}")
        error = ((found - self.values).abs().max() / self.values.abs().max().clamp(min=1e-300)).item()
        # JSON has no NaN, and one is no agreement either.
        return Check(error if error < float("inf") else None, self.tolerance, self.against)


@dataclass(frozen=True)
class Candidate:
    """What is run, and how its output is checked.

    Attributes:
        run: one call.
        check: of what it returned.
        pool_bytes: what its pools have reserved; PyTorch's own numbers do not hold it.
        weigh: whether its peak memory is measured.
        loops: how many of the thing that is timed one call does.
    """

    run: Callable[[], Any]
    check: Callable[[Any], Check]
    pool_bytes: Callable[[], int] = lambda: 0
    weigh: bool = True
    loops: int = 1


@dataclass(frozen=True)
class Measured:
    """What was found of one candidate.

    Attributes:
        check: of its output; None where it could not be run.
        timing: None where there is no figure.
        peak_bytes: beyond the inputs.
        why: why there is no figure; "" where there is one.
    """

    check: Check | None = None
    timing: measure.Timing | None = None
    peak_bytes: int | None = None
    why: str = ""

    @property
    def seconds(self) -> tuple[float, ...]:
        """All timed rounds."""
        return () if self.timing is None else self.timing.seconds

    def speed_against(self, other: Measured) -> tuple[float, float] | None:
        """How many times faster than another, and the noise of that; None where one of them has no figure."""
        if self.timing is None or other.timing is None:
            return None
        noise = (self.timing.spread + other.timing.spread) / 2
        few = min(len(self.seconds), len(other.seconds)) < FEW
        return other.timing.median / self.timing.median, max(noise, NOISE_OF_FEW if few else LEAST_NOISE)


def measured(
    candidates: Mapping[str, Candidate],
    settings: BenchSettings,
    device: torch.device,
    seconds: float,
    *,
    tell: Callable[[str], None] = lambda words: None,
    timed: bool = True,
) -> dict[str, Measured]:
    """Measure the candidates, in turns, for about so many seconds; what fails its check has no figure."""
    deadline = time.perf_counter() + seconds
    found: dict[str, Measured] = {}
    tell("checking")
    for name, candidate in candidates.items():
        found[name] = _first_look(candidate)
    tell("weighing")
    round_seconds = 0.0
    for name, candidate in _right(candidates, found).items():
        started = time.perf_counter()
        peak = None
        if candidate.weigh:
            peak = measure.peak_memory(candidate.run, device) + candidate.pool_bytes()
        else:
            candidate.run()
        round_seconds += time.perf_counter() - started
        found[name] = replace(found[name], peak_bytes=peak)
    if not timed:
        return found
    tell("timing")
    right = _right(candidates, found)
    if right:
        # The two calls before have warmed all up.
        affordable = int((deadline - time.perf_counter() - round_seconds) / max(round_seconds, 1e-9))
        repeats = min(settings.most, max(settings.fewest, affordable))
        timings = measure.interleaved({name: one.run for name, one in right.items()}, repeats=repeats, warmup=0)
        for name, timing in timings.items():
            each = tuple(taken / right[name].loops for taken in timing.seconds)
            found[name] = replace(found[name], timing=measure.Timing(each))
    tell("checking again")
    for name, candidate in right.items():
        again = _first_look(candidate)
        if again.why:
            found[name] = replace(again, why=f"after it was timed: {again.why}")
    return found


def _right(candidates: Mapping[str, Candidate], found: Mapping[str, Measured]) -> dict[str, Candidate]:
    return {name: candidate for name, candidate in candidates.items() if not found[name].why}


def _first_look(candidate: Candidate) -> Measured:
    """One call and its check."""
    try:
        check = candidate.check(candidate.run())
    except Exception as error:
        # Whatever a candidate raises, out of memory among it, is its row's affair; the others go on.
        [first, *_] = str(error).splitlines() or [""]
        return Measured(why=f"{type(error).__name__}: {first}")
    if check.passed:
        return Measured(check)
    error_found = "no number" if check.error is None else f"{check.error:.1e}"
    return Measured(
        check, why=f"its output differs from {check.against} by {error_found}, allowed are {check.tolerance:.0e}"
    )
