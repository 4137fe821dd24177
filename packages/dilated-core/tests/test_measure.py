"""measure: turns are taken in order, memory is exact, the environment is JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from dilated_core import dilated_attention, kernels, measure
from dilated_core.kernels import cpu_matmul

CPU = torch.device("cpu")


def test_interleaved_takes_turns() -> None:
    order: list[str] = []
    times = measure.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert all(len(timing.seconds) == 2 for timing in times.values())


def test_a_slow_candidate_sits_out_once_it_has_taken_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]  # a clock that only the candidates move: how busy the machine is does not count
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow() -> None:
        now[0] += 0.1

    times = measure.interleaved({"a": lambda: None, "b": slow}, repeats=4, enough=0.15)
    assert [len(times[name].seconds) for name in "ab"] == [4, 2]


def test_a_short_candidate_is_called_several_times_in_a_row_and_their_mean_counts() -> None:
    calls: list[str] = []

    def run() -> None:
        calls.append("")
        time.sleep(0.01)

    started = time.perf_counter()
    [timing] = measure.interleaved({"a": run}, repeats=2, warmup=0, shortest=0.05, enough=0.001).values()
    [mean] = timing.seconds  # one timed run was enough
    in_a_row = len(calls) - 1  # the first call tells how many it takes
    assert in_a_row <= 5
    assert 0.01 * in_a_row <= mean * in_a_row <= time.perf_counter() - started


def test_calls_of_no_length_are_counted_too() -> None:
    calls: list[str] = []
    measure.interleaved({"a": lambda: calls.append("")}, repeats=1, warmup=0, shortest=1e9)
    assert len(calls) == 1 + measure.MOST_CALLS


def test_a_shortest_time_below_zero_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"shortest: expected a number of seconds, at least 0, got -1"):
        measure.interleaved({"a": lambda: None}, repeats=1, shortest=-1)


def test_no_repeat_is_an_error() -> None:
    with pytest.raises(ValueError, match="repeats: expected at least 1, got 0"):
        measure.interleaved({"a": lambda: None}, repeats=0)


def test_timing() -> None:
    timing = measure.Timing((1.0, 2.0, 3.0, 4.0, 5.0))
    assert (timing.median, timing.spread) == (3.0, pytest.approx(2 / 3))
    assert measure.Timing((1.0,)).spread == 0.0


def test_peak_memory_is_exact() -> None:
    def run() -> torch.Tensor:
        first = torch.empty(1000)
        del first
        second = torch.empty(500)
        return torch.cat([second, torch.empty(100)])  # 500, 100 and 600 floats at once

    assert measure.peak_memory(run) == 4 * 1200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_needs_less_than_twice_its_output_more(dtype: torch.dtype) -> None:
    """The memory goal, in both precisions, where tiles exceed one gather; and a kernel's block beside it."""
    query, key, value = torch.randn(3, 1, 16384, 8, 64).to(dtype).unbind()
    peak = measure.peak_memory(lambda: dilated_attention(query, key, value, [512, 1024, 2048, 4096], [1, 2, 4, 6]))
    block = 12 * cpu_matmul.BLOCK_SCORES if kernels.choose("auto", CPU, dtype, 64).name == "cpu_matmul" else 0
    assert peak - query.nbytes < 2 * query.nbytes + block


def test_environment_is_json() -> None:
    environment = json.loads(json.dumps(measure.environment()))
    assert environment["torch"] == torch.__version__


def test_figures_of_a_cpu_belong_to_the_folder_itself() -> None:
    assert measure.results_folder("some", CPU) == measure.results_folder(Path("some"), "cpu") == Path("some")


def test_figures_of_a_card_that_is_not_there_belong_nowhere() -> None:
    missing = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"device: expected one of {missing} CUDA devices, got cuda:{missing}"):
        measure.results_folder("some", f"cuda:{missing}")


def test_a_cards_folder_has_no_sign_that_a_path_could_not_hold() -> None:
    assert measure.card_folder("Tesla T4") == "tesla-t4"
    assert measure.card_folder("NVIDIA RTX(TM) 6000 / Ada..") == "rtx-tm-6000-ada"
    assert measure.card_folder("NVIDIA H100 80GB HBM3 MIG 1g.10gb") == "h100-80gb-hbm3-mig-1g.10gb"


@pytest.mark.gpu
def test_figures_of_a_card_belong_to_its_own_folder() -> None:
    folder = measure.results_folder("some", "cuda")
    assert folder.parent == Path("some")
    assert folder.name == measure.card_folder(torch.cuda.get_device_name())
