"""Every public argument with a wrong type, shape, dtype, device or value: an error that names it, before any work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dilated_core import DilatedAttention, MultiheadDilatedAttention, attend, dilated_attention

X = torch.zeros(2, 6, 4, 8)
QKV = {"query": X, "key": X, "value": X}
MASK = torch.ones(2, 6, dtype=torch.bool)
PATTERN = {"segment_lengths": [2, 4], "dilation_rates": [1, 2]}

TENSOR_FAULTS = {
    "query not a tensor": ({"query": [1.0]}, TypeError, "query: expected a torch.Tensor, got list"),
    "query of 3 dims": (
        {"query": X[0]},
        ValueError,
        r"query: expected 4 dimensions .*, got shape \(6, 4, 8\)",
    ),
    "query of ints": ({"query": X.int()}, TypeError, "query: expected float64, float32, .* got torch.int32"),
    "key of another dtype": (
        {"key": X.double()},
        TypeError,
        "key: expected the dtype of query, torch.float32",
    ),
    "value of another dtype": ({"value": X.half()}, TypeError, "value: expected the dtype of query"),
    "key of another device": (
        {"key": X.to("meta")},
        ValueError,
        "key: expected the device of query, cpu, got meta",
    ),
    "value of another shape": ({"value": X[:, :5]}, ValueError, "value: expected the shape of key"),
    "another batch": (
        {"key": X[:1], "value": X[:1]},
        ValueError,
        "key: expected the batch of query, 2, got 1",
    ),
    "another head_dim": (
        {"key": X[..., :4], "value": X[..., :4]},
        ValueError,
        "key: expected the head_dim of query",
    ),
    "fewer kv heads": (
        {"key": X[:, :, :2], "value": X[:, :, :2]},
        ValueError,
        "key: expected the heads of query, 4",
    ),
    "head_dim 0": ({"query": X[..., :0], "key": X[..., :0]}, ValueError, "head_dim of at least 1"),
    "is_causal not a bool": ({"is_causal": 1}, TypeError, "is_causal: expected a bool, got 1"),
    "scale a string": ({"scale": "0.1"}, TypeError, "scale: expected a float or None"),
    "scale a bool": ({"scale": True}, TypeError, "scale: expected a float or None"),
    "scale not finite": ({"scale": float("nan")}, ValueError, "scale: expected a finite float"),
    "kernel not a string": ({"kernel": None}, TypeError, "kernel: expected one of"),
    "kernel unknown": ({"kernel": "magic"}, ValueError, r"kernel: expected one of \['auto'.*got 'magic'"),
    "kernel impossible": ({"kernel": "cuda_flash"}, ValueError, 'kernel: "cuda_flash" cannot run'),
    "dropout a string": ({"dropout_p": "0.1"}, TypeError, r"dropout_p: expected a probability in \[0, 1\), got '0.1'"),
    "dropout a bool": ({"dropout_p": True}, TypeError, r"dropout_p: expected a probability"),
    "dropout negative": ({"dropout_p": -0.1}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got -0.1"),
    "dropout of all": ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
    "dropout not a number": ({"dropout_p": float("nan")}, ValueError, "dropout_p: expected a probability .*got nan"),
    "generator a seed": ({"generator": 3}, TypeError, "generator: expected a torch.Generator or None, got int"),
    "mask a list": ({"key_padding_mask": [True]}, TypeError, "key_padding_mask: expected a bool tensor.*got list"),
    "mask of numbers": ({"key_padding_mask": MASK.float()}, TypeError, "key_padding_mask: .*got torch.float32"),
    "mask of ints": ({"key_padding_mask": MASK.byte()}, TypeError, "key_padding_mask: .*got torch.uint8"),
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
}
ATTENTION_FAULTS = {
    "another length": (
        {"key": X[:, :5], "value": X[:, :5]},
        ValueError,
        "key: expected the seq of query, 6, got 5",
    ),
    "kv heads no divisor": (
        {"key": X[:, :, :3], "value": X[:, :, :3], "enable_gqa": True},
        ValueError,
        "key: expected kv_heads that divide the 4 heads of query, got 3",
    ),
    "enable_gqa not a bool": ({"enable_gqa": "yes"}, TypeError, "enable_gqa: expected a bool"),
    "fused not a bool": ({"fused": None}, TypeError, "fused: expected a bool"),
    "lengths not a list": ({"segment_lengths": 4}, TypeError, "segment_lengths: expected a sequence"),
    "length a float": (
        {"segment_lengths": [2, 4.0]},
        TypeError,
        r"segment_lengths\[1\]: expected a positive int",
    ),
    "rate zero": (
        {"dilation_rates": [1, 0]},
        ValueError,
        r"dilation_rates\[1\]: expected a positive int, got 0",
    ),
    "one rate missing": ({"dilation_rates": [1]}, ValueError, "one rate a segment length"),
    "swapped": (
        {"segment_lengths": [1, 2], "dilation_rates": [2, 4]},
        ValueError,
        "were the two lists swapped",
    ),
    "semantics unknown": (
        {"semantics": "longnet"},
        ValueError,
        r"semantics: expected one of \['paper', 'torchscale', 'grouped'\], got 'longnet'",
    ),
    "semantics cannot": (
        {"semantics": "torchscale", "segment_lengths": [2, 5]},
        ValueError,
        r"segment_lengths\[1\]: .*multiple of dilation_rates\[1\] = 2 .* got 5 for 6 tokens",
    ),
    "offsets a list": ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens: expected an int32 or int64 tensor.*got list"),
    "offsets of floats": (
        {"cu_seqlens": torch.tensor([0.0, 6.0])},
        TypeError,
        "cu_seqlens: expected an int32 or int64 tensor of offsets, got torch.float32",
    ),
    "offsets of two dims": (
        {"cu_seqlens": torch.tensor([[0, 6]])},
        ValueError,
        r"cu_seqlens: expected shape \(sequences \+ 1,\), got \(1, 2\)",
    ),
    "no offsets": (
        {"cu_seqlens": torch.tensor([], dtype=torch.int64)},
        ValueError,
        r"cu_seqlens: expected shape \(sequences \+ 1,\), got \(0,\)",
    ),
    "offsets of a batch": (
        {"cu_seqlens": torch.tensor([0, 6])},
        ValueError,
        "cu_seqlens: expected packed sequences in a batch of 1, got a batch of 2",
    ),
    "offsets that do not end": (
        {"query": X[:1], "key": X[:1], "value": X[:1], "cu_seqlens": torch.tensor([0, 3])},
        ValueError,
        r"cu_seqlens: expected offsets that rise from 0 to the 6 tokens, got \[0, 3\]",
    ),
    "allocator without empty": (
        {"allocator": object()},
        TypeError,
        r"allocator: expected an object with empty\(size, \*, dtype, device\), or None, got object",
    ),
    "patterns a plain dict": (
        {"patterns": {}},
        TypeError,
        r"patterns: expected an object with get_or_create\(key, create\), or None, got dict",
    ),
    "semantics not a string": ({"semantics": 1}, TypeError, "semantics: expected one of"),
    "return_aux a bool": (
        {"return_aux": True},
        TypeError,
        "return_aux: expected an AuxRequest or None, got bool",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_attend(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attend(**{**QKV, **change})  # type: ignore[arg-type]


def test_attend_causal_needs_square() -> None:
    with pytest.raises(ValueError, match="key: expected the seq of query, 6, got 5"):
        attend(X, X[:, :5], X[:, :5], is_causal=True)


FAULTS = {**TENSOR_FAULTS, **ATTENTION_FAULTS}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("change", "error", "message"), FAULTS.values(), ids=FAULTS)
def test_dilated_attention(change: dict[str, object], error: type[Exception], message: str, fused: bool) -> None:
    with pytest.raises(error, match=message):
        dilated_attention(**{**QKV, **PATTERN, "fused": fused, **change})  # type: ignore[arg-type]


MODULE_FAULTS = {
    "swapped": (
        {"segment_lengths": [1, 2], "dilation_rates": [2, 4]},
        ValueError,
        "were the two lists swapped",
    ),
    "is_causal not a bool": ({"is_causal": 1}, TypeError, "is_causal: expected a bool"),
    "kernel unknown": ({"kernel": "magic"}, ValueError, "kernel: expected one of"),
    "semantics unknown": ({"semantics": "magic"}, ValueError, "semantics: expected one of"),
    "fused not a bool": ({"fused": 1}, TypeError, "fused: expected a bool"),
    "scale not a number": ({"softmax_scale": "x"}, TypeError, "softmax_scale: expected a float or None"),
    "allocator": ({"allocator": 1}, TypeError, "allocator: expected an object with empty"),
    "patterns": ({"patterns": 1}, TypeError, "patterns: expected an object with get_or_create"),
}
MULTIHEAD_FAULTS = {
    "embed_dim a float": ({"embed_dim": 8.0}, TypeError, "embed_dim: expected a positive int"),
    "no heads": ({"num_heads": 0}, ValueError, "num_heads: expected a positive int, got 0"),
    "heads not dividing": (
        {"num_heads": 3},
        ValueError,
        "embed_dim: expected a multiple of num_heads = 3, got 16",
    ),
    "kv heads not dividing": (
        {"kv_heads": 3},
        ValueError,
        "kv_heads: expected a divisor of num_heads = 4, got 3",
    ),
    "dropout of all": ({"dropout": 1}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1"),
    "dropout None": ({"dropout": None}, TypeError, r"dropout: expected a probability in \[0, 1\), got None"),
    "gamma a string": ({"gamma_init": "1"}, TypeError, "gamma_init: expected a positive float"),
    "gamma negative": ({"gamma_init": -1.0}, ValueError, "gamma_init: expected a positive finite float, got -1.0"),
    "epsilon zero": ({"layer_norm_eps": 0.0}, ValueError, "layer_norm_eps: expected a positive finite float"),
    "bias not a bool": ({"bias": "no"}, TypeError, "bias: expected a bool"),
    "layer_norm not a bool": ({"layer_norm": None}, TypeError, "layer_norm: expected a bool"),
    "rotary a function": (
        {"rotary": lambda q, k: (q, k)},
        TypeError,
        "rotary: expected an nn.Module or None",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), MODULE_FAULTS.values(), ids=MODULE_FAULTS)
def test_dilated_attention_module(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DilatedAttention(**{**PATTERN, **change})  # type: ignore[arg-type]


def test_dilated_attention_module_names_its_own_dropout() -> None:
    with pytest.raises(ValueError, match=r"attention_dropout: expected a probability in \[0, 1\), got 1.5"):
        DilatedAttention(**PATTERN, attention_dropout=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [*MODULE_FAULTS.values(), *MULTIHEAD_FAULTS.values()],
    ids=[*MODULE_FAULTS, *MULTIHEAD_FAULTS],
)
def test_multihead_module(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiheadDilatedAttention(**{"embed_dim": 16, "num_heads": 4, **PATTERN, **change})  # type: ignore[arg-type]


S = torch.zeros(2, 6, 16)
CALL_FAULTS: dict[str, tuple[Callable[[nn.Module], object], type[Exception], str]] = {
    "no tensor": (lambda m: m(None), TypeError, "query: expected a torch.Tensor, got NoneType"),
    "two dims": (lambda m: m(S[0]), ValueError, r"query: expected shape \(batch, seq, embed_dim = 16\)"),
    "wrong width": (lambda m: m(S[..., :8]), ValueError, r"query: expected shape .*, got \(2, 6, 8\)"),
    "other keys": (lambda m: m(S, S[:, :3]), ValueError, r"key: expected shape .*, got \(2, 3, 16\)"),
    "mask of another shape": (
        lambda m: m(S, key_padding_mask=MASK[:1]),
        ValueError,
        r"key_padding_mask: expected shape \(batch, seq\) = \(2, 6\), got \(1, 6\)",
    ),
    "mask of numbers": (lambda m: m(S, key_padding_mask=S[..., 0]), TypeError, "key_padding_mask: .*got torch.float32"),
    "offsets of a batch": (lambda m: m(S, cu_seqlens=torch.tensor([0, 6])), ValueError, "got a batch of 2"),
    "attn_mask": (lambda m: m(S, attn_mask=S[0]), ValueError, "attn_mask: expected None"),
    "weights": (lambda m: m(S, need_weights=True), ValueError, "need_weights: expected False"),
    "causal": (lambda m: m(S, is_causal=1), TypeError, "is_causal: expected a bool"),
}


@pytest.mark.parametrize(("call", "error", "message"), CALL_FAULTS.values(), ids=CALL_FAULTS)
def test_multihead_call(call: Callable[[nn.Module], object], error: type[Exception], message: str) -> None:
    module = MultiheadDilatedAttention(16, 4, [2, 4], [1, 2])
    with pytest.raises(error, match=message):
        call(module)


def test_packed_sequences_beside_a_rotary() -> None:
    module = MultiheadDilatedAttention(16, 4, [2, 4], [1, 2], rotary=nn.Identity())
    with pytest.raises(ValueError, match="cu_seqlens: expected None where there is a rotary"):
        module(S[:1], cu_seqlens=torch.tensor([0, 6]))
