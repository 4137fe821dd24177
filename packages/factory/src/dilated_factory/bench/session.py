"""One run from beginning to end: what is asked for, what is kept from before, case by case, and the report.

Imports torch and the rooms of the reports.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dilated_core import measure
from dilated_factory.bench import auto_enable, journal, pattern_cache, plots, pool_modes, ring_sizes, stages, writing
from dilated_factory.bench.cases import Case, Report
from dilated_factory.bench.command import NAMES
from dilated_factory.bench.journal import Journal
from dilated_factory.bench.results import Results, Row, Table
from dilated_factory.bench.settings import FULL, QUICK, BenchSettings
from dilated_factory.bench.subjects import Bench
from dilated_factory.cli import version
from dilated_factory.cli.arguments import UnusableError
from dilated_factory.demo.screen import Bar, Screen
from dilated_factory.hardware.device import usable_device

REPORTS: dict[str, Report] = {
    one.name: one
    for one in (auto_enable.REPORT, pool_modes.REPORT, ring_sizes.REPORT, stages.REPORT, pattern_cache.REPORT)
}
assert tuple(REPORTS) == NAMES

DISTRIBUTIONS = (
    "dilated-core",
    "dilated-memory-pool",
    "dilated-pattern-cache",
    "dilated-ring",
    "dilated-block-sparse",
    "dilated-factory",
)
# Of the environment: a run on another of these is another run.
MACHINE = ("python", "torch", "platform", "processor", "cpu_capability", "cores", "threads", "cuda")


def run_reports(
    reports: Sequence[str] | None,
    *,
    device: str,
    output: Path,
    quick: bool,
    seconds: float | None,
    resume: bool | None,
    settings: BenchSettings | None,
    screen: Screen | None,
) -> Results:
    """See ``dilated_factory.bench.run``."""
    names = _names(reports)
    settings = _settings(settings, quick, seconds)
    if not isinstance(resume, (bool, type(None))):
        raise TypeError(f"resume: expected True, False or None, got {resume!r}")
    bench = Bench(settings, _usable_device(device))
    _check_extra()
    screen = Screen() if screen is None else screen
    environment = measure.environment()
    identity = _identity(environment, settings, bench.device)
    rows = _open(output, identity, resume, screen)
    results = Results(environment, settings.as_dict(), str(bench.device), _titles(), rows=list(rows.rows))
    screen.title(
        "dilated bench: the specification's tables, measured on this machine",
        f"{', '.join(names)}; at most about {settings.seconds * len(names) / 60:.1f} minutes on {bench.device}; "
        "Ctrl-C stops and keeps what was measured",
    )
    try:
        for name in names:
            _run_report(REPORTS[name], bench, rows, results, screen)
    except KeyboardInterrupt:
        results.interrupted = True
        _finish(results, output, screen)
        raise
    _finish(results, output, screen)
    return results


def redraw(record: Path, folder: Path) -> list[Path]:
    """Draw the pictures of a report.json again, into an existing folder; nothing is measured."""
    recorded = json.loads(record.read_text(encoding="utf-8"))
    rows = [Row.from_dict({name: row[name] for name in row.keys() - {"median", "spread"}}) for row in recorded["rows"]]
    results = Results(recorded["environment"], recorded["settings"], recorded["device"], _titles(), rows)
    return list(plots.draw(results, folder).values())


def _titles() -> dict[str, tuple[str, Sequence[Table]]]:
    return {one.name: (one.title, one.tables) for one in REPORTS.values()}


def _run_report(report: Report, bench: Bench, kept: Journal, results: Results, screen: Screen) -> None:
    """The cases of one report that are not there yet."""
    # The dear ones last: where time runs out, as much as can be is there.
    cases = sorted(report.cases(bench), key=lambda case: case.weight)
    waiting = [case for case in cases if not kept.has(report.name, case.name)]
    screen.stage(report.title)
    if len(waiting) < len(cases):
        screen.note(f"{len(cases) - len(waiting)} of {len(cases)} cases were measured before")
    deadline = time.perf_counter() + bench.settings.seconds
    done = sum(case.weight for case in cases if case not in waiting)
    with screen.bar(report.name, sum(case.weight for case in cases)) as bar:
        for index, case in enumerate(waiting):
            left = deadline - time.perf_counter()
            if left <= 0:
                results.left_out += [f"{report.name}: {one.name}" for one in waiting[index:]]
                break
            share = left * case.weight / sum(one.weight for one in waiting[index:])
            rows = case.measure(replace(bench, tell=_teller(bar, done, case)), share)
            kept.add(rows)
            results.rows += rows
            done += case.weight
            bar(done, f"{case.name}: done")
    for table in report.tables:
        if not results.rows_of(report.name, table.name):
            continue
        header, lines = writing.summary(results, report.name, table)
        screen.note(table.title)
        screen.table(header, lines, words=(0, len(header) - 1))


def _teller(bar: Bar, done: float, case: Case) -> Any:
    return lambda words: bar(done, f"{case.name}: {words}")


def _finish(results: Results, output: Path, screen: Screen) -> None:
    """Everything there is, into files, and what there is to say of it."""
    # In the order of the reports, also where a run went on with another one's rows.
    places = {(report.name, table.name): number for number, (report, table) in enumerate(_tables())}
    results.rows.sort(key=lambda row: places[row.report, row.table])
    for path in writing.write(results, output):
        screen.note(str(path))
    for row in results.failed:
        screen.note(f"no figure: {row.report}, {row.name}: {row.why}")
    if results.left_out:
        screen.note(f"no time was left for {len(results.left_out)} cases; the same command goes on with them")
    if results.interrupted:
        screen.note(f"interrupted; the same command with --output {output} goes on where it was")


def _tables() -> list[tuple[Report, Any]]:
    return [(report, table) for report in REPORTS.values() for table in report.tables]


def _check_extra() -> None:
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'dilated_factory.bench needs {" and ".join(missing)}, not installed: pip install "dilated-factory[bench]"'
        )


def _names(reports: Sequence[str] | None) -> list[str]:
    if reports is None:
        return list(REPORTS)
    if isinstance(reports, str):
        raise TypeError(f"reports: expected a sequence of names, got the str {reports!r}")
    for name in reports:
        if name not in REPORTS:
            raise ValueError(f"reports: expected some of {list(REPORTS)}, got {name!r}")
    return [name for name in REPORTS if name in reports]


def _settings(settings: BenchSettings | None, quick: bool, seconds: float | None) -> BenchSettings:
    if settings is None:
        settings = QUICK if quick else FULL
    elif not isinstance(settings, BenchSettings):
        raise TypeError(f"settings: expected a BenchSettings or None, got {settings!r}")
    if seconds is None:
        return settings
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"seconds: expected a positive number, got {seconds!r}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds: expected a positive number, got {seconds!r}")
    return replace(settings, seconds=float(seconds))


def _usable_device(name: str) -> torch.device:
    try:
        return usable_device(name)
    except (TypeError, ValueError) as error:
        raise UnusableError(str(error)) from error


def _identity(environment: Any, settings: BenchSettings, device: torch.device) -> dict[str, Any]:
    """What rows depend on. How long a run may take is none of it: with more time there are more rows, not others."""
    sizes = settings.as_dict()
    del sizes["seconds"]
    return {
        "device": str(device),
        "settings": sizes,
        "versions": {name: version(name) for name in DISTRIBUTIONS},
        "code": journal.code_digest(),
        **{name: environment[name] for name in MACHINE},
    }


def _open(output: Path, identity: dict[str, Any], resume: bool | None, screen: Screen) -> Journal:
    """The rows of a folder that can be written to."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        differs = journal.fits(output, identity)
        if resume is True and differs is None:
            raise UnusableError(f"--resume: there are no rows in {output}")
        if resume is True and differs:
            raise UnusableError(f"--resume: the rows in {output} are of another run: {', '.join(differs)} differ")
        rows = Journal(output, identity, resume=resume is not False)
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableError(f"output: expected a folder that can be written to, got {output}: {error}") from error
    if rows.started == "resumed" and rows.rows:
        screen.note(f"going on with {len(rows.rows)} rows of {rows.path}")
    if rows.started == "anew":
        why = f"{', '.join(rows.differs)} changed" if rows.differs else "as was asked for"
        screen.note(f"starting anew: {why}; the rows that were there are in {journal.PREVIOUS}")
    return rows
