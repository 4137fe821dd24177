"""Every argument of the functional call with a wrong type, shape, dtype, device or value: an error that names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from dilated_block_sparse import BlockLayout, block_sparse_attention

X = torch.zeros(2, 6, 4, 8)
LAYOUT = BlockLayout.full(6, block_size=4)
MASK = torch.ones(2, 6, dtype=torch.bool)
BIAS = torch.zeros(LAYOUT.live)
GOOD: dict[str, Any] = {"query": X, "key": X, "value": X, "layout": LAYOUT}


def layout(q_len: int = 6, kv_len: int = 6, heads: int = 1) -> BlockLayout:
    """A full one of any sizes."""
    return BlockLayout.from_blocks(torch.ones(heads, 1, 1, dtype=torch.bool), q_len, kv_len)


FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # ------------------------------------------------------------------------------------------------ tensors
    "query not a tensor": ({"query": [1.0]}, TypeError, "query: expected a torch.Tensor, got list"),
    "query of 3 dims": ({"query": X[0]}, ValueError, r"query: expected 4 dimensions .*, got shape \(6, 4, 8\)"),
    "query of ints": ({"query": X.int()}, TypeError, "query: expected float64, float32, .* got torch.int32"),
    "key of another dtype": ({"key": X.double()}, TypeError, "key: expected the dtype of query, torch.float32"),
    "value of another dtype": ({"value": X.half()}, TypeError, "value: expected the dtype of query"),
    "key of another device": ({"key": X.to("meta")}, ValueError, "key: expected the device of query, cpu, got meta"),
    "value of another shape": ({"value": X[:, :5]}, ValueError, "value: expected the shape of key"),
    "another batch": ({"key": X[:1], "value": X[:1]}, ValueError, "key: expected the batch of query, 2, got 1"),
    "another head_dim": ({"key": X[..., :4], "value": X[..., :4]}, ValueError, "key: expected the head_dim of query"),
    "head_dim 0": ({"query": X[..., :0], "key": X[..., :0]}, ValueError, "head_dim of at least 1"),
    "grouped heads unasked": (
        {"key": X[:, :, :2], "value": X[:, :, :2]},
        ValueError,
        r"key: expected the heads of query, 4, got 2 \(grouped heads need enable_gqa=True\)",
    ),
    "heads that do not divide": (
        {"key": X[:, :, :3], "value": X[:, :, :3], "enable_gqa": True},
        ValueError,
        "key: expected kv_heads that divide the 4 heads of query, got 3",
    ),
    "causal of unequal lengths": (
        {"key": X[:, :5], "value": X[:, :5], "layout": layout(6, 5), "is_causal": True},
        ValueError,
        "key: expected the seq of query, 6, got 5",
    ),
    # ------------------------------------------------------------------------------------------------ layout
    "layout a mask": ({"layout": MASK}, TypeError, "layout: expected a BlockLayout, got Tensor"),
    "layout none": ({"layout": None}, TypeError, "layout: expected a BlockLayout, got NoneType"),
    "layout of other rows": (
        {"layout": layout(7, 6)},
        ValueError,
        r"layout: expected \(q_len, kv_len\) = \(6, 6\) as query and key have, got \(7, 6\)",
    ),
    "layout of other keys": ({"layout": layout(6, 5)}, ValueError, r"layout: expected .* got \(6, 5\)"),
    "layout of other heads": (
        {"layout": layout(heads=3)},
        ValueError,
        "layout: expected 1 or 4 heads for query's 4, got 3",
    ),
    "layout of neither heads": (
        {"layout": layout(heads=3), "key": X[:, :, :2], "value": X[:, :, :2], "enable_gqa": True},
        ValueError,
        "layout: expected 1 or 2 or 4 heads for query's 4, got 3",
    ),
    # ------------------------------------------------------------------------------------------------ block_bias
    "bias a list": ({"block_bias": [0.0]}, TypeError, "block_bias: expected a torch.Tensor or None, got list"),
    "bias of another dtype": (
        {"block_bias": BIAS.double()},
        TypeError,
        "block_bias: expected the dtype of query, torch.float32, got torch.float64",
    ),
    "bias of another shape": (
        {"block_bias": torch.zeros(2, 2)},
        ValueError,
        r"block_bias: expected shape \(layout.live,\) = \(4,\), got \(2, 2\)",
    ),
    "bias of another device": (
        {"block_bias": BIAS.to("meta")},
        ValueError,
        "block_bias: expected the device of query, cpu, got meta",
    ),
    # ------------------------------------------------------------------------------------------------ options
    "is_causal not a bool": ({"is_causal": 1}, TypeError, "is_causal: expected a bool, got 1"),
    "enable_gqa not a bool": ({"enable_gqa": None}, TypeError, "enable_gqa: expected a bool, got None"),
    "scale a string": ({"scale": "0.1"}, TypeError, "scale: expected a float or None"),
    "scale not finite": ({"scale": float("nan")}, ValueError, "scale: expected a finite float"),
    "dropout a string": ({"dropout_p": "0.1"}, TypeError, r"dropout_p: expected a probability in \[0, 1\), got '0.1'"),
    "dropout of all": ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
    "generator a seed": (
        {"generator": 3, "dropout_p": 0.1},
        TypeError,
        "generator: expected a torch.Generator or None, got int",
    ),
    "mask a list": ({"key_padding_mask": [True]}, TypeError, "key_padding_mask: expected a bool tensor.*got list"),
    "mask of numbers": ({"key_padding_mask": MASK.float()}, TypeError, "key_padding_mask: .*got torch.float32"),
    "mask of another shape": (
        {"key_padding_mask": MASK[:, :5]},
        ValueError,
        r"key_padding_mask: expected shape \(batch, seq\) = \(2, 6\), got \(2, 5\)",
    ),
    "mask of another device": (
        {"key_padding_mask": MASK.to("meta")},
        ValueError,
        "key_padding_mask: expected the device of key, cpu, got meta",
    ),
    "return_aux a bool": ({"return_aux": True}, TypeError, "return_aux: expected an AuxRequest or None, got bool"),
    "allocator a function": ({"allocator": torch.empty}, TypeError, "allocator: expected an object with empty"),
    "patterns a dict": ({"patterns": {}}, TypeError, "patterns: expected an object with get_or_create"),
    # ------------------------------------------------------------------------------------------------ who can run it
    "backend not a string": ({"backend": None}, TypeError, "backend: expected one of"),
    "backend unknown": ({"backend": "triton"}, ValueError, r"backend: expected one of \[.*'tiles'.*got 'triton'"),
    "kernel not a string": ({"kernel": None}, TypeError, "kernel: expected one of"),
    "kernel unknown": ({"kernel": "magic"}, ValueError, r"kernel: expected one of \['auto'.*got 'magic'"),
    "kernel impossible": ({"kernel": "cuda_flash"}, ValueError, 'kernel: "cuda_flash" cannot run'),
    "kernel that cannot drop": (
        {"kernel": "cpu_flash", "dropout_p": 0.1},
        ValueError,
        'kernel: "cpu_flash" cannot run .* it drops no probabilities',
    ),
    "flex with gradients": (
        {"backend": "flex", "query": X.clone().requires_grad_()},
        ValueError,
        'backend: "flex" cannot run this: on a CPU it has no backward',
    ),
    "flex with dropout": (
        {"backend": "flex", "dropout_p": 0.1},
        ValueError,
        'backend: "flex" cannot run this: it has no dropout',
    ),
    "flex with a bias": ({"backend": "flex", "block_bias": BIAS}, ValueError, "flex.* cannot run this: .* bias"),
    "flex in float64": (
        {"backend": "flex", **dict.fromkeys(("query", "key", "value"), X.double())},
        ValueError,
        "flex.* cannot run this: it runs float32, .* not torch.float64",
    ),
    "flex with a kernel": (
        {"backend": "flex", "kernel": "math"},
        ValueError,
        'backend: "flex" cannot run this: kernel="math" is one of the tiles',
    ),
}


def test_what_the_faults_are_changes_of_is_accepted() -> None:
    out = block_sparse_attention(**GOOD, key_padding_mask=MASK, block_bias=BIAS, is_causal=True)
    assert out.shape == X.shape


@pytest.mark.parametrize(("change", "error", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        block_sparse_attention(**{**GOOD, **change})


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="attn_mask"):
        block_sparse_attention(**GOOD, attn_mask=MASK)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, at its first dual number
def test_forward_mode_derivatives_are_refused() -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises(NotImplementedError, match="query: forward-mode derivatives"):
            block_sparse_attention(**{**GOOD, "query": dual})


@pytest.mark.parametrize("leaf", ["query", "key", "value", "bias"])
def test_second_derivatives_are_refused(leaf: str) -> None:
    tensors = {name: torch.randn_like(X) for name in ("query", "key", "value")} | {"bias": torch.randn_like(BIAS)}
    tensors[leaf].requires_grad_()
    out = block_sparse_attention(tensors["query"], tensors["key"], tensors["value"], LAYOUT, block_bias=tensors["bias"])
    (grad,) = torch.autograd.grad(out, tensors[leaf], torch.randn_like(out), create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not defined"):
        grad.square().sum().backward()


@pytest.mark.parametrize("changed", ["query", "key", "value", "out", "mask", "bias"])
def test_a_tensor_changed_before_backward_is_noticed(changed: str) -> None:
    leaf = torch.randn_like(X).requires_grad_()
    tensors = {name: leaf.clone() for name in ("query", "key", "value")}
    mask, bias = MASK.clone(), BIAS.clone()
    mask[:, 0] = False
    out = block_sparse_attention(**tensors, layout=LAYOUT, key_padding_mask=mask, block_bias=bias)
    cotangent = torch.randn_like(out)
    (tensors | {"out": out, "mask": mask, "bias": bias})[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, leaf, cotangent)
