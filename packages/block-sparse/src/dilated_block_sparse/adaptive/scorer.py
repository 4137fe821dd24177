"""A learned scorer of blocks, and a loss that teaches it the true masses.

Imports torch, dilated_core and the scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from dilated_block_sparse.adaptive.scores import POOLS, QUERY_POOLS, PooledBlocks
from dilated_block_sparse.layout.checks import BlockSize
from dilated_block_sparse.layout.checks import block_size as check_block_size
from dilated_core import checks


class BlockScorer(nn.Module):
    """Learned scores of blocks, per head: the pooled dot product plus what projections and the distance tell.

    score = exp(log_temperature) * block_scores + scale * (q Wq).(k Wk) + distance_weight * log(1 + distance),

    q and k the pooled rows, Wq and Wk a head's own, distance that of the blocks' first tokens in keys' blocks. It
    starts near ``block_scores``. Two ways to train it: ``gradient="straight_through"`` of
    BlockSparseAdaptiveAttention, or ``distillation_loss`` against ``block_masses``.

    Args:
        heads: query heads; kv_heads: key heads, heads by default.
        head_dim: channels of a head.
        rank: channels of the projections, head_dim by default.
        pool, query_pool: as in ``block_scores``.
        device, dtype: of the parameters.

    Parameters: query_weight (heads, head_dim, rank), key_weight (kv_heads, head_dim, rank), log_temperature (heads,),
    distance_weight (heads,).

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> scorer = BlockScorer(4, 16)
    >>> scorer(torch.randn(1, 300, 4, 16), torch.randn(1, 300, 4, 16), block_size=128).shape
    torch.Size([1, 4, 3, 3])
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        kv_heads: int | None = None,
        rank: int | None = None,
        pool: str = "moments",
        query_pool: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads = checks.positive_integer("heads", heads)
        self.head_dim = checks.positive_integer("head_dim", head_dim)
        self.kv_heads = heads if kv_heads is None else checks.positive_integer("kv_heads", kv_heads)
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of heads = {heads}, got {kv_heads}")
        self.rank = head_dim if rank is None else checks.positive_integer("rank", rank)
        self.pool = checks.choice("pool", pool, POOLS)
        self.query_pool = checks.choice("query_pool", query_pool, QUERY_POOLS)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.query_weight = parameter(self.heads, head_dim, self.rank)
        self.key_weight = parameter(self.kv_heads, head_dim, self.rank)
        self.log_temperature = parameter(self.heads)
        self.distance_weight = parameter(self.heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random projections, no weight on distance, temperature 1."""
        # Small, so that the dot product leads at first; not 0, where neither projection would receive a gradient.
        for weight in (self.query_weight, self.key_weight):
            nn.init.normal_(weight, std=0.25 / math.sqrt(self.head_dim))
        nn.init.zeros_(self.log_temperature)
        nn.init.zeros_(self.distance_weight)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        block_size: BlockSize = 128,
        scale: float | None = None,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Score.

        Args:
            query: (batch, q_len, heads, head_dim); key: (batch, kv_len, kv_heads, head_dim).
            block_size, scale, is_causal, key_padding_mask, query_padding_mask: as in ``block_scores``.

        Returns:
            (batch, heads, q_blocks, kv_blocks), float32 (float64 for float64), -inf where nothing can be attended.

        Raises:
            TypeError, ValueError: as ``block_scores``.
        """
        blocks = PooledBlocks.of(
            query,
            key,
            block_size=block_size,
            is_causal=is_causal,
            enable_gqa=True,  # how many heads there are is checked below
            key_padding_mask=key_padding_mask,
            query_padding_mask=query_padding_mask,
            pool=self.pool,
            query_pool=self.query_pool,
        )
        for name, tensor, heads in (("query", query, self.heads), ("key", key, self.kv_heads)):
            if tensor.shape[2:] != (heads, self.head_dim):
                raise ValueError(
                    f"{name}: expected shape (batch, seq, {heads}, {self.head_dim}), got {tuple(tensor.shape)}"
                )
        rows, columns = check_block_size(block_size)
        scale = checks.softmax_scale(scale, self.head_dim)
        pooled = blocks.scores(scale)
        dtype, device = pooled.dtype, pooled.device
        query_weight = self.query_weight.to(dtype) * scale
        key_weight = self.key_weight.to(dtype).repeat_interleave(self.heads // self.kv_heads, dim=0)
        with torch.autocast(device.type, enabled=False):  # which would round the products
            projected = blocks.query @ query_weight
            learned = projected @ (blocks.key @ key_weight).transpose(-1, -2)
            own = None if blocks.own is None else blocks.own @ key_weight
        learned = blocks.with_own(learned, projected, own)
        q_places = torch.arange(pooled.shape[2], device=device, dtype=dtype) * (rows / columns)
        k_places = torch.arange(pooled.shape[3], device=device, dtype=dtype)
        distance = (q_places[:, None] - k_places).abs().log1p()
        temperature = self.log_temperature.to(dtype).exp()[:, None, None]
        # Closed blocks are -inf in the end: taken as 0 until then, for -inf times a temperature has no gradient.
        pooled = pooled.masked_fill(~blocks.open, 0.0)
        table = temperature * pooled + learned + self.distance_weight.to(dtype)[:, None, None] * distance
        return blocks.closed(table)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return (
            f"heads={self.heads}, head_dim={self.head_dim}, kv_heads={self.kv_heads}, rank={self.rank}, "
            f"pool={self.pool!r}, query_pool={self.query_pool!r}"
        )


def distillation_loss(scores: Tensor, masses: Tensor) -> Tensor:
    """KL(true || predicted) of the distribution over the blocks of a row, mean over rows: teaches a scorer alone.

    predicted = softmax(scores). A row whose blocks hold no mass is left out.

    Args:
        scores: (..., q_blocks, kv_blocks), from a scorer; masses: like it, from ``block_masses``. A block of score -inf
            must hold no mass, as it is where both were asked with the same is_causal and masks.

    Returns:
        Scalar, in nats, at least 0 up to rounding, differentiable in scores.

    Raises:
        ValueError: shapes that differ.

    >>> distillation_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 0.5]])).item()
    0.0
    """
    if scores.shape != masses.shape:
        raise ValueError(f"masses: expected the shape of scores, {tuple(scores.shape)}, got {tuple(masses.shape)}")
    total = masses.sum(-1, keepdim=True)
    held = (total > 0).expand_as(masses)
    true = torch.where(held, masses / total.clamp(min=torch.finfo(masses.dtype).tiny), 0.0)
    # A row without mass may be -inf throughout, whose softmax is NaN. Blocks without mass add nothing.
    predicted = torch.log_softmax(scores.masked_fill(~held, 0.0), -1)
    divergence = functional.kl_div(predicted.masked_fill(true == 0, 0.0), true, reduction="none").sum(-1)
    return divergence.sum() / held[..., 0].sum().clamp(min=1)
