"""What a benchmark run holds: rows of tables, as plain values that go through JSON unchanged. Standard library only."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dilated_factory.bench.claims import Comparison


@dataclass(frozen=True)
class Check:
    """One output against a definition.

    Attributes:
        error: largest absolute difference over the largest magnitude; None where it was no number.
        tolerance: what is allowed.
        against: what it was compared with.
    """

    error: float | None
    tolerance: float
    against: str

    @property
    def passed(self) -> bool:
        """Whether figures of this output may be reported."""
        return self.error is not None and self.error <= self.tolerance


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        report, table: where it belongs.
        case: rows of one case were measured in turns, in one go; of: how many rows it has.
        name: what was run.
        facts: further columns.
        check: of its output; None where there was none to look at.
        seconds: every timed round, in order; empty where nothing was timed.
        peak_bytes: memory beyond the inputs, what pools reserve included; None where not measured.
        comparisons: with the specification.
        why: why there is no figure; "" where there is one.
    """

    report: str
    table: str
    case: str
    name: str
    of: int = 1
    facts: Mapping[str, str] = field(default_factory=dict)
    check: Check | None = None
    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    comparisons: tuple[Comparison, ...] = ()
    why: str = ""

    @property
    def median(self) -> float | None:
        """Median, in seconds."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def failed(self) -> bool:
        """Whether its output is wrong."""
        return self.check is not None and not self.check.passed

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "seconds": list(self.seconds), "comparisons": [asdict(one) for one in self.comparisons]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """The row that ``as_dict`` was of.

        Raises:
            TypeError, KeyError: they are not those of a row.

        >>> row = Row("stages", "1,024 tokens", "1024", "baseline", check=Check(1e-7, 1e-5, "the definition"))
        >>> Row.from_dict(row.as_dict()) == row
        True
        """
        check = values["check"]
        return cls(
            **{
                **values,
                "check": None if check is None else Check(**check),
                "seconds": tuple(values["seconds"]),
                "comparisons": tuple(Comparison(**one) for one in values["comparisons"]),
            }
        )


@dataclass(frozen=True)
class Table:
    """One table of a report.

    Attributes:
        name: of the rows that belong to it.
        title: as in the specification.
        about: what is measured.
        note: why the specification's figures are, or are not, found here.
    """

    name: str
    title: str
    about: str
    note: str


@dataclass
class Results:
    """Everything a run knows.

    Attributes:
        environment, settings, device, identity: what the figures depend on.
        reports: name -> (title, tables), in order.
        rows: that are there.
        left_out: names of cases for which there was no time.
        interrupted: whether Ctrl-C ended it.
    """

    environment: Mapping[str, object]
    settings: Mapping[str, object]
    device: str
    reports: Mapping[str, tuple[str, Sequence[Table]]]
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    interrupted: bool = False

    def rows_of(self, report: str, table: str | None = None) -> list[Row]:
        """Those of a report, or of one of its tables."""
        return [row for row in self.rows if row.report == report and table in (None, row.table)]

    @property
    def failed(self) -> list[Row]:
        """Rows whose output is wrong."""
        return [row for row in self.rows if row.failed]
