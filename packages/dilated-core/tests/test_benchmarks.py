"""The benchmarks run, check what they measure, and write what their pages say, at sizes that take a second."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_core import kernels

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_card  # noqa: E402
import bench_cpu_matmul  # noqa: E402
import bench_decode  # noqa: E402
import bench_dilated_attention  # noqa: E402
import card_cases  # noqa: E402
import card_measuring  # noqa: E402
import card_page  # noqa: E402

CPU = torch.device("cpu")


def _run(script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *sizes: str) -> list[dict[str, Any]]:
    """The rows that the benchmark wrote, run in this process: another would first import torch."""
    options = [*sizes, "--threads", "1", "--output", str(folder)]
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *options])
    script.main()
    return _written(script.__name__.removeprefix("bench_"), folder)


def _written(name: str, folder: Path) -> list[dict[str, Any]]:
    page = (folder / f"{name}.md").read_text()
    assert f"Raw data: [{name}.json]({name}.json). Command, from the repository's root: `python packages/" in page
    return _rows(folder / f"{name}.json")


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def test_short_sequences(tmp_path: Path) -> None:
    """As a program of its own, as all of them are meant to run."""
    command = [sys.executable, str(BENCHMARKS / "bench_short.py"), "--sizes=33", "--repeats=2", "--threads=1"]
    ran = subprocess.run([*command, f"--output={tmp_path}"], capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    rows = _written("short", tmp_path)
    assert [(row["dtype"], row["dense_seq"]) for row in rows] == [("float32", 38), ("bfloat16", 38)]
    assert all(0 < row["deviation_from_oracle"] < 2e-2 for row in rows)
    assert (tmp_path / "short.md").read_text().count("\n| 33 |") == 2


def test_cpu_matmul(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := kernels.survey(torch.device("cpu"), torch.bfloat16, 64)["cpu_matmul"]:
        pytest.skip(reason)
    options = ["--rows", "300", "--scores", "1000", "--repeats", "1"]
    rows = _run(bench_cpu_matmul, tmp_path, monkeypatch, *options)
    assert [row["is_causal"] for row in rows] == [False, True]
    assert all(set(row["deviation_from_float64"]) == {"cpu_flash", "cpu_matmul"} for row in rows)
    assert (tmp_path / "cpu_matmul.md").read_text().count("\n| 300 |") == 2


def test_dilated_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _run(bench_dilated_attention, tmp_path, monkeypatch, "--sizes", "300", "--repeats", "2")
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


def test_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--lengths", "40", "--repeats", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_decode.py", *options, f"--output={tmp_path}"])
    bench_decode.main()
    [row] = _rows(tmp_path / "decode.json")
    assert (row["tokens"], row["dtype"]) == (40, "float32")
    assert set(row["deviation_from_definition"]) == {"ours", "dense"}
    assert (tmp_path / "decode.md").read_text().count("\n| 40 |") == 1


@pytest.mark.parametrize(
    ("script", "device"), [(bench_card, "cpu"), (bench_cpu_matmul, "cuda")], ids=["card", "cpu_matmul"]
)
def test_a_benchmark_says_where_it_has_nothing_to_measure(
    script: Any, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", f"--device={device}", f"--output={tmp_path}"])
    script.main()
    assert "this measures a" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ bench_card


def _case(backward: bool = True) -> card_cases.Case:
    return card_cases.Case("paper", 65, 2, 16, torch.float32, is_causal=False, backward=backward)


def _run_card(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict[str, Any]]:
    """The rows after a run with small sizes."""
    small = ["--sizes=65", "--heads=2", "--head-dims=16", "--dtype=fp32", "--repeats=2", "--patterns=paper"]
    small += ["--kernels", "cpu_flash", "math"]
    monkeypatch.setattr(sys, "argv", ["bench_card.py", *small, *options, f"--output={folder}"])
    bench_card.main()
    return _rows(folder / "card.json")


def test_card_goes_on_with_the_rows_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [first] = _run_card(tmp_path, monkeypatch, "--passes", "forward")
    rows = _run_card(tmp_path, monkeypatch)
    assert f"1 rows of {tmp_path / 'card.json'} are kept" in capsys.readouterr().out
    assert rows[0] == first
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert set(row["candidates"]) == {"cpu_flash", "math", "dense flash"}
        assert set(row["left_out"]) == {kernel.name for kernel in kernels.table()} - {"cpu_flash", "math"} | {
            "dense cudnn"
        }
        for one in row["candidates"].values():
            assert 0 < one["deviation"] < 2e-5
            assert one["extra_bytes"] >= 0
            assert one["over_roofline"] == pytest.approx(one["median"] / one["roofline_seconds"])
    page = (tmp_path / "card.md").read_text()
    assert page.count("\n| 65 |") == 6
    assert page.count("| paper | 65 | 16 |") == 2
    assert "6.5 times faster than dense, with the paper's pattern: not measured" in page


def test_card_keeps_no_rows_of_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--passes", "forward", "--kernels", "cpu_flash", "--dense-up-to=1"]
    for heads, told in ((2, ""), (3, "1 rows of {} are of another run, and measured again"), (3, "")):
        fresh = [] if told else ["--fresh"]
        [row] = _run_card(tmp_path, monkeypatch, *options, f"--heads={heads}", *fresh)
        assert list(row["candidates"]) == ["cpu_flash"]
        assert (told.format(tmp_path / "card.json") if told else "ceilings") in capsys.readouterr().out


def test_the_definition_of_the_card_is_the_reference() -> None:
    assert card_cases.check_definition(CPU) < 1e-12


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_candidate_that_is_wrong_is_found_out(backward: bool) -> None:
    case = _case(backward)
    tensors = case.inputs(CPU)

    def slightly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = card_cases.dilated(case, "math")(query, key, value)
        return out.detach() + 1.001 * (out - out.detach()) if backward else 1.001 * out

    def nan(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return slightly(query, key, value) * math.nan

    found = card_measuring.look_at(case, "slightly", slightly, tensors, CPU)
    assert found["deviation"] == pytest.approx(1e-3, rel=0.1)
    assert "deviates from the definition by 1.0e-03" in found["why"]
    assert "deviates" in card_measuring.look_at(case, "nan", nan, tensors, CPU)["why"]


def test_a_gradient_where_no_cotangent_lies_is_found_out() -> None:
    case = _case()

    def leaking(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = card_cases.dilated(case, "math")(query, key, value)
        return out + (query - query.detach()).roll(1, dims=1) * 1e-9

    assert math.isnan(card_cases.check(case, "leaking", leaking, case.inputs(CPU)))


def test_what_a_candidate_raises_is_its_own_affair() -> None:
    def raising() -> dict[str, Any]:
        raise torch.OutOfMemoryError("no room\nfor this")

    assert card_measuring.attempt(CPU, raising) == {"why": "OutOfMemoryError: no room"}


def test_bytes_and_flops_of_a_row() -> None:
    case = card_cases.Case("paper", 100, 2, 16, torch.bfloat16, is_causal=False, backward=True)
    one, lse = 100 * 2 * 16 * 2, 100 * 2 * 4
    assert (case.tensor_bytes, case.fewest_bytes) == (one, 8 * one + lse)
    assert case.flops("dense flash") == 2.5 * 4 * 16 * 2 * 100**2
    assert case.flops("triton") == 2.5 * card_cases.PATTERNS["paper"].flops(100, 2, 16)


def _row(pattern: str, seq: int, way: str, **seconds: float) -> dict[str, Any]:
    """A row in which ours do one FLOP, in that time each, and dense attention eight."""
    found = {
        name.replace("dense_", "dense "): {
            "median": taken, "spread": 0.0, "extra_bytes": 0, "deviation": 0.0,
            "flops_per_second": (8 if name.startswith("dense") else 1) / taken,
        }
        for name, taken in seconds.items()
    }  # fmt: skip
    key = {"pattern": pattern, "seq": seq, "head_dim": 64, "pass": way}
    return {**key, "auto": "cuda_flash", "input_bytes": 1 << 30, "left_out": {}, "candidates": found}


def test_goals_are_met_or_not_or_not_measured() -> None:
    rows = [
        _row("paper", 32768, "forward", triton=1.0, cuda_flash=2.0, dense_flash=7.0, dense_cudnn=6.0),
        _row("paper", 1 << 20, "forward", triton=8.0, cuda_flash=4.0),
        _row("paper", 1 << 20, "backward", triton=1.0),
    ]
    forward = card_page.rate_goal(rows, "forward")
    assert "**not met**, in 1 of 2 rows" in forward
    assert "lowest 0.22 (cuda_flash: paper, 1,048,576 tokens" in forward  # beside dense flash at 32,768
    assert "highest 0.88 (triton: paper, 32,768 tokens" in forward
    assert "not measured" in card_page.rate_goal(rows, "backward")
    [speedup] = card_page.speedup_goal(rows)
    assert (
        "**not met** against all of them, 7.00 times over dense flash, 6.00 times over dense cudnn (triton)" in speedup
    )
    [memory] = card_page.memory_goal(rows, 80 << 30)
    assert "**met**, 2.0 GiB by triton of 80.0" in memory
    assert card_page.fastest(rows).splitlines()[2:] == [
        "| paper | 32,768 | 64 | forward | triton | 2.00 (cuda_flash) | cuda_flash | 2.00 |",
        "| paper | 1,048,576 | 64 | forward | cuda_flash | 2.00 (triton) | cuda_flash | 1.00 |",
        "| paper | 1,048,576 | 64 | backward | triton | - | cuda_flash | - |",
    ]


def test_dense_attention_that_cannot_run_is_no_failure_and_a_kernel_of_ours_is() -> None:
    row = _row("paper", 8192, "forward", triton=1.0)
    row["candidates"] |= {"dense cudnn": {"why": "RuntimeError: none"}, "cuda_flash": {"why": "RuntimeError: none"}}
    assert card_page.failures([row]) == ["cuda_flash, paper, 8,192 tokens, head_dim 64, forward: RuntimeError: none"]
    row["candidates"]["dense cudnn"]["deviation"] = 0.5
    assert len(card_page.failures([row])) == 2


def test_tuned_block_sizes_stand_beside_those_of_the_code() -> None:
    def trial(blocks: list[int], seconds: float | None) -> dict[str, Any]:
        return {"pass": "forward", "head_dim": 64, "blocks": blocks, "seconds": seconds, "why": ""}

    trials = [trial([128, 64, 4, 3], 2e-3), trial([64, 64, 4, 2], 1e-3), trial([128, 128, 8, 3], None)]
    [_, _, line] = card_page.tuning(trials)
    assert line == "| forward | 64 | 64, 64, 4, 2 | 1.000 | 128, 64, 4, 3 | 2.000 | 3 | 1 |"
    trials[1]["seconds"] = trials[0]["seconds"] = None
    assert "| 128, 64, 4, 3 | - | 128, 64, 4, 3 | - | 3 | 3 |" in list(card_page.tuning(trials))[-1]


def test_tuning_is_refused_where_the_kernel_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="--tune: the Triton kernel cannot run here: it runs on CUDA"):
        _run_card(tmp_path, monkeypatch, "--tune")
