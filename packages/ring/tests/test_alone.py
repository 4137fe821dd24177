"""What one rank alone does or suffers: the others must hear of it, or be told apart from it, and never wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dilated_ring import (
    DisagreementError,
    PeerError,
    RingMultiheadDilatedAttention,
    dilated_ring_attention,
    make_plan,
    ring_attention,
)
from dilated_ring.comm import Comm, run_ranks
from dilated_ring.dilated.agreement import rank_plan

RANKS = 3
Attention = Callable[..., Tensor]


def dilated(*qkv: Tensor, **options: Any) -> Tensor:
    return dilated_ring_attention(*qkv, [2, 12], [1, 2], **options)


ATTENTIONS = {
    "gather": lambda *qkv, **options: dilated(*qkv, exchange="gather", **options),
    "heads": lambda *qkv, **options: dilated(*qkv, exchange="heads", **options),
    "ring": ring_attention,
    "all-to-all": lambda *qkv, **options: ring_attention(*qkv, mode="all_to_all", **options),
}
each_attention = pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)


def leaves() -> list[Tensor]:
    return [torch.randn(1, 4, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def outcomes(work: Callable[[Comm], Any]) -> list[Any]:
    """What each rank returned or raised."""

    def run(comm: Comm) -> Any:
        try:
            return work(comm)
        except Exception as error:
            return error

    return run_ranks(RANKS, run)


@each_attention
def test_backwards_in_different_orders_are_told_apart(attention: Attention) -> None:
    """Two alike calls: nothing but their order says which gradients belong to which."""

    def work(comm: Comm) -> None:
        outs = [attention(*leaves(), group=comm) for _ in range(2)]
        for out in reversed(outs) if comm.rank == 1 else outs:
            out.sum().backward()

    errors = outcomes(work)
    assert {type(error) for error in errors} == {DisagreementError}
    assert "call is " in str(errors[0])


class Exhausted:
    """An allocator that has nothing left after some tensors."""

    def __init__(self, left: int) -> None:
        self.left = left

    def empty(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise MemoryError("nothing left")
        return torch.empty(size, dtype=dtype, device=device)


@pytest.mark.parametrize("left", [0, 1, 4])
@each_attention
def test_a_rank_without_memory_does_not_make_the_others_wait(attention: Attention, left: int) -> None:
    def work(comm: Comm) -> None:
        lent = {"allocator": Exhausted(left)} if comm.rank == 1 else {}
        attention(*leaves(), group=comm, **lent).sum().backward()

    errors = outcomes(work)
    assert isinstance(errors[1], MemoryError)
    assert {type(errors[rank]) for rank in (0, 2)} == {PeerError}
    assert "rank 1 is gone" in str(errors[0]) or "rank 2 is gone" in str(errors[0])


def test_a_rank_that_gave_up_says_so_when_it_tries_again() -> None:
    def work(comm: Comm) -> None:
        lent = {"allocator": Exhausted(0)} if comm.rank == 1 else {}
        with pytest.raises((MemoryError, PeerError)):
            dilated(*leaves(), group=comm, **lent)
        if comm.rank == 1:
            with pytest.raises(PeerError, match="this rank gave up the group after an earlier error"):
                dilated(*leaves(), group=comm)

    assert outcomes(work) == [None] * RANKS


@pytest.mark.parametrize("name", ["gather", "heads", "ring"])  # an exchange of heads keeps copies
def test_a_tensor_changed_in_place_on_one_rank_is_told_to_the_others(name: str) -> None:
    attention = ATTENTIONS[name]

    def work(comm: Comm) -> None:
        query, key, value = leaves()
        changed = query.clone()
        out = attention(changed, key, value, group=comm)
        if comm.rank == 2:
            changed.add_(1.0)
        out.sum().backward()

    errors = outcomes(work)
    assert type(errors[2]) is RuntimeError
    for rank in (0, 1):
        assert type(errors[rank]) is DisagreementError
        assert "modified by an inplace operation" in str(errors[rank])


class Table(torch.nn.Module):
    """Positions from a table that ends."""

    def forward(self, query: Tensor, key: Tensor, start: int) -> tuple[Tensor, Tensor]:
        torch.zeros(6)[start + query.shape[1] - 1]
        return query, key


def test_positions_beyond_one_ranks_table_are_told_to_the_others() -> None:
    def work(comm: Comm) -> None:
        attention = RingMultiheadDilatedAttention(16, 2, [4], [1], rotary=Table(), group=comm)
        attention(torch.randn(1, 3, 16))

    errors = outcomes(work)
    # Two ranks lie beyond the table, and the first hears of both.
    assert type(errors[2]) is IndexError
    assert type(errors[0]) is DisagreementError
    assert "IndexError" in str(errors[0])


def test_virtual_ranks_inherit_the_callers_mode() -> None:
    with torch.no_grad():
        assert run_ranks(2, lambda comm: torch.is_grad_enabled()) == [False, False]
    with torch.inference_mode():
        assert run_ranks(2, lambda comm: torch.is_inference_mode_enabled()) == [True, True]
    assert run_ranks(2, lambda comm: torch.is_grad_enabled()) == [True, True]


def test_the_last_plans_are_kept() -> None:
    rank_plan.cache_clear()
    for _ in range(3):
        run_ranks(RANKS, lambda comm: dilated(*leaves(), group=comm).sum().backward())
    assert rank_plan.cache_info().misses == RANKS


def test_bounds_may_be_numpys() -> None:
    assert make_plan(list(np.cumsum([0, 4, 4])), [8], [1], heads=1).bounds == (0, 4, 8)
