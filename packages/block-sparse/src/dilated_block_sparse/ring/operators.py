"""How PyTorch calls the engine: an autograd function that agrees with the other ranks, plans, and lets the engine run.

There is no custom operator: torch.compile breaks its graph here and runs the call as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_block_sparse.engine import results_of_forward
from dilated_block_sparse.ring.agreement import Call, agree_on, settle
from dilated_block_sparse.ring.engine import Keys, Rank, Results
from dilated_block_sparse.ring.rank_plan import RankPlan
from dilated_core.resources import Resources
from dilated_ring.comm import Comm, refuse, together


@torch.compiler.disable  # type: ignore[untyped-decorator]
def ring_attention_function(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, comm: Comm, call: Call, resources: Resources
) -> tuple[Tensor, Tensor]:
    """out like query and lse (batch, heads, local seq), differentiable."""
    out, lse = _Function.apply(query, key, value, real, comm, call, resources)  # type: ignore[no-untyped-call]
    return out, lse


class _Function(torch.autograd.Function):
    """Of (query, key, value, real, comm, call, resources)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        real, comm, call, resources = rest
        plan, ticket = settle(comm, call, query, key, resources.patterns)
        gathered = None
        if query.shape[0]:
            with together(comm):
                out, lse, gathered = _rank(comm, plan, call, (query, key, value, real), resources).forward()
        else:  # the same on all ranks: nobody has anything to exchange
            out, lse = results_of_forward(query)
        ctx.set_materialize_grads(False)
        ctx.rest, ctx.ticket = (comm, call, resources, plan), ticket
        kept = gathered if call.keep and gathered is not None else (None, None, None)
        ctx.save_for_backward(query, key, value, real, out, lse, *kept)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        comm, call, _, _ = ctx.rest
        try:
            query, key, value, real, out, lse, *kept = ctx.saved_tensors
        except RuntimeError as error:  # changed in place, or freed
            if call.listens:
                refuse(comm, error)
            raise
        agree_on(comm, call, query, key, "backward", ctx.ticket)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        inputs = query, key, value, real
        grads = _Gradient.apply(query, key, value, grad_out, grad_lse, out, lse, inputs, kept, ctx.rest)  # type: ignore[no-untyped-call]
        return (*grads, None, None, None, None)


class _Gradient(torch.autograd.Function):
    """Of (query, key, value, grad_out, grad_lse, out, lse, inputs, kept keys, rest).

    A function of its own, so that a second derivative is an error and not a zero.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *more: Any) -> tuple[Tensor, ...]:
        *results, inputs, kept, (comm, call, resources, plan) = more
        if query.shape[0] == 0:
            return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        gathered = None if kept[0] is None else Keys(*kept)
        with together(comm):
            return _rank(comm, plan, call, inputs, resources).backward(
                Results(*results), gathered, refetch=not call.keep
            )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("block_sparse_ring_attention: second derivatives are not defined")


def _rank(comm: Comm, plan: RankPlan, call: Call, inputs: tuple[Any, ...], resources: Resources) -> Rank:
    query, *own = inputs
    return Rank(comm, plan, query, Keys(*own), call.options, resources)
