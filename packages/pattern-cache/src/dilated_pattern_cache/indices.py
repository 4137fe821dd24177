"""The positions that the heads of dilated attention visit, as index tensors for implementations that gather."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from dilated_pattern_cache.keys import DilatedIndexKey

if TYPE_CHECKING:
    from torch import Tensor

DilatedIndices: TypeAlias = "tuple[tuple[Tensor, ...], ...]"


def dilated_indices(key: DilatedIndexKey) -> DilatedIndices:
    """For every branch, a tensor of positions for every offset that its heads begin at.

    In a branch of segments of w and rate r, head j visits in each segment the positions p with

        (p - start of the segment) mod r == j mod r

    (LongNet, arXiv 2307.02486, eq. 7 and 10), so heads that are r apart visit the same: those of head j are
    ``indices[branch][j % r]``. A last, shorter segment is simply shorter.

    Returns:
        ``len(key.segment_lengths)`` tuples of ``min(r, key.heads)`` int64 tensors on the CPU, each (positions,) and
        rising.

    Raises:
        ValueError: the key has other semantics than "paper".
        ImportError: PyTorch is not installed.

    >>> dilated_indices(DilatedIndexKey(10, [4], [2], heads=8))
    ((tensor([0, 2, 4, 6, 8]), tensor([1, 3, 5, 7, 9])),)
    """
    if key.semantics != "paper":
        raise ValueError(f"semantics: expected 'paper', for which indices are made, got {key.semantics!r}")
    return tuple(
        tuple(_positions(key.seq_len, length, rate, offset) for offset in range(min(rate, key.heads)))
        for length, rate in zip(key.segment_lengths, key.dilation_rates, strict=True)
    )


def _positions(seq_len: int, segment_length: int, rate: int, offset: int) -> Tensor:
    import torch

    segment_length = min(segment_length, max(seq_len, 1))
    starts = torch.arange(0, seq_len, segment_length, device="cpu")
    within = torch.arange(offset, max(segment_length, offset), rate, device="cpu")
    positions = (starts[:, None] + within).flatten()
    return positions[positions < seq_len]
