"""Where PyTorch traces: opcheck's rules, gradients by differences, compile, export, shapes without data, torch.func."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sparse_cases import Case, run
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from dilated_block_sparse import BlockLayout, block_sparse_attention, operators
from dilated_core import AuxRequest

LAYOUT = BlockLayout.local(45, 1, block_size=8) | BlockLayout.global_(45, 1, 1, block_size=8)
SMALL = Case(2, 9, 2, 3, (2, 3), ("random", "global"), kv_heads=1, is_causal=True)


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> None:
    torch._dynamo.reset()
    counters.clear()


# ------------------------------------------------------------------------------------------------ by themselves


QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
PROBLEMS = [
    ((2, 9, 4, 8), torch.float64, (*QUICK, "test_aot_dispatch_dynamic")),
    ((2, 9, 4, 8), torch.bfloat16, QUICK),
    ((1, 1, 1, 8), torch.float32, QUICK),
    ((0, 4, 2, 8), torch.float32, QUICK),
    ((1, 0, 2, 8), torch.float32, QUICK),
]


@pytest.mark.parametrize(("shape", "dtype", "rules"), PROBLEMS, ids=str)
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype, rules: tuple[str, ...]) -> None:
    forward, backward = torch.ops.dilated_block_sparse.attention, torch.ops.dilated_block_sparse.attention_backward
    seq = shape[1]
    layout = BlockLayout.local(seq, 1, block_size=(2, 3))
    place = layout.indptr, layout.indices, [seq, seq, 2, 3]
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    plain = [leaf.detach() for leaf in leaves]
    real = torch.arange(seq).expand(shape[:2]) % 5 > 0
    bias = torch.randn(layout.live, dtype=dtype, requires_grad=True)
    for extras, options in (
        ((None, None, None), (True, 0.3, 0.0, "auto")),
        ((real, bias, None), (False, 0.3, 0.0, "auto")),
        ((None, None, torch.tensor(7)), (False, 0.3, 0.5, "auto")),
    ):
        opcheck(forward.default, (*leaves, *extras, *place, *options), test_utils=rules)
        extras = tuple(None if extra is None else extra.detach() for extra in extras)
        out, lse = forward(*plain, *extras, *place, *options)
        for grad_lse in (None, torch.randn_like(lse)):
            arguments = (torch.randn_like(out), grad_lse, *plain, out, lse, *extras, *place, *options)
            opcheck(backward.default, arguments, test_utils=rules)


@pytest.mark.parametrize("case", [SMALL, replace(SMALL, is_causal=False, mask="random", has_bias=True)], ids=str)
@pytest.mark.parametrize("traced", [False, True], ids=["function", "operator"])
def test_gradcheck(case: Case, traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Central differences of out and lse, in the autograd function and in the operator."""
    if traced:
        monkeypatch.setattr(operators, "PLAIN", ())
    leaves = [tensor.requires_grad_() for tensor in case.problem(torch.float64, poisoned=False)]
    layout = case.layout()

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = block_sparse_attention(
            *tensors[:3],
            layout,
            **case.options(),
            block_bias=tensors[3] if case.has_bias else None,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )
        assert aux.lse is not None
        return out, aux.lse.masked_fill(aux.lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_operator_and_function_are_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [SMALL, *(replace(SMALL, share=share, has_bias=True, mask="right") for share in ("key", "query"))]
    plain = [run(case, dtype) for case in cases]
    monkeypatch.setattr(operators, "PLAIN", ())
    for case, results in zip(cases, plain, strict=True):
        assert run(case, dtype).equal(results)


@pytest.mark.parametrize("leaf", ["query", "bias"])
def test_the_operators_refuse_second_derivatives(leaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "PLAIN", ())
    query, bias = torch.randn(1, 45, 2, 8), torch.randn(LAYOUT.live)
    of = {"query": query, "bias": bias}[leaf].requires_grad_()
    out = block_sparse_attention(query, query, query, LAYOUT, block_bias=bias)
    (grad,) = torch.autograd.grad(out, of, torch.randn_like(out), create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not defined"):
        grad.square().sum().backward()


# ------------------------------------------------------------------------------------------- torch.func, checkpoint


def test_torch_func_grad_is_autograd() -> None:
    query, key, value, cotangent = torch.randn(4, 1, 45, 2, 8, dtype=torch.float64).unbind()
    bias = torch.randn(LAYOUT.live, dtype=torch.float64)

    def loss(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return (block_sparse_attention(query, key, value, LAYOUT, block_bias=bias) * cotangent).sum()

    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value, bias)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for found, wanted in zip(
        torch.func.grad(loss, argnums=(0, 1, 2, 3))(query, key, value, bias), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_torch_func_vmap_is_an_error_and_never_wrong() -> None:
    tensors = torch.randn(3, 5, 1, 45, 2, 8).unbind()
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda *qkv: block_sparse_attention(*qkv, LAYOUT))(*tensors)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same(use_reentrant: bool) -> None:
    leaves = [torch.randn(1, 45, 2, 8, requires_grad=True) for _ in range(3)]
    cotangent = torch.randn(1, 45, 2, 8)

    def call(*tensors: Tensor) -> Tensor:
        return block_sparse_attention(*tensors, LAYOUT, is_causal=True)

    outs = [call(*leaves), checkpoint(call, *leaves, use_reentrant=use_reentrant)]
    grads = []
    for out in outs:
        out.backward(cotangent)
        grads.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    assert torch.equal(*outs)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ shapes without data

TOKENS = 1 << 24


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_shapes_come_without_data(where: str) -> None:
    """Of tokens that no machine here could attend."""
    layout = BlockLayout.local(TOKENS, 1, block_size=1 << 12)
    # A layout's own tensors are real ones.
    with FakeTensorMode(allow_non_fake_inputs=True) if where == "fake" else torch.device("meta"):
        query = torch.empty(1, TOKENS, 4, 64, dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(1, TOKENS, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.empty(layout.live, dtype=torch.bfloat16, requires_grad=True)
        options: dict[str, Any] = {"enable_gqa": True, "backend": "tiles", "return_aux": AuxRequest(lse=True)}
        out, aux = block_sparse_attention(query, key, key, layout, block_bias=bias, dropout_p=0.1, **options)
        gradients = torch.autograd.grad(out, [query, key, bias], torch.empty_like(out))
    for result, like in zip((out, *gradients), (query, query, key, bias), strict=True):
        assert (result.shape, result.dtype, result.device) == (like.shape, like.dtype, like.device)
    assert (aux.lse.shape, aux.lse.dtype) == ((1, 4, TOKENS), torch.float32)


# ------------------------------------------------------------------------------------------------ compile


class Attention(nn.Module):
    """A projection before and after, so that the attention sits inside a graph."""

    def __init__(self, layout: BlockLayout, **options: Any) -> None:
        super().__init__()
        self.project, self.layout, self.options = nn.Linear(16, 48), layout, options

    def forward(self, sequence: Tensor, real: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        query, key, value = self.project(sequence).unflatten(-1, (3, 2, 8)).unbind(2)
        out = block_sparse_attention(
            query, key, value, self.layout, key_padding_mask=real, block_bias=bias, **self.options
        )
        return out.flatten(2) + sequence


def extras(batch: int) -> dict[str, Tensor]:
    """A mask that is hard in both senses, and a bias."""
    return {"real": torch.arange(45).expand(batch, 45) % 5 == 0, "bias": torch.randn(LAYOUT.live, requires_grad=True)}


def compare(module: nn.Module, compiled: Callable[..., Any], batch: int, arguments: dict[str, Tensor]) -> None:
    """Output and every gradient, under a random cotangent and the same random numbers."""
    sequence = torch.randn(batch, 45, 16, requires_grad=True)
    leaves = [sequence, *module.parameters(), *(each for each in arguments.values() if each.requires_grad)]
    cotangent, results = torch.randn(batch, 45, 16), []
    for call in (module, compiled):
        torch.manual_seed(1)
        out = call(sequence, **arguments)
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "with_extras"),
    [({}, False), ({"is_causal": True}, True), ({"dropout_p": 0.3}, False)],
    ids=["plain", "causal-mask-and-bias", "dropout"],
)
def test_two_graphs_serve_every_batch(options: dict[str, Any], with_extras: bool) -> None:
    """One for the first batch, one for a second and all others: torch.compile's own way to learn what is dynamic."""
    module = Attention(LAYOUT, **options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        compare(module, compiled, batch, extras(batch) if with_extras else {})
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (5, 4, 7):
            compare(module, compiled, batch, extras(batch) if with_extras else {})
    assert counters["stats"]["unique_graphs"] == 2


def test_a_layout_for_each_head_compiles_with_the_lse() -> None:
    layout = BlockLayout.stack([LAYOUT, LAYOUT.T - BlockLayout.local(45, 0, block_size=8)])

    def call(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = block_sparse_attention(query, key, key, layout, return_aux=AuxRequest(lse=True), scale=-0.3)
        assert aux.lse is not None
        return out, aux.lse

    tensors = torch.randn(2, 1, 45, 2, 8).unbind()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(compiled(*tensors), call(*tensors), strict=True):
        torch.testing.assert_close(traced, eager)


def test_inductor_gives_the_same_gradients() -> None:
    """Of slices of one packed tensor, and of nothing else: what surrounds an attention takes long to compile."""

    def call(packed: Tensor) -> Tensor:
        return block_sparse_attention(*packed.unbind(2), LAYOUT, is_causal=True)

    leaf, cotangent = torch.randn(2, 45, 3, 2, 8, requires_grad=True), torch.randn(2, 45, 2, 8)
    outs = [run(leaf) for run in (call, torch.compile(call, fullgraph=True))]
    grads = [torch.autograd.grad(out, leaf, cotangent)[0] for out in outs]
    for pair in (outs, grads):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=2e-5)


def test_it_compiles_under_autocast() -> None:
    module = Attention(LAYOUT)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    sequence = torch.randn(2, 45, 16)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(sequence), module(sequence), rtol=0, atol=0.02)


# ------------------------------------------------------------------------------------------------ export


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.11, of what it loads
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("with_extras", [False, True], ids=["plain", "mask-and-bias"])
def test_it_exports_with_a_dynamic_batch(with_extras: bool, strict: bool) -> None:
    module = Attention(LAYOUT, is_causal=True)
    arguments = {name: each.detach() for name, each in extras(3).items()} if with_extras else {}
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"sequence": {0: batch}, "real": {0: batch}, "bias": None}
    program = torch.export.export(
        module,
        (torch.randn(3, 45, 16),),
        arguments,
        dynamic_shapes={name: shape for name, shape in shapes.items() if name in {"sequence", *arguments}},
        strict=strict,
    )
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    for size in (2, 5):
        sequence = torch.randn(size, 45, 16)
        given = {name: each.detach() for name, each in extras(size).items()} if with_extras else {}
        torch.testing.assert_close(loaded(sequence, **given), module(sequence, **given))
