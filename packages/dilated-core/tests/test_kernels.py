"""The kernel table: each kernel against the math in float64, who is chosen, and why others are not."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dilated_core import dilated_attention, kernels
from dilated_core.kernels import Problem, cpu_flash, math

CPU = torch.device("cpu")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu_kernels_agree_with_float64(dtype: torch.dtype, is_causal: bool) -> None:
    tensors = [tensor.transpose(1, 2) for tensor in torch.randn(4, 2, 130, 3, 16, dtype=torch.float64).to(dtype)]
    exact = math.Math()
    problem = Problem(*tensors[:3], is_causal, 0.25)
    doubles = [tensor.double() for tensor in tensors]
    exact_problem = Problem(*doubles[:3], is_causal, 0.25)
    out, lse = exact.forward(exact_problem)
    grads = exact.backward(exact_problem, doubles[3], out, lse)
    for kernel in kernels.table():
        if kernels.survey(CPU, dtype, 16)[kernel.name] is None:
            ours = kernel.forward(problem)
            our_grads = kernel.backward(problem, tensors[3], *ours)
            eps = torch.finfo(dtype).eps
            for got, expected in zip((*ours, *our_grads), (out, lse, *grads), strict=True):
                assert (got.double() - expected).abs().max() <= 30 * eps * expected.abs().max(), kernel.name


def test_math_in_chunks_equals_math_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, grad = torch.randn(4, 2, 3, 50, 8, dtype=torch.float64).unbind()
    kernel, problem = math.Math(), Problem(query, key, value, is_causal=True, scale=0.3)
    results = []
    for limit in (1 << 24, 700):
        monkeypatch.setattr(math, "SCORES_AT_ONCE", limit)
        out, lse = kernel.forward(problem)
        results.append([out, lse, *kernel.backward(problem, grad, out, lse)])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-13)


def test_auto_prefers_flash_and_falls_back() -> None:
    assert kernels.choose("auto", CPU, torch.float32, 64).name == "cpu_flash"
    assert kernels.choose("auto", torch.device("meta"), torch.float32, 64).name == "math"


def test_survey_gives_a_reason_for_each_refusal() -> None:
    survey = kernels.survey(CPU, torch.float32, 64)
    assert list(survey) == ["cpu_matmul", "cpu_flash", "cuda_flash", "cuda_cudnn", "cuda_efficient", "math"]
    assert survey["cpu_flash"] is None
    assert survey["math"] is None
    assert survey["cuda_flash"] == "it runs on CUDA, not on cpu"
    if not torch.cuda.is_available():
        assert kernels.survey(torch.device("cuda"), torch.bfloat16, 64)["cuda_flash"] == "CUDA is not available here"


def test_impossible_request_names_what_is_missing() -> None:
    query = torch.randn(1, 4, 2, 8)
    with pytest.raises(
        ValueError, match=r'kernel: "cuda_flash" cannot run torch.float32 .* it runs on CUDA, not on cpu'
    ):
        dilated_attention(query, query, query, [2], [1], kernel="cuda_flash")
    with pytest.raises(ValueError, match=r"kernel: expected one of \['auto', 'cpu_flash'"):
        kernels.choose("flash", CPU, torch.float32, 8)


def test_a_missing_private_operator_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a torch without the operator the table says so, and "auto" takes the math kernel."""

    class NoOperators:
        aten = object()

    monkeypatch.setattr(cpu_flash.torch, "ops", NoOperators)
    cpu_flash._fault.cache_clear()
    kernels.choose.cache_clear()
    try:
        assert "has no aten::_scaled_dot_product" in str(kernels.survey(CPU, torch.float32, 8)["cpu_flash"])
        assert kernels.choose("auto", CPU, torch.float32, 8).name == "math"
    finally:
        cpu_flash._fault.cache_clear()
        kernels.choose.cache_clear()


def test_a_wrong_private_operator_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch whose operator scales differently would be caught by the capability test."""
    right = cpu_flash.CPUFlash.forward
    monkeypatch.setattr(
        cpu_flash.CPUFlash, "forward", lambda self, problem: right(self, problem._replace(scale=2 * problem.scale))
    )
    cpu_flash._fault.cache_clear()
    try:
        assert cpu_flash._fault(torch.float32) == "the operator's results differ from the definition"
    finally:
        cpu_flash._fault.cache_clear()


@pytest.mark.parametrize("mode", [torch.device("meta"), FakeTensorMode()], ids=["meta", "fake"])
def test_the_capability_test_is_real_in_every_mode(mode: AbstractContextManager[object]) -> None:
    """A first use while modules are built on meta or with fake tensors must not leave a false refusal behind."""
    cpu_flash._fault.cache_clear()
    with mode:
        assert kernels.survey(CPU, torch.float32, 8)["cpu_flash"] is None


@pytest.mark.parametrize("name", ["cuda_flash", "cuda_cudnn", "cuda_efficient"])
def test_cuda_kernels_call_their_operators_as_declared(name: str) -> None:
    """On meta tensors the operators check their arguments and shapes; what they compute is for `nox -s gpu`."""
    (kernel,) = (kernel for kernel in kernels.table() if kernel.name == name)
    shape = (2, 37, 3, 64)
    query, key, value, grad = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta").transpose(1, 2) for _ in range(4)
    )
    problem = Problem(query, key, value, is_causal=True, scale=0.2)
    out, lse = kernel.forward(problem)
    grads = kernel.backward(problem, grad, out, lse.contiguous())
    assert lse.shape == query.shape[:3]
    assert all(tensor.shape == query.shape for tensor in (out, *grads))
