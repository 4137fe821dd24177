"""How PyTorch calls the attention: a plain autograd function where it runs, a custom operator where it traces.

Both let the ranks agree first, again in the backward. The operator knows its groups by name, as a graph cannot hold a
group, and exchanges heads anew in the backward, as a graph cannot know how many rows that brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect
from torch.library import custom_op

from dilated_core.autograd import make_differentiable
from dilated_core.fused import results_of_forward
from dilated_core.resources import NO_RESOURCES, Resources
from dilated_ring.comm import Comm, ProcessGroupComm
from dilated_ring.comm.named import comm_named
from dilated_ring.dense.attention import Call, Inputs, Rank, Results, Shard, settle
from dilated_ring.dense.team import Team


def ring_attention_function(inputs: Inputs, team: Team, call: Call, resources: Resources) -> tuple[Tensor, Tensor]:
    """out like query and lse (batch, heads, local seq), differentiable. ``resources`` step aside in a trace."""
    if torch.compiler.is_compiling():
        out, lse = _operator(*inputs, _name(team.ring), _name(team.heads), *call._replace(bounds=list(call.bounds)))  # type: ignore[arg-type]
    else:
        # Of no size, and derived from all three: so a backward knows that it depends on them, without keeping them.
        link = torch.cat([tensor[:0].flatten() for tensor in inputs[:3]])
        out, lse = _Function.apply(*inputs, link, team, call, resources)  # type: ignore[no-untyped-call]
    return out, lse


class _Function(torch.autograd.Function):
    """Of (query, key, value, real, link, team, call, resources)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, link, team, call, resources = arguments
        inputs = Inputs(*tensors)
        shard = Shard.of(inputs)
        with team.together():
            bounds, tickets = settle(team, call, shard, "forward")
        rank = Rank(team, call, bounds, shard, resources)  # raises on every rank where lengths do not fit the balance
        with team.together():
            gathered = rank.gather(inputs, "forward")
            (out, lse), results = rank.forward(gathered)
        ctx.set_materialize_grads(False)
        ctx.rank, ctx.call, ctx.tickets = rank, call._replace(bounds=bounds), tickets
        ctx.save_for_backward(link, *gathered, *results)
        return out, lse.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        try:
            link, *gathered, out, lse = ctx.saved_tensors
        except RuntimeError as error:  # changed in place, or freed
            if ctx.call.listens:
                ctx.rank.team.refuse(error)
            raise
        rest = Inputs(*gathered), Results(out, lse), ctx.rank, ctx.call, ctx.tickets
        grads = _Gradient.apply(link, grad_out, grad_lse, *rest)  # type: ignore[no-untyped-call]
        return (*grads, None, None, None, None, None)


class _Gradient(torch.autograd.Function):
    """Of (link, grad_out, grad_lse, gathered inputs, results, rank, call, tickets).

    A function of its own, so that a second derivative is an error and not a zero.
    """

    @staticmethod
    def forward(
        ctx: Any, link: Tensor, grad_out: Tensor | None, grad_lse: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        gathered, results, rank, call, tickets = rest
        grad_lse = None if grad_lse is None else grad_lse.transpose(1, 2)
        with rank.team.together():
            settle(rank.team, call, rank.shard, "backward", tickets)
            grads: tuple[Tensor, Tensor, Tensor] = rank.backward(gathered, results, grad_out, grad_lse)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("ring_attention: second derivatives are not defined")


# ------------------------------------------------------------------------------------------------ operator


def _name(comm: Comm | None) -> str:
    """The name of a comm's group, "" for none."""
    if comm is None:
        return ""
    if not isinstance(comm, ProcessGroupComm):
        raise TypeError(f"group: expected a process group under torch.compile, got {type(comm).__name__}")
    return comm.group.group_name


def _team(ring: str, heads: str) -> Team:
    return Team(*(comm_named(name) if name else None for name in (ring, heads)))


@custom_op("dilated_ring::ring_attention", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    ring: str,
    heads: str,
    is_causal: bool,
    scale: float,
    factor: float,
    mode: str,
    balance: str,
    bounds: Sequence[int],
    chunks: int,
    verify: bool,
    with_lse: bool,
    differentiable: bool,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    call = Call(
        is_causal, scale, factor, mode, balance, tuple(bounds), chunks, verify, with_lse, differentiable, kernel
    )
    inputs, team = Inputs(query, key, value, real), _team(ring, heads)
    shard = Shard.of(inputs)
    with team.together():
        bounds, _ = settle(team, call, shard, "forward")
    rank = Rank(team, call, bounds, shard, NO_RESOURCES)
    with team.together():
        (out, lse), _ = rank.forward(rank.gather(inputs, "forward"))
    return out, lse.transpose(1, 2)


@_operator.register_fake
def _results(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return results_of_forward(query)


@custom_op("dilated_ring::ring_attention_backward", mutates_args=())
def _backward_operator(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    real: Tensor | None,
    ring: str,
    heads: str,
    is_causal: bool,
    scale: float,
    factor: float,
    mode: str,
    balance: str,
    bounds: Sequence[int],
    chunks: int,
    verify: bool,
    with_lse: bool,
    differentiable: bool,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(
        is_causal, scale, factor, mode, balance, tuple(bounds), chunks, verify, with_lse, differentiable, kernel
    )
    inputs, team = Inputs(query, key, value, real), _team(ring, heads)
    shard = Shard.of(inputs)
    grad_lse = None if grad_lse is None else grad_lse.transpose(1, 2)
    with team.together():
        bounds, _ = settle(team, call, shard, "backward")
        rank = Rank(team, call, bounds, shard, NO_RESOURCES)
        results = rank.gather_results(Results(out, lse.transpose(1, 2)), "results", "backward")
        return rank.backward(rank.gather(inputs, "backward"), results, grad_out, grad_lse)


@_backward_operator.register_fake
def _gradients(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


make_differentiable("ring_attention", _operator, _backward_operator)
# A graph whose rank does not use the result must not leave the call out: the other ranks wait for its rows.
for _operator_name in ("ring_attention", "ring_attention_backward"):
    has_side_effect(getattr(torch.ops.dilated_ring, _operator_name).default)
