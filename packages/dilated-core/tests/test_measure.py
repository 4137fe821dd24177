"""measure: turns are taken in order, memory is exact, the environment is JSON."""

from __future__ import annotations

import json
import time

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


def test_a_slow_candidate_sits_out_once_it_has_taken_enough() -> None:
    times = measure.interleaved({"a": lambda: None, "b": lambda: time.sleep(0.1)}, repeats=4, enough=0.15)
    assert [len(times[name].seconds) for name in "ab"] == [4, 2]


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
