"""One cell of a table: candidates that are checked against the definition, and then timed in turns.

Imports torch and dilated_core.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_core import measure
from dilated_factory.tuning.budget import FEWEST, Budget
from dilated_factory.tuning.rules import Figure

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
FORWARD, TRAINING = "forward", "training"

# Largest difference from the definition over its largest magnitude: far above rounding, far below a wrong function.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
CHECKED_ROWS = 16


class Timed(NamedTuple):
    """What a cell came to.

    Attributes:
        figures: candidate -> seconds.
        rounds: that were timed.
        seconds: that the cell takes with the fewest rounds.
    """

    figures: dict[str, Figure]
    rounds: int
    seconds: float


def time_in_turns(budget: Budget, runs: Mapping[str, Callable[[], object]], loops: int = 1) -> Timed:
    """Time what runs; each run does its work ``loops`` times, and the figures are of one.

    A round that is not counted comes first. It warms everything up, and says how many rounds there is time for.

    Raises:
        OutOfTime: there is no time for the fewest.
    """
    start = time.monotonic()
    measure.interleaved(runs, repeats=1, warmup=0)
    seconds = time.monotonic() - start
    rounds = budget.rounds(seconds)
    timings = measure.interleaved(runs, repeats=rounds, warmup=0)
    figures = {name: Figure(timing.median / loops, timing.spread) for name, timing in timings.items()}
    # By the medians: one hiccup of the machine must not make all larger sizes look too dear.
    return Timed(figures, rounds, (1 + FEWEST) * sum(timing.median for timing in timings.values()))


def recorded(timed: Timed) -> dict[str, Any]:
    """Its figures as they stand in a profile."""
    return {
        "rounds": timed.rounds,
        "figures": {name: {"seconds": one.seconds, "spread": one.spread} for name, one in timed.figures.items()},
    }


class Example:
    """Random query, key, value and a cotangent of one length, and what the definition makes of them in a few rows.

    The cotangent of the check is zero but in those rows, so that the definition gives exact gradients of a long
    sequence in little time.

    Args:
        exact: (query, key, value, rows), all in float64, -> the rows of the output; autograd differentiates it.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        length: int,
        heads: int,
        head_dim: int,
        exact: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def random() -> Tensor:
            return torch.randn(1, length, heads, head_dim, device=device, generator=generator).to(dtype)

        self.qkv = tuple(random().requires_grad_() for _ in range(3))
        self.cotangent = random()
        self.tolerance = TOLERANCES[dtype]
        self._rows = torch.linspace(0, length - 1, min(length, CHECKED_ROWS), device=device).long()
        self._sparse = torch.zeros_like(self.cotangent)
        self._sparse[:, self._rows] = self.cotangent[:, self._rows]
        self._exact = exact
        self._wanted: tuple[Tensor, ...] | None = None

    def deviation(self, attention: Attention) -> float:
        """The largest difference of output and gradients from the definition, over its largest magnitude."""
        if self._wanted is None:
            query, key, value = (tensor.detach().double().requires_grad_() for tensor in self.qkv)
            output = self._exact(query, key, value, self._rows)
            cotangent = self.cotangent[:, self._rows].double()
            gradients = torch.autograd.grad(output, (query, key, value), cotangent)
            self._wanted = (output.detach(), *gradients)
        output = attention(*self.qkv)
        gradients = torch.autograd.grad(output, self.qkv, self._sparse)
        found = (output.detach()[:, self._rows], *gradients)
        differences = [
            ((one.double() - other).abs().max() / other.abs().max().clamp_min(1e-30)).item()
            for one, other in zip(found, self._wanted, strict=True)
        ]
        return math.nan if any(map(math.isnan, differences)) else max(differences)

    def runs(self, attention: Attention, kind: str) -> Callable[[], object]:
        """What is timed: a forward without gradients, or a forward and a backward."""

        def forward() -> object:
            with torch.no_grad():
                return attention(*self.qkv)

        def training() -> object:
            return torch.autograd.grad(attention(*self.qkv), self.qkv, self.cotangent)

        return forward if kind == FORWARD else training

    def check(self, candidates: Mapping[str, Attention]) -> tuple[dict[str, float], dict[str, str]]:
        """Run each once: name -> deviation of those that are right, and name -> why of those that are not."""
        right, dropped = {}, {}
        for name, attention in candidates.items():
            try:
                deviation = self.deviation(attention)
            except (RuntimeError, MemoryError, ValueError) as error:
                dropped[name] = f"it fails: {' '.join(str(error).split())[:200]}"
                continue
            if deviation <= self.tolerance:
                right[name] = deviation
            else:
                dropped[name] = f"wrong: it deviates from the definition by {deviation:.1e}, above {self.tolerance:.0e}"
        return right, dropped


def bytes_of_scores(pairs: int, dtype: torch.dtype) -> int:
    """What a kernel that writes all scores down holds in forward and backward: four numbers a pair, never halves."""
    return 4 * pairs * max(4, dtype.itemsize)
