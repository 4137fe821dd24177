"""Which blocks are kept: the best of each row of blocks, by count or by predicted mass, and some always.

``BlockLayout.topk`` and ``.threshold`` are the same without blocks that are always kept, and with one count for all
rows; here a causal row may keep a share of what it sees, and the table stays, to gather the kept scores by.

Imports torch and the layouts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from dilated_block_sparse.adaptive.scores import diagonal_blocks, visible_blocks
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.layout.checks import BlockSize
from dilated_block_sparse.layout.checks import block_size as check_block_size
from dilated_block_sparse.patterns.scores import mass_before
from dilated_core import checks


def select_blocks(
    scores: Tensor,
    q_len: int,
    kv_len: int,
    *,
    block_size: BlockSize = 128,
    keep: float | None = None,
    mass: float | None = None,
    sink: int = 1,
    window: int | None = 1,
    is_causal: bool = False,
) -> Tensor:
    """Choose blocks in every row of a table of scores; takes no gradient.

    Exactly one of ``keep`` and ``mass`` says how many. The blocks of ``sink`` and ``window`` come first and count.
    A block of score -inf, of which nothing can be attended, is never kept, nor one that is_causal hides.

    Args:
        scores: (..., q_blocks, kv_blocks), floating point.
        q_len, kv_len: tokens.
        block_size: tokens in a block, or (rows, columns).
        keep: an int of at least 1: so many blocks a row. A float in (0, 1]: that share of the row's blocks that can be
            attended, rounded up.
        mass: in (0, 1]: the fewest blocks, best first, whose softmax(scores) adds up to this.
        sink: that many first columns are always kept.
        window: blocks at most so far from the diagonal are always kept, 0 for the diagonal alone; None for none. With
            is_causal the diagonal is kept whatever this is, so that no row is empty.
        is_causal: whether a row sees only keys at or before it.

    Returns:
        Like scores, bool, on its device. Of equal scores the earlier block is taken.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or value; a score that is NaN.

    >>> scores = torch.tensor([[9.0, 0.0, 0.0, 0.0], [1.0, 9.0, 0.0, 0.0], [1.0, 2.0, 9.0, 0.0], [1.0, 3.0, 2.0, 9.0]])
    >>> select_blocks(scores, 4, 4, block_size=1, keep=2, sink=0, window=0, is_causal=True).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 1, 0, 1]], dtype=torch.int32)
    """
    check_budget(keep, mass)
    size = check_block_size(block_size)
    _check_scores(scores, -(-q_len // size[0]), -(-kv_len // size[1]))
    checks.length("sink", sink)
    if window is not None:
        checks.length("window", window)
    scores = scores.detach()
    can = scores > -math.inf
    blocks = scores.shape[-1]
    if checks.boolean("is_causal", is_causal):
        can = can & visible_blocks(q_len, kv_len, size, scores.device)
        # What of the diagonal is past the end, or padding, counts too: else how many of the keys before it a row keeps
        # would depend on whether there are keys after it.
        whole = scores.shape[-2] * size[0]
        own = diagonal_blocks(whole, whole, size, scores.device)
        scores, can = (_wider(table, own.shape[-1], fill) for table, fill in ((scores, -math.inf), (can, False)))
        first = torch.arange(0, whole, size[0], device=scores.device) // size[1]
        at_first = scores.gather(-1, first[:, None].expand(*scores.shape[:-1], 1))
        counted = can | (own & (at_first > -math.inf))
        scores = torch.where(counted & ~can, at_first, scores)
    else:
        own, counted = torch.zeros_like(can), can
    always = _wider(_always(q_len, kv_len, size, sink, window, is_causal, scores.device), scores.shape[-1], False)
    always = counted & (always | own)

    # Sorting puts what is always kept first and what cannot be attended last.
    ranked = scores.masked_fill(always, math.inf).masked_fill(~counted, -math.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(scores.shape[-1], device=scores.device)
    if mass is None:
        assert keep is not None
        wanted = _rounded_up(counted.sum(-1, keepdim=True), keep) if isinstance(keep, float) else keep
        taken = place < wanted
    else:
        # A row that can attend nothing has NaN, 0 here, and what it takes is dropped below.
        predicted = torch.softmax(scores.masked_fill(~counted, -math.inf).double(), -1).gather(-1, order)
        predicted = torch.nan_to_num(predicted, nan=0.0)
        taken = (mass_before(predicted) < mass) | (mass == 1)  # with 1, all, however small
    taken = (taken | (place < always.sum(-1, keepdim=True))).expand_as(can)
    return (torch.zeros_like(can).scatter_(-1, order, taken) & can)[..., :blocks]


def select_layout(
    scores: Tensor,
    q_len: int,
    kv_len: int,
    *,
    block_size: BlockSize = 128,
    keep: float | None = None,
    mass: float | None = None,
    sink: int = 1,
    window: int | None = 1,
    is_causal: bool = False,
) -> BlockLayout:
    """The blocks that ``select_blocks`` chooses, as a layout with one head for each (batch row, head).

    Args:
        scores: (batch, heads, q_blocks, kv_blocks); the other arguments are those of ``select_blocks``.

    Returns:
        BlockLayout, heads == batch * heads: for query (1, q_len, batch * heads, head_dim), or for ``attend_layout``.

    Raises:
        TypeError, ValueError: as ``select_blocks``.
    """
    kept = select_blocks(
        scores,
        q_len,
        kv_len,
        block_size=block_size,
        keep=keep,
        mass=mass,
        sink=sink,
        window=window,
        is_causal=is_causal,
    )
    return layout_of(kept, q_len, kv_len, block_size)


def layout_of(kept: Tensor, q_len: int, kv_len: int, block_size: BlockSize) -> BlockLayout:
    """A table of kept blocks, bool (batch, heads, q_blocks, kv_blocks), as a layout of batch * heads heads."""
    if kept.shape[0] * kept.shape[1] == 0:  # a layout has at least one head
        kept = kept.new_zeros(1, 1, *kept.shape[2:])
    return BlockLayout.from_blocks(kept.flatten(0, 1).cpu(), q_len, kv_len, block_size=block_size)


def check_budget(keep: object, mass: object) -> None:
    """Raise unless exactly one of the two is there and in its range."""
    if (keep is None) == (mass is None):
        raise ValueError(f"keep, mass: expected exactly one of them, got keep={keep!r} and mass={mass!r}")
    if isinstance(keep, int) and not isinstance(keep, bool):
        checks.positive_integer("keep", keep)
    elif keep is not None:
        _share("keep", keep, "a number of blocks or a share in (0, 1]")
    if mass is not None:
        _share("mass", mass, "a share in (0, 1]")


def _share(name: str, value: object, expected: str) -> None:
    if not isinstance(value, float) and not (value == 1 and isinstance(value, int) and not isinstance(value, bool)):
        raise TypeError(f"{name}: expected {expected}, got {value!r} of type {type(value).__name__}")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name}: expected {expected}, got {value}")


def _rounded_up(blocks: Tensor, share: float) -> Tensor:
    """ceil(share * blocks), where rounding in float64 does not count: 0.1 of 30 blocks are 3."""
    return torch.ceil(blocks.double() * share - 1e-9)


def _always(
    q_len: int,
    kv_len: int,
    size: tuple[int, int],
    sink: int,
    window: int | None,
    is_causal: bool,
    device: torch.device,
) -> Tensor:
    """(q_blocks, kv_blocks), bool: what is kept whatever its score."""
    always = torch.zeros(-(-q_len // size[0]), -(-kv_len // size[1]), dtype=torch.bool, device=device)
    always[:, :sink] = True
    if window is None and not is_causal:
        return always
    return always | diagonal_blocks(q_len, kv_len, size, device, window=window or 0)


def _wider(table: Tensor, columns: int, fill: float) -> Tensor:
    """The table with columns added at its end."""
    return functional.pad(table, (0, columns - table.shape[-1]), value=fill)


def _check_scores(scores: object, q_blocks: int, kv_blocks: int) -> None:
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        found = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores: expected a floating point tensor, got {found}")
    if scores.shape[-2:] != (q_blocks, kv_blocks):
        raise ValueError(
            f"scores: expected shape (..., q_blocks, kv_blocks) = (..., {q_blocks}, {kv_blocks}), "
            f"got {tuple(scores.shape)}"
        )
    if scores.isnan().any():
        raise ValueError("scores: expected numbers or -inf, got NaN")
