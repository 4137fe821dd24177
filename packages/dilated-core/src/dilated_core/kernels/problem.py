"""What a kernel is asked to attend: one tile's rows, and how."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Dropout(NamedTuple):
    """Dropout on the probabilities of one tile: the seed makes the backward drop what the forward dropped.

    Attributes:
        probability: of a probability to become 0; the others are divided by 1 - probability.
        seed: of this tile's random numbers.
    """

    probability: float
    seed: int


class Problem(NamedTuple):
    """One tile. Query rows meet all key rows, or, causal, those up to their own index.

    Attributes:
        query: (batch, heads, rows, head_dim), last stride 1, other strides free, not empty.
        key: (batch, heads, keys, head_dim), the same otherwise.
        value: like key.
        is_causal: needs as many keys as queries.
        scale: factor on the scores.
        real: (batch, heads, keys), bool, True where the key is attended; None for all. Keys and values elsewhere are
            finite: whoever asks has zeroed what padding holds.
        dropout: None for none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool
    scale: float
    real: Tensor | None = None
    dropout: Dropout | None = None

    def bias(self) -> Tensor | None:
        """``real`` as what the stock kernels add to the scores: (batch, heads, 1, keys), 0 or -inf, query's dtype."""
        if self.real is None:
            return None
        zeros = torch.zeros(self.real.shape, dtype=self.query.dtype, device=self.query.device)
        return zeros.masked_fill_(~self.real, float("-inf")).unsqueeze(2)

    def rows_with_a_key(self) -> Tensor | None:
        """(batch, heads, rows or 1), bool: which query rows attend at all; None where every row does."""
        if self.real is None:
            return None
        return self.real.cummax(-1).values if self.is_causal else self.real.any(-1, keepdim=True)
