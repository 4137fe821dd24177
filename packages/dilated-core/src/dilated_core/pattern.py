"""DilatedPattern: which positions a dilated attention joins, as numbers: its cost, density and coverage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dilated_core import checks
from dilated_core.plan import make_tiles


@dataclass(frozen=True)
class DilatedPattern:
    """Segment lengths and dilation rates of LongNet's branches (arXiv 2307.02486, section 3.1).

    Branch i cuts the positions into segments of ``segment_lengths[i]``; in each segment, head j keeps the positions p
    with ``(p - segment start) mod dilation_rates[i] == j mod dilation_rates[i]``, as queries and as keys.
    Immutable, hashable, checked at construction.

    Args:
        segment_lengths: tokens a segment, one entry a branch, each at least 1.
        dilation_rates: one entry a branch, each from 1 to its segment length.

    Raises:
        TypeError: an argument is not a sequence of ints.
        ValueError: empty, unequal lengths, a value below 1, or a rate above its segment length.

    >>> pattern = DilatedPattern([4, 8], [1, 2])
    >>> pattern.segment_lengths, pattern.branches
    ((4, 8), 2)
    >>> pattern.density(8)  # 2 segments of 4 x 4 pairs, and 4 x 4 pairs, of 64
    0.75
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]

    def __init__(self, segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> None:
        lengths, rates = checks.branches(segment_lengths, dilation_rates)
        object.__setattr__(self, "segment_lengths", lengths)
        object.__setattr__(self, "dilation_rates", rates)

    @property
    def branches(self) -> int:
        """How many (segment length, dilation rate) pairs there are."""
        return len(self.segment_lengths)

    @classmethod
    def longnet(cls) -> DilatedPattern:
        """The paper's pattern: segments 2048 to 32768, rates 1, 2, 4, 6, 12 (arXiv 2307.02486, section 4.1).

        >>> DilatedPattern.longnet().dilation_rates
        (1, 2, 4, 6, 12)
        """
        return cls((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))

    @classmethod
    def gigapath(cls, max_slide_px: int = 262144, tile_px: int = 256) -> DilatedPattern:
        """Prov-GigaPath's pattern: five segment lengths from 1024 to all tiles of the largest slide, rates 1 to 16.

        The exponents are evenly spaced and the lengths cut to whole numbers, as the published slide encoder does
        (Xu et al., Nature 2024).

        Args:
            max_slide_px: side of the largest slide, in pixels.
            tile_px: side of a tile, in pixels.

        Raises:
            TypeError, ValueError: an argument is no positive int, or the slide has less than 32 tiles a side.

        >>> DilatedPattern.gigapath().segment_lengths
        (1024, 5792, 32768, 185363, 1048576)
        """
        side = checks.positive_integer("max_slide_px", max_slide_px) // checks.positive_integer("tile_px", tile_px)
        if side * side < 1024:
            raise ValueError(f"max_slide_px: expected at least 32 tiles of {tile_px} px a side, got {max_slide_px}")
        first, last, steps = 10.0, float(int(math.log2(side * side))), 4
        lengths = [int(2.0 ** (first + (last - first) * step / steps)) for step in range(steps + 1)]
        return cls(lengths, (1, 2, 4, 8, 16))

    @classmethod
    def geometric(cls, w0: int, n: int, alpha: int) -> DilatedPattern:
        """``n`` branches, segment length and rate both growing by ``alpha``: w0 * alpha^i and alpha^i.

        Every branch then keeps about w0 positions a segment, so cost grows linearly with length (the paper's eq. 16).

        Args:
            w0: the shortest segment, in tokens.
            n: how many branches.
            alpha: factor from one branch to the next.

        Raises:
            TypeError, ValueError: an argument is no int of at least 1.

        >>> DilatedPattern.geometric(512, 3, 4)
        DilatedPattern(segment_lengths=(512, 2048, 8192), dilation_rates=(1, 4, 16))
        """
        w0, n = checks.positive_integer("w0", w0), checks.positive_integer("n", n)
        alpha = checks.positive_integer("alpha", alpha)
        return cls([w0 * alpha**i for i in range(n)], [alpha**i for i in range(n)])

    def pairs(self, seq_len: int, heads: int, *, is_causal: bool = False) -> int:
        """Attended (query, key) pairs over all heads; a pair that m branches join counts m times.

        Args:
            seq_len: positions, at least 0.
            heads: query heads.
            is_causal: whether a row sees only keys at or before it.

        Raises:
            TypeError, ValueError: an argument of a wrong type or value.

        >>> DilatedPattern([4], [2]).pairs(4, heads=2)
        8
        """
        checks.length("seq_len", seq_len)
        checks.positive_integer("heads", heads)
        total = 0
        for tile in make_tiles(self.segment_lengths, self.dilation_rates, seq_len, heads):
            square = tile.rows * (tile.rows + 1) // 2 if is_causal else tile.rows**2
            total += tile.segments * tile.heads * square
        return total

    def flops(self, seq_len: int, heads: int, head_dim: int, *, is_causal: bool = False) -> int:
        """Floating point operations of one forward for one batch row: 4 * head_dim for each attended pair.

        Two matrix products, a multiplication and an addition each; softmax is left out, as is usual.

        Args:
            seq_len, heads, is_causal: as of ``pairs``.
            head_dim: width of a head.

        Raises:
            TypeError, ValueError: an argument of a wrong type or value.

        >>> DilatedPattern([4], [1]).flops(4, heads=1, head_dim=8)
        512
        """
        return 4 * checks.positive_integer("head_dim", head_dim) * self.pairs(seq_len, heads, is_causal=is_causal)

    def density(self, seq_len: int, heads: int | None = None) -> float:
        """Attended pairs over seq_len^2, averaged over heads; not causal. Dense attention has density 1.

        Args:
            seq_len: positions, at least 0.
            heads: query heads; None for one full cycle of head phases.

        Raises:
            TypeError, ValueError: an argument of a wrong type or value.

        >>> round(DilatedPattern.longnet().density(32768), 3)  # the paper's pattern costs 13 % of dense at 32k
        0.13
        """
        if checks.length("seq_len", seq_len) == 0:
            return 0.0
        heads = self._heads(heads)
        return self.pairs(seq_len, heads) / (heads * seq_len**2)

    def coverage(self, seq_len: int, heads: int | None = None) -> float:
        """Share of (position, head) places that attend at all, i.e. that lie on some branch's grid.

        1.0 whenever a branch has rate 1. A place outside every branch gives output 0 and lse -inf.

        Args:
            seq_len: positions, at least 0.
            heads: query heads; None for one full cycle of head phases.

        Raises:
            TypeError, ValueError: an argument of a wrong type or value.

        >>> DilatedPattern([8], [2]).coverage(8)
        0.5
        """
        heads = self._heads(heads)
        if checks.length("seq_len", seq_len) == 0 or 1 in self.dilation_rates:
            return 1.0
        position = torch.arange(seq_len)
        covered = 0
        for head in range(heads):
            on_grid = torch.zeros(seq_len, dtype=torch.bool)
            for w, r in zip(self.segment_lengths, self.dilation_rates, strict=True):
                on_grid |= (position % w) % r == head % r
            covered += int(on_grid.sum())
        return covered / (heads * seq_len)

    def _heads(self, heads: int | None) -> int:
        """The number asked for, or one full cycle of head phases."""
        return math.lcm(*self.dilation_rates) if heads is None else checks.positive_integer("heads", heads)
