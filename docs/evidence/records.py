"""Recorded runs: JSON under docs/benchmarks, the page beside each, and the command that made it.

Standard library only.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "benchmarks"


def names() -> list[str]:
    """Every record, as "decode" or "demo/report", in order."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.json"))


@cache
def load(name: str) -> Any:
    """What a record holds. It is shared: leave it as it is."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def script(name: str) -> Path | None:
    """The benchmark or example that made a record; None where it was the command of a package."""
    first = load(name)["environment"]["command"].split()[0]
    found = [*ROOT.glob(f"packages/*/benchmarks/{first}"), *ROOT.glob(f"examples/{first}")]
    return found[0] if found else None


def command(name: str) -> str:
    """What made a record, as it is typed in the repository's root."""
    said: str = load(name)["environment"]["command"]
    made_by = script(name)
    if made_by is not None:
        return f"python {made_by.relative_to(ROOT).parent.as_posix()}/{said}"
    return said.replace("__main__.py", "python -m dilated_factory")


def source_line(name: str) -> str:
    """The line that every page of a recorded run ends with."""
    raw = Path(name).name + ".json"
    return f"Raw data: [{raw}]({raw}). Command, from the repository's root: `{command(name)}`."
