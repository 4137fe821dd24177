"""The benchmark runs, checks what it measures, and writes what its page says, at a size that takes a second."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_dilated_attention_benchmark(tmp_path: Path) -> None:
    sizes = ["--sizes", "300", "--threads", "1", "--repeats", "2", "--output", str(tmp_path)]
    script = str(BENCHMARKS / "bench_dilated_attention.py")
    ran = subprocess.run([sys.executable, script, *sizes], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    rows = json.loads((tmp_path / "dilated_attention.json").read_text())["rows"]
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
