"""The benchmarks run, check what they measure, and write what their pages say, at sizes that take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("resource", reason="page faults are counted by getrusage")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import traces  # noqa: E402

from dilated_memory_pool import MemoryPool, PoolEvent, PoolLimitError  # noqa: E402


def _run(name: str, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """What the benchmark wrote, beside a page that holds every row."""
    command = [sys.executable, str(BENCHMARKS / f"bench_{name}.py"), "--quick", f"--device={device}"]
    ran = subprocess.run(
        [*command, f"--output={folder}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # on a busy machine more threads wait for one another
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    [path] = folder.rglob(f"memory_pool_{name}.json")
    results: dict[str, Any] = json.loads(path.read_text())
    page = path.with_suffix(".md").read_text().splitlines()
    tables = [value for value in results.values() if isinstance(value, list)]
    assert sum(line.startswith("| ") for line in page) == sum(len(rows) + 1 for rows in tables)  # and a header each
    assert page[-1].startswith(f"Raw data: [{path.name}]({path.name}). Command, from the repository's root: `python ")
    assert all(row["checked"] for rows in tables for row in rows)
    assert {"date", "torch", "processor", "cores", "kernel", "libc", "transparent_huge_pages"} <= set(
        results["environment"]
    )
    assert results["quick"]
    return results


@pytest.mark.slow
def test_allocate(tmp_path: Path) -> None:
    results = _run("allocate", tmp_path)
    for row in results["allocate"]:
        assert set(row["median"]) == set(row["spread"]) == {
            "torch.empty", "lightweight", "lightweight, blocks", "full", "full, blocks", "full, busy"
        }  # fmt: skip
    assert all(row["nbytes"] < 1 << 20 for row in results["pass_through"])
    waste = {row["classes"]: row["waste"]["log-uniform"]["mean"] for row in results["waste"]}
    assert waste["4 a doubling"] > waste["8 a doubling (default)"] > waste["16 a doubling"] > waste["exact (pages)"]
    assert [row["within_goal"] for row in results["waste"]] == [False, False, True, True, True]
    assert len(results["hits"]) == 6


@pytest.mark.slow
def test_first_write(tmp_path: Path) -> None:
    results = _run("first_write", tmp_path)
    pools = {"torch.empty", "lightweight", "full", "lightweight, small pages"}
    for row in results["first"]:
        assert set(row["median"]) == set(row["page_faults"]) == pools
    for row in results["again"]:
        assert pools <= set(row["median"])
        assert row["ratio"]["torch.empty"] == 1.0


@pytest.mark.slow
def test_fragmentation(tmp_path: Path) -> None:
    results = _run("fragmentation", tmp_path)
    assert len(results["unlimited"]) == len(results["limited"]) == 5
    for row in results["unlimited"]:
        assert row["reserved_over_requested"] >= 1
        assert 0 <= row["fragmentation"] < 1
        assert row["samples"]
        assert set(row["median"]) == {"blocks", "tensors"}
    for row in results["limited"]:
        assert row["peak_reserved_bytes"] <= row["limit_bytes"]


@pytest.mark.slow
def test_attention(tmp_path: Path) -> None:
    pytest.importorskip("dilated_core")
    results = _run("attention", tmp_path)
    variants = {"no pool", "lightweight", "full"}
    for key in ("forward", "training", "dynamic"):
        assert all(variants <= set(row["median"]) for row in results[key])
        assert {row["dtype"] for row in results[key]} == {"fp32", "bf16"}
    assert [row["pass"] for row in results["dynamic"]] == ["first", "later"] * 2
    assert all(row["memory"]["no pool"]["rise_bytes"] > 0 for row in results["dynamic"])
    assert all(row["second_hit_rate"] == 1.0 for row in results["classes"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["allocate", "first_write", "fragmentation", "attention"])
def test_benchmarks_run_on_a_gpu(name: str, tmp_path: Path) -> None:
    if name == "attention":
        pytest.importorskip("dilated_core")
    assert _run(name, tmp_path, device="cuda")["device"].startswith("cuda")


# ------------------------------------------------------------------------------------------------ traces


def test_a_days_trace_frees_everything_it_allocates_once() -> None:
    trace = traces.day(500, seed=3)
    live: set[int] = set()
    for key, nbytes in trace:
        assert (key in live) == (nbytes == 0)
        live ^= {key}
    assert not live
    assert trace == traces.day(500, seed=3) != traces.day(500, seed=4)


def test_peak_bytes_of_a_trace() -> None:
    trace = [traces.Event(0, 10), traces.Event(1, 5), traces.Event(0, 0), traces.Event(2, 7), traces.Event(1, 0)]
    assert traces.peak_bytes(trace) == 15


def test_lengths_hold_both_ends() -> None:
    drawn = traces.lengths(40, shortest=100, longest=1000)
    assert len(drawn) == 40
    assert (min(drawn), max(drawn)) == (100, 1000)


def test_a_recorded_trace_replays_to_the_same_numbers() -> None:
    events: list[PoolEvent] = []

    def observe(event: PoolEvent) -> None:
        events.append(event)

    trace = traces.day(300)
    pool = MemoryPool("host", mode="full", observers=[observe])
    traces.replay(trace, pool.allocate)
    first = pool.statistics()
    found = traces.recorded(events)
    assert [event.nbytes for event in found if event.nbytes] == [event.nbytes for event in trace if event.nbytes]
    again = MemoryPool("host", mode="full")
    traces.replay(found, again.allocate)
    assert again.statistics() == first


def test_refused_requests_are_counted_and_the_trace_goes_on() -> None:
    trace = [traces.Event(0, 4096), traces.Event(1, 1 << 20), traces.Event(1, 0), traces.Event(0, 0)]
    replayed = traces.replay(trace, MemoryPool("host", limit="64KiB").allocate, refusal=PoolLimitError)
    assert replayed.failed == 1


def test_a_watch_sees_an_overlap() -> None:
    watch = traces.Watch(lambda nbytes: nbytes, lambda owner: 1000 - owner)
    first, second = watch(10), watch(20)  # 990 to 1000, 980 to 1000
    assert watch.overlaps == 1
    del first, second
    watch(10)
    assert watch.overlaps == 1
