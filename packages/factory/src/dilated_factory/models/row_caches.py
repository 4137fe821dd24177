"""RowCaches: one layer's keys and values for a batch whose rows have seen different numbers of tokens.

Rows of one length share a cache and are attended in one call, through the attention's own forward, so that positions,
hooks and everything else are what they are for a batch of that length. May import torch and dilated_core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dilated_core import DilatedKVCache


@dataclass
class RowGroup:
    """Batch rows that have seen equally many tokens.

    Attributes:
        rows: their indices, int64, on the device of the hidden states.
        tokens: how many columns of the present call are theirs, from the left; 0 where they take no part in it.
    """

    rows: Tensor
    tokens: int


@dataclass
class RowCaches:
    """Attributes: groups: shared by all layers; caches: this layer's, one a group."""

    groups: Sequence[RowGroup]
    caches: Sequence[DilatedKVCache]

    def attend(self, attention: Any, hidden: Tensor) -> Tensor:
        """Self-attention of hidden (batch, seq, embed_dim), a call a group; columns that are nobody's come out 0."""
        joined = None
        for group, cache in zip(self.groups, self.caches, strict=True):
            if group.tokens:
                attended, _ = attention(hidden[group.rows, : group.tokens], cache=cache)
                if joined is None:  # autocast decides its dtype
                    joined = attended.new_zeros(hidden.shape)
                joined[group.rows, : group.tokens] = attended
        return hidden.new_zeros(hidden.shape) if joined is None else joined


LayerCache = DilatedKVCache | RowCaches
"""What one layer keeps: one cache, or one for each length that the rows of the batch have."""
