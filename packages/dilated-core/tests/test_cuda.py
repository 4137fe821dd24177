"""What only a CUDA device can show: its kernels against the oracle, forward and backward. Run by `nox -s gpu`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from core_cases import CASES, Case, assert_close, deviation, oracle, run

from dilated_core import kernels

pytestmark = pytest.mark.gpu

HALF_CASES = [
    Case(1, 601, 4, 64, (601,), (1,)),
    Case(2, 509, 5, 32, (64, 128, 512), (1, 2, 4)),
    Case(1, 1024, 8, 64, (128, 256, 1024), (1, 4, 6), is_causal=True),
    Case(2, 131, 3, 128, (16, 131), (2, 5)),
]
HALF_KERNELS = ["cuda_flash", "cuda_cudnn", "cuda_efficient", "math"]
# Largest deviation in half precision, relative to the largest magnitude (at least 1): a few roundings.
HALF_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


def _skip_where_refused(kernel: str, dtype: torch.dtype, head_dim: int) -> None:
    reason = kernels.survey(torch.device("cuda"), dtype, head_dim)[kernel]
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out+lse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", HALF_KERNELS)
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision_kernels(case: Case, kernel: str, dtype: torch.dtype, with_lse: bool) -> None:
    _skip_where_refused(kernel, dtype, case.head_dim)
    ours = run(case, dtype, device="cuda", kernel=kernel, with_lse=with_lse)
    exact = oracle(case, dtype, with_lse=with_lse)
    for name in ("out", "dq", "dk", "dv"):
        assert deviation(getattr(ours, name), getattr(exact, name), floor=1.0) <= HALF_TOLERANCE[dtype], name


@pytest.mark.parametrize("kernel", ["auto", "cuda_efficient", "math"])
@pytest.mark.parametrize("case", [case for case in CASES if case.head_dim % 8 == 0], ids=str)
def test_float32(case: Case, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _skip_where_refused("cuda_efficient" if kernel == "auto" else kernel, torch.float32, case.head_dim)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    for is_causal in (False, True):
        problem = replace(case, is_causal=is_causal)
        results = run(problem, torch.float32, device="cuda", kernel=kernel)
        assert_close(problem, torch.float32, results, oracle(problem, torch.float32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_runs_by_the_math_kernel(case: Case) -> None:
    assert_close(case, torch.float64, run(case, torch.float64, device="cuda"), oracle(case, torch.float64))


def test_auto_takes_flash_in_half_precision() -> None:
    assert kernels.choose("auto", torch.device("cuda"), torch.bfloat16, 64).name == "cuda_flash"
    assert kernels.choose("auto", torch.device("cuda"), torch.float32, 64).name == "cuda_efficient"
