"""Keys and values go round a ring of ranks; in the backward their gradients follow them and come home.

After hop h, rank r holds the keys of rank r - h. The next hop is on its way while these are attended. A shard's keys
stop where nobody further on needs them: in a causal ring of contiguous shards that halves the traffic.

Memory beside a rank's own tensors: two shards' keys and values; in the backward also four shards' float32 gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core.resources import Resources
from dilated_ring.comm import Comm, Purpose, Transfer
from dilated_ring.dense.engine import Engine, Keys
from dilated_ring.dense.sharding import Pieces, rows_of


class Route(NamedTuple):
    """How far each rank's keys go.

    Attributes:
        last: of every rank, the hop after which nobody further on needs its keys.
    """

    last: tuple[int, ...]

    @property
    def hops(self) -> int:
        """Of the keys that go furthest."""
        return max(self.last)

    def goes(self, source: int, hop: int) -> bool:
        """Whether a rank's keys take part in a hop, the first of which is 1."""
        return hop <= self.last[source]


@lru_cache(maxsize=128)
def make_route(shards: tuple[Pieces, ...], is_causal: bool) -> Route:
    """How far each rank's keys go round the ring.

    >>> make_route((((0, 2),), ((2, 4),), ((4, 6),)), is_causal=True)
    Route(last=(2, 1, 0))
    """
    size = len(shards)

    def needs(rank: int, source: int) -> bool:
        queries, keys = shards[rank], shards[source]
        return bool(queries and keys) and (not is_causal or queries[-1][1] > keys[0][0])

    hops = range(size - 1, 0, -1)
    return Route(tuple(next((hop for hop in hops if needs((at + hop) % size, at)), 0) for at in range(size)))


class Ring:
    """One rank's place in a ring.

    Args:
        comm: to the ranks of the ring.
        shards: every rank's positions.
        own: this rank's keys.
        resources: where buffers are allocated.
    """

    def __init__(
        self, comm: Comm, shards: tuple[Pieces, ...], own: Keys, is_causal: bool, resources: Resources
    ) -> None:
        self.comm, self.shards, self.own, self.resources = comm, shards, own, resources
        batch, _, kv_heads, head_dim = own.key.shape
        self.features = kv_heads * head_dim
        # Without heads here, or without a batch, no rank of the ring has anything to send.
        self.route = make_route(shards if batch * self.features else ((),) * comm.size, is_causal)

    def forward(self, engine: Engine) -> None:
        """Let the engine attend all keys that its rows may see."""
        engine.start_forward()
        for keys in self._keys("forward"):
            if keys is not None:
                engine.attend(keys)

    def backward(self, engine: Engine) -> tuple[Tensor, Tensor]:
        """Let the engine differentiate them again, and return the sums of this rank's keys' and values' gradients."""
        gradients = _Gradients(self.comm, self.route, [self._shape(pieces) for pieces in self.shards], engine)
        for hop, keys in enumerate(self._keys("backward")):
            mine = None
            if keys is not None:
                mine = engine.zeros(*self._shape(keys.pieces))
                engine.differentiate(keys, *mine)
            gradients.add(hop, mine)
        return gradients.home()

    def _shape(self, pieces: Pieces) -> tuple[int, ...]:
        """Of key and value, stacked."""
        batch, _, kv_heads, head_dim = self.own.key.shape
        return 2, batch, rows_of(pieces), kv_heads, head_dim

    def _keys(self, phase: str) -> Iterator[Keys | None]:
        """The keys that come by, the own ones first; None at a hop that brings none."""
        rank, size, hops = self.comm.rank, self.comm.size, self.route.hops
        nbytes = [self._nbytes(pieces) for pieces in self.shards]
        buffers = [self._bytes(max(nbytes)) for _ in range(2 if hops else 0)]
        held: Keys | None = self.own
        for hop in range(1, hops + 1):
            buffer, other = buffers[(hop - 1) % 2], buffers[hop % 2]
            if hop == 1:
                self._pack(buffer)
            leaving, coming = (rank - hop + 1) % size, (rank - hop) % size
            sent_counts, received_counts = [0] * size, [0] * size
            if self.route.goes(leaving, hop):
                sent_counts[(rank + 1) % size] = nbytes[leaving]
            if self.route.goes(coming, hop):
                received_counts[(rank - 1) % size] = nbytes[coming]
            received = other[: sum(received_counts)]
            purpose = Purpose("keys and values", phase, detail=f"hop {hop} of {hops}")
            transfer = self.comm.exchange(received, buffer[: sum(sent_counts)], received_counts, sent_counts, purpose)
            yield held
            transfer.wait()
            held = self._within(received, self.shards[coming]) if received.numel() else None
        yield held

    def _bytes(self, count: int) -> Tensor:
        return self.resources.empty((count,), dtype=torch.uint8, device=self.own.key.device, kind="comm")

    def _nbytes(self, pieces: Pieces) -> int:
        """Of a shard's key, value and mask in one message."""
        cells = self.own.key.shape[0] * rows_of(pieces)
        return cells * (2 * self.features * self.own.key.itemsize + (self.own.real is not None))

    def _pack(self, buffer: Tensor) -> None:
        places = self._within(buffer, self.own.pieces)
        places.key.copy_(self.own.key)
        places.value.copy_(self.own.value)
        if places.real is not None and self.own.real is not None:
            places.real.copy_(self.own.real)

    def _within(self, buffer: Tensor, pieces: Pieces) -> Keys:
        """A shard's key, value and mask as views of a message."""
        shape = self._shape(pieces)[1:]
        size = shape[0] * shape[1] * self.features * self.own.key.itemsize
        key, value = (
            buffer[at : at + size].view(self.own.key.dtype).view(shape) for at in (0, size)
        )  # the mask comes last: bytes lie anywhere
        real = None
        if self.own.real is not None:
            real = buffer[2 * size : 2 * size + shape[0] * shape[1]].view(torch.bool).view(shape[:2])
        return Keys(pieces, key, value, real)


class _Arriving(NamedTuple):
    """A transfer of gradients: what it will have brought, split by ``counts``, and who sends what comes home."""

    transfer: Transfer
    received: Tensor
    counts: list[int]
    brings_home: int | None


class _Gradients:
    """Sums of gradients that follow the keys, one hop behind, and go home from where the keys stop.

    Args:
        shapes: of every rank's sums.
        engine: whose device and dtype they have.
    """

    def __init__(self, comm: Comm, route: Route, shapes: list[tuple[int, ...]], engine: Engine) -> None:
        self.comm, self.route, self.shapes, self.engine = comm, route, shapes, engine
        self.counts = [torch.Size(shape).numel() for shape in shapes]
        self._own: Tensor | None = None
        self._arriving: _Arriving | None = None

    def add(self, hop: int, mine: Tensor | None) -> None:
        """Add this rank's share to what came with the keys of this hop, and start to send the sum on.

        Args:
            mine: (2, batch, keys, kv_heads, head_dim); None where no keys came.
        """
        earlier = self._arrive()
        if mine is not None and earlier is not None:
            mine.add_(earlier.view_as(mine))
        rank, size, last = self.comm.rank, self.comm.size, self.route.last
        held, coming = (rank - hop) % size, (rank - hop - 1) % size
        if hop == last[rank] == 0:
            self._own = mine
        if self.route.hops == 0:
            return
        sent, sent_counts, received_counts = self.engine.zeros(0), [0] * size, [0] * size
        if mine is not None and last[held] > 0:
            sent = mine.view(-1)
            sent_counts[(rank + 1) % size if hop < last[held] else held] = self.counts[held]
        if self.route.goes(coming, hop + 1):
            received_counts[(rank - 1) % size] = self.counts[coming]
        brings_home = (rank + hop) % size if hop == last[rank] > 0 else None
        if brings_home is not None:  # it is not the rank before: had the keys come so far, no others would come now
            received_counts[brings_home] = self.counts[rank]
        received = self.engine.empty(sum(received_counts), kind="comm")
        purpose = Purpose("gradients of keys and values", "backward", detail=f"hop {hop + 1} of {self.route.hops + 1}")
        transfer = self.comm.exchange(received, sent, received_counts, sent_counts, purpose)
        self._arriving = _Arriving(transfer, received, received_counts, brings_home)

    def home(self) -> tuple[Tensor, Tensor]:
        """The sums of this rank's own keys' and values' gradients, when all have added to them."""
        self._arrive()
        assert self._own is not None
        grad_key, grad_value = self._own.view(self.shapes[self.comm.rank])
        return grad_key, grad_value

    def _arrive(self) -> Tensor | None:
        """Wait for the last transfer. Keep what came home, return what came with the keys."""
        if self._arriving is None:
            return None
        transfer, received, counts, brings_home = self._arriving
        self._arriving = None
        transfer.wait()
        parts = list(received.split(counts))
        if brings_home is not None:
            self._own = parts.pop(brings_home)
        return next((part for part in parts if part.numel()), None)
