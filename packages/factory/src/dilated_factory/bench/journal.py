"""rows.jsonl: every finished row on a line of its own, so that an interrupted run goes on where it was.

The first line says what the rows depend on. Standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dilated_factory.bench.results import Row

FILE = "rows.jsonl"
PREVIOUS = "rows.previous.jsonl"
PACKAGES = (
    "dilated_core",
    "dilated_memory_pool",
    "dilated_pattern_cache",
    "dilated_ring",
    "dilated_block_sparse",
    "dilated_factory",
)


class Journal:
    """The rows of a folder.

    Attributes:
        started: "new", "resumed", or "anew" where there were rows of something else; these lie in rows.previous.jsonl.
        differs: what they depended on that is another now.

    Args:
        folder: that exists.
        identity: what the rows depend on, JSON-ready.
        resume: False to start anew in any case.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, resume: bool = True) -> None:
        self.path = folder / FILE
        self.started, self.differs = "new", list[str]()
        self.rows: list[Row] = []
        identity = json.loads(json.dumps(identity))
        if self.path.exists():
            found, rows = _read(self.path)
            self.differs = differences(found, identity)
            if resume and not self.differs:
                self.rows, self.started = rows, "resumed"
            else:
                self.path.replace(folder / PREVIOUS)
                self.started = "anew"
        # Written anew, so that a line that was cut off, and rows of cases that are not whole, are gone.
        lines = [json.dumps({"identity": identity}), *(json.dumps(row.as_dict()) for row in self.rows)]
        kept = self.path.with_suffix(".part")
        kept.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        kept.replace(self.path)

    def has(self, report: str, case: str) -> bool:
        """Whether that case is finished."""
        return any(row.report == report and row.case == case for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Keep the rows of one finished case."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(row.as_dict())}\n" for row in rows))
        self.rows += rows


def fits(folder: Path, identity: Mapping[str, Any]) -> list[str] | None:
    """What rows in a folder depended on that is another now, [] where they fit; None where there are none."""
    path = folder / FILE
    if not path.exists():
        return None
    return differences(_read(path)[0], json.loads(json.dumps(identity)))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of what differs.

    >>> differences({"torch": "2.11", "threads": 2}, {"torch": "2.13", "threads": 2})
    ['torch']
    """
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def code_digest() -> str:
    """Of the sources of the packages that are measured: a working copy changes and its version does not."""
    total = hashlib.sha256()
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations or ()) if found else ():
            for path in sorted(Path(folder).rglob("*.py")):
                total.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def _read(path: Path) -> tuple[Mapping[str, Any], list[Row]]:
    """What the rows depend on, and the rows of whole cases; a line that is none, as a killed run leaves, is none."""
    identity: Mapping[str, Any] = {}
    cases: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            if "identity" in values:
                identity = values["identity"]
                continue
            row = Row.from_dict(values)
        except (ValueError, TypeError, KeyError):
            continue
        cases[row.report, row.case].append(row)
    return identity, [row for rows in cases.values() if len(rows) == rows[0].of for row in rows]
