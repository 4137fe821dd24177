"""The benchmarks run, check what they measure, and write what their pages say, at sizes that take seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name: str, folder: Path, *options: str) -> tuple[dict, str]:
    """The JSON and the page of one script."""
    command = [sys.executable, str(BENCHMARKS / f"bench_{name}.py"), *options, "--output", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads((folder / f"{name}.json").read_text()), (folder / f"{name}.md").read_text()


@pytest.mark.slow
def test_gigapath_benchmark(tmp_path: Path) -> None:
    result, page = run("gigapath", tmp_path, "--tiles", "60", "--layers", "1", "--repeats", "2", "--threads", "1")
    assert all(0 < deviation < 1e-5 for deviation in result["deviation"].values())
    assert len(result["deviation"]) == 3
    for part in ("encoder", "attention"):
        assert {name: len(times) for name, times in result["seconds"][part].items()} == {"ours": 2, "torchscale": 2}
        assert f"**{result['speedup'][part]:.2f}**" in page


@pytest.mark.slow
def test_semantics_benchmark(tmp_path: Path) -> None:
    result, page = run("semantics", tmp_path, "--tiles", "60", "--layers", "1")
    assert set(result["deviation_from_oracle"]) == {"paper", "torchscale", "grouped"}
    for part in ("attention", "embedding"):
        assert len(result["relative_difference"][part]) == 6
        assert all(difference > 0 for difference in result["relative_difference"][part].values())
    assert page.count("\n| ") == 7


@pytest.mark.slow
def test_tune_benchmark(tmp_path: Path) -> None:
    result, page = run("tune", tmp_path, "--quick")
    assert len(result["rows"]) == 4
    for row in result["rows"]:
        assert row["ratio"] > 0
        assert all(deviation < 1e-4 for deviation in row["deviation"].values())
    assert page.count("\n| ") >= len(result["rows"])
