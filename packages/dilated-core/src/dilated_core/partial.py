"""Partial and merge: attention over parts of the keys, joined exactly. Imports torch only.

Softmax over a union of key sets needs, of each part, only its own output and the log of its denominator:

    lse = log sum_i exp(lse_i)          out = sum_i exp(lse_i - lse) out_i
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention of some query rows over some of their keys.

    Attributes:
        out: (batch, seq, heads, head_dim), softmax within these keys times the values; 0 in a row with no key.
        lse: (batch, heads, seq), natural log of the softmax denominator, float32 (float64 where out is float64);
            -inf in a row with no key.
    """

    out: Tensor
    lse: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for all else: the precision of every sum, merge and lse."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(*partials: Partial) -> Partial:
    """Join partials of the same query rows over different keys into one, exactly and in float32 (or float64).

    A key that occurs in m partials counts m times. Differentiable in every ``out`` and ``lse``; rows with no key in
    any partial give 0 and -inf, and gradient 0.

    Args:
        partials: at least one; all of one shape and dtype.

    Returns:
        Partial of the same shape; ``out`` in the dtype of the inputs.

    Raises:
        TypeError: an argument is no Partial, or dtypes differ.
        ValueError: no argument, or shapes differ.

    >>> keys = torch.randn(1, 6, 1, 8); query = keys[:, :2]
    >>> from dilated_core import attend
    >>> whole = attend(query, keys, keys)
    >>> joined = merge(attend(query, keys[:, :4], keys[:, :4]), attend(query, keys[:, 4:], keys[:, 4:]))
    >>> torch.allclose(whole.out, joined.out, atol=1e-6)
    True
    """
    _check(partials)
    dtype = accumulation_dtype(partials[0].out.dtype)
    lses = torch.stack([partial.lse.to(dtype) for partial in partials])
    # The shift cancels in the quotient, so it takes no gradient; where no part has a key, shift by 0, not by -inf.
    shift = lses.detach().amax(0)
    shift = shift.masked_fill(shift == -math.inf, 0.0)
    weights = torch.exp(lses - shift)
    total = weights.sum(0)
    has_key = total > 0
    total = torch.where(has_key, total, 1.0)
    lse = torch.where(has_key, torch.log(total) + shift, -math.inf)
    weights = (weights / total).transpose(-1, -2).unsqueeze(-1)  # as out: (parts, batch, seq, heads, 1)
    out = sum(
        (weight * partial.out.to(dtype) for weight, partial in zip(weights, partials, strict=True)),
        start=weights.new_zeros(()),
    )
    return Partial(out.to(partials[0].out.dtype), lse)


def merge_in_place(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor, *, all_have_keys: bool = False) -> None:
    """Merge one more partial into ``out`` and ``lse``, without autograd: one pass over each.

    Args:
        out: (..., rows, head_dim), float32 or float64, overwritten; lse: (..., rows), overwritten.
        new_out, new_lse: of the same shapes; new_out of any floating dtype.
        all_have_keys: promises that new_lse is -inf nowhere.
    """
    share = (new_lse - lse).sigmoid_()  # of the joint denominator: exp(new) / (exp(old) + exp(new))
    if not all_have_keys:
        share.masked_fill_(new_lse == -math.inf, 0.0)
    out.lerp_(new_out.to(out.dtype), share.unsqueeze(-1))
    torch.logaddexp(lse, new_lse, out=lse)


def merge_stack(outs: Tensor, lses: Tensor) -> Tensor:
    """The joint out of partials that lie in one tensor, without autograd; outs is overwritten.

    Args:
        outs: (partials, ..., head_dim), float32 or float64; lses: (partials, ...), finite: a partial with no key has
            out 0 and an lse far below any other.
    """
    return outs.mul_(torch.softmax(lses, 0).unsqueeze(-1)).sum(0)


def with_zero_keys(out: Tensor, lse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """out and lse after every row attends ``count`` more keys of score 0 and value 0: they take their share, give none.

    Args:
        out: (..., rows, head_dim); lse: (..., rows), float32 or float64.

    Returns:
        out in lse's dtype, and lse.
    """
    joint = torch.logaddexp(lse, lse.new_full((), math.log(count)))
    return out.to(lse.dtype) * torch.exp(lse - joint).unsqueeze(-1), joint


def _check(partials: tuple[Partial, ...]) -> None:
    if not partials:
        raise ValueError("partials: expected at least one Partial, got none")
    for index, partial in enumerate(partials):
        if not isinstance(partial, Partial):
            raise TypeError(f"partials[{index}]: expected a Partial, got {type(partial).__name__}")
        if partial.out.ndim != 4:
            raise ValueError(
                f"partials[{index}].out: expected 4 dimensions (batch, seq, heads, head_dim), "
                f"got shape {tuple(partial.out.shape)}"
            )
        batch, seq, heads, _ = partial.out.shape
        if partial.lse.shape != (batch, heads, seq):
            raise ValueError(
                f"partials[{index}].lse: expected shape (batch, heads, seq) = {(batch, heads, seq)}, "
                f"got {tuple(partial.lse.shape)}"
            )
        if partial.out.shape != partials[0].out.shape:
            raise ValueError(
                f"partials[{index}].out: expected the shape of the first partial, "
                f"{tuple(partials[0].out.shape)}, got {tuple(partial.out.shape)}"
            )
        if partial.out.dtype != partials[0].out.dtype:
            raise TypeError(
                f"partials[{index}].out: expected the dtype of the first partial, "
                f"{partials[0].out.dtype}, got {partial.out.dtype}"
            )
