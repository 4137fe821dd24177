"""DilatedKVCache: the keys and values that tokens to come can still reach, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core import checks
from dilated_core.decode.lanes import plan_lanes
from dilated_core.decode.store import Store
from dilated_core.partial import accumulation_dtype
from dilated_core.plan import check_torchscale
from dilated_core.resources import Allocator


class Group(NamedTuple):
    """Batch rows that are attended together.

    Attributes:
        rows: neighbours.
        position: tokens that each has seen.
        tokens: how many each gets now.
    """

    rows: slice
    position: int
    tokens: int


class DilatedKVCache:
    """Keys and values for causal dilated attention over tokens that come one by one or in chunks: see ``decode_step``.

    A branch attends within a segment, so only the rows of the segment still open are kept, and of these only the
    grids that some head is on: at most ceil(w_i / r_i) rows in each of its ``lanes_i`` lanes, a lane being a
    (key head, phase) pair that occurs. A segment that closes leaves its memory to the next. Hence, however many tokens
    come,

        bytes <= max_nbytes = 2 * batch_size * head_dim * itemsize * sum_i lanes_i * ceil(w_i / r_i)

    and memory is allocated as rows come, by doubling: a w_i beyond the tokens that ever come costs nothing.
    Not thread-safe: one step at a time.

    Args:
        segment_lengths, dilation_rates: LongNet's branches, see DilatedPattern.
        batch_size: rows, each with a length of its own; may be 0.
        num_heads: query heads.
        head_dim: width of a head.
        kv_heads: key and value heads, a divisor of num_heads; None for num_heads.
        semantics: "paper", "torchscale" or "grouped", as in ``dilated_attention``.
        dtype: float64, float32, bfloat16 or float16, of the rows kept and of all tensors to come.
        device: theirs too; None for torch's default.
        allocator: where the rows are allocated, as kind "cache" of a BufferManager; torch.empty by default.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> cache = DilatedKVCache([4, 8], [1, 2], batch_size=1, num_heads=2, head_dim=16)
    >>> cache
    DilatedKVCache(segment_lengths=[4, 8], dilation_rates=[1, 2], batch_size=1, num_heads=2, head_dim=16, kv_heads=2,
    semantics='paper', dtype=torch.float32, device='cpu', lengths=[0], nbytes=0, max_nbytes=2048)
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        semantics: str = "paper",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        allocator: Allocator | None = None,
    ) -> None:
        self.segment_lengths, self.dilation_rates = checks.branches(segment_lengths, dilation_rates)
        self.batch_size = checks.length("batch_size", batch_size)
        self.num_heads = checks.positive_integer("num_heads", num_heads)
        self.head_dim = checks.positive_integer("head_dim", head_dim)
        self.kv_heads = self.num_heads if kv_heads is None else checks.positive_integer("kv_heads", kv_heads)
        if self.num_heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of num_heads = {self.num_heads}, got {self.kv_heads}")
        self.semantics = checks.semantics(semantics)
        if dtype not in checks.FLOATS:
            raise TypeError(f"dtype: expected float64, float32, bfloat16 or float16, got {dtype!r}")
        self.dtype = dtype
        self.resources = checks.resources(allocator, None)
        # As tensors report it: "cuda" alone is whichever device is current.
        self.device = torch.empty(0, device=device).device
        plans = plan_lanes(self.segment_lengths, self.dilation_rates, semantics, self.num_heads, self.kv_heads)
        # Where a step of one token puts the partials of all branches before they are merged.
        scratch = (len(plans), self.batch_size, self.num_heads)
        with torch.inference_mode(False):  # see _allocate
            self.outs = torch.empty(*scratch, self.head_dim, dtype=accumulation_dtype(dtype), device=self.device)
            self.lses = torch.empty(scratch, dtype=accumulation_dtype(dtype), device=self.device)
        self.stores = [
            Store(plan, self._allocate, *partial) for plan, *partial in zip(plans, self.outs, self.lses, strict=True)
        ]
        self._positions = [0] * self.batch_size

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens each batch row has seen."""
        return tuple(self._positions)

    @property
    def live_rows(self) -> int:
        """Key rows of the segments still open, which are kept, over all batch rows, branches and lanes."""
        return sum(store.plan.live_rows(position) for store in self.stores for position in self._positions)

    @property
    def nbytes(self) -> int:
        """Bytes allocated now, for keys and values."""
        return sum(store.nbytes for store in self.stores)

    @property
    def max_nbytes(self) -> int:
        """What ``nbytes`` never exceeds, see the class."""
        rows = sum(store.plan.lanes * store.plan.rows for store in self.stores)
        return 2 * self.batch_size * self.head_dim * self.dtype.itemsize * rows

    def reset(self, rows: Sequence[int] | Tensor | None = None) -> None:
        """Start batch rows afresh, as if they had seen no token. Memory is kept for the tokens to come.

        Args:
            rows: which, ints (or a 1-D integer tensor) below batch_size; None for all.

        Raises:
            TypeError, ValueError: not integers, or out of range.
        """
        chosen = range(self.batch_size) if rows is None else integers("rows", rows, self.batch_size - 1)
        for row in chosen:
            self._positions[row] = 0

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Let batch row i go on from what row ``indices[i]`` has seen, as beam search does. Copies the rows kept.

        Args:
            indices: batch_size ints (or a 1-D integer tensor) below batch_size; repeats are welcome.

        Raises:
            TypeError, ValueError: not integers, out of range, or not batch_size of them.
        """
        chosen = integers("indices", indices, self.batch_size - 1, count=self.batch_size)
        if chosen == list(range(self.batch_size)):
            return
        index = torch.tensor(chosen, device=self.device)
        for store in self.stores:
            offsets = [position % store.plan.segment_length for position in self._positions]
            store.reorder(index, used=min(store.rows, -(-max(offsets) // store.plan.rate)))
        self._positions = [self._positions[row] for row in chosen]

    def _allocate(self, lanes: int, rows: int) -> Tensor:
        size = (2, self.batch_size, lanes, rows, self.head_dim)
        with torch.inference_mode(False):  # a normal tensor in any case: steps outside inference_mode write to it too
            if math.prod(size) == 0:  # nothing to ask an allocator for
                return torch.empty(size, dtype=self.dtype, device=self.device)
            return self.resources.empty(size, dtype=self.dtype, device=self.device, kind="cache")

    def check_advance(self, counts: Sequence[int]) -> None:
        """Refuse tokens that the semantics cannot take, before anything changes.

        Raises:
            ValueError: "torchscale" with several segments of a length that its rate does not divide.
        """
        if self.semantics == "torchscale" and self._positions:
            longest = max(position + count for position, count in zip(self._positions, counts, strict=True))
            pattern = zip(self.segment_lengths, self.dilation_rates, strict=True)
            for branch, (segment_length, rate) in enumerate(pattern):
                check_torchscale(branch, segment_length, rate, longest)

    def groups(self, counts: Sequence[int]) -> list[Group]:
        """Batch rows that take their tokens together: neighbours that have seen as many and get as many, if any."""
        groups: list[Group] = []
        for row, (position, count) in enumerate(zip(self._positions, counts, strict=True)):
            last = groups[-1] if groups else None
            if last is not None and last[1:] == (position, count):
                groups[-1] = last._replace(rows=slice(last.rows.start, row + 1))
            else:
                groups.append(Group(slice(row, row + 1), position, count))
        return [group for group in groups if group.tokens]

    def advance(self, rows: slice, count: int) -> None:
        """Count the tokens in, once their rows are stored."""
        for row in range(rows.start, rows.stop):
            self._positions[row] += count

    def __repr__(self) -> str:
        return (
            f"DilatedKVCache(segment_lengths={list(self.segment_lengths)}, "
            f"dilation_rates={list(self.dilation_rates)}, batch_size={self.batch_size}, num_heads={self.num_heads}, "
            f"head_dim={self.head_dim}, kv_heads={self.kv_heads}, semantics={self.semantics!r}, dtype={self.dtype}, "
            f"device='{self.device}', lengths={self._positions}, nbytes={self.nbytes}, max_nbytes={self.max_nbytes})"
        )


def integers(name: str, values: object, highest: int, count: int | None = None) -> list[int]:
    """Return a sequence of ints, or a 1-D integer tensor, as a list; each from 0 to ``highest``.

    Raises:
        TypeError: anything else.
        ValueError: out of range, or not ``count`` of them.
    """
    if isinstance(values, Tensor):
        if values.ndim != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(
                f"{name}: expected ints or a 1-D integer tensor, got shape {tuple(values.shape)} of {values.dtype}"
            )
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(
            f"{name}: expected ints or a 1-D integer tensor, got {values!r} of type {type(values).__name__}"
        )
    numbers = [checks.length(f"{name}[{index}]", value) for index, value in enumerate(values)]
    if count is not None and len(numbers) != count:
        raise ValueError(f"{name}: expected {count}, one a batch row, got {len(numbers)}")
    for index, number in enumerate(numbers):
        if number > highest:
            raise ValueError(f"{name}[{index}]: expected at most {highest}, got {number}")
    return numbers
