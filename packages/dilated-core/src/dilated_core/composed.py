"""The plain path: the same plan as differentiable torch operations, to read, to learn from and to check against.

Plan, attend, merge, and nothing else: autograd finds the gradient, through the merge and every tile's lse. It keeps a
full-size partial a branch and repeats shared keys, so it costs more memory than the fused path, which it agrees with to
rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dilated_core.attend import attend
from dilated_core.packing import sequence_bounds
from dilated_core.partial import Partial, accumulation_dtype, merge
from dilated_core.plan import check_torchscale, head_phases
from dilated_core.span import Options


def composed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    cu_seqlens: Tensor | None,
    options: Options,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Dilated attention of (batch, seq, heads, head_dim) tensors -> out like query, lse (batch, heads, seq).

    Takes its arguments as checked: ``dilated_core.dilated_attention`` is the door.
    """
    repeats = query.shape[2] // max(key.shape[2], 1)
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
    if cu_seqlens is None:
        return _sequence(query, key, value, real, options, generator)
    parts = [
        _sequence(
            query[:, start:stop],
            key[:, start:stop],
            value[:, start:stop],
            None if real is None else real[:, start:stop],
            options,
            generator,
        )
        for start, stop in sequence_bounds(cu_seqlens, query.shape[1])
    ]
    if not parts:
        return _sequence(query, key, value, real, options, generator)
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=2)


def _sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    options: Options,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    if query.numel() == 0:
        return attend(query, key, value, scale=options.scale, kernel=options.kernel)
    branches = [
        _branch(branch, query, key, value, real, options, generator) for branch in range(len(options.dilation_rates))
    ]
    if options.semantics == "torchscale":  # the weights of the mixture take no gradient
        lse = merge(*branches).lse
        return merge(*(Partial(out, branch_lse.detach()) for out, branch_lse in branches)).out, lse
    return merge(*branches)


def _branch(
    branch: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    options: Options,
    generator: torch.Generator | None,
) -> Partial:
    """One branch at full length: 0 and -inf where its grid has no row."""
    batch, seq_len, heads, _ = query.shape
    rate = options.dilation_rates[branch]
    segment_length = min(options.segment_lengths[branch], seq_len)
    padded = options.semantics == "torchscale"
    if padded:
        check_torchscale(branch, segment_length, rate, seq_len)
    phases = head_phases(options.semantics, branch, len(options.dilation_rates), rate, heads)
    out = query.new_zeros(query.shape)
    lse = query.new_full((batch, heads, seq_len), -math.inf, dtype=accumulation_dtype(query.dtype))
    for start in range(0, seq_len, segment_length):
        stop = min(start + segment_length, seq_len)
        for phase in sorted({phase for phase in phases if phase is not None and phase < stop - start}):
            members = [head for head, own in enumerate(phases) if own == phase]
            rows = slice(start + phase, stop, rate)
            tile = attend(
                query[:, rows, members],
                key[:, rows, members],
                value[:, rows, members],
                is_causal=options.is_causal,
                scale=options.scale,
                key_padding_mask=None if real is None else real[:, rows],
                dropout_p=options.dropout_p,
                generator=generator,
                kernel=options.kernel,
            )
            phantoms = -(-segment_length // rate) - tile.out.shape[1]
            if padded and phantoms and not options.is_causal:
                zero_keys = Partial(torch.zeros_like(tile.out), torch.full_like(tile.lse, math.log(phantoms)))
                tile = merge(tile, zero_keys)
            out[:, rows, members] = tile.out
            lse[:, members, rows] = tile.lse
    return Partial(out, lse)
