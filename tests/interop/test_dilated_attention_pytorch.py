"""semantics="grouped" against dilated-attention-pytorch 0.2.0's own DilatedAttention.

That module divides each branch's outputs by their sum over the whole sequence, which makes a row depend on every other
(and is undone by nothing), and with unequal head groups it slices the wrong heads. Ours does neither, so the same
division is applied to ours here, and the heads always split evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from peers import deviation, imported, only
from torch import Tensor, nn

from dilated_core import dilated_attention


class LowerTriangularMask:
    """xformers' sign for causal attention."""


def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, op: None, attn_bias: object) -> Tensor:
    """What xformers' operator computes, (batch, seq, heads, head_dim)."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    if isinstance(attn_bias, LowerTriangularMask):
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


@pytest.fixture(scope="module")
def peer() -> Iterator[type[nn.Module]]:
    pytest.importorskip("einops")
    operators = {
        "AttentionOp": object,
        "LowerTriangularMask": LowerTriangularMask,
        "memory_efficient_attention": memory_efficient_attention,
    }
    with only(stand_ins={"xformers": {}, "xformers.ops": operators}):
        try:
            yield imported("dilated_attention_pytorch.dilated_attention").DilatedAttention
        except ModuleNotFoundError as error:
            pytest.skip(f"needs dilated-attention-pytorch 0.2.0: {error}")


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize(
    ("seq", "heads", "lengths", "rates"),
    [(64, 4, [16, 32], [1, 2]), (96, 6, [8, 24, 96], [1, 2, 3]), (96, 3, [96, 48, 24], [6, 3, 4])],
)
def test_outputs_and_every_gradient_are_the_peers(
    peer: type[nn.Module],
    seq: int,
    heads: int,
    lengths: list[int],
    rates: list[int],
    is_causal: bool,
    within: Callable[[str, float, float], None],
) -> None:
    torch.manual_seed(0)
    *qkv, cotangent = torch.randn(4, 2, seq, heads, 8, dtype=torch.float64).unbind()
    results = []
    for ours in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in qkv]
        if ours:
            out = dilated_attention(*leaves, lengths, rates, is_causal=is_causal, semantics="grouped")
            out = out / (out * len(rates)).sum(dim=1, keepdim=True)
        else:
            out = peer(lengths, rates)(*leaves, is_causal=is_causal)
        results.append((out, *torch.autograd.grad(out, leaves, cotangent)))
    for name, found, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        # A sum over the sequence may come near 0, and a division by it magnifies rounding.
        what = "output" if name == "out" else "gradients"
        within(f"dilated-attention-pytorch 0.2.0, {what}, float64", deviation(found, expected), 1e-11)
