"""Patterns chosen by scores: the best k columns of each row, or the fewest that hold a given share of the softmax.

Scores are a table of blocks, so these are for lengths at which such a table is affordable. They choose and do not
weigh: no gradient passes to the scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dilated_block_sparse.layout import checks
from dilated_block_sparse.layout.checks import BlockSize
from dilated_block_sparse.layout.compressed import offsets
from dilated_block_sparse.patterns.grid import Grid
from dilated_core.checks import boolean, probability
from dilated_core.checks import length as non_negative


class Choice(NamedTuple):
    """Compressed rows and the lengths that they are for.

    Attributes:
        indptr: (heads, q_blocks + 1), int64.
        indices: (live blocks,), int32.
        q_len, kv_len: tokens.
    """

    indptr: Tensor
    indices: Tensor
    q_len: int
    kv_len: int


def topk(
    scores: Tensor,
    k: int,
    *,
    q_len: int | None = None,
    kv_len: int | None = None,
    block_size: BlockSize = 128,
    is_causal: bool = False,
) -> Choice:
    """The ``k`` columns of the highest scores in each row; of equal ones, the earlier.

    Args:
        scores: (q_blocks, kv_blocks) or (heads, q_blocks, kv_blocks), floating point, any device. A column at -inf is
            never chosen, so a row has fewer than ``k`` where fewer are above that.
        k: columns of each row, at least 0.
        q_len, kv_len: tokens. Default: as many as the blocks hold.
        block_size: tokens, (rows, columns) or one number for both.
        is_causal: choose among the columns that the row block may see (see ``BlockLayout.causal``); needs
            q_len == kv_len.

    Returns:
        Choice(indptr, indices, q_len, kv_len), in CPU memory.

    Raises:
        TypeError: scores that are no floating point tensor.
        ValueError: NaN among the scores, or shapes and lengths that do not fit.

    >>> topk(torch.tensor([[3.0, 1.0, 3.0], [0.0, 2.0, 1.0], [5.0, 5.0, 5.0]]), 2, is_causal=True).indices.tolist()
    [0, 0, 1, 0, 1]
    """
    k = non_negative("k", k)
    ranked = _ranked(scores, q_len, kv_len, block_size, is_causal)
    return ranked.choose(torch.arange(ranked.scores.shape[-1], device=scores.device) < k)


def threshold(
    scores: Tensor,
    mass: float,
    *,
    minimum: int = 1,
    q_len: int | None = None,
    kv_len: int | None = None,
    block_size: BlockSize = 128,
    is_causal: bool = False,
) -> Choice:
    """The fewest columns of each row whose share of the row's softmax is at least ``mass``.

    The scores are logits, as pooled query-key products are; for masses, give their logarithm. The softmax, over the
    columns that the row may have, serves the choice alone. Columns are taken from the best on; of equal ones, the
    earlier.

    Args:
        scores: (q_blocks, kv_blocks) or (heads, q_blocks, kv_blocks), floating point, any device. A column at -inf is
            never chosen.
        mass: in [0, 1]; 1 takes every column above -inf.
        minimum: columns that a row gets in any case, where it has so many, at least 0.
        q_len, kv_len: tokens. Default: as many as the blocks hold.
        block_size: tokens, (rows, columns) or one number for both.
        is_causal: choose among the columns that the row block may see, as in ``topk``.

    Returns:
        Choice(indptr, indices, q_len, kv_len), in CPU memory.

    Raises:
        TypeError: scores that are no floating point tensor.
        ValueError: NaN or +inf among the scores, or shapes and lengths that do not fit.

    >>> threshold(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log(), 0.75).indices.tolist()
    [0, 1, 2]
    """
    share = 1.0 if mass == 1 and not isinstance(mass, bool) else probability("mass", mass)
    minimum = non_negative("minimum", minimum)
    ranked = _ranked(scores, q_len, kv_len, block_size, is_causal)
    values = ranked.scores.to(torch.float64)
    if bool((values == torch.inf).any()):
        raise ValueError("scores: expected logits below +inf, got +inf")
    if share == 1.0:
        return ranked.choose(torch.ones_like(values, dtype=torch.bool))
    masses = torch.nan_to_num(values.softmax(-1), nan=0.0)  # NaN: a row without a column
    sure = torch.arange(values.shape[-1], device=values.device) < minimum
    return ranked.choose((mass_before(masses) < share) | sure)


def mass_before(masses: Tensor) -> Tensor:
    """What the entries before each one hold, (..., entries), float64; masses are float64 and sum to 1 at most.

    Summed as whole numbers of 2^-52, exactly and so in any order: a GPU's running sum of floats differs between runs.

    >>> mass_before(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)).tolist()
    [0.0, 0.5, 0.75]
    """
    whole = (masses * 2.0**52).round().to(torch.int64)
    return (whole.cumsum(-1) - whole).to(torch.float64) * 2.0**-52


class _Ranked(NamedTuple):
    """Scores of each row from the best on, and the columns they are of; what a row may not have is at -inf."""

    scores: Tensor
    columns: Tensor
    q_len: int
    kv_len: int

    def choose(self, wanted: Tensor) -> Choice:
        """Those of the places that ``wanted``, bool, broadcast to the scores, which are not at -inf."""
        chosen = (self.scores > -torch.inf) & wanted
        table = torch.zeros_like(chosen).scatter_(-1, self.columns, chosen)
        return Choice(
            offsets(table.sum(-1).cpu()), table.nonzero()[:, 2].to("cpu", torch.int32), self.q_len, self.kv_len
        )


def _ranked(scores: object, q_len: int | None, kv_len: int | None, block_size: BlockSize, is_causal: bool) -> _Ranked:
    """Check what both take, and sort."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        found = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores: expected a floating point tensor, got {found}")
    if scores.ndim not in (2, 3) or (scores.ndim == 3 and not scores.shape[0]):
        expected = "(q_blocks, kv_blocks) or (heads, q_blocks, kv_blocks), at least one head"
        raise ValueError(f"scores: expected shape {expected}, got {tuple(scores.shape)}")
    table = scores.detach() if scores.ndim == 3 else scores.detach()[None]
    size = checks.block_size(block_size)
    lengths: list[int] = []
    for name, given, blocks, tokens in (
        ("q_len", q_len, table.shape[1], size[0]),
        ("kv_len", kv_len, table.shape[2], size[1]),
    ):
        length = blocks * tokens if given is None else checks.length(name, given)
        if -(-length // tokens) != blocks:
            raise ValueError(f"{name}: expected a length of {blocks} blocks of {tokens}, as scores has, got {length}")
        lengths.append(length)
    if bool(table.isnan().any()):
        head, row, column = table.isnan().nonzero()[0].tolist()
        raise ValueError(f"scores: expected numbers, got NaN in column {column} of row {row} of head {head}")
    if boolean("is_causal", is_causal):
        if lengths[0] != lengths[1]:
            raise ValueError(f"is_causal: expected q_len == kv_len, got {lengths[0]} and {lengths[1]}")
        limit = Grid(lengths[0], size, is_causal=True).limit.to(table.device)
        unseen = torch.arange(table.shape[-1], device=table.device) >= limit[:, None]
        table = table.masked_fill(unseen, -torch.inf)
    # Stable: of equal scores, the earlier column comes first.
    best = table.sort(dim=-1, descending=True, stable=True)
    return _Ranked(best.values, best.indices, lengths[0], lengths[1])
