"""One tile's arithmetic without autograd: its problem, its partial merged into sums, its gradients added to sums.

What a fused attention does with every tile, whatever its plan: dilated segments, shards of a ring, chunks of a stream.
Tensors here are as the kernels take them, (batch, heads, rows, head_dim).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dilated_core.kernels import Dropout, Kernel, Problem
from dilated_core.partial import merge_in_place, with_zero_keys


def last_stride_1(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its last stride is another, which the kernels read wrongly."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def make_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None = None,
    *,
    is_causal: bool,
    scale: float,
    dropout: Dropout | None = None,
    phantoms: int = 0,
) -> Problem | None:
    """What the kernel is to attend; None where all keys are padding and nothing stands in for them.

    Args:
        query: (batch, heads, rows, head_dim), last stride 1, not empty; key, value: the same with rows of their own.
        real: (batch, heads, keys), bool, True where the key is no padding; None for all. What padding holds, NaN too,
            has no influence.
        phantoms: zero keys beside the real ones.
    """
    if real is not None and real.device.type == "cpu":  # elsewhere a look at the values would wait for the device
        if real.all():
            real = None
        elif not real.any() and not phantoms:
            return None
    if real is not None:
        padding = ~real.unsqueeze(-1)
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
    return Problem(query, key, value, is_causal, scale, real, dropout)


def attend_tile(engine: Kernel, problem: Problem, phantoms: int = 0) -> tuple[Tensor, Tensor]:
    """out and lse of one tile, its zero keys included."""
    out, lse = engine.forward(problem)
    return with_zero_keys(out, lse, phantoms) if phantoms else (out, lse)


def merge_tile(partial: Iterable[Tensor], out: Tensor, lse: Tensor, *, all_have_keys: bool = False) -> None:
    """Merge a tile's out and lse into its place in the sums, which may be of a shape that only splits dimensions.

    Args:
        out: view of a sum, float32 or float64; lse: the same without the last dimension.
        all_have_keys: promises that the tile's lse is -inf nowhere.
    """
    new_out, new_lse = (rows.reshape(total.shape) for rows, total in zip(partial, (out, lse), strict=True))
    merge_in_place(out, lse, new_out, new_lse, all_have_keys=all_have_keys)


def add_tile(grads: Iterable[Tensor], sums: Iterable[Tensor]) -> None:
    """Add a tile's gradients, one by one, to their places in the sums."""
    for total, rows in zip(sums, grads, strict=True):
        total.add_(rows.reshape(total.shape))
