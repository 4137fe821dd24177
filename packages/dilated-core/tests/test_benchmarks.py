"""The benchmarks run, check what they measure, and write what their pages say, at sizes that take a second."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_core import kernels

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def _run(name: str, folder: Path, *sizes: str) -> list[dict[str, Any]]:
    """The rows that the benchmark wrote."""
    command = [sys.executable, str(BENCHMARKS / f"bench_{name}.py"), *sizes, "--threads", "1", "--output", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    rows: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())["rows"]
    return rows


def test_short_sequences(tmp_path: Path) -> None:
    rows = _run("short", tmp_path, "--sizes", "33", "--repeats", "2")
    assert [(row["dtype"], row["dense_seq"]) for row in rows] == [("float32", 38), ("bfloat16", 38)]
    assert all(0 < row["deviation_from_oracle"] < 2e-2 for row in rows)
    assert (tmp_path / "short.md").read_text().count("\n| 33 |") == 2


def test_cpu_matmul(tmp_path: Path) -> None:
    if reason := kernels.survey(torch.device("cpu"), torch.bfloat16, 64)["cpu_matmul"]:
        pytest.skip(reason)
    rows = _run("cpu_matmul", tmp_path, "--rows", "300", "--scores", "1000", "--repeats", "1")
    assert [row["is_causal"] for row in rows] == [False, True]
    assert all(set(row["deviation_from_float64"]) == {"cpu_flash", "cpu_matmul"} for row in rows)
    assert (tmp_path / "cpu_matmul.md").read_text().count("\n| 300 |") == 2


def test_dilated_attention(tmp_path: Path) -> None:
    rows = _run("dilated_attention", tmp_path, "--sizes", "300", "--repeats", "2")
    assert [(row["dtype"], row["pass"]) for row in rows] == [
        ("float32", "forward"),
        ("bfloat16", "forward"),
        ("float32", "forward+backward"),
        ("bfloat16", "forward+backward"),
    ]
    for row in rows:
        assert 0 < row["deviation_from_oracle"]["ours"] < 2e-2
        assert set(row["seconds"]) == {"ours", "dense", "torchscale"}
    assert (tmp_path / "dilated_attention.md").read_text().count("\n| 300 |") == 4
