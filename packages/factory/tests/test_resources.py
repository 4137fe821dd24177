"""The shared resources by themselves: what is made when, limits, threads, copies, and who is told of the pools."""

from __future__ import annotations

import copy
import gc
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dilated_core import Allocator, BufferManager, PatternStore
from dilated_factory import (
    Hardware,
    Policy,
    Profile,
    SharedResources,
    create_dilated_attention,
    create_multihead_dilated_attention,
    shared_resources,
)
from dilated_factory import profile as profiles
from dilated_factory.hooks import FollowCalls
from dilated_factory.resources.handles import BuffersByKind, CachedPatterns, PooledAllocator
from dilated_memory_pool import MemoryPool, PoolLimitError
from dilated_memory_pool.backends import HostBackend

CPU = torch.device("cpu")
SHORT = Policy(pool_lightweight_from=100, pool_full_from=200)
MIB = 2**20
WAIT = 120  # seconds after which a test that hangs fails


def make(resources: SharedResources, **options: Any) -> nn.Module:
    # No whole number of these segments covers what these tests attend, so that results are summed in lent memory.
    sizes: dict[str, Any] = {"segment_lengths": [48, 200], "dilation_rates": [1, 4]}
    return create_dilated_attention("improved", resources=resources, **{**sizes, "profile": None, **options})


def inputs(length: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 1, length, 2, 8, generator=generator).requires_grad_().unbind()


def take(resources: SharedResources, mode: Any, nbytes: int) -> Tensor:
    return resources.pool("cpu", mode).empty(nbytes, dtype=torch.uint8)


# ------------------------------------------------------------------------------------------------ what there is


def test_nothing_is_made_before_it_is_asked_for() -> None:
    resources = SharedResources()
    assert resources.statistics() == {}
    assert resources.reasons() == {}
    assert resources.trim() == 0
    assert "nothing used yet" in repr(resources)


def test_a_device_and_a_mode_have_one_pool() -> None:
    resources = SharedResources()
    lightweight, full = resources.pool("cpu", "lightweight"), resources.pool(CPU)
    assert (lightweight.mode, full.mode) == ("lightweight", "full")
    assert resources.pool("cpu", "full") is full
    assert resources.pool(torch.device("cpu", 0), "lightweight") is lightweight
    assert resources.manager("cpu") is resources.manager(CPU)
    assert resources.backend("cpu") is resources.backend(CPU)
    assert set(resources.statistics()) == {("cpu", "lightweight"), ("cpu", "full")}
    assert set(resources.reasons()) == {("cpu", "lightweight"), ("cpu", "full")}
    assert "full on cpu, lightweight on cpu" in repr(resources)


@pytest.mark.parametrize("mode", ["off", "large", None])
def test_a_mode_that_is_none_is_refused(mode: Any) -> None:
    with pytest.raises(ValueError, match=r'^mode: expected "lightweight" or "full", got '):
        SharedResources().pool("cpu", mode)


def test_a_device_without_pools_is_refused() -> None:
    for ask in (SharedResources().pool, SharedResources().manager, SharedResources().backend):
        with pytest.raises(ValueError, match=r"^device: expected cpu or cuda for a memory pool, got meta"):
            ask("meta")


def test_the_process_has_one_set() -> None:
    assert shared_resources() is shared_resources()
    modules = [create_dilated_attention("improved", [8], [1], sequence_length=8192) for _ in range(2)]
    assert {id(module.allocator.resources) for module in modules} == {id(shared_resources())}


def test_a_backend_of_ones_own() -> None:
    asked: list[torch.device] = []

    def choose(device: torch.device) -> HostBackend:
        asked.append(device)
        return HostBackend()

    resources = SharedResources(backend=choose)
    resources.pool("cpu", "full")
    resources.pool("cpu", "lightweight")
    assert asked == [CPU]


# ------------------------------------------------------------------------------------------------ small tensors


def test_small_tensors_are_left_to_pytorch() -> None:
    resources = SharedResources()
    assert resources.pool("cpu").min_bytes == 2**20
    small, large = take(resources, "full", MIB - 1), take(resources, "full", MIB)
    numbers = resources.statistics()["cpu", "full"]
    assert (numbers.bypasses, numbers.misses) == (1, 1)
    assert len(small) + 1 == len(large)


def test_the_size_that_was_measured_on_this_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = Hardware.detect()
    versions = {name: str(profiles.installed_version(name)) for name in profiles.MEASURED_WITH}
    measured = Profile(hardware.key(), hardware.device_type, versions, pool_min_bytes=4096)
    monkeypatch.setenv(profiles.VARIABLE, str(measured.save(tmp_path / "profile.json")))
    assert SharedResources().pool("cpu").min_bytes == 4096
    assert SharedResources(min_bytes=0).pool("cpu").min_bytes == 0  # the caller's word goes before it


# ------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    "options", [{"lightweight_pool": True}, {"enable_memory_pool": True, "lightweight_pool": False}]
)
def test_a_limit_that_is_too_small_says_what_to_do(options: dict[str, Any]) -> None:
    resources = SharedResources("64KiB", min_bytes=0)
    module = make(resources, **options)
    with pytest.raises(
        PoolLimitError, match=r"limit is reached.*limit 64 KiB.*raise the limit with set_limit"
    ) as caught:
        module(*inputs(2001))
    assert caught.value.limit == 2**16
    assert isinstance(caught.value, MemoryError)
    del caught
    gc.collect()
    resources.set_limit("64MiB")
    assert module(*inputs(2001)).shape == (1, 2001, 2, 8)


def test_a_limit_is_that_of_buffers_by_kind_too() -> None:
    resources = SharedResources("1MiB")
    with pytest.raises(PoolLimitError, match="raise the limit with set_limit"):
        BuffersByKind(resources).allocator("output").empty((2, MIB), dtype=torch.float32, device=CPU)


def test_pools_and_kinds_of_a_device_have_one_limit_and_make_room() -> None:
    resources = SharedResources("8MiB", min_bytes=0)
    held = take(resources, "lightweight", 5 * MIB)
    with pytest.raises(PoolLimitError):
        resources.manager("cpu").empty(5 * MIB, dtype=torch.uint8, kind="output")
    with pytest.raises(PoolLimitError):
        PooledAllocator(resources, "full").empty((5 * MIB,), dtype=torch.uint8, device=CPU)
    del held
    gc.collect()
    assert len(resources.manager("cpu").empty(5 * MIB, dtype=torch.uint8, kind="output")) == 5 * MIB
    assert resources.statistics()["cpu", "lightweight"].reserved_bytes == 0


def test_a_refusal_has_the_numbers_of_all_pools() -> None:
    resources = SharedResources("8MiB", min_bytes=0)
    held = take(resources, "lightweight", 4 * MIB)
    with pytest.raises(PoolLimitError) as caught:
        PooledAllocator(resources, "full").empty((6 * MIB,), dtype=torch.uint8, device=CPU)
    assert caught.value.allocated >= len(held) == 4 * MIB
    assert (caught.value.requested, caught.value.limit) == (6 * MIB, 8 * MIB)


def test_a_new_limit_gives_back_what_is_idle() -> None:
    resources = SharedResources("64MiB", min_bytes=0)
    del (first := [take(resources, "lightweight", 8 * MIB)])[:]
    assert first == []
    gc.collect()
    assert resources.statistics()["cpu", "lightweight"].reserved_bytes >= 8 * MIB
    resources.set_limit("2MiB")
    assert resources.limit == "2MiB"
    assert resources.statistics()["cpu", "lightweight"].reserved_bytes <= 2 * MIB
    with pytest.raises(PoolLimitError):
        take(resources, "lightweight", 4 * MIB)
    # Of devices that have no pool yet, too.
    other = SharedResources("64MiB", min_bytes=0)
    other.set_limit("2MiB")
    with pytest.raises(PoolLimitError):
        PooledAllocator(other, "full").empty((4 * MIB,), dtype=torch.uint8, device=CPU)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("limit", ["much", "-1GiB", -1, 1.5, [1]])
def test_a_limit_that_is_none_is_refused(limit: Any, used: bool) -> None:
    with pytest.raises((TypeError, ValueError), match="limit"):
        SharedResources(limit)
    resources = SharedResources()
    if used:
        resources.pool("cpu")
    with pytest.raises((TypeError, ValueError), match="limit"):
        resources.set_limit(limit)
    assert resources.limit == 1.0


@pytest.mark.parametrize(
    "option", [{"min_bytes": "much"}, {"min_bytes": -1}, {"min_bytes": 0.5}, {"backend": "host"}, {"coordinator": 5}]
)
def test_what_is_no_argument_is_refused_before_the_first_call(option: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(option))):
        SharedResources(**option)


def test_trimming_gives_everything_idle_back() -> None:
    resources = SharedResources(min_bytes=0)
    kept = take(resources, "lightweight", 2 * MIB)
    take(resources, "full", 2 * MIB)
    resources.manager("cpu").empty(2 * MIB, dtype=torch.uint8, kind="output")
    gc.collect()
    reserved = sum(now.reserved_bytes for now in resources.statistics().values())
    given = resources.trim()
    numbers = resources.statistics()
    assert given == reserved - sum(now.reserved_bytes for now in numbers.values()) > 0
    assert {name: now.reserved_bytes > 0 for (_, name), now in numbers.items()} == {
        "lightweight": True,
        "full": False,
        "output": False,
    }
    assert len(kept) == 2 * MIB


# ------------------------------------------------------------------------------------------------ lifetime


@pytest.mark.parametrize("options", [{"policy": SHORT}, {"buffer_manager": True}], ids=["by length", "by kind"])
def test_memory_comes_back_when_results_go(options: dict[str, Any]) -> None:
    resources = SharedResources(min_bytes=0)
    module = make(resources, **options)
    length = 201 if "policy" in options else 50_001
    leaves = inputs(length)
    out = module(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert sum(now.allocated_bytes for now in resources.statistics().values()) >= out.nbytes
    view = out[:, :1]
    del out, grads
    gc.collect()
    held = sum(now.allocated_bytes for now in resources.statistics().values())
    assert held >= view.untyped_storage().nbytes()  # a view keeps its memory
    del view
    gc.collect()
    assert sum(now.allocated_bytes for now in resources.statistics().values()) == 0
    assert sum(now.waiting_bytes for now in resources.statistics().values()) == 0


def test_results_outlive_their_module_and_resources() -> None:
    resources = SharedResources(min_bytes=0)
    module = make(resources, policy=SHORT)
    out = module(*inputs(201))
    expected = out.detach().clone()
    del module, resources
    gc.collect()
    others = [take(SharedResources(min_bytes=0), "full", out.nbytes).fill_(77) for _ in range(3)]
    assert torch.equal(out, expected)
    assert len(others) == 3


# ------------------------------------------------------------------------------------------------ handles


def test_handles_are_what_attentions_take() -> None:
    resources = SharedResources()
    assert isinstance(PooledAllocator(resources), Allocator)
    assert not isinstance(PooledAllocator(resources), BufferManager)
    assert isinstance(BuffersByKind(resources), Allocator)
    assert isinstance(BuffersByKind(resources), BufferManager)
    assert isinstance(CachedPatterns(resources), PatternStore)


def test_a_switched_allocator_draws_from_the_pool_of_its_mode() -> None:
    resources = SharedResources(min_bytes=0)
    allocator = PooledAllocator(resources)
    assert allocator.empty((4,), dtype=torch.float32, device=CPU).shape == (4,)
    assert resources.statistics() == {}
    for mode in ("lightweight", "full"):
        allocator.mode = mode
        allocator.empty((4,), dtype=torch.float32, device=CPU)
        assert resources.statistics()["cpu", mode].misses == 1


@pytest.mark.parametrize("handle", [PooledAllocator, BuffersByKind])
def test_tensors_without_memory_need_no_pool(handle: Callable[..., Any]) -> None:
    resources = SharedResources(min_bytes=0)
    allocator = handle(resources)
    if isinstance(allocator, PooledAllocator):
        allocator.mode = "full"
    assert allocator.empty((4,), dtype=torch.float32, device=torch.device("meta")).device.type == "meta"
    assert resources.statistics() == {}


def test_buffers_of_no_kind_are_of_the_kind_temp() -> None:
    resources = SharedResources()
    BuffersByKind(resources).empty((MIB,), dtype=torch.float32, device=CPU)
    assert {kind for _, kind in resources.statistics()} == {"temp"}


def test_patterns_are_made_once() -> None:
    resources = SharedResources(cache_entries=2)
    store = CachedPatterns(resources)
    made = [store.get_or_create(("key",), lambda: [1]) for _ in range(3)]
    assert made[0] is made[1] is made[2]
    for number in range(3):
        store.get_or_create(("number", number), lambda: [2])
    info = resources.cache_info()
    assert (info.hits, info.entries, info.max_entries, info.evictions) == (2, 2, 2, 2)


# ------------------------------------------------------------------------------------------------ copies


def test_copies_are_the_same_set() -> None:
    resources = SharedResources()
    assert copy.copy(resources) is resources
    assert copy.deepcopy([resources])[0] is resources


def test_only_the_process_s_own_is_pickled() -> None:
    assert pickle.loads(pickle.dumps(shared_resources())) is shared_resources()
    with pytest.raises(TypeError, match=re.escape("a SharedResources of one's own cannot be pickled")):
        pickle.dumps(SharedResources())


# ------------------------------------------------------------------------------------------------ threads


def test_threads_that_alternate_lengths_get_the_right_results() -> None:
    resources = SharedResources(min_bytes=0)
    module, plain = make(resources, policy=SHORT), make(resources, enable_memory_pool=False, enable_pattern_cache=False)
    lengths = (51, 101, 201)
    with torch.no_grad():
        expected = {length: plain(*inputs(length)) for length in lengths}
    start = Barrier(4, timeout=WAIT)

    def work(number: int) -> bool:
        start.wait()
        right = True
        for turn in range(20):
            length = lengths[(turn + number) % len(lengths)]
            with torch.no_grad():
                right &= torch.equal(module(*inputs(length)), expected[length])
        return right

    with ThreadPoolExecutor(4) as threads:
        assert all(each.result(timeout=WAIT) for each in [threads.submit(work, number) for number in range(4)])
    gc.collect()
    assert all(now.allocated_bytes == 0 for now in resources.statistics().values())
    (hook,) = module._forward_pre_hooks.values()
    follow = hook.__self__
    assert isinstance(follow, FollowCalls)
    # Whoever came last: the switch, the decision and the class are of one call.
    assert module.allocator.mode == module.decision.pool_mode
    assert module.decision is follow.decisions[follow.latest]


def test_threads_that_train_get_the_right_gradients() -> None:
    resources = SharedResources(min_bytes=0)
    module, plain = make(resources, policy=SHORT), make(resources, enable_memory_pool=False, enable_pattern_cache=False)

    def grads(of: nn.Module, number: int) -> list[Tensor]:
        length = (101, 201)[number % 2]
        leaves = inputs(length, number)
        cotangent = torch.randn(1, length, 2, 8, generator=torch.Generator().manual_seed(number))
        return list(torch.autograd.grad(of(*leaves), leaves, cotangent))

    def work(number: int) -> list[list[Tensor]]:
        return [grads(module, number + turn) for turn in range(3)]

    with ThreadPoolExecutor(4) as threads:
        found = [each.result(timeout=WAIT) for each in [threads.submit(work, number) for number in range(4)]]
    for number, turns in enumerate(found):
        for turn, each in enumerate(turns):
            for one, other in zip(each, grads(plain, number + turn), strict=True):
                assert torch.equal(one, other)


def test_threads_that_come_first_together_share_one_pool() -> None:
    for _ in range(10):
        resources = SharedResources()
        start = Barrier(4, timeout=WAIT)

        def ask(resources: SharedResources = resources, start: Barrier = start) -> tuple[int, int]:
            start.wait()
            return id(resources.pool("cpu", "full")), id(resources.manager("cpu"))

        with ThreadPoolExecutor(4) as threads:
            asked = [threads.submit(ask) for _ in range(4)]
            assert len({each.result(timeout=WAIT) for each in asked}) == 1


# ------------------------------------------------------------------------------------------------ coordination


class Recording:
    """A coordinator that remembers what it was told of."""

    def __init__(self, covers: bool = True) -> None:
        self.covering = covers
        self.upstreams: list[Any] = []
        self.watched: list[Any] = []

    def covers(self, backend: Any) -> bool:
        return self.covering and backend.device == "cpu"

    def coordinated(self, upstream: Any) -> Any:
        self.upstreams.append(upstream)
        return upstream

    def watch(self, pool: Any) -> None:
        self.watched.append(pool)


def test_a_coordinator_is_told_of_every_backend_and_pool_once() -> None:
    coordinator = Recording()
    resources = SharedResources(min_bytes=0, coordinator=coordinator)
    module = make(resources, policy=SHORT)
    assert (coordinator.upstreams, coordinator.watched) == ([], [])
    for length in (51, 101, 201, 101, 201):
        module(*inputs(length))
    assert [type(each) for each in coordinator.upstreams] == [HostBackend]
    assert coordinator.watched == [resources.pool("cpu", "lightweight"), resources.pool("cpu", "full")]
    make(resources, buffer_manager=True)(*inputs(51))
    assert coordinator.watched[2:] == [resources.manager("cpu")]
    assert len(coordinator.upstreams) == 1
    assert all(isinstance(each, MemoryPool) for each in coordinator.watched[:2])


def test_memory_that_a_coordinator_does_not_cover_is_not_shared_through_it() -> None:
    coordinator = Recording(covers=False)
    resources = SharedResources(min_bytes=0, coordinator=coordinator)
    make(resources, policy=SHORT)(*inputs(201))
    assert coordinator.upstreams == []
    assert set(resources.statistics()) == {("cpu", "full")}


# ------------------------------------------------------------------------------------------------ sharing


def test_modules_that_share_a_set_share_memory_and_plans() -> None:
    resources = SharedResources(min_bytes=0)
    first, second = make(resources, policy=SHORT), make(resources, policy=SHORT)
    with torch.no_grad():
        first(*inputs(201))
        gc.collect()
        before, plans = resources.statistics()["cpu", "full"], resources.cache_info()
        second(*inputs(201))
    after = resources.statistics()["cpu", "full"]
    assert (after.misses, after.reserved_bytes) == (before.misses, before.reserved_bytes)
    assert after.hits > before.hits
    assert resources.cache_info().misses == plans.misses
    assert resources.cache_info().hits > plans.hits


def test_sets_of_ones_own_share_nothing() -> None:
    one, other = SharedResources(min_bytes=0), SharedResources(min_bytes=0)
    module = create_multihead_dilated_attention("improved", 8, 2, [48, 200], [1, 4], policy=SHORT, resources=one)
    x = torch.randn(1, 201, 8)
    module(x, x, x)
    assert one.statistics()
    assert (other.statistics(), other.cache_info().entries) == ({}, 0)
