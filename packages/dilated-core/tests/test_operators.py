"""The custom operators by themselves: opcheck's rules, gradients by differences, autocast, shapes without data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from dilated_core import attend, dilated_attention

PATTERN = ([8, 16], [1, 3])
PROBLEMS = [
    ((2, 37, 5, 8), torch.float64),
    ((1, 64, 2, 16), torch.bfloat16),
    ((1, 1, 1, 8), torch.float32),
    ((0, 4, 2, 8), torch.float32),
    ((1, 0, 2, 8), torch.float32),
]


@pytest.mark.parametrize(("shape", "dtype"), PROBLEMS, ids=str)
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


def test_opcheck_packed() -> None:
    query, key = torch.randn(1, 37, 4, 8, requires_grad=True), torch.randn(1, 37, 2, 8, requires_grad=True)
    offsets = torch.tensor([0, 20, 20, 37])
    options = (None, offsets, None, *PATTERN, "paper", False, 0.3, 0.0, "auto")
    opcheck(torch.ops.dilated_core.dilated_attention.default, (query, key, key, *options))


def test_gradcheck() -> None:
    tensors = [torch.randn(1, 7, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *qkv: dilated_attention(*qkv, [3, 8], [1, 2], is_causal=True), tensors)


@pytest.mark.parametrize("changed", ["query", "key", "value", "out", "mask"])
def test_a_tensor_changed_before_backward_is_noticed(changed: str) -> None:
    leaves = [torch.randn(1, 20, 4, 8, requires_grad=True) for _ in range(3)]
    tensors: dict[str, Tensor] = dict(zip(("query", "key", "value"), (leaf.clone() for leaf in leaves), strict=True))
    mask = torch.arange(20).view(1, 20) > 3
    out = dilated_attention(**tensors, segment_lengths=[8], dilation_rates=[1], key_padding_mask=mask)
    cotangent = torch.randn_like(out)
    (tensors | {"out": out, "mask": mask})[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, leaves, cotangent)


def test_autocast_casts_as_sdpa_does() -> None:
    query, key, value = torch.randn(3, 1, 20, 4, 8).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        out = dilated_attention(query, key, value, *PATTERN)
        mixed = dilated_attention(query, key.bfloat16(), value, *PATTERN)
        assert dilated_attention(query.double(), key.double(), value.double(), *PATTERN).dtype == torch.float64
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert torch.equal(out, dilated_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), *PATTERN))


# Tokens that no machine here could attend: shapes and dtypes come without work.
TOKENS = 1 << 30


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_shapes_come_without_data(where: str) -> None:
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        query = torch.empty(1, TOKENS, 4, 64, dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(1, TOKENS, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        options = {"cu_seqlens": torch.empty(9, dtype=torch.int64), "dropout_p": 0.1, "enable_gqa": True}
        out = dilated_attention(query, key, key, [2048], [1], **options)  # type: ignore[call-overload]
        gradients = torch.autograd.grad(out, [query, key], torch.empty_like(out))
    for result, like in zip((out, *gradients), (query, query, key), strict=True):
        assert (result.shape, result.dtype, result.device) == (like.shape, like.dtype, like.device)


def test_attend_has_shapes_without_data() -> None:
    query, key = torch.empty(1, TOKENS, 2, 8, device="meta"), torch.empty(1, 3 * TOKENS, 2, 8, device="meta")
    out, lse = attend(query, key, key)
    assert out.shape == query.shape
    assert lse.shape == (1, 2, TOKENS)
