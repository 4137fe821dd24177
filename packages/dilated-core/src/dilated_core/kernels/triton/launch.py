"""From tensors to launches: grids, strides, block sizes. Imports torch, and Triton's programs when first called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_core.kernels.triton.blocks import INTERPRETED, Blocks, Pass, block_dim, choose_blocks, tuned_blocks
from dilated_core.kernels.triton.schedule import Tables, make_tiles

# The smallest normal float32. A factor that becomes 0, times the -inf of a row without keys, would be no number.
SMALLEST_SCALE = 2.0**-126


class Work(NamedTuple):
    """What the programs are to attend.

    Attributes:
        query: (batch, rows, heads, head_dim), last stride 1, not empty.
        key, value: (batch, others, kv_heads, head_dim), the same.
        real: (batch, kv_heads, others), bool, True where a key is attended; None for all.
        tables: the pattern, on their device.
        bounds: (start, stop) of packed sequences; None for one.
        is_causal: whether a row sees only keys at or before it.
        scale: factor on the scores, above 0.
        torchscale: whether a row also meets the zero keys of torchscale's padding (not causal), and the branches'
            mixing weights take no gradient.
        blocks: to take instead of the usual ones, by pass; for tuning.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    real: Tensor | None
    tables: Tables
    is_causal: bool
    scale: float
    bounds: tuple[tuple[int, int], ...] | None = None
    torchscale: bool = False
    blocks: Mapping[Pass, Blocks] | None = None

    @property
    def zero_keys(self) -> bool:
        """Whether torchscale's padding is met."""
        return self.torchscale and not self.is_causal


def programs() -> ModuleType:
    """The programs' module, which imports Triton."""
    from dilated_core.kernels.triton import programs as module

    return module


@cache
def interpreted() -> bool:
    """Whether the programs run in Triton's interpreter, on the CPU."""
    from triton.runtime import JITFunction

    return not isinstance(programs().forward, JITFunction)


def forward(work: Work, out: Tensor, lse: Tensor) -> None:
    """Write out, like query, and lse, (batch, heads, rows) float32."""
    _forward(work, out.unsqueeze(0), lse.unsqueeze(0))


def forward_in_splits(work: Work, outs: Tensor, lses: Tensor) -> None:
    """The same for shares of the keys: (splits, batch, rows, heads, head_dim) and (splits, batch, heads, rows)."""
    _forward(work, outs, lses)


def _forward(work: Work, outs: Tensor, lses: Tensor) -> None:
    query, splits = work.query, outs.shape[0]
    blocks = _blocks("forward", work)
    _, rows, heads, _ = query.shape
    num_tiles, tiles = _tiles(work, rows, blocks)
    with _on_device(query):
        programs().forward[(num_tiles * heads * query.shape[0] * splits,)](
            query, work.key, work.value, _or(work.real, lses), outs, lses, *_tables(work, tiles),
            *_strides(query, work.key, work.value), *_mask_strides(work.real), *_strides(outs[0]), *lses.stride()[1:],
            outs.stride(0) if splits > 1 else 0, lses.stride(0) if splits > 1 else 0,
            rows, work.key.shape[1], num_tiles, *_counts(work), splits, max(work.scale, SMALLEST_SCALE),
            **_options(work, tiles, blocks), ZERO_KEYS=work.zero_keys,
        )  # fmt: skip


def useful_splits(work: Work, processors: int, fewest_blocks: int) -> int:
    """Into how many shares to cut the keys, so that few rows with many keys keep all processors busy."""
    blocks = _blocks("forward", work)
    batch_size, rows, heads, _ = work.query.shape
    programs_without = -(-rows // blocks.rows) * heads * batch_size
    shares_of_keys = work.key.shape[1] // (fewest_blocks * blocks.others)
    return max(1, min(2 * processors // programs_without, shares_of_keys))


class Cotangents(NamedTuple):
    """What the backward programs read beside the inputs: see ``row_stats``.

    Attributes:
        grad_out: like query, last stride 1.
        stats: (batch, heads, rows, 2), float32, contiguous; for torchscale with a first dimension of branches.
    """

    grad_out: Tensor
    stats: Tensor


def backward(
    work: Work, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, grads: tuple[Tensor, ...]
) -> None:
    """Write the gradients of query, key and value.

    Args:
        grad_out, out: like query; grad_lse, lse: (batch, heads, rows), lse -inf or +inf in a row with no key.
        grads: places like query, key and value, of any dtype. Where heads share keys, those of key and value are
            float32: they are summed there, one launch a head of each group.
    """
    cotangents = Cotangents(grad_out, row_stats(work, grad_out, grad_lse, out, lse))
    grad_query(work, cotangents, grads[0])  # first: for torchscale it completes the row sums
    grad_key_value(work, cotangents, grads[1], grads[2])


def grad_query(work: Work, cotangents: Cotangents, grad: Tensor) -> None:
    """Write the gradient of query."""
    blocks = _blocks("grad_query", work)
    batch_size, rows, heads, _ = work.query.shape
    num_tiles, tiles = _tiles(work, rows, blocks)
    with _on_device(work.query):
        programs().grad_query[(num_tiles * heads * batch_size,)](
            *_inputs(work, cotangents), grad, *_tables(work, tiles),
            *_input_strides(work, cotangents), *_strides(grad), _stats_branch(work, cotangents),
            rows, work.key.shape[1], num_tiles, *_counts(work), work.scale,
            **_options(work, tiles, blocks), OWN_SUMS=work.torchscale,
        )  # fmt: skip


def grad_key_value(work: Work, cotangents: Cotangents, grad_key: Tensor, grad_value: Tensor) -> None:
    """Write the gradients of key and value."""
    blocks = _blocks("grad_key_value", work)
    batch_size, others, kv_heads, _ = work.key.shape
    num_tiles, tiles = _tiles(work, others, blocks)
    with _on_device(work.query):
        for shift in range(work.query.shape[2] // kv_heads):
            programs().grad_key_value[(num_tiles * kv_heads * batch_size,)](
                *_inputs(work, cotangents), grad_key, grad_value, *_tables(work, tiles),
                *_input_strides(work, cotangents), *_strides(grad_key, grad_value), _stats_branch(work, cotangents),
                others, work.query.shape[1], num_tiles, *_counts(work), shift, work.scale,
                **_options(work, tiles, blocks), ADD=shift > 0,
            )  # fmt: skip


def row_stats(work: Work, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
    """Of each row lse in base 2, +inf where it has no key, and rowsum(grad_out * out) - grad_lse.

    (batch, heads, rows, 2), float32, contiguous. For torchscale, (branches, batch, heads, rows, 2), the second number
    without the row sum, which differs by branch.
    """
    if work.torchscale:
        no_key = lse.isinf()
        base_2 = (lse * math.log2(math.e)).masked_fill_(no_key, math.inf)
        rest = torch.zeros_like(base_2) if grad_lse is None else -grad_lse.masked_fill(no_key, 0.0).float()
        stats = torch.stack([base_2, rest], -1)
        return stats.expand(work.tables.branches.shape[0], *stats.shape).contiguous()
    batch_size, rows, heads, head_dim = out.shape
    stats = torch.empty(*lse.shape, 2, dtype=torch.float32, device=lse.device)
    block = INTERPRETED.rows if interpreted() else 64
    num_tiles = -(-rows // block)
    grad = _or(grad_lse, lse)
    with _on_device(out):
        programs().row_stats[(num_tiles * heads * batch_size,)](
            out, grad_out, lse, grad, stats, *_strides(out, grad_out), *lse.stride(), *grad.stride(),
            rows, num_tiles, batch_size, heads,
            HEAD_DIM=head_dim, BLOCK_DIM=block_dim(head_dim), BLOCK_ROWS=block, HAS_GRAD_LSE=grad_lse is not None,
        )  # fmt: skip
    return stats


# ------------------------------------------------------------------------------------------------ arguments


def _inputs(work: Work, cotangents: Cotangents) -> tuple[Tensor, ...]:
    grad_out, stats = cotangents
    return work.query, work.key, work.value, _or(work.real, stats), grad_out, stats


def _input_strides(work: Work, cotangents: Cotangents) -> tuple[tuple[int, ...] | int, ...]:
    of_qkv = _strides(work.query, work.key, work.value)
    return (*of_qkv, *_mask_strides(work.real), *_strides(cotangents.grad_out))


def _stats_branch(work: Work, cotangents: Cotangents) -> int:
    """Elements from the stats of one branch to the next."""
    return cotangents.stats.stride(0) if work.torchscale else 0


def _blocks(which: Pass, work: Work) -> Blocks:
    if work.blocks is not None:
        return work.blocks[which]
    if interpreted():
        return INTERPRETED
    device, head_dim, dtype = work.query.device, work.query.shape[-1], work.query.dtype
    tuned = tuned_blocks(device).get((which, head_dim, dtype))
    return tuned or choose_blocks(which, torch.cuda.get_device_capability(device), head_dim, dtype)


def _tiles(work: Work, rows: int, blocks: Blocks) -> tuple[int, Tensor | None]:
    """How many tiles, and for packed sequences their table."""
    if work.bounds is None:
        return -(-rows // blocks.rows), None
    tiles = make_tiles(work.bounds, blocks.rows, work.query.device)
    return tiles.shape[0], tiles


def _tables(work: Work, tiles: Tensor | None) -> tuple[Tensor, ...]:
    """order, head_class, tiles, branches and phases; what is not there is not read either."""
    branches, phases, order, head_class, _ = work.tables
    return _or(order, branches), _or(head_class, branches), _or(tiles, branches), branches, phases


def _counts(work: Work) -> tuple[int, int, int, int]:
    """Branches, batch rows, query heads, and query heads to a key head."""
    batch_size, _, heads, _ = work.query.shape
    return work.tables.branches.shape[0], batch_size, heads, heads // work.key.shape[2]


def _options(work: Work, tiles: Tensor | None, blocks: Blocks) -> dict[str, Any]:
    """What the programs are compiled for."""
    head_dim, dtype, interpreting = work.query.shape[-1], work.query.dtype, interpreted()
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": block_dim(head_dim),
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_OTHERS": blocks.others,
        "IS_CAUSAL": work.is_causal,
        "HAS_MASK": work.real is not None,
        "ORDERED": work.tables.order is not None,
        "PACKED": tiles is not None,
        "PRECISION": float32_precision() if dtype == torch.float32 else "ieee",
        "UPCAST": interpreting and dtype == torch.bfloat16,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def float32_precision() -> str:
    """'tf32' where torch's own switch for float32 matrix products says so, else 'ieee'."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """Of batch, row and head."""
    return [tensor.stride()[:3] for tensor in tensors]


def _mask_strides(real: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if real is None else real.stride()


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A tensor to pass; the stand-in is not read."""
    return stand_in if tensor is None else tensor


def _on_device(tensor: Tensor) -> torch.cuda.device:
    """Triton launches on the current device; -1 leaves that as it is, for the CPU."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
