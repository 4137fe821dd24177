"""The custom operators as PyTorch sees them: opcheck, gradcheck, fullgraph compile, dynamic length, export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from dilated_core import DilatedAttention, MultiheadDilatedAttention, attend, dilated_attention

SHAPES = [(2, 37, 5, 8), (1, 1, 1, 8), (1, 64, 2, 16), (0, 4, 2, 8), (1, 0, 2, 8)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
PATTERN = ([8, 16], [1, 3])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    operators = torch.ops.dilated_core
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    plain = [leaf.detach() for leaf in leaves]
    real = torch.arange(shape[1]).expand(shape[:2]) % 5 > 0
    seed = torch.tensor(7)
    dilated = (operators.dilated_attention, operators.dilated_attention_backward)
    tile = (operators.attend, operators.attend_backward)
    for (forward, backward), options in (
        (dilated, (None, None, None, *PATTERN, "paper", True, 0.3, 0.0, "auto")),
        (dilated, (real, None, None, [8, 15], [2, 3], "torchscale", False, 0.3, 0.0, "auto")),
        (dilated, (None, None, seed, *PATTERN, "grouped", False, 0.3, 0.5, "auto")),
        (tile, (None, None, True, 0.3, 0.0, "auto")),
        (tile, (real, seed, False, 0.3, 0.5, "auto")),
    ):
        opcheck(forward.default, (*leaves, *options))
        out, lse = forward(*plain, *options)
        for grad_lse in (None, torch.randn_like(lse)):
            opcheck(backward.default, (torch.randn_like(out), grad_lse, *plain, out, lse, *options))


def test_gradcheck() -> None:
    tensors = [torch.randn(1, 7, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *qkv: dilated_attention(*qkv, [3, 8], [1, 2], is_causal=True), tensors)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
def test_compiles_into_one_graph(fused: bool) -> None:
    """fullgraph=True: forward and gradients as in eager mode."""
    module = MultiheadDilatedAttention(32, 4, *PATTERN, is_causal=True, fused=fused)
    compiled = torch.compile(module, fullgraph=True)
    sequence, cotangent = torch.randn(2, 33, 32), torch.randn(2, 33, 32)
    results = []
    for call in (module, compiled):
        leaf = sequence.clone().requires_grad_()
        out = call(leaf)[0]
        results.append([out, *torch.autograd.grad(out, [leaf, *module.parameters()], cotangent)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=0, atol=2e-5)


def test_one_graph_serves_every_length() -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    attention = DilatedAttention(*PATTERN)
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=count)
    for seq in (33, 57, 64, 101):
        query, key, value = torch.randn(3, 2, seq, 4, 8).unbind()
        torch.testing.assert_close(compiled(query, key, value), attention(query, key, value))
    assert graphs == 1


def test_exports_with_dynamic_length() -> None:
    module = MultiheadDilatedAttention(32, 4, *PATTERN)
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(module, (torch.randn(2, 33, 32),), dynamic_shapes={"query": {1: length}})
    sequence = torch.randn(2, 70, 32)
    torch.testing.assert_close(program.module()(sequence)[0], module(sequence)[0])


def test_double_backward_raises() -> None:
    """Second derivatives are not defined; asking for them is an error, not a wrong number."""
    tensors = [torch.randn(1, 7, 2, 8, requires_grad=True) for _ in range(3)]
    out = dilated_attention(*tensors, *PATTERN)
    (gradient,) = torch.autograd.grad(out, tensors[0], torch.randn_like(out), create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def test_autocast_casts_as_sdpa_does() -> None:
    query, key, value = torch.randn(3, 1, 20, 4, 8).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        out = dilated_attention(query, key, value, *PATTERN)
        mixed = dilated_attention(query, key.bfloat16(), value, *PATTERN)
        assert dilated_attention(query.double(), key.double(), value.double(), *PATTERN).dtype == torch.float64
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert torch.equal(out, dilated_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), *PATTERN))


def test_attend_compiles() -> None:
    query, key = torch.randn(1, 5, 2, 8), torch.randn(1, 9, 2, 8)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, key), attend(query, key, key))
