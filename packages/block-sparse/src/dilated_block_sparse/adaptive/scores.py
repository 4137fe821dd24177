"""Scores of whole blocks from pooled queries and keys: one number a block, never one a pair of tokens.

A table of scores has (tokens / block) squared entries for each head and batch row: 4 MiB in float32 at 128k tokens and
blocks of 128, 256 MiB at 1M. Choose larger blocks for longer sequences. Imports torch, dilated_core and the layout's
checks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dilated_block_sparse.layout.checks import BlockSize
from dilated_block_sparse.layout.checks import block_size as check_block_size
from dilated_core import checks
from dilated_core.partial import accumulation_dtype

POOLS = ("moments", "mean", "bound")
QUERY_POOLS = ("mean", "first")


def block_scores(
    query: Tensor,
    key: Tensor,
    *,
    block_size: BlockSize = 128,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    pool: str = "moments",
    query_pool: str = "mean",
) -> Tensor:
    """Score every block of (query rows, keys) by its pooled rows; differentiable.

    With q and k the pooled query and key of a block, by ``pool``:

    - "mean": scale * q.k, which is the mean of the scores of all pairs in the block. Blind where keys differ within a
      block, as with rotary positions, whose turning cancels in the mean.
    - "moments": that plus half the scores' variance, channels taken as independent: the log of the mean weight exp(S),
      to second order. It finds blocks whose weight comes from a few large scores.
    - "bound": the largest score that q could have with a key inside the box that the block's keys span
      (Quest, arXiv 2406.10774).

    Args:
        query: (batch, q_len, heads, head_dim), float64, float32, bfloat16 or float16.
        key: (batch, kv_len, kv_heads, head_dim), dtype and device of query.
        block_size: tokens in a block, or (rows, columns). The last blocks may be shorter and pool what they have.
        scale: factor on the scores, 1 / sqrt(head_dim) by default.
        is_causal: blocks whose every key comes after every row get -inf; needs q_len == kv_len.
        enable_gqa: whether kv_heads may be a divisor of heads.
        key_padding_mask: (batch, kv_len), bool, True where the key is real. Padded keys, even NaN, stay out of the
            pool; a block of only padding gets -inf.
        query_padding_mask: (batch, q_len), bool, True where the row is real; the others stay out of the pool.
        pool: "moments", "mean" or "bound".
        query_pool: "mean": a block of rows is scored by all its rows, so that which blocks a row attends depends on
            the up to block - 1 rows after it, though their keys and values never reach it. "first": by its first row
            alone, and blocks on the diagonal by that row's own key, so that with is_causal a row depends on nothing
            after it, as decoding token by token needs.

    Returns:
        (batch, heads, q_blocks, kv_blocks), float32 (float64 for float64), under autocast too.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or value.

    >>> query, key = torch.randn(2, 1, 300, 4, 16).unbind()
    >>> block_scores(query, key, block_size=128).shape
    torch.Size([1, 4, 3, 3])
    """
    blocks = PooledBlocks.of(
        query,
        key,
        block_size=block_size,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        key_padding_mask=key_padding_mask,
        query_padding_mask=query_padding_mask,
        pool=pool,
        query_pool=query_pool,
    )
    return blocks.scores(checks.softmax_scale(scale, query.shape[-1]))


@dataclass(frozen=True)
class PooledBlocks:
    """The rows that stand for blocks, float32 or float64, and which blocks can be attended at all.

    Attributes:
        query: (batch, heads, q_blocks, head_dim), means or first rows.
        key: (batch, heads, kv_blocks, head_dim), means.
        squares: for "moments", else None: the same two of squared rows.
        span: for "bound", else None: the least and the largest of each channel of the keys, like key.
        own: (batch, heads, q_blocks, head_dim), the key of each block's first row, which stands for the blocks on the
            diagonal; None where the pooled key does.
        diagonal: (q_blocks, kv_blocks), bool, blocks that hold a row's own key.
        open: (batch or 1, 1, q_blocks, kv_blocks), bool, False where no row of the block sees a real key.
    """

    query: Tensor
    key: Tensor
    squares: tuple[Tensor, Tensor] | None
    span: tuple[Tensor, Tensor] | None
    own: Tensor | None
    diagonal: Tensor
    open: Tensor

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        *,
        block_size: BlockSize,
        is_causal: bool,
        enable_gqa: bool,
        key_padding_mask: Tensor | None,
        query_padding_mask: Tensor | None,
        pool: str,
        query_pool: str,
    ) -> PooledBlocks:
        """Pool; the arguments are those of ``block_scores``."""
        checks.boolean("is_causal", is_causal)
        checks.boolean("enable_gqa", enable_gqa)
        checks.choice("pool", pool, POOLS)
        checks.choice("query_pool", query_pool, QUERY_POOLS)
        query, key = checks.autocast(query, key)
        query, key, _ = checks.query_key_value(query, key, key, same_length=is_causal, enable_gqa=enable_gqa)
        rows, columns = check_block_size(block_size)
        real = checks.key_padding_mask(key_padding_mask, key)
        real_rows = _query_padding_mask(query_padding_mask, query)
        diagonal = diagonal_blocks(query.shape[1], key.shape[1], (rows, columns), query.device)

        dtype = accumulation_dtype(query.dtype)
        query, key = query.transpose(1, 2).to(dtype), key.transpose(1, 2).to(dtype)
        if real is not None:
            key = key.masked_fill(~real[:, None, :, None], 0.0)
        counts = _counts(real, key.shape[2], columns, key.device)
        groups = query.shape[1] // max(1, key.shape[1])

        def pool_query(tensor: Tensor) -> Tensor:
            if real_rows is not None:
                tensor = tensor.masked_fill(~real_rows[:, None, :, None], 0.0)
            if query_pool == "first":
                return _first(tensor, rows, real_rows)
            return _mean(tensor, rows, _counts(real_rows, tensor.shape[2], rows, tensor.device))

        def for_heads(pooled: Tensor) -> Tensor:
            return pooled.repeat_interleave(groups, dim=1) if groups > 1 else pooled

        squares = span = own = None
        if pool == "moments":
            squares = pool_query(query.square()), for_heads(_mean(key.square(), columns, counts))
        if pool == "bound":
            span = for_heads(-_most(-key, columns, real)), for_heads(_most(key, columns, real))
        if is_causal and query_pool == "first":
            own = for_heads(_first(key, rows, real_rows))
        open_blocks = (counts > 0)[:, None, None, :]
        if is_causal:
            open_blocks = open_blocks & visible_blocks(query.shape[2], key.shape[2], (rows, columns), key.device)
        pooled_query = pool_query(query)
        return cls(
            pooled_query,
            for_heads(_mean(key, columns, counts)),
            squares,
            span,
            own,
            diagonal,
            open_blocks.expand(-1, -1, pooled_query.shape[2], -1),
        )

    def scores(self, scale: float) -> Tensor:
        """The scores of ``block_scores``."""
        query = self.query * scale
        with torch.autocast(query.device.type, enabled=False):  # which would round the products
            if self.span is not None:
                least, most = self.span
                table = query.clamp(min=0.0) @ most.transpose(-1, -2) + query.clamp(max=0.0) @ least.transpose(-1, -2)
            else:
                table = query @ self.key.transpose(-1, -2)
            if self.squares is not None:
                query_squares, key_squares = self.squares
                means = self.query.square() @ self.key.square().transpose(-1, -2)
                table = table + 0.5 * scale**2 * (query_squares @ key_squares.transpose(-1, -2) - means)
        return self.closed(self.with_own(table, query, self.own))

    def with_own(self, table: Tensor, query: Tensor, own: Tensor | None) -> Tensor:
        """The table with query.own on the diagonal, where the first row's own key stands for those blocks."""
        if own is None:
            return table
        return torch.where(self.diagonal, (query * own).sum(-1, keepdim=True), table)

    def closed(self, table: Tensor) -> Tensor:
        """The table with -inf where a block cannot be attended."""
        return table.masked_fill(~self.open, -math.inf)


def visible_blocks(q_len: int, kv_len: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """(q_blocks, kv_blocks), bool: blocks that is_causal leaves something of: a row at or after their first key."""
    _, last = _row_ends(q_len, size[0], device)
    first_keys = torch.arange(0, kv_len, size[1], device=device)
    return first_keys <= last[:, None]


def diagonal_blocks(q_len: int, kv_len: int, size: tuple[int, int], device: torch.device, *, window: int = 0) -> Tensor:
    """(q_blocks, kv_blocks), bool: blocks at most ``window`` blocks away from one with the own key, r, of a row r."""
    first, last = _row_ends(q_len, size[0], device)
    columns = torch.arange(-(-kv_len // size[1]), device=device)
    low, high = first[:, None] // size[1] - window, last[:, None] // size[1] + window
    return (columns >= low) & (columns <= high)


def _row_ends(q_len: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the last row of every block of rows, (q_blocks,) each."""
    first = torch.arange(0, q_len, rows, device=device)
    return first, (first + rows - 1).clamp(max=q_len - 1)


def _cut(tensor: Tensor, size: int, fill: float) -> Tensor:
    """(batch, heads, tokens, dim) to (batch, heads, blocks, size, dim), the last block filled up."""
    short = -tensor.shape[2] % size
    if short:
        tensor = functional.pad(tensor, (0, 0, 0, short), value=fill)
    return tensor.unflatten(2, (-1, size)) if tensor.shape[2] else tensor.unsqueeze(3)


def _counts(real: Tensor | None, tokens: int, size: int, device: torch.device) -> Tensor:
    """(batch or 1, blocks): real tokens in each block."""
    if real is None:
        real = torch.ones(1, tokens, dtype=torch.bool, device=device)
    return _cut(real[:, None, :, None].float(), size, 0.0).sum((1, 3, 4))


def _mean(tensor: Tensor, size: int, counts: Tensor) -> Tensor:
    """Means of blocks, (batch, heads, blocks, dim); padding is 0 in the tensor. 0 in a block without a real token."""
    return _cut(tensor, size, 0.0).sum(3) / counts.clamp(min=1.0)[:, None, :, None]


def _first(tensor: Tensor, size: int, real: Tensor | None) -> Tensor:
    """The first real row of each block, (batch, heads, blocks, dim); the very first of a block without one."""
    if real is None or not tensor.shape[2]:
        return tensor[:, :, ::size]
    at = _cut(real[:, None, :, None].byte(), size, 0)[:, 0, :, :, 0].argmax(-1)
    rows = torch.arange(0, tensor.shape[2], size, device=tensor.device) + at
    return tensor.gather(2, rows[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def _most(tensor: Tensor, size: int, real: Tensor | None) -> Tensor:
    """The largest of each channel in each block, (batch, heads, blocks, dim); 0 in a block without a real token."""
    if real is not None:
        tensor = tensor.masked_fill(~real[:, None, :, None], -math.inf)
    most = _cut(tensor, size, -math.inf).amax(3)
    return most.masked_fill(most == -math.inf, 0.0)


def _query_padding_mask(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"query_padding_mask: expected a bool tensor, got {found}")
    if mask.shape != query.shape[:2]:
        raise ValueError(
            f"query_padding_mask: expected shape (batch, q_len) = {tuple(query.shape[:2])}, got {tuple(mask.shape)}"
        )
    if mask.device != query.device:
        raise ValueError(f"query_padding_mask: expected the device of query, {query.device}, got {mask.device}")
    return mask
