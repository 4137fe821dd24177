"""A warning where a call's tensors seem to have another layout than (batch, seq, heads, head_dim). Imports torch."""

from __future__ import annotations

import warnings

from torch import Tensor

# More query heads than any model has.
MANY_HEADS = 256
# From the warning to the line that calls the module.
_CALLER = 6


def look_at_layout(query: Tensor, expected: int | None) -> None:
    """Warn where the sequence seems to be in the place of the heads, or of the batch."""
    batch, length = query.shape[:2]
    if query.ndim == 4:
        heads = query.shape[2]
        if (heads == expected and length != expected) or (heads > MANY_HEADS and heads > length):
            warnings.warn(
                f"query: expected (batch, seq, heads, head_dim), got {tuple(query.shape)}, which is {heads:,} heads of "
                f"{length:,} tokens; if it is (batch, heads, seq, head_dim), write query.transpose(1, 2), and key and "
                "value alike",
                stacklevel=_CALLER,
            )
    elif batch == expected and length != expected:
        warnings.warn(
            f"query: expected (batch, seq, embed_dim), got {tuple(query.shape)}, which is {batch:,} sequences of "
            f"{length:,} tokens, where sequence_length={expected} was given; if it is (seq, batch, embed_dim), write "
            "query.transpose(0, 1)",
            stacklevel=_CALLER,
        )
