"""The benchmarks run, check what they measure, and write what their pages say, at sizes that take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_policies  # noqa: E402
import layouts  # noqa: E402
import record_traces  # noqa: E402
import traces  # noqa: E402

from dilated_pattern_cache import PatternCache  # noqa: E402

TRACES = sorted(traces.FOLDER.glob("*.json"))


def _run(name: str, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """What the benchmark wrote, in a process of its own: it counts memory, and sets threads."""
    ran = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"bench_{name}.py"), "--quick", f"--device={device}", f"--output={folder}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # on a busy machine more threads wait for one another
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return _read(name, folder)


def _read(name: str, folder: Path) -> dict[str, Any]:
    """The results, beside a page that holds every row."""
    [path] = folder.rglob(f"pattern_cache_{name}.json")
    results: dict[str, Any] = json.loads(path.read_text())
    page = path.with_suffix(".md").read_text().splitlines()
    tables = [value for value in results.values() if isinstance(value, list)]
    assert sum(line.startswith("| ") for line in page) == sum(len(rows) + 1 for rows in tables)  # and a header each
    assert page[-1].startswith(f"Raw data: [{path.name}]({path.name}). Command, from the repository's root: `python ")
    assert all(row["checked"] for rows in tables for row in rows)
    assert {"date", "python", "torch", "processor", "cores", "kernel"} <= set(results["environment"])
    assert results["quick"]
    return results


@pytest.mark.slow
def test_lookup(tmp_path: Path) -> None:
    pytest.importorskip("dilated_core")
    results = _run("lookup", tmp_path)
    ways = {"get_or_create", "cache[key]", "lru_cache with a lock", "lru_cache bare"}
    for row in results["hits"] + results["threads"]:
        assert ways <= set(row["median"]) <= ways | {"cachetools with a lock"}
    assert [row["goal_met"] is None for row in results["hits"]] == [False, False, False, True]
    assert {(row["value"], row["guard"]) for row in results["guards"]} == {
        (value, guard)
        for value in ("an object", "a tensor", "a tuple of 16 tensors")
        for guard in ("version", "contents", None)
    }
    assert {row["what"] for row in results["making"]} == {
        "dilated indices, key kept",
        "dilated indices, key made anew",
        "dilated_core's plan",
        "block layout",
        "create_block_mask, causal and window",
    }
    assert all(row["goal_met"] for row in results["bytes"])


@pytest.mark.slow
def test_planning(tmp_path: Path) -> None:
    pytest.importorskip("dilated_core")
    results = _run("planning", tmp_path)
    assert [row["forward"] for row in results["planning"]] == ["block-sparse", "dilated_core"]
    assert all(set(row["median"]) == {"without", "kept", "cold", "warm"} for row in results["planning"])


@pytest.mark.slow
def test_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_policies.py", "--quick", f"--output={tmp_path}"])
    bench_policies.main()
    results = _read("policies", tmp_path)
    for path in TRACES:
        for row in results[path.stem]:
            assert set(row["policies"]) == {"lru", "gdsf", "farthest next use"}
            once = row["seconds_once"]
            assert all(score["seconds_missed"] >= once * 0.999 for score in row["policies"].values())


@pytest.mark.slow
def test_recording_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["record_traces.py", "--quick", f"--output={tmp_path}"])
    record_traces.main()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [path.name for path in TRACES]
    for path in tmp_path.iterdir():
        # Costs differ from run to run. What is asked for first, and what it weighs, does not.
        again, kept = traces.load(path), traces.load(traces.FOLDER / path.name)
        assert again.about == kept.about
        if path.stem != "curriculum":  # whose stages depend on how many steps there are
            assert again.lookups == kept.lookups[: len(again.lookups)]
            assert [key[:2] for key in again.keys] == [key[:2] for key in kept.keys[: len(again.keys)]]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lookup", "planning"])
def test_benchmarks_run_on_a_gpu(name: str, tmp_path: Path) -> None:
    pytest.importorskip("dilated_core")
    assert _run(name, tmp_path, device="cuda")["device"].startswith("cuda")


# ------------------------------------------------------------------------------------------------ traces


def test_there_are_three_traces() -> None:
    assert [path.stem for path in TRACES] == ["curriculum", "service", "slides"]


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_a_kept_trace_is_consistent(path: Path) -> None:
    trace = traces.load(path)
    assert trace.name == path.stem
    assert path.stat().st_size < 150_000
    assert len({key.text for key in trace.keys}) == len(trace.keys)
    assert all(key.nbytes > 0 and key.seconds > 0 for key in trace.keys)
    first = list(dict.fromkeys(trace.lookups))
    assert first == list(range(len(trace.keys)))  # keys stand in the order in which they were first asked for
    assert trace.footprint == sum(key.nbytes for key in trace.keys)


def test_a_saved_trace_is_loaded_as_it_was(tmp_path: Path) -> None:
    recorder = traces.Recorder(PatternCache())
    for size in (4, 2, 4, 8):
        value = recorder.get_or_create(("zeros", size), lambda size=size: torch.zeros(size))
        assert len(value) == size
    trace = recorder.trace("zeros", "a few")
    assert traces.load(trace.save({}, tmp_path)) == trace
    assert trace.lookups == [0, 1, 0, 2]
    assert [key.nbytes for key in trace.keys] == [16, 8, 32]
    assert trace.footprint == 56


# ------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize(("rows", "global_rows"), [(1, 0), (2, 2), (5, 0), (40, 2)])
def test_a_layout_is_what_it_says(rows: int, global_rows: int) -> None:
    options = {"window": 3, "global_columns": 2, "global_rows": global_rows, "random": 3}
    layout = layouts.block_layout(rows, **options)
    assert layouts.is_such_a_layout(layout, **options)
    assert not layouts.is_such_a_layout(layout._replace(columns=layout.columns.flip(0) + 1), **options)


def test_a_seed_draws_the_same_layout_again() -> None:
    first, again, other = (layouts.block_layout(64, seed=seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.columns, other.columns)
