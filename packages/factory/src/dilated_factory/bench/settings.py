"""Every size of the benchmark, in two sets: the full run, and a quick one. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

# Specification, "Pattern Caching Performance Analysis Report", "Memory Usage Analysis": the only pattern that the
# reports name. Rates as in its other examples, doubling.
SEGMENT_LENGTHS = (1024, 2048, 4096)
DILATION_RATES = (1, 2, 4)


@dataclass(frozen=True)
class BenchSettings:
    """How large, how long and how often.

    Attributes:
        heads, head_dim: of every attention, batch 1 where the specification names no other.
        longest: tokens; rows of longer sequences are listed and not run.
        ring_tokens: of the table of ring sizes.
        longest_dense: tokens; dense attention of more is listed and not run.
        buffer_mebibytes: sizes of the bare buffers of the dynamic workload.
        checked_rows: query rows that are compared with the definition.
        lookups: calls in one timed loop of the pattern cache.
        fewest, most: timed rounds.
        seconds: for each report.

    Raises:
        TypeError, ValueError: a value is not a positive number of its kind, or there are more fewest than most rounds.
    """

    heads: int
    head_dim: int
    longest: int
    ring_tokens: int
    longest_dense: int
    buffer_mebibytes: tuple[int, ...]
    checked_rows: int
    lookups: int
    fewest: int
    most: int
    seconds: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            values = value if field.name == "buffer_mebibytes" and isinstance(value, tuple) else (value,)
            kinds = (int, float) if field.name == "seconds" else (int,)
            for one in values:
                if isinstance(one, bool) or not isinstance(one, kinds):
                    raise TypeError(f"{field.name}: expected a positive number, got {value!r}")
                if not 0 < one < float("inf"):
                    raise ValueError(f"{field.name}: expected a positive number, got {value!r}")
        if self.fewest > self.most:
            raise ValueError(f"fewest: expected at most `most` = {self.most}, got {self.fewest}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for report.json."""
        return {**asdict(self), "buffer_mebibytes": list(self.buffer_mebibytes)}


FULL = BenchSettings(
    heads=8,
    head_dim=64,
    longest=32768,
    ring_tokens=8192,
    longest_dense=16384,
    buffer_mebibytes=(16, 64, 32, 96, 48, 128),
    checked_rows=16,
    lookups=1000,
    fewest=3,
    most=15,
    seconds=160.0,
)

QUICK = BenchSettings(
    heads=4,
    head_dim=32,
    longest=8192,
    ring_tokens=2048,
    longest_dense=4096,
    buffer_mebibytes=(4, 16, 8, 24),
    checked_rows=8,
    lookups=200,
    fewest=2,
    most=7,
    seconds=9.0,
)
