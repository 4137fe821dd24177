"""Lent resources: memory for results, scratch and gradients, and a store of plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from core_cases import MIXED_CASES, Case, packed, run
from torch import Tensor

from dilated_core import (
    Allocator,
    DilatedAttention,
    MultiheadDilatedAttention,
    PatternStore,
    dilated_attention,
)
from dilated_core.plan import SEMANTICS


class Lender:
    """An allocator that remembers what it lent, each tensor full of NaN."""

    def __init__(self) -> None:
        self.lent: list[Tensor] = []

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = torch.full(tuple(size), torch.nan, dtype=dtype, device=device)
        self.lent.append(tensor)
        return tensor

    def owns(self, tensor: Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        return any(address == lent.untyped_storage().data_ptr() for lent in self.lent)


class Store(dict[Hashable, Any]):
    """A store of plans that counts how often each is asked for and made."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[Hashable] = Counter()
        self.made: Counter[Hashable] = Counter()

    def get_or_create(self, key: Hashable, create: Callable[[], Any]) -> Any:
        self.asked[key] += 1
        if key not in self:
            self.made[key] += 1
            self[key] = create()
        return self[key]


CASE = MIXED_CASES[0]
KINDS = {
    "plain": CASE,
    "masked": replace(CASE, mask="random"),
    "shared-keys": replace(CASE, kv_heads=2),
    "packed": packed(CASE, [9, 0, 20]),
}


def test_protocols_are_met_by_their_methods() -> None:
    assert isinstance(Lender(), Allocator)
    assert isinstance(Store(), PatternStore)
    assert not isinstance(Store(), Allocator)
    assert not isinstance(Lender(), PatternStore)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_lent_resources_change_no_bit(case: Case, semantics: str, dtype: torch.dtype) -> None:
    """Memory full of NaN and plans kept from an earlier call."""
    case, lender, store = case.meaning(semantics), Lender(), Store()
    alone = run(case, dtype, with_lse=True)
    for _ in range(2):
        lent = run(case, dtype, with_lse=True, allocator=lender, patterns=store)
        assert all(torch.equal(a, b) for a, b in zip(lent.each(), alone.each(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_results_gradients_and_scratch_lie_in_lent_memory(case: Case, dtype: torch.dtype) -> None:
    lender = Lender()
    results = run(case, dtype, allocator=lender)
    assert all(lender.owns(result) for result in results.each())
    assert len(lender.lent) > 5


@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_each_plan_is_made_once(case: Case) -> None:
    """Forward and backward ask for the same plans, and a second call finds them all."""
    store = Store()
    run(case, torch.float32, patterns=store)
    first = dict(store.asked)
    assert first
    assert all(key[0] == "dilated_core.tiles" for key in store)  # one's own name, in a store that others use too
    run(case, torch.float32, patterns=store)
    assert set(store.made.values()) == {1}
    assert dict(store.asked) == {key: 2 * times for key, times in first.items()}


def test_what_differs_in_a_plan_differs_in_its_key() -> None:
    store, calls = Store(), 0
    for case in (
        CASE,
        replace(CASE, seq=40),
        replace(CASE, is_causal=True),
        replace(CASE, semantics="grouped"),
        CASE.meaning("torchscale"),  # whose zero keys only a row that looks ahead meets
        replace(CASE, is_causal=True).meaning("torchscale"),
        replace(CASE, heads=3),
        replace(CASE, kv_heads=1),
        replace(CASE, segment_lengths=(8, 20, 91)),
        replace(CASE, dilation_rates=(1, 3, 6)),
    ):
        calls += 1
        alone = run(case, torch.float64).out
        assert torch.equal(run(case, torch.float64, patterns=store).out, alone)
    assert len(store) >= calls


@pytest.mark.parametrize("change", [{"batch": 1}, {"head_dim": 3}, {"seed": 5}, {"mask": "random"}], ids=str)
def test_what_a_plan_does_not_depend_on_is_not_in_its_key(change: dict[str, Any]) -> None:
    store = Store()
    for case in (CASE, replace(CASE, **change)):
        run(case, torch.float32, patterns=store)
    assert set(store.made.values()) == {1}
    assert len(store) == 1


def test_modules_pass_them_on() -> None:
    lender, store = Lender(), Store()
    query, key, value, _ = CASE.problem(torch.float32)
    for module in (DilatedAttention, lambda *pattern, **options: MultiheadDilatedAttention(16, 4, *pattern, **options)):
        before = len(lender.lent), sum(store.asked.values())
        attention = module(*CASE.pattern, allocator=lender, patterns=store)
        attention(query, key, value) if module is DilatedAttention else attention(torch.randn(1, 41, 16))
        assert len(lender.lent) > before[0]
        assert sum(store.asked.values()) > before[1]


@pytest.mark.parametrize("make", [DilatedAttention, lambda *a, **o: MultiheadDilatedAttention(16, 4, *a, **o)])
def test_they_step_aside_where_pytorch_traces(make: Callable[..., torch.nn.Module]) -> None:
    """A compiled call is one graph, asks neither, and gives what the eager call gives."""
    torch._dynamo.reset()
    lender, store = Lender(), Store()
    module = make(*CASE.pattern, allocator=lender, patterns=store)
    inputs = CASE.problem(torch.float32)[:3] if isinstance(module, DilatedAttention) else [torch.randn(2, 41, 16)]
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def out_of(call: Callable[..., Any]) -> Tensor:
        result = call(*leaves)
        return result[0] if isinstance(result, tuple) else result

    traced = out_of(torch.compile(module, fullgraph=True, backend="aot_eager"))
    gradients = torch.autograd.grad(traced, leaves, torch.ones_like(traced))
    assert not lender.lent
    assert not store
    eager = out_of(module)
    assert lender.lent
    assert store
    torch.testing.assert_close(traced, eager)
    for got, expected in zip(gradients, torch.autograd.grad(eager, leaves, torch.ones_like(eager)), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_plain_path_asks_neither() -> None:
    lender, store = Lender(), Store()
    run(CASE, torch.float32, fused=False, allocator=lender, patterns=store)
    assert not lender.lent
    assert not store


def test_an_error_of_the_lender_is_the_callers() -> None:
    class Full(Lender):
        def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
            raise MemoryError("the pool is full")

    query, key, value, _ = CASE.problem(torch.float32)
    with pytest.raises(MemoryError, match="the pool is full"):
        dilated_attention(query, key, value, *CASE.pattern, allocator=Full())
