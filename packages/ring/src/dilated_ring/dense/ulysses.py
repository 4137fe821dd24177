"""Ulysses (arXiv 2309.14509): ranks that hold some positions of all heads come to hold all positions of some heads.

Key heads are dealt out as evenly as can be, the first ranks taking one more, and query heads follow the key head that
they meet; with fewer key heads than ranks the last ranks get none. The way back is the same exchange with what is sent
and what is received the other way round, and so is the gradient of either.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dilated_core.resources import BufferKind, Resources
from dilated_ring.comm import Comm, Purpose, Transfer
from dilated_ring.dense.sharding import Pieces, gather_pieces, rows_of
from dilated_ring.plan import even_bounds

_Views = list[list[Tensor]]
"""For each rank, the views that go to it or come from it."""


class HeadExchange:
    """Exchanges heads for positions among the ranks of ``comm``.

    Tensors are (batch, positions, kv_heads, ...): what belongs to a key head is one lane of them.

    Args:
        comm: to the ranks.
        shards: their positions.
        kv_heads: all key heads.
        resources: where buffers and results are allocated.

    Attributes:
        pieces: the positions that all these ranks hold together, in whose order gathered rows lie.
    """

    def __init__(self, comm: Comm, shards: Sequence[Pieces], kv_heads: int, resources: Resources) -> None:
        self.comm, self.kv_heads, self.resources = comm, kv_heads, resources
        self.pieces, self._places = gather_pieces(shards)
        self._shares = [slice(*share) for share in pairwise(even_bounds(kv_heads, comm.size))]
        self._rows, at = [], 0
        for start, stop in shards[comm.rank]:
            self._rows.append(slice(at, at + stop - start))
            at += stop - start
        self._lengths = at, rows_of(self.pieces)

    def to_heads(
        self, tensors: Sequence[Tensor], what: str, phase: str, kinds: Sequence[BufferKind] | None = None
    ) -> list[Tensor]:
        """Every rank's rows of this rank's share of lanes, for this rank's rows of all lanes.

        Args:
            what, phase: for messages.
            kinds: for each tensor, what the result is allocated as; None for "temp".
        """
        share = self._shares[self.comm.rank]
        gathered = self._empty(tensors, self._lengths[1], share.stop - share.start, kinds)
        self._exchange(
            self._by_heads(gathered), self._by_rows(tensors), tensors, Purpose(what, phase, detail="to heads")
        )
        return gathered

    def to_rows(
        self, tensors: Sequence[Tensor], what: str, phase: str, kinds: Sequence[BufferKind] | None = None
    ) -> list[Tensor]:
        """This rank's rows of all lanes, for all rows of its share. Arguments as in ``to_heads``."""
        local = self._empty(tensors, self._lengths[0], self.kv_heads, kinds)
        self._exchange(self._by_rows(local), self._by_heads(tensors), tensors, Purpose(what, phase, detail="to rows"))
        return local

    def _empty(
        self, tensors: Sequence[Tensor], rows: int, lanes: int, kinds: Sequence[BufferKind] | None
    ) -> list[Tensor]:
        """Like each tensor, of so many rows and lanes."""
        kinds = ["temp"] * len(tensors) if kinds is None else kinds
        return [
            self.resources.empty(
                (tensor.shape[0], rows, lanes, *tensor.shape[3:]), dtype=tensor.dtype, device=tensor.device, kind=kind
            )
            for tensor, kind in zip(tensors, kinds, strict=True)
        ]

    def _by_rows(self, tensors: Sequence[Tensor]) -> _Views:
        """For each rank, what this rank holds of its share of lanes: views of tensors by row."""
        return [[tensor[:, rows, share] for tensor in tensors for rows in self._rows] for share in self._shares]

    def _by_heads(self, tensors: Sequence[Tensor]) -> _Views:
        """For each rank, its rows of this rank's share: views of tensors by head."""
        return [[tensor[:, place] for tensor in tensors for place in places] for places in self._places]

    def _exchange(self, received: _Views, sent: _Views, like: Sequence[Tensor], purpose: Purpose) -> None:
        """Fill each rank's ``received`` with what that rank has in ``sent`` for this one. One message a dtype.

        Args:
            like: tensors of the dtypes, the same on all ranks: one with no positions has no views.
        """
        arriving = [
            self._start(_of(dtype, received), _of(dtype, sent), dtype, like[0].device, purpose)
            for dtype in dict.fromkeys(tensor.dtype for tensor in like)
        ]
        for transfer, parts, places in arriving:
            transfer.wait()
            for place, part in zip(places, parts, strict=True):
                place.copy_(part)

    def _start(
        self, received: _Views, sent: _Views, dtype: torch.dtype, device: torch.device, purpose: Purpose
    ) -> tuple[Transfer, list[Tensor], list[Tensor]]:
        """Start to exchange views of one dtype; the transfer, what it will have brought, and where that belongs."""
        wire = torch.uint8 if dtype == torch.bool else dtype  # a byte either way, and every network knows bytes
        received_counts, sent_counts = ([sum(map(Tensor.numel, views)) for views in side] for side in (received, sent))
        arriving, leaving = (
            self.resources.empty((sum(counts),), dtype=wire, device=device, kind="comm")
            for counts in (received_counts, sent_counts)
        )
        for part, source in _parts(leaving, dtype, sent):
            part.copy_(source)
        transfer = self.comm.exchange(arriving, leaving, received_counts, sent_counts, purpose)
        parts = _parts(arriving, dtype, received)
        return transfer, [part for part, _ in parts], [place for _, place in parts]


def _of(dtype: torch.dtype, side: _Views) -> _Views:
    return [[view for view in views if view.dtype == dtype] for views in side]


def _parts(message: Tensor, dtype: torch.dtype, side: _Views) -> list[tuple[Tensor, Tensor]]:
    """Each part of a message, in the shape of the view that it belongs to, and that view."""
    flat = [view for views in side for view in views]
    parts = message.view(dtype).split([view.numel() for view in flat]) if flat else ()
    return [(part.view(view.shape), view) for part, view in zip(parts, flat, strict=True)]
