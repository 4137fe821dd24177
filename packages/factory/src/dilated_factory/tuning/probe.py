"""What every part of the measurement has: the device, the attention that is measured, and the record.

Imports torch and dilated_core.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dilated_core import DilatedPattern, measure, reference
from dilated_factory.create import create_dilated_attention
from dilated_factory.hardware import Hardware
from dilated_factory.policy import Policy
from dilated_factory.resources.shared import SharedResources
from dilated_factory.tuning.budget import FEWEST, Budget, OutOfTime
from dilated_factory.tuning.cells import TRAINING, Attention, Example, Timed, time_in_turns

# The paper's kind of pattern, lengths and rates growing alike, at 1,792 keys a row: its own has 4,266, and would leave
# little time for long sequences. Only rates below the number of heads copy rows, into memory that a pool may lend; with
# the 8 heads that are the default these do, as two of the paper's do.
PATTERN = DilatedPattern.geometric(1024, 3, 2)
# What one measurement may hold at most, of the device's memory.
SHARE_OF_MEMORY = 1 / 8


@dataclass
class Probe:
    """What is measured on, and what came of it so far.

    Attributes:
        measurements: as they stand in a profile.
        step: called with a few words after each cell.
    """

    device: torch.device
    hardware: Hardware
    heads: int
    head_dim: int
    step: Callable[[str], None]
    measurements: list[dict[str, Any]] = field(default_factory=list)

    def record(self, part: str, words: str, **what: Any) -> None:
        """Keep a measurement, or why there is none."""
        self.measurements.append({"part": part, **what})
        self.step(words)

    def too_large(self, nbytes: int) -> str | None:
        """Why so many bytes are not taken; None where they are."""
        total = self.hardware.memory_total
        if total is None or nbytes <= total * SHARE_OF_MEMORY:
            return None
        return f"it holds {nbytes / 2**20:,.0f} MiB, above an eighth of the memory"

    def working_set(self, length: int, dtype: torch.dtype) -> int:
        """Bytes of query, key, value, output and their gradients."""
        return Policy().live_tensors * length * self.heads * self.head_dim * dtype.itemsize

    def attention(self, length: int, resources: SharedResources, **options: Any) -> Attention:
        """The improved attention as the factory makes it, with nothing of an earlier profile."""
        return create_dilated_attention(
            "improved",
            PATTERN.segment_lengths,
            PATTERN.dilation_rates,
            sequence_length=length,
            policy=Policy(),
            profile=None,
            hardware=self.hardware,
            resources=resources,
            **options,
        )

    def example(self, length: int, dtype: torch.dtype) -> Example:
        """Inputs of that length, with the definition of dilated attention."""

        def exact(query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
            branches = (PATTERN.segment_lengths, PATTERN.dilation_rates)
            return reference.dilated_attention(query, key, value, *branches, rows=rows)[0]

        return Example(self.device, dtype, length, self.heads, self.head_dim, exact)

    def both_passes(
        self,
        budget: Budget,
        series: str,
        length: int,
        dtype: torch.dtype,
        candidates: Mapping[str, Attention],
        passes: Sequence[str],
        worth_timing: Callable[[], bool] = lambda: True,
    ) -> tuple[dict[str, Timed], dict[str, float], dict[str, str]]:
        """Check the candidates and time those that are right: pass -> Timed, name -> deviation, name -> why not.

        What the check has shown to be not worth timing comes back without passes.

        Raises:
            OutOfTime: there is no time for the fewest rounds.
        """
        start = time.monotonic()
        example = self.example(length, dtype)
        right, dropped = example.check(candidates)
        seconds = time.monotonic() - start
        timed: dict[str, Timed] = {}
        if right and not worth_timing():
            # A longer one may be worth it: a few warm runs foretell what it will take.
            run = example.runs(candidates[next(iter(right))], TRAINING)
            of_one = measure.interleaved({"run": run}, repeats=3, warmup=0)["run"].median
            budget.note(series, length, of_one * len(right) * len(passes) * (1 + FEWEST))
            return timed, right, dropped
        for kind in passes if right else ():
            runs = {name: example.runs(candidates[name], kind) for name in right}
            try:
                timed[kind] = time_in_turns(budget, runs)
            except OutOfTime:  # foreseen for longer ones: what it has taken so far, for every pass and round
                budget.note(series, length, (time.monotonic() - start) * len(passes) * (1 + FEWEST))
                raise
            seconds += timed[kind].seconds
        budget.note(series, length, seconds)
        return timed, right, dropped
