"""The kernel table: each kernel against the math in float64, who is chosen, and why others are not."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dilated_core import dilated_attention, kernels
from dilated_core.kernels import Problem, cpu_flash, cpu_matmul, math

CPU = torch.device("cpu")


def _compare(kernel: kernels.Kernel, problem: Problem, grad_out: Tensor) -> None:
    """A kernel's results against the math kernel's in float64, with an lse that other tiles were merged into."""
    exact, eps = math.Math(), torch.finfo(problem.query.dtype).eps
    wide = problem._replace(**{name: getattr(problem, name).double() for name in ("query", "key", "value")})
    out, lse = exact.forward(wide)
    joint = lse.masked_fill(lse == -torch.inf, torch.inf) + 0.5
    grads = exact.backward(wide, grad_out.double(), out, joint)
    got_out, got_lse = kernel.forward(problem)
    got_grads = kernel.backward(problem, grad_out, out.to(grad_out.dtype), joint.to(got_lse.dtype))
    assert torch.equal(got_lse == -torch.inf, lse == -torch.inf), kernel.name
    lses = (got_lse.masked_fill(lse == -torch.inf, 0.0), lse.masked_fill(lse == -torch.inf, 0.0))
    for got, expected in ((got_out, out), lses, *zip(got_grads, grads, strict=True)):
        assert (got.double() - expected).abs().max() <= 30 * eps * expected.abs().max(), kernel.name


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu_kernels_agree_with_float64(dtype: torch.dtype, is_causal: bool, masked: bool) -> None:
    *qkv, grad = (tensor.transpose(1, 2) for tensor in torch.randn(4, 2, 130, 3, 16, dtype=torch.float64).to(dtype))
    real = _some_keys(2, 3, 130) if masked else None
    for kernel in kernels.table():
        if kernel.name == "triton":  # interpreted here, seconds for such a tile: test_triton has smaller ones
            continue
        if kernels.survey(CPU, dtype, 16)[kernel.name] is None:
            _compare(kernel, Problem(*qkv, is_causal, 0.25, real), grad)


def _some_keys(batch: int, heads: int, keys: int) -> Tensor:
    """About half of the keys; in one head none, in another none of the first."""
    real = torch.rand(batch, heads, keys) < 0.5
    real[0, 0] = False
    real[-1, -1, : keys // 2] = False
    return real


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(
    ("batch", "heads", "rows", "keys", "head_dim", "is_causal"),
    [(2, 3, 300, 300, 64, True), (1, 2, 70, 700, 48, False), (3, 2, 513, 513, 72, True), (5, 4, 64, 64, 8, False)],
)
@pytest.mark.parametrize("layout", ["(batch, heads, rows)", "(batch, rows, heads)", "a slice of the heads"])
def test_products_in_blocks(
    batch: int,
    heads: int,
    rows: int,
    keys: int,
    head_dim: int,
    is_causal: bool,
    layout: str,
    masked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cpu_matmul over blocks that do not come out even, in every layout that the tiles have."""
    if reason := kernels.survey(CPU, torch.bfloat16, head_dim)["cpu_matmul"]:
        pytest.skip(reason)
    monkeypatch.setattr(cpu_matmul, "FEWEST_SCORES", 0)
    monkeypatch.setattr(cpu_matmul, "BLOCK_SCORES", 1 << 16)

    def draw(length: int) -> Tensor:
        if layout == "(batch, heads, rows)":
            return torch.randn(batch, heads, length, head_dim).bfloat16()
        wide = torch.randn(batch, length, 2 * heads, head_dim).bfloat16().transpose(1, 2)
        return (
            wide[:, :heads]
            if layout == "a slice of the heads"
            else wide[:, :heads].transpose(1, 2).contiguous().transpose(1, 2)
        )

    real = _some_keys(batch, heads, keys) if masked else None
    problem = Problem(draw(rows), draw(keys), draw(keys), is_causal, head_dim**-0.5, real)
    _compare(cpu_matmul.CPUMatmul(), problem, draw(rows))


def test_products_keep_large_scores() -> None:
    """Scores near 300, of which one bfloat16 would lose units: the weights are as right as flash's."""
    if reason := kernels.survey(CPU, torch.bfloat16, 64)["cpu_matmul"]:
        pytest.skip(reason)
    query, key, value = torch.randn(3, 1, 4, 256, 64).bfloat16().unbind()
    problem = Problem(query * 8, key, value, is_causal=False, scale=1.0)
    exact, _ = math.Math().forward(
        problem._replace(query=problem.query.double(), key=key.double(), value=value.double())
    )
    errors = [
        (kernel.forward(problem)[0] - exact).abs().max() for kernel in (cpu_matmul.CPUMatmul(), cpu_flash.CPUFlash())
    ]
    assert errors[0] <= 2 * errors[1]


def test_auto_takes_products_with_one_thread_only() -> None:
    if reason := kernels.survey(CPU, torch.bfloat16, 64)["cpu_matmul"]:
        pytest.skip(reason)
    threads = torch.get_num_threads()
    try:
        for count, name in ((1, "cpu_matmul"), (2, "cpu_flash")):
            torch.set_num_threads(count)
            assert kernels.choose("auto", CPU, torch.bfloat16, 64).name == name
    finally:
        torch.set_num_threads(threads)


def test_small_problems_go_to_flash() -> None:
    query = torch.randn(1, 2, 16, 8).bfloat16()
    problem = Problem(query, query, query, is_causal=False, scale=1.0)
    for got, expected in zip(
        cpu_matmul.CPUMatmul().forward(problem), cpu_flash.CPUFlash().forward(problem), strict=True
    ):
        assert torch.equal(got, expected)


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
    assert list(survey) == [
        "cpu_matmul",
        "cpu_flash",
        "cuda_flash",
        "cuda_cudnn",
        "cuda_efficient",
        "triton",
        "cuda_flash3",
        "cuda_flash4",
        "math",
    ]
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
    with pytest.raises(ValueError, match=r"kernel: expected one of \['auto', 'cpu_matmul'"):
        kernels.choose("flash", CPU, torch.float32, 8)


def test_a_missing_private_operator_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a torch without the operator the table says so, and "auto" takes the math kernel."""

    class NoOperators:
        aten = object()

    monkeypatch.setattr(cpu_flash.torch, "ops", NoOperators)
    cpu_flash._fault.cache_clear()
    try:
        assert "has no aten::_scaled_dot_product" in str(kernels.survey(CPU, torch.float32, 8)["cpu_flash"])
        assert kernels.choose("auto", CPU, torch.float32, 8).name == "math"
    finally:
        cpu_flash._fault.cache_clear()


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
    masks = [None]
    if name == "cuda_efficient":
        masks.append(torch.empty(2, 3, 37, dtype=torch.bool, device="meta"))
    for real in masks:
        problem = Problem(query, key, value, is_causal=True, scale=0.2, real=real)
        out, lse = kernel.forward(problem)
        grads = kernel.backward(problem, grad, out, lse.contiguous())
        assert lse.shape == query.shape[:3]
        assert all(tensor.shape == query.shape for tensor in (out, *grads))


def test_what_a_call_needs_decides_too() -> None:
    cuda = torch.device("cuda")
    masked, dropping = kernels.Needs(mask=True), kernels.Needs(dropout=True)
    assert kernels.choose("auto", CPU, torch.float32, 64, masked).name == "cpu_flash"
    assert kernels.choose("auto", CPU, torch.float32, 64, dropping).name == "math"
    assert kernels.survey(CPU, torch.float32, 64, dropping)["cpu_flash"] == "it drops no probabilities"
    if torch.cuda.is_available():
        assert kernels.choose("auto", cuda, torch.bfloat16, 64, masked).name == "cuda_efficient"
