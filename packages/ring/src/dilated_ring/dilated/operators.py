"""How PyTorch calls an engine: a plain autograd function where it runs, a custom operator where it traces.

Both agree with the other ranks first, then plan, then let the engine run, and again in the backward. The operator knows
its group by name, as a graph cannot hold a group, and gathers rows anew in the backward, since a graph must know how
many they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.node import has_side_effect
from torch.library import custom_op

from dilated_core.autograd import make_differentiable
from dilated_core.fused import results_of_forward
from dilated_core.resources import NO_RESOURCES, Resources
from dilated_core.span import Options
from dilated_ring.comm import Comm, ProcessGroupComm, refuse, together
from dilated_ring.comm.named import comm_named
from dilated_ring.dilated.agreement import Call, agree_on, settle
from dilated_ring.dilated.engine import Inputs, Kept, Rank
from dilated_ring.dilated.exchange import Gathered
from dilated_ring.plan import RankPlan


class Extras(NamedTuple):
    """Tensors beside query, key and value: real (batch, local seq), bool; seed (), int64, of the dropout."""

    real: Tensor | None
    seed: Tensor | None

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> Inputs:
        """With query, key and value, as the engine takes them."""
        return Inputs(query, key, value, self.real, None if self.seed is None else int(self.seed))


def ring_attention_function(
    query: Tensor, key: Tensor, value: Tensor, extras: Extras, comm: Comm, call: Call, resources: Resources
) -> tuple[Tensor, Tensor]:
    """out like query and lse (batch, heads, local seq), differentiable. ``resources`` step aside in a trace."""
    if torch.compiler.is_compiling():
        if not isinstance(comm, ProcessGroupComm):
            raise TypeError(f"group: expected a process group under torch.compile, got {type(comm).__name__}")
        options = call.options
        out, lse = _operator(
            query,
            key,
            value,
            *extras,
            comm.group.group_name,
            list(call.bounds or ()),
            ",".join(call.exchange),
            call.verify,
            call.with_lse,
            call.signed_scale,
            options.segment_lengths,
            options.dilation_rates,
            *options[2:],
        )
        return out, lse
    out, lse = _Function.apply(query, key, value, *extras, comm, call, resources)  # type: ignore[no-untyped-call]
    return out, lse


class _Function(torch.autograd.Function):
    """Of (query, key, value, real, seed, comm, call, resources)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *extras, comm, call, resources = rest
        plan, ticket = settle(comm, call, query, key, "forward", resources.patterns)
        out, lse, kept = _forward(comm, plan, call, Extras(*extras).inputs(query, key, value), resources)
        ctx.set_materialize_grads(False)
        ctx.rest, ctx.ticket = (comm, call, resources, plan), ticket
        ctx.shape, flat = (None, []) if kept is None else _flatten(kept)
        ctx.save_for_backward(query, key, value, *extras, out, lse, *flat)
        return out, lse.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        comm, call, _, plan = ctx.rest
        try:
            query, key, value, real, seed, out, lse, *flat = ctx.saved_tensors
        except RuntimeError as error:  # changed in place, or freed
            if call.listens:
                refuse(comm, error)
            raise
        agree_on(comm, call, query, key, "backward", ctx.ticket)
        if grad_lse is not None:
            grad_lse = grad_lse.transpose(1, 2)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_lse = _like_the_others(call, plan, grad_lse, lse)
        grads = _Gradient.apply(  # type: ignore[no-untyped-call]
            query, key, value, grad_out, grad_lse, out, lse, Extras(real, seed), flat, ctx.shape, ctx.rest
        )
        return (*grads, None, None, None, None, None)


class _Gradient(torch.autograd.Function):
    """Of (query, key, value, grad_out, grad_lse, out, lse, extras, kept rows, rest).

    A function of its own, so that a second derivative is an error and not a zero.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *more: Any) -> tuple[Tensor, ...]:
        *results, extras, flat, shape, (comm, call, resources, plan) = more
        kept = None if shape is None else _unflatten(shape, flat)
        inputs = extras.inputs(query, key, value)
        return _backward(comm, plan, inputs, call.options, resources, *results, kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("dilated_ring_attention: second derivatives are not defined")


def _forward(
    comm: Comm, plan: RankPlan, call: Call, inputs: Inputs, resources: Resources
) -> tuple[Tensor, Tensor, Kept | None]:
    if inputs.query.shape[0] == 0:  # the same on all ranks: nobody has anything to exchange
        out, lse = results_of_forward(inputs.query)
        return out, lse.transpose(1, 2), None
    with together(comm):
        return Rank(comm, plan, inputs, call.options, resources).forward(keep=call.keep)


def _backward(
    comm: Comm, plan: RankPlan, inputs: Inputs, options: Options, resources: Resources, *results: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if inputs.query.shape[0] == 0:
        return torch.zeros_like(inputs.query), torch.zeros_like(inputs.key), torch.zeros_like(inputs.value)
    with together(comm):
        return Rank(comm, plan, inputs, options, resources).backward(*results)


def _like_the_others(call: Call, plan: RankPlan, grad_lse: Tensor | None, lse: Tensor) -> Tensor | None:
    """The gradient of lse, zeros where it travels and another rank may have one: all send the same kinds of rows."""
    travels = call.with_lse and any(route.by_heads for route in plan.routes)
    return torch.zeros_like(lse) if travels and grad_lse is None else grad_lse


# ------------------------------------------------------------------------------------------------ kept rows

Shape = list[list[list[list[int]]]]
"""Of every route, segment and tensor: for each block, which of the flat list's tensors is its room."""


def _flatten(kept: Kept) -> tuple[Shape, list[Tensor]]:
    """Kept rows as autograd saves them, a flat list; rooms that blocks share are in it once."""
    flat: list[Tensor] = []
    places: dict[int, int] = {}

    def place(room: Tensor) -> int:
        if id(room) not in places:
            places[id(room)] = len(flat)
            flat.append(room)
        return places[id(room)]

    return [[[[place(room) for room in each.rooms] for each in rooms] for rooms in route] for route in kept], flat


def _unflatten(shape: Shape, flat: list[Tensor]) -> Kept:
    return [[[Gathered([flat[at] for at in each]) for each in rooms] for rooms in route] for route in shape]


# ------------------------------------------------------------------------------------------------ operator


def _call(options: Options, bounds: Sequence[int], exchange: str, *rest: Any) -> Call:
    """The call, from what an operator's schema can hold: no bounds for none, and words with commas between them."""
    return Call(options, tuple(bounds) or None, tuple(exchange.split(",")), *rest)


@custom_op("dilated_ring::dilated_ring_attention", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    seed: Tensor | None,
    group_name: str,
    bounds: Sequence[int],
    exchange: str,
    verify: bool,
    with_lse: bool,
    signed_scale: float,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    semantics: str,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    options = Options(tuple(segment_lengths), tuple(dilation_rates), semantics, is_causal, scale, dropout_p, kernel)
    call = _call(options, bounds, exchange, verify, real is not None, with_lse, signed_scale)
    comm = comm_named(group_name)
    plan, _ = settle(comm, call, query, key, "forward")
    out, lse, _ = _forward(comm, plan, call, Extras(real, seed).inputs(query, key, value), NO_RESOURCES)
    return out, lse.transpose(1, 2)


@_operator.register_fake
def _results(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return results_of_forward(query)


@custom_op("dilated_ring::dilated_ring_attention_backward", mutates_args=())
def _backward_operator(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    real: Tensor | None,
    seed: Tensor | None,
    group_name: str,
    bounds: Sequence[int],
    exchange: str,
    verify: bool,
    with_lse: bool,
    signed_scale: float,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    semantics: str,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(tuple(segment_lengths), tuple(dilation_rates), semantics, is_causal, scale, dropout_p, kernel)
    call = _call(options, bounds, exchange, verify, real is not None, with_lse, signed_scale)
    comm = comm_named(group_name)
    plan, _ = settle(comm, call, query, key, "backward")
    inputs = Extras(real, seed).inputs(query, key, value)
    lse = lse.transpose(1, 2)
    grad_lse = _like_the_others(call, plan, None if grad_lse is None else grad_lse.transpose(1, 2), lse)
    return _backward(comm, plan, inputs, options, NO_RESOURCES, grad_out, grad_lse, out, lse, None)


@_backward_operator.register_fake
def _gradients(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


make_differentiable("dilated_ring_attention", _operator, _backward_operator)
# A graph whose rank does not use the result must not leave the call out: the other ranks wait for its rows.
for _name in ("dilated_ring_attention", "dilated_ring_attention_backward"):
    has_side_effect(getattr(torch.ops.dilated_ring, _name).default)
