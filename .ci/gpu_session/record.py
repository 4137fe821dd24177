"""What is kept of a session on a card: how each step ended, as JSON and as a page, beside the figures."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


class Ledger:
    """Which steps ran on a card and how they ended: session.json and session.md, written after each.

    Args:
        card: name, folder and versions; what another card or other versions gave is not kept.
        folder: of the files.
    """

    def __init__(self, card: dict[str, str], folder: Path) -> None:
        self.folder, self._card = folder, card
        self._steps: dict[str, dict[str, Any]] = {}
        path = folder / "session.json"
        if path.exists():
            earlier = json.loads(path.read_text())
            self._steps = earlier["steps"] if earlier["card"] == card else {}

    def passed(self, step: str, digest: str) -> bool:
        """Whether it passed before, from the same sources."""
        before = self._steps.get(step)
        return before is not None and before["digest"] == digest and before["outcome"] == "passed"

    def add(self, step: str, digest: str, outcome: str, seconds: float, details: str) -> None:
        """Keep how a step ended."""
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._steps[step] = {
            "outcome": outcome,
            "seconds": round(seconds, 1),
            "details": details,
            "date": date,
            "digest": digest,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"card": self._card, "steps": self._steps}, indent=1)
        _replace(self.folder / "session.json", content + "\n")
        _replace(self.folder / "session.md", self._page())

    def _page(self) -> str:
        versions = ", ".join(f"{name} {value}" for name, value in self._card.items() if name != "folder")
        lines = ["# What ran on this card", "", f"`nox -s gpu`, {versions}.", ""]
        lines += ["| step | outcome | seconds | details | date (UTC) |", "|---|---|---|---|---|"]
        for name, one in sorted(self._steps.items()):
            cells = (name, one["outcome"], f"{one['seconds']:.0f}", one["details"], one["date"])
            lines.append(f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |")
        return "\n".join(lines) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write all of a file or nothing: a machine that is taken away in between leaves the one before."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)


def counts(report: Path) -> tuple[int, str]:
    """How many tests passed by pytest's report; and, in a line, how many failed and which, were skipped and why."""
    if not report.exists():
        return 0, "no report"
    try:
        found = ElementTree.parse(report)
    except ElementTree.ParseError:
        return 0, "a report that was cut off"
    # By name: a test whose clean-up fails too is there twice, with its failure in either.
    cases: dict[tuple[str | None, str | None], list[ElementTree.Element]] = {}
    for one in found.iter("testcase"):
        cases.setdefault((one.get("classname"), one.get("name")), []).extend(one)
    red = [name for (_, name), inside in cases.items() if any(one.tag in ("failure", "error") for one in inside)]
    skipped = [one for inside in cases.values() for one in inside if one.tag == "skipped"]
    passed = len(cases) - len(red) - len(skipped)
    told = f"{passed} passed, {len(red)} failed, {len(skipped)} skipped"
    if red:
        told += ": " + ", ".join(map(str, red[:10])) + (", ..." if len(red) > 10 else "")
    why = sorted({" ".join(str(one.get("message")).split())[:120] for one in skipped})
    return passed, told + (f" ({'; '.join(why[:8])})" if why else "")
