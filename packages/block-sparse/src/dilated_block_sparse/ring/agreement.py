"""What the ranks of one call agree on before keys travel: the lengths of their shards, then the plan that follows."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from dilated_block_sparse.engine import Options
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.ring.bounds import check_layout_bounds
from dilated_block_sparse.ring.plan import BlockSparseRingPlan
from dilated_block_sparse.ring.rank_plan import RankPlan
from dilated_core.resources import PatternStore
from dilated_ring.comm import Comm, agree_with_ticket, together


class Call(NamedTuple):
    """What all ranks must ask for alike, beside their tensors.

    Attributes:
        layout: of the whole sequence.
        options: what is computed; ranks may differ in its kernel only.
        bounds: of the shards; None to ask the ranks for their lengths.
        verify: whether ranks compare their calls where the bounds are given.
        masked: whether they have key padding masks.
        with_lse: whether the lse is asked for, and so may have a gradient.
        signed_scale: as it was asked for; that of ``options`` is above 0.
        keep: whether gathered keys are kept for the backward.
        differentiable: whether a backward may follow.
    """

    layout: BlockLayout
    options: Options
    bounds: tuple[int, ...] | None
    verify: bool
    masked: bool
    with_lse: bool
    signed_scale: float
    keep: bool
    differentiable: bool

    @property
    def listens(self) -> bool:
        """Whether the ranks talk before keys travel."""
        return self.verify or self.bounds is None


def settle(
    comm: Comm, call: Call, query: Tensor, key: Tensor, patterns: PatternStore | None
) -> tuple[RankPlan, int | None]:
    """Agree with the other ranks, and find what this one is to do; with the agreement's ticket, None without one.

    Raises:
        DisagreementError: on every rank, where they were called differently.
        ValueError: on every rank, where their shards are not the layout's sequence.
    """
    bounds, ticket = agree_on(comm, call, query, key, "forward")
    layout, is_causal, kv_heads = call.layout, call.options.is_causal, key.shape[2]
    if call.bounds is None:
        check_layout_bounds(layout, bounds)

    def create() -> RankPlan:
        return BlockSparseRingPlan(layout, bounds, kv_heads=kv_heads, is_causal=is_causal).for_rank(comm.rank)

    what = "dilated_block_sparse.rank_plan", bounds, kv_heads, is_causal, comm.rank
    with together(comm):  # the others have agreed, and are about to wait for this rank's keys
        if patterns is not None:
            plan: RankPlan = patterns.get_or_create((*what, layout.key()), create)
            return plan, ticket
        if what not in layout.plans:
            layout.plans[what] = create()
        plan = layout.plans[what]
    return plan, ticket


def agree_on(
    comm: Comm, call: Call, query: Tensor, key: Tensor, phase: str, of_forward: int | None = None
) -> tuple[tuple[int, ...], int | None]:
    """Agree with the other ranks; the bounds of the shards, and the agreement's ticket.

    Args:
        of_forward: in a backward, the ticket of the forward that it belongs to. Ranks that go back through two alike
            calls in different orders would else send each other the gradients of the wrong one.

    Raises:
        DisagreementError: on every rank, where they were called differently.
    """
    if call.bounds is not None and not call.verify:
        return call.bounds, None
    batch, length, heads, head_dim = query.shape
    fields = {
        "function": "block_sparse_ring_attention",
        "phase": phase,
        "call": of_forward,
        "batch": batch,
        "heads": heads,
        "kv_heads": key.shape[2],
        "head_dim": head_dim,
        "dtype": query.dtype,
        "device": query.device.type,
        "layout": call.layout.key(),
        "is_causal": call.options.is_causal,
        "scale": call.signed_scale,
        "bounds": call.bounds,
        "key_padding_mask": "given" if call.masked else None,
        "return_aux.lse": call.with_lse,
        "gradients": call.differentiable,
        "refetch": not call.keep if call.differentiable else None,
    }
    lengths, ticket = agree_with_ticket(comm, fields, length)
    return call.bounds or (0, *accumulate(lengths)), ticket
