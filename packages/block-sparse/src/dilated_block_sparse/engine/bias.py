"""A bias for each live block, as two more columns of queries and keys: no kernel takes one, each takes wider rows.

With p, about 1 / scale, in a query's columns and b / (scale * p) in a key's, scale * q k gains b. Half precision rounds
that, so the second column has what the first lost. The gradient of b is that of the key's column, summed over the
block's keys, over scale * p.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dilated_block_sparse.engine.gather import Place
from dilated_block_sparse.layout import BlockLayout, algebra
from dilated_core.kernels import Problem
from dilated_core.partial import accumulation_dtype

# Head dimensions stay multiples of 8 for the CUDA kernels.
COLUMNS = 8


class BlockBias(NamedTuple):
    """A bias and where each block's lies in it.

    Attributes:
        values: (live blocks,), float32 or float64, on the device of the attention.
        numbers: (live blocks,), int64, CPU: the blocks' numbers, which rise, see ``layout.algebra``.
    """

    values: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, bias: Tensor, layout: BlockLayout) -> BlockBias:
        """Of a layout's live blocks."""
        return cls(bias.to(accumulation_dtype(bias.dtype)), algebra.numbers(layout))

    def positions(self, layout: BlockLayout, head: int, rows: Place, keys: Place) -> Tensor:
        """Where the bias of each key lies, (rectangles, keys), int64; a rectangle has one block of rows."""
        row_size, column_size = layout.block_size
        row = head * layout.q_blocks + rows.tokens()[:, :1] // row_size
        wanted = row * layout.kv_blocks + keys.tokens() // column_size
        return torch.searchsorted(self.numbers, wanted).to(self.values.device)


def with_bias(problem: Problem, bias: Tensor) -> Problem:
    """The problem with the bias on its scores; values get as many columns, of zeros, which the caller cuts off.

    Args:
        bias: (rectangles, keys), float32 or float64. The problem's batch is the tensors', each with all rectangles.
    """
    query, key, value = (widened(tensor) for tensor in problem[:3])
    head_dim = problem.query.shape[-1]
    share = _query_share(problem.scale)
    # Neither a column nor its product with the query's may overflow: that would be NaN.
    limit = min(torch.finfo(key.dtype).max, torch.finfo(bias.dtype).max / (4.0 * max(share, 1.0)))
    column = (bias / (problem.scale * share)).clamp(-limit, limit).repeat(len(key) // len(bias), 1).unsqueeze(1)
    rounded = column.to(key.dtype)
    query[..., head_dim : head_dim + 2] = share
    key[..., head_dim] = rounded
    key[..., head_dim + 1] = (column - rounded).to(key.dtype)
    return problem._replace(query=query, key=key, value=value)


def widened(tensor: Tensor) -> Tensor:
    """The tensor with columns of zeros."""
    return F.pad(tensor, (0, COLUMNS))


def bias_gradient(grad_key: Tensor, head_dim: int, rectangles: int, scale: float) -> Tensor:
    """The gradient of each key's bias, (rectangles, keys), given that of the keys that ``with_bias`` made."""
    column = grad_key[..., head_dim].unflatten(0, (-1, rectangles))
    total: Tensor = column.sum((0, 2), dtype=torch.promote_types(column.dtype, torch.float32))
    return total / (scale * _query_share(scale))


def _query_share(scale: float) -> float:
    """What the query's columns hold: about 1 / scale, as a power of two that half precision holds exactly."""
    return 2.0 ** min(max(math.ceil(-math.log2(scale)), -14), 15)
