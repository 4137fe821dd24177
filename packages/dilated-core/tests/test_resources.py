"""Lent resources: memory for results, scratch and gradients, and a store of plans."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from core_cases import MIXED_CASES, Case, packed, run
from torch import Tensor

from dilated_core import (
    Allocator,
    BufferManager,
    DilatedAttention,
    DilatedKVCache,
    MultiheadDilatedAttention,
    PatternStore,
    checks,
    decode_step,
    dilated_attention,
)
from dilated_core.plan import SEMANTICS
from dilated_core.resources import BufferKind


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


class Manager:
    """A buffer manager that remembers what it lent of each kind, and is never asked for a buffer of none."""

    def __init__(self) -> None:
        self.kinds = {kind: Lender() for kind in get_args(BufferKind)}

    def allocator(self, kind: str) -> Lender:
        return self.kinds[kind]

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        raise AssertionError(f"a buffer of {tuple(size)} that is of no kind")

    def used(self) -> set[str]:
        return {kind for kind, lender in self.kinds.items() if lender.lent}

    def dtypes(self, kind: str) -> set[torch.dtype]:
        return {tensor.dtype for tensor in self.kinds[kind].lent}


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
    assert isinstance(Manager(), BufferManager)
    assert isinstance(Manager(), Allocator)
    assert not isinstance(Lender(), BufferManager)


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


# ------------------------------------------------------------------------------------------------ kinds


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_a_manager_lends_results_and_gradients_by_kind_and_changes_no_bit(case: Case, dtype: torch.dtype) -> None:
    manager, alone = Manager(), run(case, dtype, with_lse=True)
    results = run(case, dtype, with_lse=True, allocator=manager)
    assert all(torch.equal(a, b) for a, b in zip(results.each(), alone.each(), strict=True))
    kinds = manager.kinds
    assert manager.used() == {"query", "key", "value", "output", "temp"} | ({"mask"} if case.mask != "none" else set())
    assert kinds["output"].owns(results.out)
    assert kinds["query"].owns(results.dq)
    assert kinds["key"].owns(results.dk)
    assert kinds["value"].owns(results.dv)
    assert len(kinds["output"].lent) == 2  # out and lse
    for kind in ("query", "key", "value"):
        assert manager.dtypes(kind) == {dtype}
    if dtype is torch.bfloat16:  # sums that are yet to be rounded
        assert torch.float32 in manager.dtypes("temp")
        assert manager.dtypes("output") == {dtype, torch.float32}  # as lse is
    if case.mask != "none":
        assert manager.dtypes("mask") == {torch.bool}


def test_each_gathered_row_is_of_its_kind() -> None:
    """Queries of 1, keys of 2, values of 3: whatever is copied shows whose it is."""
    manager = Manager()
    query, key, value = (torch.full((3, 41, 4, 8), float(number)) for number in (1, 2, 3))
    dilated_attention(query, key, value, *CASE.pattern, allocator=manager)
    assert manager.used() == {"query", "key", "value", "output"}
    for number, kind in enumerate(("query", "key", "value"), 1):
        assert all(bool((tensor == number).all()) for tensor in manager.kinds[kind].lent)


def test_rows_kept_for_decoding_are_of_the_kind_cache() -> None:
    manager = Manager()
    query, key, value = torch.randn(3, 3, 41, 4, 8).unbind()

    def decode(allocator: Allocator | None, prompt: int) -> Tensor:
        cache = DilatedKVCache(*CASE.pattern, batch_size=3, num_heads=4, head_dim=8, allocator=allocator)
        bounds = [0, *range(prompt, 42)]
        spans = [slice(*span) for span in pairwise(bounds) if span[0] < span[1]]
        return torch.cat([decode_step(query[:, at], key[:, at], value[:, at], cache) for at in spans], 1)

    assert torch.equal(decode(manager, 1), decode(None, 1))
    assert manager.used() == {"cache"}
    assert torch.equal(decode(manager, 20), decode(None, 20))  # a prompt is a whole attention
    assert manager.used() == {"cache", "query", "key", "value", "output"}


def test_an_attribute_that_cannot_be_called_makes_no_manager() -> None:
    class Named(Lender):
        allocator = "of this name"

    lender = Named()
    assert checks.resources(lender, None).manager is None
    results = run(CASE, torch.float32, allocator=lender)
    assert lender.owns(results.out)


def test_a_manager_that_allocates_nothing_itself_is_refused() -> None:
    class Kinds:
        def allocator(self, kind: str) -> Lender:
            return Lender()

    query, key, value, _ = CASE.problem(torch.float32)
    with pytest.raises(TypeError, match=r"allocator: expected an object with empty.*got Kinds"):
        dilated_attention(query, key, value, *CASE.pattern, allocator=Kinds())  # type: ignore[arg-type]


def test_resources_are_a_value() -> None:
    manager, lender = Manager(), Lender()
    assert checks.resources(None, None) is checks.resources(None, None)
    assert checks.resources(manager, None) == checks.resources(manager, None) != checks.resources(lender, None)
    assert checks.resources(manager, None).manager is manager
    copy = pickle.loads(pickle.dumps(checks.resources(manager, None)))
    assert copy.manager is copy.allocator


def test_a_manager_steps_aside_where_pytorch_traces() -> None:
    torch._dynamo.reset()
    manager = Manager()
    query, key, value, _ = CASE.problem(torch.float32)

    def call(*qkv: Tensor) -> Tensor:
        return dilated_attention(*qkv, *CASE.pattern, allocator=manager)

    traced = torch.compile(call, fullgraph=True, backend="aot_eager")(query, key, value)
    assert not manager.used()
    torch.testing.assert_close(traced, call(query, key, value))
    assert manager.used()
