"""report.json, report.md and the pictures, of whatever rows there are.

Imports nothing but the bench's own rooms; pictures are drawn through ``plots``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dilated_core.measure import Timing
from dilated_factory.bench import plots
from dilated_factory.bench.claims import RULE
from dilated_factory.bench.results import Results, Row, Table
from dilated_factory.bench.settings import DILATION_RATES, SEGMENT_LENGTHS

FORMAT = 1
"""Of report.json; raised when a key changes its meaning."""

NO_FIGURE = "-"
GATE = (
    "Each output was compared with its definition, in rows drawn from its whole length, before it was timed and again "
    "after that; a row whose output is wrong has no figure. Times are medians of rounds in which the rows of one case "
    "take turns, with the interquartile range over the median. Memory is the peak beyond the inputs, and with a pool "
    "what PyTorch allocates and the most that the pool reserved."
)


def write(results: Results, folder: Path) -> list[Path]:
    """Write what there is into an existing folder; the files, the report first."""
    pictures = plots.draw(results, folder)
    report, raw = folder / "report.md", folder / "report.json"
    report.write_text(markdown(results, pictures), encoding="utf-8")
    raw.write_text(json.dumps(as_dict(results), indent=1) + "\n", encoding="utf-8")
    return [report, raw, *pictures.values()]


def as_dict(results: Results) -> dict[str, Any]:
    """report.json: plain values; times in seconds, memory in bytes."""
    return {
        "format": FORMAT,
        "complete": not (results.interrupted or results.left_out),
        "interrupted": results.interrupted,
        "left_out": results.left_out,
        "device": results.device,
        "environment": dict(results.environment),
        "settings": dict(results.settings),
        "rule": RULE,
        "rows": [
            {**row.as_dict(), "median": row.median, "spread": Timing(row.seconds).spread if row.seconds else None}
            for row in results.rows
        ],
    }


def markdown(results: Results, pictures: dict[str, Path]) -> str:
    """report.md: the same for people."""
    parts = [_opening(results)]
    for name, (title, tables) in results.reports.items():
        if not results.rows_of(name):
            continue
        parts.append(f'## "{title}"')
        if name in pictures:
            parts.append(f"![{title}]({pictures[name].name})")
        for table in tables:
            rows = results.rows_of(name, table.name)
            if rows:
                header, lines = _table(rows)
                parts += [f"### {table.title}", table.about, _lines(header, lines), f"Why: {table.note}"]
    command = str(results.environment["command"]).replace("__main__.py", "python -m dilated_factory")
    parts.append(f"Raw data: [report.json](report.json). Command, from the repository's root: `{command}`.")
    return "\n\n".join(parts) + "\n"


def summary(results: Results, report: str, table: Table) -> tuple[list[str], list[list[str]]]:
    """A table for a screen: fewer columns, one line for each comparison."""
    lines = []
    for row in results.rows_of(report, table.name):
        shown = [f"{one.what} {one.ours} (said: {one.claimed}): {one.verdict}" for one in row.comparisons]
        # Reasons are sentences; their first half is enough here, the whole is in the report.
        lines.append([row.name, _time(row), _peak(row), row.why or "\n".join(shown)])
    return ["", "ms (IQR)", "peak MiB", "beside the specification"], lines


def _opening(results: Results) -> str:
    environment, settings = results.environment, results.settings
    verdicts = Counter(one.verdict for row in results.rows for one in row.comparisons if one.verdict != "no claim")
    found = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()) or "no claim was weighed"
    machine = (
        f"{environment['date']}, torch {environment['torch']}, {environment['processor']} "
        f"({environment['cpu_capability']}), {environment['cores']} cores, {environment['threads']} threads, device "
        f"{results.device}."
    )
    sizes = (
        f"Batch 1, {settings['heads']} heads of {settings['head_dim']}, segments {list(SEGMENT_LENGTHS)}, rates "
        f"{list(DILATION_RATES)}, forward, where a table does not say otherwise. The specification's figures are of "
        "GPUs, one of them a GeForce GTX 1080, and it does not say with which heads and, but for one table, with which "
        "pattern."
    )
    lines = ["# The specification's tables on this machine", machine, sizes, f"Claims: {found}.", f"Rule: {RULE}", GATE]
    if results.interrupted:
        lines += ["This run was interrupted: what it had measured is below."]
    if results.left_out:
        lines += [f"No time was left for: {'; '.join(results.left_out)}."]
    return "\n\n".join(lines)


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells; columns that no row fills are left out."""
    names = list(dict.fromkeys(name for row in rows for name in row.facts))
    header = ["", "time, ms (IQR)", "peak, MiB", *names, "error", "specification", "here", "verdict"]
    cells = []
    for row in rows:
        error = NO_FIGURE if row.check is None or row.check.error is None else f"{row.check.error:.0e}"
        said = [f"{one.what}: {one.claimed}" for one in row.comparisons if one.claimed != "-"]
        ours = [f"{one.what}: {one.ours}" for one in row.comparisons if one.ours != "-"]
        verdicts = [one.verdict for one in row.comparisons]
        cells.append(
            [
                row.name,
                _time(row),
                _peak(row),
                *(row.facts.get(name, NO_FIGURE) for name in names),
                error,
                "<br>".join(said) or NO_FIGURE,
                row.why or "<br>".join(ours) or NO_FIGURE,
                "<br>".join(verdicts) if not row.why and verdicts else NO_FIGURE,
            ]
        )
    used = [index for index in range(len(header)) if index == 0 or any(line[index] != NO_FIGURE for line in cells)]
    return [header[index] for index in used], [[line[index] for index in used] for line in cells]


def _time(row: Row) -> str:
    if not row.seconds:
        return NO_FIGURE
    timing = Timing(row.seconds)
    return f"{1e3 * timing.median:,.4g} ({timing.spread:.0%})"


def _peak(row: Row) -> str:
    return NO_FIGURE if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.1f}"


def _lines(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    # A bar in a cell would begin another one.
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, rule, *cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
