"""dilated_attention: the front door. Checks its arguments, then hands them to the fused or the plain path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from dilated_core import checks
from dilated_core.attend import dropout_seed
from dilated_core.auxiliary import AuxOutput, AuxRequest
from dilated_core.composed import composed_attention
from dilated_core.operators import fused_attention
from dilated_core.resources import Allocator, PatternStore
from dilated_core.span import Extras, Options


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    enable_gqa: bool = False,
    semantics: str = "paper",
    kernel: str = "auto",
    fused: bool = True,
    allocator: Allocator | None = None,
    patterns: PatternStore | None = None,
    return_aux: None = None,
) -> Tensor: ...


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    enable_gqa: bool = False,
    semantics: str = "paper",
    kernel: str = "auto",
    fused: bool = True,
    allocator: Allocator | None = None,
    patterns: PatternStore | None = None,
    return_aux: AuxRequest,
) -> tuple[Tensor, AuxOutput]: ...


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    enable_gqa: bool = False,
    semantics: str = "paper",
    kernel: str = "auto",
    fused: bool = True,
    allocator: Allocator | None = None,
    patterns: PatternStore | None = None,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """LongNet's dilated self-attention (arXiv 2307.02486, eq. 3-15), exact, with exact gradients.

    Branch i cuts the positions into segments of w_i; in each, head j attends among the positions p with
    (p - segment start) mod r_i == j mod r_i. The branches mix by their softmax denominators s_i,
    alpha_i = s_i / sum_j s_j: one softmax over the multiset of reachable keys. A last, shorter segment is simply
    shorter; nothing is padded. A row that lies on no branch's grid gives 0.

    Args:
        query: (batch, seq, heads, head_dim), float64, float32, bfloat16 or float16, CPU or CUDA. Under autocast,
            float32 inputs are cast to autocast's dtype.
        key, value: (batch, seq, kv_heads, head_dim), dtype and device of query; kv_heads == heads, or with
            ``enable_gqa`` a divisor of it (query head j then meets key head j // (heads // kv_heads)).
        segment_lengths: w_i, in tokens, one a branch.
        dilation_rates: r_i, one a branch, 1 <= r_i <= w_i.
        is_causal: whether a row sees only keys at or before it.
        scale: factor on the scores, 1 / sqrt(head_dim) by default.
        dropout_p: probability in [0, 1) that an attention weight is dropped (the rest divided by 1 - dropout_p); a pair
            that m branches join is dropped m times, each on its own. Applied whenever it is above 0: pass 0.0 when not
            training. Only the "math" kernel drops, which forms the scores a chunk at a time.
        generator: a CPU generator that the dropout's seed is drawn from; the global one by default.
        key_padding_mask: (batch, seq), bool, True where the key is real (SDPA's sense). Padded keys are never attended
            and what they hold, even NaN, has no influence; their own rows attend like any other. With is_causal: both.
        cu_seqlens: (sequences + 1,), int32 or int64: the offsets 0 .. seq of sequences packed into a batch of 1. Each
            is attended by itself, as if it had been passed alone: segments start afresh. On a GPU, reading it waits
            for the device.
        enable_gqa: whether query heads may share key heads, see ``key``.
        semantics: "paper", as above. "torchscale": what microsoft/torchscale computes, for checkpoints trained with
            it: head j starts at j // ceil(heads / r_i); the sequence is padded with zero rows to a multiple of
            min(w_i, seq) and each segment to a multiple of r_i, and (not causal) these zero keys are attended; alpha
            takes no gradient. "grouped": the heads are split over the branches, those of branch i start at i mod r_i,
            and the output is divided by the number of branches.
        kernel: a name from ``dilated_core.kernels.table()``, or "auto" for the first that can run.
        fused: False runs the plain composition of torch operations instead of the one fused operator.
        return_aux: ``AuxRequest(lse=True)`` to have the lse too.
        allocator: where results and scratch are allocated, by kind where it is a BufferManager; torch.empty by default.
            What a kernel allocates itself stays its own, the output where one tile's is the first sum among it.
        patterns: where plans are kept between calls; planned anew by default. Neither it nor ``allocator`` is used
            while PyTorch traces (compile, export), nor by ``fused=False``.

    Returns:
        Output like query; with ``return_aux``, a pair of it and an AuxOutput.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or values that do not fit, or a kernel that cannot run them.

    >>> q, k, v = torch.randn(3, 1, 1000, 4, 16).unbind()
    >>> dilated_attention(q, k, v, [128, 512], [1, 4], is_causal=True).shape
    torch.Size([1, 1000, 4, 16])
    """
    checks.boolean("is_causal", is_causal)
    checks.boolean("enable_gqa", enable_gqa)
    checks.boolean("fused", fused)
    checks.semantics(semantics)
    checks.kernel(kernel)
    dropout_p = checks.probability("dropout_p", dropout_p)
    with_lse = checks.asks_for_lse(return_aux)
    lengths, rates = checks.branches(segment_lengths, dilation_rates)
    resources = checks.resources(allocator, patterns)
    query, key, value = checks.autocast(query, key, value)
    query, key, value = checks.query_key_value(query, key, value, same_length=True, enable_gqa=enable_gqa)
    real = checks.key_padding_mask(key_padding_mask, key)
    cu_seqlens = checks.cu_seqlens(cu_seqlens, query)
    query, scale = checks.query_and_scale(query, scale)
    options = Options(lengths, rates, semantics, is_causal, scale, dropout_p, kernel)
    if fused:
        extras = Extras(real, cu_seqlens, dropout_seed(dropout_p, generator))
        out, lse = fused_attention(query, key, value, extras, options, resources)
    else:
        out, lse = composed_attention(query, key, value, real, cu_seqlens, options, generator)
    if semantics == "grouped":
        out = out / len(rates)
    if return_aux is None:
        return out
    return out, AuxOutput(lse=lse if with_lse else None)
