"""make_plan: from sizes to a RingPlan. Each branch gets its rows in the cheaper way, unless told."""

from __future__ import annotations

from collections.abc import Sequence

from dilated_core import checks
from dilated_core.plan import check_torchscale
from dilated_ring.plan.cost import busiest_rows
from dilated_ring.plan.crossing import Branch, find_crossings
from dilated_ring.plan.ring_plan import RingPlan, check_exchange
from dilated_ring.plan.sharding import check_bounds, even_bounds


def make_plan(
    sequence: int | Sequence[int],
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    heads: int,
    world_size: int | None = None,
    *,
    kv_heads: int | None = None,
    is_causal: bool = False,
    semantics: str = "paper",
    exchange: str | Sequence[str] = "auto",
) -> RingPlan:
    """Plan dilated attention over shards of one sequence.

    Args:
        sequence: its length in tokens, for shards as equal as can be; or the bounds of the shards, ``world_size + 1``
            positions that rise from 0 to the length (shards may be empty).
        segment_lengths, dilation_rates: the pattern, as in ``dilated_core.dilated_attention``.
        heads: query heads.
        world_size: how many ranks; needed with a length, and if given with bounds, checked.
        kv_heads: key and value heads, a divisor of heads; None for as many.
        is_causal, semantics: as in ``dilated_core.dilated_attention``.
        exchange: "auto" lets each branch do what brings the busiest rank fewer bytes; "gather" and "heads" force it.
            One for all branches, or a sequence with one for each.

    Returns:
        RingPlan, in milliseconds whatever the length.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> plan = make_plan(1 << 20, [1024, 32768, 1 << 20], [1, 4, 16], heads=16, world_size=8)
    >>> plan.exchanges
    ('none', 'none', 'heads')
    """
    lengths, rates = checks.branches(segment_lengths, dilation_rates)
    bounds = _bounds(sequence, world_size)
    heads = checks.positive_integer("heads", heads)
    kv_heads = heads if kv_heads is None else checks.positive_integer("kv_heads", kv_heads)
    if heads % kv_heads:
        raise ValueError(f"kv_heads: expected a divisor of the {heads} heads, got {kv_heads}")
    checks.boolean("is_causal", is_causal)
    checks.semantics(semantics)
    exchanges = check_exchange(exchange, len(lengths))
    draft = RingPlan(bounds, lengths, rates, heads, kv_heads, is_causal, semantics, ("none",) * len(lengths))
    if semantics == "torchscale":
        for branch in draft.branches:
            check_torchscale(branch.number, branch.segment_length, branch.rate, draft.seq_len)
    chosen = tuple(_exchange(bounds, *each) for each in zip(draft.branches, exchanges, strict=True))
    return RingPlan(bounds, lengths, rates, heads, kv_heads, is_causal, semantics, chosen)


def _bounds(sequence: int | Sequence[int], world_size: int | None) -> tuple[int, ...]:
    if world_size is not None:
        checks.positive_integer("world_size", world_size)
    if not isinstance(sequence, Sequence):
        if world_size is None:
            raise ValueError("world_size: expected a number of ranks beside a length, got None")
        return even_bounds(checks.length("sequence", sequence), world_size)
    return check_bounds(sequence, world_size)


def _exchange(bounds: tuple[int, ...], branch: Branch, exchange: str) -> str:
    """How a branch gets its rows: what brings the busiest rank fewer rows, unless told."""
    crossings = find_crossings(bounds, branch, by_heads=False)
    if not crossings:
        return "none"
    if exchange != "auto":
        return exchange
    gathered = busiest_rows(crossings)
    by_heads = busiest_rows([crossing._replace(by_heads=True) for crossing in crossings])
    return "heads" if by_heads < gathered else "gather"
