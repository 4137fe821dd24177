"""What a kernel is asked to attend: one tile's rows, and how."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """One tile. Query rows meet all key rows, or, causal, those up to their own index.

    Attributes:
        query: (batch, heads, rows, head_dim), last stride 1, other strides free, not empty.
        key, value: the same with their own number of rows.
        is_causal: needs as many keys as queries.
        scale: factor on the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool
    scale: float
