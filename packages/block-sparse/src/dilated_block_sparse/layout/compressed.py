"""Compressed rows from how many blocks each row has. Imports torch only."""

from __future__ import annotations

import torch
from torch import Tensor


def offsets(counts: Tensor) -> Tensor:
    """The ``indptr``, int64 (heads, rows + 1), of rows with ``counts`` live blocks, (heads, rows)."""
    heads, rows = counts.shape
    ends = counts.flatten().cumsum(0, dtype=torch.int64)
    flat = torch.cat([ends.new_zeros(1), ends])
    return flat[torch.arange(heads, device="cpu").unsqueeze(1) * rows + torch.arange(rows + 1, device="cpu")]
