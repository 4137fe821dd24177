"""The plain path: the same plan as differentiable torch operations, to read, to learn from and to check against.

Plan, attend, merge, and nothing else: autograd finds the gradient, through the merge and every tile's lse. It keeps a
full-size partial a branch, so it costs more memory than the fused path, which it agrees with to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from dilated_core.attend import attend
from dilated_core.partial import Partial, accumulation_dtype, merge


def composed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    is_causal: bool,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """LongNet attention of (batch, seq, heads, head_dim) tensors -> out like query, lse (batch, heads, seq).

    Takes its arguments as checked: ``dilated_core.dilated_attention`` is the door.
    """
    if query.numel() == 0:
        return attend(query, key, value, is_causal=is_causal, scale=scale, kernel=kernel)
    branches = []
    for segment_length, rate in zip(segment_lengths, dilation_rates, strict=True):
        out = query.new_zeros(query.shape)
        lse = query.new_full(
            (query.shape[0], query.shape[2], query.shape[1]), -math.inf, dtype=accumulation_dtype(query.dtype)
        )
        for start in range(0, query.shape[1], segment_length):
            stop = min(start + segment_length, query.shape[1])
            for phase in range(min(rate, stop - start, query.shape[2])):
                rows, heads = slice(start + phase, stop, rate), slice(phase, None, rate)
                tile = attend(
                    query[:, rows, heads],
                    key[:, rows, heads],
                    value[:, rows, heads],
                    is_causal=is_causal,
                    scale=scale,
                    kernel=kernel,
                )
                out[:, rows, heads] = tile.out
                lse[:, heads, rows] = tile.lse
        branches.append(Partial(out, lse))
    return merge(*branches)
