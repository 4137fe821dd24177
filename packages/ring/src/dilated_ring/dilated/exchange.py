"""Moving strips between ranks: rows go out to who attends them, and what was made of them comes back.

Either way is one uneven all-to-all. A message holds, for every tensor, every block of heads and every strip, the
strip's rows in one piece, and nothing else. What a rank keeps for itself is not sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dilated_core.resources import BufferKind, Resources
from dilated_ring.comm import Comm, Purpose
from dilated_ring.plan import Bundle, Route, Segment, Strip

Arrivals = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Waits, then gives every place where rows belong, and the rows."""


class Rows:
    """A shard's tensor, block by block: (batch, local seq, heads, ...), the heads numbered like the key heads.

    Args:
        blocks: one tensor a block of query heads; for keys the same one each time.
        of_keys: whether they are keys, whose rows several blocks may share.
    """

    def __init__(self, blocks: Sequence[Tensor], *, of_keys: bool = False) -> None:
        self.blocks, self.of_keys = blocks, of_keys

    @classmethod
    def of_queries(cls, tensor: Tensor, blocks: int) -> Rows:
        """Every ``blocks``-th head of a tensor of query heads is a block."""
        return cls([tensor[:, :, block::blocks] for block in range(blocks)])

    @classmethod
    def like_keys(cls, tensor: Tensor, blocks: int) -> Rows:
        """Each block meets all heads of a tensor of key heads."""
        return cls([tensor] * blocks, of_keys=True)

    def of(self, block: int, share: range) -> Tensor:
        """The block's heads that meet the key heads in ``share``."""
        return self.blocks[block][:, :, share.start : share.stop]


class Gathered:
    """What a rank gathers of one tensor in one segment: of each block (batch, rows, lanes, ...).

    Blocks that attend the same rows of the same keys share one room.
    """

    def __init__(self, rooms: Sequence[Tensor]) -> None:
        self.rooms = rooms

    def of(self, block: int) -> Tensor:
        """The block's room."""
        return self.rooms[block]

    def apply(self, change: Callable[[Tensor], Tensor]) -> Gathered:
        """Another with every room changed, shared ones once."""
        changed = {id(room): change(room) for room in self.rooms}
        return Gathered([changed[id(room)] for room in self.rooms])


class Exchanges:
    """The exchanges of one rank: its network, and where its buffers come from."""

    def __init__(self, comm: Comm, resources: Resources) -> None:
        self.comm, self.resources = comm, resources

    def room(
        self, segment: Segment, rows: Rows, dtype: torch.dtype | None = None, kind: BufferKind = "temp"
    ) -> Gathered:
        """Room for what a segment gathers of a tensor, not yet written."""
        rooms: list[Tensor] = []
        for block, lanes in enumerate(segment.lanes):
            first = segment.key_blocks[block] if rows.of_keys else block
            if first < block:
                rooms.append(rooms[first])
                continue
            tensor = rows.blocks[block]
            size = (tensor.shape[0], segment.rows, lanes, *tensor.shape[3:])
            room = self.resources.empty(size, dtype=dtype or tensor.dtype, device=tensor.device, kind=kind)
            rooms.append(room)
        return Gathered(rooms)

    def start_out(
        self, route: Route, tensors: Sequence[Rows], kinds: Sequence[BufferKind], purpose: Purpose
    ) -> Callable[[], list[list[Gathered]]]:
        """Send this rank's rows to who attends them.

        Args:
            tensors: of one dtype.
            kinds: for each tensor, what its gathered rows are allocated as.

        Returns:
            A function that waits, and gives for each segment of the route what it gathers of each tensor.
        """
        gathered = [
            [self.room(segment, rows, kind=kind) for rows, kind in zip(tensors, kinds, strict=True)]
            for segment in route.segments
        ]
        sent, places = self._messages(), self._messages()
        for segment, rooms in zip(route.segments, gathered, strict=True):
            for bundle in segment.lent:
                sent[bundle.peer] += _in_shard(bundle, tensors)
            for bundle in segment.gathered:
                places[bundle.peer] += _in_segment(bundle, tensors, rooms)
        arrivals = self._start(sent, places, tensors[0].blocks[0], purpose)

        def wait() -> list[list[Gathered]]:
            for place, rows in arrivals():
                place.copy_(rows)
            return gathered

        return wait

    def start_back(
        self,
        route: Route,
        results: Sequence[Sequence[Gathered]],
        sums: Sequence[Rows],
        like: Tensor,
        purpose: Purpose,
    ) -> Arrivals:
        """Return what was made of gathered rows to who owns them.

        Args:
            results: for each segment, of each tensor, what is sent back.
            sums: for each tensor, where its owner puts what comes back.
            like: a tensor of the dtype, and on the device, in which they travel.
        """
        sent, places = self._messages(), self._messages()
        for segment, rooms in zip(route.segments, results, strict=True):
            for bundle in segment.gathered:
                sent[bundle.peer] += _in_segment(bundle, sums, rooms)
            for bundle in segment.lent:
                places[bundle.peer] += _in_shard(bundle, sums)
        return self._start(sent, places, like, purpose)

    def _messages(self) -> list[list[Tensor]]:
        return [[] for _ in range(self.comm.size)]

    def _start(self, sent: list[list[Tensor]], places: list[list[Tensor]], like: Tensor, purpose: Purpose) -> Arrivals:
        """Exchange the messages of all ranks; a rank's own stay where they are."""
        own = self.comm.rank
        kept, sent[own] = sent[own], []
        kept_places, places[own] = places[own], []
        outgoing, incoming = self._buffer(sent, like), self._buffer(places, like)
        for stretch, view in _stretches(outgoing, sent):
            stretch.copy_(view)
        transfer = self.comm.exchange(incoming, outgoing, _sizes(places), _sizes(sent), purpose)

        def arrivals() -> Iterator[tuple[Tensor, Tensor]]:
            transfer.wait()
            yield from zip(kept_places, kept, strict=True)
            for stretch, place in _stretches(incoming, places):
                yield place, stretch

        return arrivals

    def _buffer(self, messages: list[list[Tensor]], like: Tensor) -> Tensor:
        return self.resources.empty((sum(_sizes(messages)),), dtype=like.dtype, device=like.device, kind="comm")


def _sizes(messages: list[list[Tensor]]) -> list[int]:
    return [sum(view.numel() for view in message) for message in messages]


def _stretches(buffer: Tensor, messages: list[list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The part of a flat buffer that belongs to each view, in its shape, and the view."""
    start = 0
    for message in messages:
        for view in message:
            yield buffer[start : start + view.numel()].view(view.shape), view
            start += view.numel()


def _travelling(bundle: Bundle, rows: Rows) -> Iterator[tuple[int, Strip]]:
    for block in bundle.blocks(rows.of_keys):
        for strip in bundle.strips[block]:
            yield block, strip


def _in_shard(bundle: Bundle, tensors: Iterable[Rows]) -> list[Tensor]:
    """Views of the owner's rows."""
    return [
        strip.of_shard(rows.of(block, bundle.share)) for rows in tensors for block, strip in _travelling(bundle, rows)
    ]


def _in_segment(bundle: Bundle, tensors: Iterable[Rows], rooms: Sequence[Gathered]) -> list[Tensor]:
    """Views of the same rows where they are gathered."""
    return [
        strip.of_segment(room.of(block))
        for rows, room in zip(tensors, rooms, strict=True)
        for block, strip in _travelling(bundle, rows)
    ]
