"""``dilated bench``: the tables of the specification's five reports, measured again on this machine.

Every figure is of an output that was compared with a definition in float64 before and after it was timed. Needs the
extra "bench" to draw and to show progress. Nothing is imported until a run begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dilated_factory.bench.results import Results
    from dilated_factory.bench.settings import BenchSettings
    from dilated_factory.demo.screen import Screen

__all__ = ["run"]


def run(
    reports: Sequence[str] | None = None,
    *,
    device: str = "cpu",
    output: Path | str = "bench-report",
    quick: bool = False,
    seconds: float | None = None,
    resume: bool | None = None,
    settings: BenchSettings | None = None,
    screen: Screen | None = None,
) -> Results:
    """Measure, and write report.json, report.md and a PNG a report into a folder.

    Args:
        reports: of "auto-enable", "pool-modes", "ring-sizes", "stages" and "pattern-cache"; None for all.
        device: "cpu" or "cuda[:index]".
        output: the folder; made where missing. Each row is kept in its rows.jsonl as soon as it is measured.
        quick: smaller heads and shorter sequences, under a minute.
        seconds: for each report, those of the settings by default.
        resume: None to go on with the rows of the folder where they are of the same versions, machine and settings, and
            to start anew otherwise; True to refuse the latter; False to start anew.
        settings: sizes, instead of those that ``quick`` chooses.
        screen: where progress is shown.

    Returns:
        What was measured, of this run and of the one it went on with.

    Raises:
        TypeError, ValueError: an argument is none of the above.
        UnusableError: of ``dilated_factory.cli.arguments``; the device or the folder cannot be used, or there is
            nothing to resume.
        KeyboardInterrupt: after the rows there are were written.
        ImportError: the extra "bench" is not installed.
    """
    from dilated_factory.bench.session import run_reports

    return run_reports(
        reports,
        device=device,
        output=Path(output),
        quick=quick,
        seconds=seconds,
        resume=resume,
        settings=settings,
        screen=screen,
    )
