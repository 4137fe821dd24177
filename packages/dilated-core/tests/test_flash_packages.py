"""FlashAttention-3 and -4: what is refused, that our calls fit the packages' signatures, and, on a card, their results.

Neither package runs without a GPU. Here stand-ins take their place: they have the packages' signatures, demand what the
packages demand of tensors, and compute by the math kernel. So what they show is our side of the calls.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from inspect import Parameter, Signature
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from core_cases import Case, Results, deviation, oracle, run
from torch import Tensor
from torch.library import Library

from dilated_core import kernels
from dilated_core.kernels import Needs, Problem, flash_attention_3, flash_attention_4
from dilated_core.kernels.flash_attention_3 import CUDAFlash3, as_read
from dilated_core.kernels.flash_attention_4 import CUDAFlash4
from dilated_core.kernels.math import Math

Adapter = CUDAFlash3 | CUDAFlash4
ADAPTERS: list[Adapter] = [CUDAFlash3(), CUDAFlash4()]
HALF_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
CASES = [
    Case(2, 31, 5, 8, (5, 12), (1, 5)),
    Case(1, 97, 4, 48, (8, 25, 200), (1, 3, 9), is_causal=True),
    Case(2, 41, 3, 64, (41,), (1,), layout="head-major"),
    Case(1, 64, 4, 16, (16, 32), (2, 3), kv_heads=2, is_causal=True),
]
GPU_CASES = [
    Case(1, 601, 4, 64, (601,), (1,)),
    Case(2, 509, 5, 48, (64, 128, 512), (1, 2, 4)),
    Case(1, 1024, 8, 64, (128, 256, 1024), (1, 4, 6), is_causal=True),
    Case(2, 131, 4, 128, (16, 131), (2, 5), kv_heads=2, is_causal=True),
    Case(1, 13, 2, 8, (4,), (1,)),
]

# hopper/flash_api_stable.cpp of Dao-AILab/flash-attention: the operators it registers with PyTorch.
FORWARD_SCHEMA = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# flash_attn/cute/interface.py of flash-attn-4 4.0.0b36.
FORWARD_NAMES = (
    "q k v qv cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k min_seqlen_k page_table "
    "softmax_scale causal softcap window_size_left window_size_right learnable_sink tile_mn mma_pv_is_rs "
    "intra_wg_overlap num_threads num_splits pack_gqa _arch score_mod mask_mod block_sparse_tensors return_lse out lse "
    "aux_tensors aux_scalars q_descale k_descale v_descale gather_kv_indices scheduler_metadata seqlen_k_per_split "
    "disable_scheduler_metadata gather_bwd_recompute_p"
)
BACKWARD_NAMES = (
    "q k v out dout lse softmax_scale causal softcap window_size_left window_size_right m_block_size n_block_size "
    "num_threads pack_gqa num_stages_Q num_stages_dO SdP_swapAB dKV_swapAB dQ_swapAB AtomLayoutMSdP AtomLayoutNdKV "
    "AtomLayoutMdQ V_in_regs cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k deterministic "
    "dq dk dv score_mod score_mod_bwd mask_mod aux_tensors aux_scalars block_sparse_tensors dlse learnable_sink"
)


def _signature(names: str) -> Signature:
    return Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names.split()])


def _demand(*tensors: Tensor) -> None:
    """What both packages demand of tensors, or take for granted."""
    for tensor in tensors:
        assert tensor.dtype == tensors[0].dtype
        assert tensor.dtype in (torch.float16, torch.bfloat16)
        assert not tensor.requires_grad
        assert tensor.dim() == 4
        assert tensor.shape[-1] % 8 == 0
        *strides, last = tensor.stride()
        assert last == 1
        assert tensor.data_ptr() % 16 == 0
        assert all(stride > 0 and stride % 8 == 0 for stride in strides)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None, is_causal: bool) -> tuple[Tensor, Tensor]:
    _demand(q, k, v)
    assert scale is not None
    out, lse = Math().forward(Problem(*(tensor.transpose(1, 2) for tensor in (q, k, v)), is_causal, scale))
    return out.transpose(1, 2).contiguous(), lse


def _backward(tensors: list[Tensor], lse: Tensor, grads: list[Tensor], scale: float | None, is_causal: bool) -> None:
    """``tensors`` are q, k, v, out and dout."""
    _demand(*tensors, *grads)
    assert scale is not None
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    q, k, v, out, dout = (tensor.transpose(1, 2) for tensor in tensors)
    assert lse.shape == q.shape[:-1]
    results = Math().backward(Problem(q, k, v, is_causal, scale), dout, out, lse)
    for grad, result, tensor in zip(grads, results, tensors[:3], strict=True):
        assert grad.shape == tensor.shape
        grad.copy_(result.transpose(1, 2))


def _stand_in_3(monkeypatch: pytest.MonkeyPatch) -> Library:
    if hasattr(torch.ops.flash_attn_3, "fwd"):
        pytest.skip("the real FlashAttention-3 is here")

    def fwd(*args: object) -> tuple[Tensor, ...]:
        given = named("fwd", args)
        assert given["num_splits"] == 1
        out, lse = _forward(*(given[name] for name in ("q", "k", "v", "softmax_scale", "is_causal")))
        return out, lse, out.new_empty(0), out.new_empty(0)

    def bwd(*args: object) -> tuple[Tensor, ...]:
        given = named("bwd", args)
        assert given["deterministic"] is True
        grads = [given[name] for name in ("dq", "dk", "dv")]
        tensors = [given[name] for name in ("q", "k", "v", "out", "dout")]
        _backward(tensors, given["softmax_lse"], grads, given["softmax_scale"], given["is_causal"])
        return tuple(torch.empty(0) for _ in range(5))

    def named(operator: str, args: tuple[object, ...]) -> dict[str, Any]:
        """What an operator's implementation is given: PyTorch leaves out defaults at the end."""
        arguments = getattr(torch.ops.flash_attn_3, operator).default._schema.arguments
        defaults = {argument.name: argument.default_value for argument in arguments}
        return defaults | dict(zip(defaults, args, strict=False))

    library = Library("flash_attn_3", "FRAGMENT")
    for schema, function in zip((FORWARD_SCHEMA, BACKWARD_SCHEMA), (fwd, bwd), strict=True):
        library.define(schema)
        library.impl(function.__name__, function, "CPU")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    return library


def _stand_in_4(monkeypatch: pytest.MonkeyPatch, more_results: int = 3) -> ModuleType:
    forward_signature, backward_signature = _signature(FORWARD_NAMES), _signature(BACKWARD_NAMES)

    def forward(*args: object, **kwargs: object) -> tuple[Tensor | None, ...]:
        given = forward_signature.bind(*args, **kwargs).arguments
        assert given["return_lse"] is True
        return *_forward(*(given[name] for name in ("q", "k", "v", "softmax_scale", "causal"))), *(
            [None] * more_results
        )

    def backward(*args: object, **kwargs: object) -> tuple[Tensor, ...]:
        given = backward_signature.bind(*args, **kwargs).arguments
        assert given["deterministic"] is True
        grads = [given[name] for name in ("dq", "dk", "dv")]
        tensors = [given[name] for name in ("q", "k", "v", "out", "dout")]
        _backward(tensors, given["lse"], grads, given["softmax_scale"], given["causal"])
        return tuple(grads)

    forward.__signature__ = forward_signature  # type: ignore[attr-defined]
    backward.__signature__ = backward_signature  # type: ignore[attr-defined]
    root, cute, interface = (
        ModuleType(name) for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
    )
    root.cute, cute.interface = cute, interface  # type: ignore[attr-defined]
    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward  # type: ignore[attr-defined]
    for module in (root, cute, interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return interface


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    """No test learns from another whether a package is there."""
    faults = (flash_attention_3._fault, flash_attention_4._fault)
    for fault in faults:
        fault.cache_clear()
    yield
    for fault in faults:
        fault.cache_clear()


@pytest.fixture(params=ADAPTERS, ids=lambda adapter: adapter.name)
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Adapter]:
    """An adapter whose package is a stand-in."""
    kernel: Adapter = request.param
    if isinstance(kernel, CUDAFlash4):
        _stand_in_4(monkeypatch)
        yield kernel
        return
    library = _stand_in_3(monkeypatch)
    yield kernel
    library._destroy()


def _close(ours: Results, exact: Results, tolerance: float) -> None:
    no_key = exact.lse == -torch.inf
    assert torch.equal(ours.lse.cpu() == -torch.inf, no_key)
    for name in ("out", "lse", "dq", "dk", "dv"):
        result, wanted = getattr(ours, name).detach().cpu(), getattr(exact, name).detach()
        if name == "lse":
            result, wanted = result.masked_fill(no_key, 0.0), wanted.masked_fill(no_key, 0.0)
        assert deviation(result, wanted, floor=1.0) <= tolerance, name


def _agrees(adapter: Adapter, problem: Problem) -> None:
    """Against the math kernel in float64 on the CPU, with an lse that was merged and rows that have no key in it."""
    exact, dtype = Math(), problem.query.dtype
    wide = problem._replace(**{name: getattr(problem, name).cpu().double() for name in ("query", "key", "value")})
    grad_out = torch.randn(problem.query.shape).to(problem.query)
    out, lse = exact.forward(wide)
    joint = lse + 0.5
    joint[:, :, ::7] = torch.inf
    expected = (out, lse, *exact.backward(wide, grad_out.cpu().double(), out, joint))
    merged = joint.to(grad_out.device, torch.float32).transpose(1, 2).contiguous().transpose(1, 2)
    results = (*adapter.forward(problem), *adapter.backward(problem, grad_out, out.to(grad_out), merged))
    for name, result, wanted in zip(("out", "lse", "dq", "dk", "dv"), results, expected, strict=True):
        assert result.shape == wanted.shape, name
        assert deviation(result, wanted, floor=1.0) <= HALF_TOLERANCE[dtype], name


def _awkward_problems(head_dim: int, dtype: torch.dtype, device: str) -> list[Problem]:
    """Strided, one row, unlike lengths, rows at odd addresses, and one head's numbers for all heads."""
    draw = torch.randn(3, 2, 38, 3, head_dim).to(device, dtype)
    strided = [tensor[:, ::2].transpose(1, 2) for tensor in draw]
    odd = [torch.randn(2 * 3 * 19 * head_dim + 1).to(device, dtype)[1:].view(2, 3, 19, head_dim) for _ in range(3)]
    padded = [torch.randn(2, 3, 19, head_dim + 1).to(device, dtype)[..., :head_dim] for _ in range(3)]
    one_row = [tensor[:, :, :1] for tensor in strided]
    shared = [tensor[:, :1].expand(-1, 3, -1, -1) for tensor in strided]
    problems = [Problem(*qkv, True, 0.3) for qkv in (strided, odd, padded, one_row, shared)]
    problems.append(Problem(strided[0], strided[1][:, :, :5], strided[2][:, :, :5], False, 0.3))
    return problems


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_calls_fit_the_signatures_and_give_the_values(adapter: Adapter, dtype: torch.dtype) -> None:
    assert flash_attention_3._fault() is None or isinstance(adapter, CUDAFlash4)
    assert flash_attention_4._fault() is None or isinstance(adapter, CUDAFlash3)
    for head_dim in (8, 64):
        for problem in _awkward_problems(head_dim, dtype, "cpu"):
            _agrees(adapter, problem)


def test_earlier_versions_of_4_return_less(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in_4(monkeypatch, more_results=0)
    _agrees(CUDAFlash4(), _awkward_problems(8, torch.bfloat16, "cpu")[0])


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out+lse"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_whole_attention_through_a_stand_in(
    case: Case, adapter: Adapter, with_lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, so the adapter is told not to mind the device."""
    monkeypatch.setattr(type(adapter), "refusal", lambda *_: None)
    ours = run(case, torch.bfloat16, kernel=adapter.name, with_lse=with_lse)
    exact = oracle(case, torch.bfloat16, with_lse=with_lse)
    _close(ours, exact, 5e-2)


def test_where_the_wider_rows_of_a_gradient_of_lse_are_refused_another_kernel_takes_them(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[0]
    monkeypatch.setattr(type(adapter), "refusal", lambda *args: None if args[3] == case.head_dim else "too wide")
    ours = run(case, torch.bfloat16, kernel=adapter.name, with_lse=True)
    exact = oracle(case, torch.bfloat16, with_lse=True)
    _close(ours, exact, 5e-2)


def test_rows_that_can_be_read_as_they_lie_are_not_copied() -> None:
    wide = torch.randn(2, 38, 3, 4, 16).bfloat16()
    view = wide[:, ::2, :, 1, 8:].transpose(1, 2)
    (read,) = as_read(view)
    assert read.data_ptr() == view.data_ptr()
    assert read.stride() == view.transpose(1, 2).stride()
    (copied,) = as_read(wide[:, ::2, :, 1, 4:12].transpose(1, 2))
    assert copied.is_contiguous()


def test_more_batch_rows_than_a_launch_takes_are_refused(adapter: Adapter) -> None:
    query = torch.zeros(1, 1, 1, 8).bfloat16().expand(65536, -1, -1, -1)
    with pytest.raises(ValueError, match=r"query: expected at most 65535 batch rows .* got 65536"):
        adapter.forward(Problem(query, query, query, False, 1.0))


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    assert "flash_attn_interface is not installed" in str(flash_attention_3._fault())
    assert "https://download.pytorch.org/whl/flash-attn-3/" in str(flash_attention_3._fault())
    assert flash_attention_4._fault() == 'flash_attn.cute is not installed (pip install "dilated-core[flash]")'
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))  # FlashAttention-2 alone has that name too
    flash_attention_4._fault.cache_clear()
    assert "is not installed" in str(flash_attention_4._fault())


def test_a_package_that_lacks_what_is_called_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty package of the name of FlashAttention-3's module is on PyPI; FlashAttention-2 brings an early 4."""
    if not hasattr(torch.ops.flash_attn_3, "fwd"):
        monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
        assert "registers no operator flash_attn_3::fwd" in str(flash_attention_3._fault())
    interface = _stand_in_4(monkeypatch)
    early = _signature(BACKWARD_NAMES.replace(" deterministic dq dk dv", ""))
    interface._flash_attn_bwd.__signature__ = early
    assert "its _flash_attn_bwd takes no deterministic, dq, dk, dv" in str(flash_attention_4._fault())
    del interface._flash_attn_fwd
    flash_attention_4._fault.cache_clear()
    assert flash_attention_4._fault() == "the installed flash_attn.cute has no _flash_attn_fwd"


def test_a_package_that_does_not_load_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('libcudart.so.12 is not here')")
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "cute.py").write_text("import a_module_that_nobody_has")
    for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert flash_attention_3._fault() == "flash_attn_interface cannot be imported: libcudart.so.12 is not here"
    assert "flash_attn.cute cannot be imported: No module named 'a_module" in str(flash_attention_4._fault())


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _refusals(adapter: Adapter, **changes: object) -> str | None:
    arguments = {"device": CUDA, "dtype": torch.bfloat16, "head_dim": 64, "needs": Needs(), **changes}
    return adapter.refusal(**arguments)  # type: ignore[arg-type]


def test_without_cuda_nothing_is_imported_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for adapter in ADAPTERS:
        assert _refusals(adapter, device=CPU) == "it runs on CUDA, not on cpu"
        assert _refusals(adapter) == "CUDA is not available here"
    assert flash_attention_3._fault.cache_info().currsize == flash_attention_4._fault.cache_info().currsize == 0


def test_what_each_refuses_on_which_card(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability[0])
    monkeypatch.setattr(torch.version, "hip", None)
    widest = 192 if adapter.name == "cuda_flash3" else 128
    for head_dim in (8, 48, 64, 72, 96, 128, widest):
        assert _refusals(adapter, head_dim=head_dim) is None
        assert _refusals(adapter, dtype=torch.float16, head_dim=head_dim) is None
    for head_dim in (12, widest + 8, 256):
        assert f"a multiple of 8 up to {widest}, not {head_dim}" in str(_refusals(adapter, head_dim=head_dim))
    assert _refusals(adapter, dtype=torch.float32) == "it takes float16 and bfloat16, not torch.float32"
    assert _refusals(adapter, needs=Needs(mask=True)) == "it takes no key padding mask"
    assert _refusals(adapter, needs=Needs(dropout=True)) == "it drops no probabilities"
    for capability[0] in ((8, 0), (12, 0)):
        assert "it runs on compute capability 9.x" in str(_refusals(adapter))
        assert f"the device has {capability[0][0]}.0" in str(_refusals(adapter))
    capability[0] = (10, 0)
    assert (_refusals(adapter) is None) == (adapter.name == "cuda_flash4")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert _refusals(adapter) == "it runs on NVIDIA's cards, not on AMD's"


def test_auto_takes_neither_before_a_card_has_measured_them() -> None:
    assert not any(adapter.recommended() for adapter in ADAPTERS)


# ------------------------------------------------------------------------------------------------ on a card


def _skip_where_refused(adapter: Adapter, dtype: torch.dtype, head_dim: int) -> None:
    reason = adapter.refusal(CUDA, dtype, head_dim, Needs())
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out+lse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
@pytest.mark.parametrize("real", ADAPTERS, ids=lambda adapter: adapter.name)
def test_the_package_agrees_with_the_oracle(case: Case, real: Adapter, dtype: torch.dtype, with_lse: bool) -> None:
    _skip_where_refused(real, dtype, case.head_dim)
    ours = run(case, dtype, device="cuda", kernel=real.name, with_lse=with_lse)
    exact = oracle(case, dtype, with_lse=with_lse)
    _close(ours, exact, HALF_TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [8, 48, 64, 72, 96, 128, 136, 192])
@pytest.mark.parametrize("real", ADAPTERS, ids=lambda adapter: adapter.name)
def test_the_package_takes_every_layout_and_width(real: Adapter, head_dim: int) -> None:
    _skip_where_refused(real, torch.bfloat16, head_dim)
    for problem in _awkward_problems(head_dim, torch.bfloat16, "cuda"):
        _agrees(real, problem)


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("real", ADAPTERS, ids=lambda adapter: adapter.name)
def test_the_package_gives_the_same_bits_each_time(real: Adapter, head_dim: int, is_causal: bool) -> None:
    _skip_where_refused(real, torch.bfloat16, head_dim)
    query, key, value, grad_out = torch.randn(4, 2, 8, 2048, head_dim).to("cuda", torch.bfloat16)
    problem = Problem(query, key, value, is_causal, head_dim**-0.5)

    def results() -> list[Tensor]:
        out, lse = real.forward(problem)
        return [out, lse, *real.backward(problem, grad_out, out, lse)]

    first = results()
    for _ in range(10):
        for name, again, before in zip(("out", "lse", "dq", "dk", "dv"), results(), first, strict=True):
            assert torch.equal(again, before), name


@pytest.mark.gpu
def test_the_survey_says_what_there_is() -> None:
    survey = kernels.survey(CUDA, torch.bfloat16, 64)
    for adapter in ADAPTERS:
        assert survey[adapter.name] == adapter.refusal(CUDA, torch.bfloat16, 64, Needs())
