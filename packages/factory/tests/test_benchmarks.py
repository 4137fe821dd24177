"""The benchmarks run, check what they measure, and write what their pages say, at sizes that take seconds."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gigapath(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("bench_gigapath")


def run(name: str, folder: Path, *options: str) -> tuple[dict, str]:
    """The JSON and the page of one script."""
    command = [sys.executable, str(BENCHMARKS / f"bench_{name}.py"), *options, "--output", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    page = (folder / f"{name}.md").read_text()
    assert f"Raw data: [{name}.json]({name}.json). Command, from the repository's root: `python packages/" in page
    return json.loads((folder / f"{name}.json").read_text()), page


@pytest.mark.slow
def test_gigapath_benchmark(tmp_path: Path, gigapath: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--tiles", "60", "--precisions", "fp32", "bf16", "--kernels", "auto", "math"]
    options += ["--layers", "1", "--repeats", "2", "--threads", "1"]
    result, page = run("gigapath", tmp_path, *options)
    assert {(row["tiles"], row["precision"]) for row in result["rows"]} == {(60, "fp32"), (60, "bf16")}
    for row in result["rows"]:
        assert set(row["candidates"]) == {"auto", "math", "torchscale"}
        assert "it runs on CUDA" in row["left_out"]["cuda_flash"]
        for name, one in row["candidates"].items():
            assert all(0 <= deviation < 5e-2 for deviation in one["deviation"].values())
            assert 0 < one["deviation"]["encoder"] < (1e-5 if row["precision"] == "fp32" else 5e-2)
            for part in ("layers", "attention") if name == "math" else ("layers", "attention", "slide"):
                assert len(one[part]["seconds"]) == 2
        medians = [row["candidates"][name]["slide"]["median"] for name in ("auto", "torchscale")]
        assert f"{medians[1] / medians[0]:.2f} times; the attention alone" in page
    assert page.count("\n| 60 |") == 6

    monkeypatch.setattr(sys, "argv", ["bench_gigapath.py", *options, "--output", str(tmp_path)])
    gigapath.main()
    again = json.loads((tmp_path / "gigapath.json").read_text())
    assert again == result, "the rows that were there are kept"


def row_of(precision: str, **candidates: dict[str, Any]) -> dict[str, Any]:
    return {"tiles": 100_000, "layers": 12, "precision": precision, "candidates": candidates}


def layers_in(median: float) -> dict[str, Any]:
    return {"deviation": {"attention": 1e-3}, "layers": {"median": median, "spread": 0.0, "peak_bytes": 1}}


def test_the_goal_of_a_card_is_met_or_not_or_not_measured(gigapath: ModuleType) -> None:
    fast, slow = row_of("bf16", auto=layers_in(2.5), triton=layers_in(1.5)), row_of("fp32", auto=layers_in(2.0))
    met, not_met = gigapath.goals([fast, slow], "cuda")
    assert "12 layers over 100,000 tiles under 2 s, bf16: **met**, 1.500 s by triton, 2.500 s by auto" in met
    assert "fp32: **not met**, 2.000 s by auto" in not_met
    [none] = gigapath.goals([row_of("bf16", auto={"why": "ValueError: no"})], "cuda")
    assert "**not met**, no kernel has a figure" in none
    for other in ({"layers": 2}, {"tiles": 10_000}):
        [absent] = gigapath.goals([fast | other], "cuda")
        assert "not measured in this run" in absent


def test_what_deviates_or_raises_is_wrong_and_too_little_memory_is_not(gigapath: ModuleType) -> None:
    raised, deviates = {"why": "ValueError: no"}, {"why": "encoder: it deviates", "deviation": {"encoder": 1.0}}
    full = {"why": "OutOfMemoryError: CUDA out of memory"}
    rows = [row_of("bf16", auto=raised, triton=full, torchscale=raised), row_of("fp32", auto=full, torchscale=deviates)]
    assert list(gigapath.failures(rows)) == [
        "auto, 100,000 tiles, bf16: ValueError: no",
        "torchscale, 100,000 tiles, fp32: encoder: it deviates",
    ]
    in_a_part = {**layers_in(1.0), "attention": raised}
    assert list(gigapath.failures([row_of("bf16", auto=in_a_part)])) == ["auto, 100,000 tiles, bf16: ValueError: no"]


def test_a_candidate_that_deviates_has_no_figure_and_fails_the_run(
    gigapath: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gigapath_candidates.written_down", lambda query, key, value: value)
    options = ["--tiles", "40", "--layers", "1", "--repeats", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_gigapath.py", *options, "--threads", str(torch.get_num_threads())])
    with pytest.raises(SystemExit, match=r"torchscale, 40 tiles, fp32: attention: it deviates"):
        gigapath.main()
    [row] = json.loads((tmp_path / "gigapath.json").read_text())["rows"]
    assert "layers" in row["candidates"]["auto"]
    assert "layers" not in row["candidates"]["torchscale"]
    assert "## Wrong, or not run\n\n- torchscale, 40 tiles, fp32: attention" in (tmp_path / "gigapath.md").read_text()


def test_torchscales_own_code_is_left_out_of_a_card_without_what_it_needs(gigapath: ModuleType) -> None:
    card, checkout = torch.device("cuda"), Path("torchscale")
    for dtype, path, why in (
        (torch.bfloat16, None, "--torchscale"),
        (torch.float32, checkout, "takes float16 and bfloat16"),
        (torch.bfloat16, checkout, "flash_attn"),
    ):
        runs, words = gigapath.peer_words(card, dtype, path)
        assert why in words
        assert not runs or importlib.util.find_spec("flash_attn")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "meta"], "--device: expected cpu or cuda"),
        (["--tiles", "0"], "--tiles: expected 1 to 1,000,000"),
        (["--tiles", "1000001"], "--tiles: expected 1 to 1,000,000"),
        (["--layers", "0"], "--layers, --repeats, --threads: expected at least 1"),
    ],
)
def test_gigapath_benchmark_refuses_what_it_cannot_measure(
    options: list[str],
    message: str,
    gigapath: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gigapath.py", *options])
    with pytest.raises(SystemExit):
        gigapath.main()
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_gigapath_benchmark_on_a_card(tmp_path: Path) -> None:
    options = ["--device=cuda", "--tiles", "2500", "--layers", "2", "--repeats", "2", "--output", str(tmp_path)]
    command = [sys.executable, str(BENCHMARKS / "bench_gigapath.py"), *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    [path] = tmp_path.glob("*/gigapath.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["precision"] for row in rows] == ["bf16", "fp16-autocast", "fp32"]
    for row in rows:
        assert row["auto"].startswith("cuda_")
        assert all(one["attention"]["median"] > 0 for one in row["candidates"].values())
        assert "torchscale" in row["left_out"]


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
