"""What only a CUDA device can show: its kernels against the oracle, forward and backward. Run by `nox -s gpu`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from core_cases import CASES, LAYOUTS, MIXED_CASES, Case, assert_close, deviation, oracle, packed, run
from torch import Tensor

from dilated_core import DilatedKVCache, DilatedPattern, decode_step, dilated_attention, kernels, reference

pytestmark = pytest.mark.gpu

HALF_CASES = [
    Case(1, 601, 4, 64, (601,), (1,)),
    Case(2, 509, 5, 32, (64, 128, 512), (1, 2, 4)),
    Case(1, 1024, 8, 64, (128, 256, 1024), (1, 4, 6), is_causal=True),
    Case(2, 131, 3, 128, (16, 131), (2, 5)),
]
HALF_KERNELS = ["cuda_flash", "cuda_cudnn", "cuda_efficient", "triton", "cuda_flash3", "cuda_flash4", "math"]
# Largest deviation in half precision, relative to the largest magnitude (at least 1): a few roundings.
HALF_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
# In float32 and float64, over the tolerances of a CPU: cards sum in other orders, and the memory-efficient kernel makes
# a float32 product of several in tf32.
SLACK = 10.0
# For the Triton kernel: tiles of mixed membership, ragged ends, rates that do not divide, more rows than one tile.
TRITON_CASES = [
    Case(2, 257, 4, 32, (64, 128, 512), (1, 2, 4)),
    Case(1, 709, 5, 64, (100, 333, 800), (1, 3, 7)),
    Case(2, 391, 6, 48, (128, 256), (2, 5)),
    Case(1, 1531, 12, 64, (256, 512, 2048), (1, 4, 12)),
]


def _skip_where_refused(kernel: str, dtype: torch.dtype, head_dim: int, **needs: bool) -> None:
    reason = kernels.survey(torch.device("cuda"), dtype, head_dim, kernels.Needs(**needs))[kernel]
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def _assert_near(case: Case, dtype: torch.dtype, ours: object, exact: object) -> None:
    for name in ("out", "dq", "dk", "dv"):
        assert deviation(getattr(ours, name), getattr(exact, name), floor=1.0) <= HALF_TOLERANCE[dtype], (name, case)


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out+lse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", HALF_KERNELS)
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision_kernels(case: Case, kernel: str, dtype: torch.dtype, with_lse: bool) -> None:
    _skip_where_refused(kernel, dtype, case.head_dim)
    ours = run(case, dtype, device="cuda", kernel=kernel, with_lse=with_lse)
    _assert_near(case, dtype, ours, oracle(case, dtype, with_lse=with_lse))


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("kernel", ["auto", "cuda_efficient", "math"])
@pytest.mark.parametrize("case", [case for case in CASES if case.head_dim % 8 == 0], ids=str)
def test_float32(case: Case, kernel: str) -> None:
    _skip_where_refused("cuda_efficient" if kernel == "auto" else kernel, torch.float32, case.head_dim)
    for is_causal in (False, True):
        problem = replace(case, is_causal=is_causal)
        results = run(problem, torch.float32, device="cuda", kernel=kernel)
        assert_close(problem, torch.float32, results, oracle(problem, torch.float32), slack=SLACK)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_runs_by_the_math_kernel(case: Case) -> None:
    assert_close(case, torch.float64, run(case, torch.float64, device="cuda"), oracle(case, torch.float64), slack=SLACK)


def test_auto_takes_flash_in_half_precision() -> None:
    assert kernels.choose("auto", torch.device("cuda"), torch.bfloat16, 64).name == "cuda_flash"
    assert kernels.choose("auto", torch.device("cuda"), torch.float32, 64).name == "cuda_efficient"


# ------------------------------------------------------------------------------------------------ triton


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("case", [*CASES, *TRITON_CASES], ids=str)
def test_triton_in_float32(case: Case, is_causal: bool) -> None:
    _skip_where_refused("triton", torch.float32, case.head_dim)
    problem = replace(case, is_causal=is_causal)
    results = run(problem, torch.float32, device="cuda", kernel="triton", with_lse=True)
    assert_close(problem, torch.float32, results, oracle(problem, torch.float32, with_lse=True), slack=SLACK)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("mask", ["none", "random", "right"])
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("semantics", ["paper", "torchscale", "grouped"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_triton_options(semantics: str, is_causal: bool, kv_heads: int | None, mask: str) -> None:
    _skip_where_refused("triton", torch.float32, 8)
    for case in (*MIXED_CASES, Case(2, 333, 4, 16, (64, 150, 400), (1, 3, 7))):
        problem = replace(case, is_causal=is_causal, kv_heads=kv_heads, mask=mask).meaning(semantics)
        results = run(problem, torch.float32, device="cuda", kernel="triton", with_lse=True)
        assert_close(problem, torch.float32, results, oracle(problem, torch.float32, with_lse=True), slack=SLACK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 72, 96, 128, 256])
def test_triton_head_dims(head_dim: int, is_causal: bool, dtype: torch.dtype) -> None:
    _skip_where_refused("triton", dtype, head_dim)
    case = Case(1, 389, 4, head_dim, (128, 400), (1, 3), is_causal=is_causal, kv_heads=2, mask="random")
    ours = run(case, dtype, device="cuda", kernel="triton", with_lse=True)
    _assert_near(case, dtype, ours, oracle(case, dtype, with_lse=True))


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_layouts(layout: str) -> None:
    _skip_where_refused("triton", torch.float32, 16)
    case = Case(2, 150, 4, 16, (64, 150), (1, 3), layout=layout)
    assert_close(
        case, torch.float32, run(case, torch.float32, device="cuda", kernel="triton"), oracle(case, torch.float32)
    )


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("semantics", ["paper", "torchscale", "grouped"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_triton_packed(semantics: str, is_causal: bool) -> None:
    _skip_where_refused("triton", torch.float32, 16)
    case = Case(1, 1, 4, 16, (64, 150), (1, 3), semantics=semantics, is_causal=is_causal)
    case = packed(case, [5, 1, 0, 190, 64, 77])
    results = run(case, torch.float32, device="cuda", kernel="triton", with_lse=True)
    assert_close(case, torch.float32, results, oracle(case, torch.float32, with_lse=True), slack=SLACK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_smallest(dtype: torch.dtype) -> None:
    """One tile and a ragged one, each way through a block: what the sanitizer watches too."""
    _skip_where_refused("triton", dtype, 16)
    case = Case(1, 150, 2, 16, (64, 150), (1, 3), is_causal=True, kv_heads=1, mask="random")
    ours = run(case, dtype, device="cuda", kernel="triton", with_lse=True)
    exact = oracle(case, dtype, with_lse=True)
    assert deviation(ours.out, exact.out, floor=1.0) <= 2e-2


def test_triton_gives_the_same_bits_again() -> None:
    _skip_where_refused("triton", torch.bfloat16, 64)
    case = replace(TRITON_CASES[3], kv_heads=4)
    first, second = (run(case, torch.bfloat16, device="cuda", kernel="triton", with_lse=True) for _ in range(2))
    for once, again in zip(first.each(), second.each(), strict=True):
        assert torch.equal(once, again)


def test_triton_compiles_nothing_for_a_new_length_or_pattern() -> None:
    _skip_where_refused("triton", torch.bfloat16, 64)
    from dilated_core.kernels.triton import programs

    def attend(seq: int, lengths: list[int], rates: list[int]) -> None:
        query = torch.randn(1, seq, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        out = dilated_attention(query, query, query, lengths, rates, kernel="triton")
        torch.autograd.grad(out, query, torch.randn_like(out))

    def compiled() -> int:
        jitted = (programs.forward, programs.row_stats, programs.grad_query, programs.grad_key_value)
        return sum(len(caches[0]) for program in jitted for caches in program.device_caches.values())

    attend(1000, [128, 512], [1, 4])
    before = compiled()
    for seq in (1, 16, 17, 999, 4096):
        attend(seq, [64, 100, 512], [1, 3, 7])
    assert before > 0
    assert compiled() == before


@pytest.mark.slow
def test_triton_with_offsets_beyond_32_bits() -> None:
    """2^31 elements and more a tensor: rows near the end against the oracle of their own, last, segment."""
    _skip_where_refused("triton", torch.bfloat16, 128)
    seq, heads, segment = 1 << 20, 17, 1024
    if torch.cuda.mem_get_info()[0] < 10 * 2 * seq * heads * 128:
        pytest.skip("it takes ten tensors of 4.3 GiB")
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value, cotangent = (
        torch.randn(1, seq, heads, 128, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4)
    )
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = dilated_attention(*leaves, [segment], [2], kernel="triton")
    found = [out, *torch.autograd.grad(out, leaves, cotangent)]
    tail = [tensor[:, -segment:].detach().cpu().double().requires_grad_() for tensor in leaves]
    exact, _ = reference.dilated_attention(*tail, [segment], [2])
    expected = [exact, *torch.autograd.grad(exact, tail, cotangent[:, -segment:].cpu().double())]
    for ours, theirs in zip(found, expected, strict=True):
        assert deviation(ours[:, -segment:], theirs, floor=1.0) <= HALF_TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_decoding_equals_the_whole_call(kernel: str) -> None:
    """A long cache: with few rows and many keys the Triton kernel splits the keys over programs."""
    if kernel != "auto":
        _skip_where_refused(kernel, torch.bfloat16, 64)
    pattern, seq = DilatedPattern([2048, 16384], [1, 2]), 6000
    query, key, value = torch.randn(3, 1, seq, 4, 64, device="cuda", dtype=torch.bfloat16).unbind()
    cache = DilatedKVCache(
        *(pattern.segment_lengths, pattern.dilation_rates),
        batch_size=1, num_heads=4, head_dim=64, dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    bounds = [(0, seq - 3), (seq - 3, seq - 2), (seq - 2, seq)]
    outs = [decode_step(*(t[:, a:b] for t in (query, key, value)), cache, kernel=kernel) for a, b in bounds]
    rows = torch.arange(seq - 40, seq)
    exact, _ = reference.dilated_attention(
        *(tensor.cpu().double() for tensor in (query, key, value)),
        *(pattern.segment_lengths, pattern.dilation_rates), is_causal=True, rows=rows,
    )  # fmt: skip
    assert deviation(torch.cat(outs, 1)[:, -40:], exact, floor=1.0) <= HALF_TOLERANCE[torch.bfloat16]


# ------------------------------------------------------------------------------------------------ graphs and streams


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_a_captured_graph_replays_with_new_inputs(kernel: str) -> None:
    if kernel != "auto":
        _skip_where_refused(kernel, torch.bfloat16, 64)

    def attend(tensors: list[Tensor]) -> list[Tensor]:
        query, key, value, cotangent = tensors
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        out = dilated_attention(*leaves, [128, 512], [1, 4], is_causal=True, kernel=kernel)
        return [out, *torch.autograd.grad(out, leaves, cotangent)]

    def draw() -> list[Tensor]:
        return [torch.randn(1, 700, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)]

    inputs = draw()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            attend(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = attend(inputs)
    for length in range(300, 320):  # other sizes since: what the graph reads must not be evicted
        dilated_attention(*(tensor[:, :length] for tensor in inputs[:3]), [128, 512], [1, 4], kernel=kernel)
    fresh = draw()
    for place, value in zip(inputs, fresh, strict=True):
        place.copy_(value)
    graph.replay()
    for replayed, expected in zip(results, attend(fresh), strict=True):
        assert torch.equal(replayed, expected)


def test_triton_says_what_a_capture_needs_first() -> None:
    _skip_where_refused("triton", torch.bfloat16, 64)
    query = torch.randn(1, 701, 4, 64, device="cuda", dtype=torch.bfloat16)
    dilated_attention(query, query, query, [128], [1], kernel="triton")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        query.add(1)  # an empty graph is a warning of its own
        with pytest.raises(RuntimeError, match="only after a call of the same sizes"):
            dilated_attention(query, query, query, [128, 511], [1, 3], kernel="triton")


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_streams_do_not_disturb_each_other(kernel: str) -> None:
    if kernel != "auto":
        _skip_where_refused(kernel, torch.bfloat16, 64)
    query = torch.randn(1, 900, 4, 64, device="cuda", dtype=torch.bfloat16)
    expected = dilated_attention(query, query, query, [128, 512], [1, 4], kernel=kernel)
    torch.cuda.synchronize()
    results = []
    for _ in range(4):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results += [dilated_attention(query, query, query, [128, 512], [1, 4], kernel=kernel) for _ in range(5)]
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_compiled_into_one_graph_with_any_length(kernel: str) -> None:
    if kernel != "auto":
        _skip_where_refused(kernel, torch.bfloat16, 64)

    def attend(query: Tensor) -> Tensor:
        return dilated_attention(query, query, query, [128, 512], [1, 4], kernel=kernel) + 1.0

    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    for seq in (300, 701):
        query = torch.randn(1, seq, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        cotangent = torch.randn_like(query)
        outs = [function(query) for function in (attend, compiled)]
        assert deviation(outs[1], outs[0]) <= HALF_TOLERANCE[torch.bfloat16]
        grads = [torch.autograd.grad(out, query, cotangent)[0] for out in outs]
        assert deviation(grads[1], grads[0]) <= HALF_TOLERANCE[torch.bfloat16]
