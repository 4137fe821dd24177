"""The pictures of recorded runs: what draws them again from the JSON beside them. Nothing is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
BENCHMARKS = Path("docs") / "benchmarks"

Redraw = Callable[[Path, Path], list[Path]]


class Record(NamedTuple):
    """A recorded run.

    Attributes:
        record: its JSON, below docs/benchmarks; the pictures are in the same folder.
        drawer: a module, or a script of the repository, with ``redraw(record, folder)``, which writes the pictures into
            the folder and returns their paths.
    """

    record: str
    drawer: str

    @property
    def name(self) -> str:
        """What `python docs/figures NAME` calls it."""
        return "benchmarks/" + self.record.removesuffix(".json").removesuffix("/report")

    def draw(self, folder: Path) -> list[Path]:
        """Draw its pictures into ``folder``, where they lie as they do in the repository."""
        record = BENCHMARKS / self.record
        target = folder / record.parent
        target.mkdir(parents=True, exist_ok=True)
        redraw: Redraw = load(self.drawer).redraw
        return redraw(ROOT / record, target)


RECORDS = (
    Record("block_sparse_density.json", "packages/block-sparse/benchmarks/bench_density.py"),
    Record("block_sparse_recall.json", "packages/block-sparse/benchmarks/bench_recall.py"),
    Record("ring_traffic.json", "packages/ring/benchmarks/bench_traffic.py"),
    Record("bench/report.json", "dilated_factory.bench.session"),
    Record("demo/report.json", "dilated_factory.demo.report"),
)


def load(module: str) -> Any:
    """The module of that name, or the script at that path of the repository; scripts import what lies beside them."""
    if not module.endswith(".py"):
        return import_module(module)
    script = ROOT / module
    sys.path.insert(0, str(script.parent))
    try:
        return import_module(script.stem)
    finally:
        sys.path.remove(str(script.parent))
