"""The pictures of recorded runs: what draws them again from the JSON beside them. Nothing is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module, util
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
        redraw: Redraw = _load(self.drawer).redraw
        return redraw(ROOT / record, target)


RECORDS = (
    Record("block_sparse_density.json", "packages/block-sparse/benchmarks/bench_density.py"),
    Record("block_sparse_recall.json", "packages/block-sparse/benchmarks/bench_recall.py"),
    Record("ring_traffic.json", "packages/ring/benchmarks/bench_traffic.py"),
    Record("bench/report.json", "dilated_factory.bench.session"),
    Record("demo/report.json", "dilated_factory.demo.report"),
)


def _load(drawer: str) -> Any:
    """The module of that name, or the script at that path; scripts import what lies beside them."""
    if not drawer.endswith(".py"):
        return import_module(drawer)
    path = ROOT / drawer
    name = path.stem
    if name not in sys.modules:
        spec = util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"no module at {path}")
        module = sys.modules[name] = util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
    return sys.modules[name]
