"""What the ranks of one call agree on before rows travel: the lengths of their shards, then the plan that follows."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from dilated_core.resources import PatternStore
from dilated_core.span import Options
from dilated_ring.comm import Comm, agree_with_ticket, together
from dilated_ring.plan import RankPlan, make_plan


class Call(NamedTuple):
    """What all ranks must ask for alike, beside their tensors.

    Attributes:
        options: what is computed; ranks may differ in its kernel only.
        bounds: of the shards; None to ask the ranks for their lengths.
        exchange: "auto", "gather" or "heads", for each branch.
        verify: whether ranks compare their calls where the bounds are given.
        masked: whether they have key padding masks.
        with_lse: whether the lse is asked for, and so may have a gradient.
        signed_scale: as it was asked for; that of ``options`` is above 0.
        keep: whether gathered rows are kept for the backward; under torch.compile they never are.
        differentiable: whether a backward may follow.
    """

    options: Options
    bounds: tuple[int, ...] | None
    exchange: tuple[str, ...]
    verify: bool
    masked: bool
    with_lse: bool
    signed_scale: float
    keep: bool = False
    differentiable: bool | None = None

    @property
    def listens(self) -> bool:
        """Whether the ranks talk before rows travel."""
        return self.verify or self.bounds is None


def settle(
    comm: Comm, call: Call, query: Tensor, key: Tensor, phase: str, patterns: PatternStore | None = None
) -> tuple[RankPlan, int | None]:
    """Agree with the other ranks, and find what this one is to do; with the agreement's ticket, None without one.

    Raises:
        DisagreementError: on every rank, where they were called differently.
    """
    bounds, ticket = agree_on(comm, call, query, key, phase)
    what = *call.options[:4], bounds, query.shape[2], key.shape[2], call.exchange, comm.rank
    with together(comm):  # the others have agreed, and are about to wait for this rank's rows
        if patterns is None:
            return rank_plan(*what), ticket
        plan: RankPlan = patterns.get_or_create(("dilated_ring.rank_plan", *what), lambda: rank_plan.__wrapped__(*what))
    return plan, ticket


# A layer has the same plan at every step, and all layers mostly have it in common; with many ranks it is worth keeping.
@lru_cache(maxsize=8)
def rank_plan(
    segment_lengths: tuple[int, ...],
    dilation_rates: tuple[int, ...],
    semantics: str,
    is_causal: bool,
    bounds: tuple[int, ...],
    heads: int,
    kv_heads: int,
    exchange: tuple[str, ...],
    rank: int,
) -> RankPlan:
    """What one rank is to do, see ``make_plan``; the last few are kept."""
    plan = make_plan(
        bounds,
        segment_lengths,
        dilation_rates,
        heads,
        kv_heads=kv_heads,
        is_causal=is_causal,
        semantics=semantics,
        exchange=exchange,
    )
    return plan.for_rank(rank)


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
    options, bounds = call.options, call.bounds
    if bounds is not None and not call.verify:
        return bounds, None
    batch, length, heads, head_dim = query.shape
    fields = {
        "function": "dilated_ring_attention",
        "phase": phase,
        "call": of_forward,
        "batch": batch,
        "heads": heads,
        "kv_heads": key.shape[2],
        "head_dim": head_dim,
        "dtype": query.dtype,
        "device": query.device.type,
        **options._replace(kernel="", scale=call.signed_scale)._asdict(),
        "bounds": bounds,
        "exchange": _words(call.exchange),
        "key_padding_mask": "given" if call.masked else None,
        "return_aux.lse": call.with_lse,
        "gradients": call.differentiable,
        "refetch": not call.keep if call.differentiable else None,
    }
    lengths, ticket = agree_with_ticket(comm, fields, length)
    return bounds or (0, *accumulate(lengths)), ticket


def _words(exchange: tuple[str, ...]) -> str:
    """How each branch gets its rows, one word where all do alike."""
    return exchange[0] if len(set(exchange)) == 1 else ", ".join(exchange)
