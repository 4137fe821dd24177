"""Where a branch's rows lie in memory, and how that memory grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core.decode.lanes import BranchLanes, Bundle

# Rows a lane's first allocation holds, so that the first tokens do not each allocate.
FIRST_ROWS = 16


class Shelf(NamedTuple):
    """A bundle's part of the cache, as views made once an allocation rather than once a token.

    Attributes:
        pair: (2, batch, lanes, rows, head_dim), keys and values; key, value: its two halves.
        out: (batch, lanes, heads a lane, head_dim), where a token's partial is put; lse: without head_dim.
        heads: the query heads, lane by lane.
        kv_heads: the key head of each lane: a slice, which makes a view, where they are a constant step apart.
        per_lane: heads a lane.
    """

    pair: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    heads: slice
    kv_heads: slice | Tensor
    per_lane: int

    def of(self, rows: slice) -> Shelf:
        """The part of these batch rows."""
        if rows.stop - rows.start == self.pair.shape[1]:
            return self
        key, value, out, lse = (tensor[rows] for tensor in (self.key, self.value, self.out, self.lse))
        return self._replace(pair=self.pair[:, rows], key=key, value=value, out=out, lse=lse)


class Store:
    """The kept rows of one branch: row i of a lane of phase f is offset f + i * rate of the open segment.

    Args:
        plan: the branch.
        allocate: called with lanes and rows, returns memory of shape (2, batch, lanes, rows, head_dim).
        out: (batch, heads, head_dim), where a token's partials of this branch are put; lse: without head_dim.
    """

    def __init__(self, plan: BranchLanes, allocate: Callable[[int, int], Tensor], out: Tensor, lse: Tensor) -> None:
        self.plan = plan
        self._allocate = allocate
        self._out, self._lse = out, lse
        self._put_up(self._new(0))

    @property
    def rows(self) -> int:
        """Rows a lane that are allocated."""
        return int(self._pair.shape[3])

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._pair.nbytes

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows a lane: at least twice what there was, at most what a segment can fill."""
        if rows <= self.rows:
            return
        grown = self._new(min(self.plan.rows, max(rows, 2 * self.rows, FIRST_ROWS)))
        grown[:, :, :, : self.rows] = self._pair
        self._put_up(grown)

    def reorder(self, indices: Tensor, used: int) -> None:
        """Take batch row ``indices[i]`` as row i; of each lane the first ``used`` rows matter."""
        if used == 0:
            return
        moved = self._new(self.rows)
        for old, new in zip(self._pair.unbind(), moved.unbind(), strict=True):
            new[:, :, :used] = old[:, :, :used].index_select(0, indices)
        self._put_up(moved)

    def _new(self, rows: int) -> Tensor:
        return self._allocate(self.plan.lanes, rows)

    def _put_up(self, pair: Tensor) -> None:
        """Make ``pair`` the memory of the branch."""
        self._pair = pair
        self.shelves = {
            phase: [self._shelf(bundle) for bundle in bundles] for phase, bundles in self.plan.bundles.items()
        }

    def _shelf(self, bundle: Bundle) -> Shelf:
        pair = self._pair[:, :, bundle.lanes]
        heads = slice(bundle.heads.start, bundle.heads.stop, bundle.heads.step)
        per_lane = len(bundle.heads) // len(bundle.kv_heads)
        out, lse = (tensor[:, heads].unflatten(1, (-1, per_lane)) for tensor in (self._out, self._lse))
        return Shelf(pair, pair[0], pair[1], out, lse, heads, _index(bundle.kv_heads, pair.device), per_lane)


def _index(numbers: Sequence[int], device: torch.device) -> slice | Tensor:
    """The rising numbers as a slice where one gives just them, else as a tensor."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if tuple(range(numbers[0], numbers[-1] + 1, step)) == tuple(numbers):
        return slice(numbers[0], numbers[-1] + 1, step)
    return torch.tensor(numbers, device=device)
