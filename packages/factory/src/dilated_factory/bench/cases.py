"""Cases, and rows made of what was measured: what the five reports have in common. Imports the bench's own rooms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dilated_factory.bench import claims
from dilated_factory.bench.claims import Comparison
from dilated_factory.bench.measuring import Measured
from dilated_factory.bench.results import Row, Table
from dilated_factory.bench.subjects import Bench

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """Rows that are measured in turns, in one go.

    Attributes:
        name: unique in its report.
        measure: (bench, seconds) -> its rows, within about so many seconds.
        weight: its share of the report's time, beside the others'.
    """

    name: str
    measure: Callable[[Bench, float], list[Row]]
    weight: float = 1.0


@dataclass(frozen=True)
class Report:
    """One of the specification's reports.

    Attributes:
        name: on the command line.
        title: the specification's.
        tables: in order.
        cases: of a bench.
    """

    name: str
    title: str
    tables: Sequence[Table]
    cases: Callable[[Bench], list[Case]]


@dataclass(frozen=True)
class Said:
    """What the specification says of one row against its baseline.

    Attributes:
        speed: ratio, above 1 for faster; or (low, high).
        mebibytes: change of peak memory; 0 for "no difference".
        words: in place of the number.
    """

    speed: float | tuple[float, float] | None = None
    mebibytes: float | None = None
    words: str = ""

    @property
    def text(self) -> str:
        """What is said of the speed.

        >>> Said(1.72).text, Said((0.68, 0.92), words="9 to 47 % slower").text
        ('1.72x', '9 to 47 % slower')
        """
        return self.words or (f"{self.speed:.2f}x" if isinstance(self.speed, float) else "")


def row(
    bench_report: str,
    table: str,
    case: str,
    name: str,
    found: Measured,
    *,
    facts: Mapping[str, str] | None = None,
    comparisons: Sequence[Comparison] = (),
) -> Row:
    """A row of what was measured; one that failed has no figure and is compared with nothing."""
    return Row(
        bench_report,
        table,
        case,
        name,
        facts=dict(facts or {}),
        check=found.check,
        seconds=found.seconds,
        peak_bytes=None if found.why else found.peak_bytes,
        comparisons=() if found.why else tuple(comparisons),
        why=found.why,
    )


def not_run(report: str, table: str, case: str, name: str, why: str, said: str = "") -> Row:
    """A row that is listed only."""
    comparisons = (claims.no_claim("all", "-", said),) if said else ()
    return Row(report, table, case, name, comparisons=comparisons, why=why)


def too_long(bench: Bench, length: int) -> str:
    """Why a length is not run; "" where it is."""
    longest = bench.settings.longest
    return "" if length <= longest else f"not run: longer than the {longest:,} tokens of this run's settings"


def whole(rows: Sequence[Row]) -> list[Row]:
    """The rows of one case, which know how many they are."""
    return [replace(one, of=len(rows)) for one in rows]


def compared(
    ours: Measured, baseline: Measured, said: Said | None = None, *, same_work: bool = False
) -> list[Comparison]:
    """Speed and peak memory against the baseline, beside what the specification says of them.

    Args:
        same_work: whether both did the same, so that whatever differs in time is noise.
    """
    said = Said() if said is None else said
    found = []
    speed = ours.speed_against(baseline)
    if speed is not None:
        times, noise = speed
        noise = max(noise, abs(times - 1)) if same_work else noise
        if isinstance(said.speed, tuple):
            low, high = said.speed
            found.append(claims.within("speed", low, high, times, noise=noise, text=said.words))
        elif said.speed is not None:
            found.append(claims.ratio("speed", said.speed, times, noise=noise, text=said.words))
        else:
            found.append(claims.no_claim("speed", f"{times:.2f}x", said.words or "-"))
    if ours.peak_bytes is not None and baseline.peak_bytes is not None:
        rise = (ours.peak_bytes - baseline.peak_bytes) / MIB
        if said.mebibytes is None:
            found.append(claims.no_claim("peak memory", f"{rise:+.1f} MiB"))
        else:
            found.append(claims.change("peak memory", said.mebibytes, rise, baseline.peak_bytes / MIB))
    return found
