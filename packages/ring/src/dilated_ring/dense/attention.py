"""One rank's share of a dense attention, forward and backward, without autograd.

Where ranks exchange heads they do that first; then keys go round the ring; then results are exchanged back.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core.resources import OF_QKV, BufferKind, Resources
from dilated_core.tiles import last_stride_1
from dilated_ring.dense.chunks import Chunks
from dilated_ring.dense.engine import Engine, Keys
from dilated_ring.dense.ring import Ring
from dilated_ring.dense.sharding import Pieces, gather_pieces, pieces_of
from dilated_ring.dense.team import Team, Tickets
from dilated_ring.dense.ulysses import HeadExchange


class Call(NamedTuple):
    """What is asked for, beside the tensors; the same on all ranks, but for the kernel.

    Attributes:
        is_causal: whether a row sees only keys at or before it.
        scale: factor on the scores, as it was asked for.
        factor: the same as kernels take it, above 0: the sign is in the query.
        mode: "ring" or "all_to_all".
        balance: "contiguous" or "head_tail".
        bounds: world_size + 1 positions, of which rank i's shard has bounds[i + 1] - bounds[i]; () to ask the ranks.
        chunks: how many the keys are taken in, without ranks.
        verify: whether ranks compare their calls where the bounds are given.
        with_lse: whether the lse has a gradient.
        differentiable: whether a backward may follow.
        kernel: a kernel's name, or "auto".
    """

    is_causal: bool
    scale: float
    factor: float
    mode: str
    balance: str
    bounds: tuple[int, ...]
    chunks: int
    verify: bool
    with_lse: bool
    differentiable: bool
    kernel: str

    @property
    def listens(self) -> bool:
        """Whether the ranks talk before rows travel."""
        return self.verify or not self.bounds


class Inputs(NamedTuple):
    """query (batch, seq, heads, head_dim), key and value with kv_heads, real (batch, seq), bool, or None.

    First those of the rank's shard; after an exchange of heads those of all its ranks' positions.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    real: Tensor | None


class Results(NamedTuple):
    """out like query, lse (batch, seq, heads)."""

    out: Tensor
    lse: Tensor


class Shard(NamedTuple):
    """What a rank's own tensors are like. All but its length is the same on all ranks."""

    length: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str
    key_padding_mask: str

    @classmethod
    def of(cls, inputs: Inputs) -> Shard:
        """Of these inputs."""
        query, key, _, real = inputs
        batch, length, heads, head_dim = query.shape
        mask = "not given" if real is None else "given"
        return cls(length, batch, heads, key.shape[2], head_dim, query.dtype, query.device.type, mask)


def settle(
    team: Team, call: Call, shard: Shard, phase: str, of_forward: Tickets = (None, None)
) -> tuple[tuple[int, ...], Tickets]:
    """Agree with the other ranks, and find out how many positions each has: the bounds, and the agreement's tickets.

    Args:
        of_forward: in a backward, the tickets of its forward. Ranks that go back through two alike calls in different
            orders would else send each other the gradients of the wrong one.

    Raises:
        DisagreementError: on every rank, where they were called differently.
    """
    if team.size == 1:
        return (0, shard.length), (None, None)
    bounds, tickets = call.bounds, of_forward
    if call.listens:
        fields = {"function": "ring_attention", "phase": phase, **shard._asdict(), **call._asdict()}
        del fields["length"], fields["kernel"]
        lengths, tickets = team.agree(fields, shard.length, of_forward)
        bounds = (0, *accumulate(lengths))
    return bounds, tickets


class Rank:
    """One rank at work on one call.

    Args:
        bounds: of all ranks' shards, see Call.
        shard: this rank's own.
    """

    def __init__(self, team: Team, call: Call, bounds: Sequence[int], shard: Shard, resources: Resources) -> None:
        self.team, self.call, self.shard, self.resources = team, call, shard, resources
        self.kv_heads, self.blocks = shard.kv_heads, shard.heads // shard.kv_heads if shard.kv_heads else 1
        shards, width = pieces_of(bounds, call.balance), team.shape[1]
        self.rows = tuple(gather_pieces(shards[at : at + width])[0] for at in range(0, len(shards), width))
        row, _ = team.place
        self.exchange: HeadExchange | None = None
        if team.heads is not None:
            own = shards[row * width : (row + 1) * width]
            self.exchange = HeadExchange(team.heads, own, self.kv_heads, resources)
        self.pieces: Pieces = self.rows[row]

    # -------------------------------------------------------------------------------------------- heads

    def gather(self, inputs: Inputs, phase: str) -> Inputs:
        """The inputs of this rank's heads: what it will attend."""
        if self.exchange is None:
            return inputs
        query, key, value, real = inputs
        lanes = [self._to_lanes(query), key, value]
        kinds: list[BufferKind] = [*OF_QKV]
        if real is not None:  # as if it were of every head, a byte beside 2 * head_dim numbers and more
            lanes.append(real.unsqueeze(-1).expand(*real.shape, self.kv_heads))
            kinds.append("mask")
        query, key, value, *masks = self.exchange.to_heads(lanes, "queries, keys and values", phase, kinds)
        if masks:
            real = masks[0][:, :, 0] if masks[0].shape[2] else masks[0].new_ones(masks[0].shape[:2])
        return Inputs(query.flatten(2, 3), key, value, real)

    def gather_results(self, results: Results, what: str, phase: str) -> Results:
        """Results, or their gradients, of this rank's heads."""
        if self.exchange is None:
            return results
        out, lse = self.exchange.to_heads([self._to_lanes(tensor) for tensor in results], what, phase)
        return Results(out.flatten(2, 3), lse.flatten(2, 3))

    def _to_lanes(self, tensor: Tensor) -> Tensor:
        """(batch, seq, heads, ...) as (batch, seq, kv_heads, blocks, ...)."""
        lanes: Tensor = tensor.unflatten(2, (tensor.shape[2] // self.blocks, self.blocks))
        return lanes

    # -------------------------------------------------------------------------------------------- attention

    def _engine(self, inputs: Inputs) -> tuple[Engine, Ring | Chunks]:
        query, key, value, real = inputs
        key, value = last_stride_1(key), last_stride_1(value)
        own = Keys(self.pieces, key, value, real)
        engine = Engine(
            query,
            self.pieces,
            key.shape[2],
            masked=real is not None,
            is_causal=self.call.is_causal,
            scale=self.call.factor,
            kernel=self.call.kernel,
            resources=self.resources,
        )
        if self.team.ring is None:
            return engine, Chunks(own, self.call.chunks)
        return engine, Ring(self.team.ring, self.rows, own, self.call.is_causal, self.resources)

    def forward(self, gathered: Inputs) -> tuple[Results, Results]:
        """Of gathered inputs: the results of this rank's shard, and those of its heads, for the backward."""
        engine, source = self._engine(gathered)
        source.forward(engine)
        results = Results(engine.out.to(gathered.query.dtype), engine.lse)
        if self.exchange is None:
            return results, results
        lanes = [self._to_lanes(tensor) for tensor in results]
        out, lse = self.exchange.to_rows(lanes, "results", "forward", ["output", "output"])
        return Results(out.flatten(2, 3), lse.flatten(2, 3)), results

    def backward(
        self, gathered: Inputs, results: Results, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's query, key and value, given those of its shard's results.

        Args:
            results: of this rank's heads.
            grad_out: like out, or None; grad_lse: like lse, or None.
        """
        query = gathered.query
        shape = self.shard.batch, self.shard.length, self.shard.heads, self.shard.head_dim
        if grad_out is None:
            grad_out = query.new_zeros(shape)
        # Every rank exchanges the same kinds of gradients, whatever its own part of the loss is.
        if grad_lse is None and self.call.with_lse and self.exchange is not None:
            grad_lse = results.lse.new_zeros(shape[:-1])
        if grad_lse is not None:
            grad_out, grad_lse = self.gather_results(Results(grad_out, grad_lse), "gradients of results", "backward")
        elif self.exchange is not None:
            lanes = self.exchange.to_heads([self._to_lanes(grad_out)], "gradients of results", "backward")
            grad_out = lanes[0].flatten(2, 3)
        engine, source = self._engine(gathered)
        engine.start_backward(grad_out, grad_lse, *results)
        by_key = source.backward(engine)
        # Copies: in the ring the sums of key's and value's are one tensor, and results are to share no memory.
        grads = [engine.grad_query.to(query.dtype), *(grad.to(query.dtype, copy=True) for grad in by_key)]
        if self.exchange is not None:
            lanes = [self._to_lanes(grads[0]), *grads[1:]]
            grads = self.exchange.to_rows(lanes, "gradients", "backward", OF_QKV)
            grads[0] = grads[0].flatten(2, 3)
        return grads[0], grads[1], grads[2]
