"""Packed sequences: where each one starts and stops."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor


def sequence_bounds(cu_seqlens: Tensor | None, seq_len: int) -> list[tuple[int, int]]:
    """(start, stop) of every packed sequence that has tokens; of the one there is, if none are packed.

    Raises:
        ValueError: the offsets do not rise from 0 to ``seq_len``.
    """
    if cu_seqlens is None:
        return [(0, seq_len)]
    offsets = cu_seqlens.tolist()
    bounds = list(pairwise(offsets))
    if not offsets or offsets[0] != 0 or offsets[-1] != seq_len or any(start > stop for start, stop in bounds):
        shown = offsets if len(offsets) <= 8 else [*offsets[:4], "...", *offsets[-3:]]
        raise ValueError(f"cu_seqlens: expected offsets that rise from 0 to the {seq_len} tokens, got {shown}")
    return [(start, stop) for start, stop in bounds if start < stop]
