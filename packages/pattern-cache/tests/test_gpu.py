"""A real device: copies that are late, streams that find them, evictions under running kernels, graph captures."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from dilated_pattern_cache import PatternCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

COUNT = 2**20
NBYTES = 4 * COUNT
LATE_CYCLES = 500_000_000  # a quarter of a second or so: far longer than the host takes to get ahead of it
SECONDS = 120
Cache = PatternCache[str, torch.Tensor]


def numbers() -> torch.Tensor:
    return torch.arange(1.0, COUNT + 1)


def current_name() -> str:
    return f"cuda:{torch.cuda.current_device()}"


# ------------------------------------------------------------------------------------------------ copies


def test_a_copy_is_made_once_and_counted() -> None:
    cache: Cache = PatternCache()
    copy = cache.get_or_create("a", numbers, device="cuda")
    assert cache.get_or_create("a", numbers, device=current_name()) is copy
    assert cache.get("a", device=torch.device("cuda")) is copy
    assert torch.equal(copy.cpu(), numbers())
    info = cache.info()
    assert (info.misses, info.creations, info.hits, info.nbytes) == (1, 1, 2, NBYTES)
    tier = info.devices[current_name()]
    assert (tier.copies, tier.entries, tier.nbytes) == (1, 1, NBYTES)
    assert cache.snapshot()[0].devices == (current_name(),)
    assert cache["a"].device.type == "cpu"


def test_a_value_that_was_made_on_the_device_is_there_itself() -> None:
    cache: Cache = PatternCache()
    value = cache.get_or_create("a", lambda: numbers().cuda(), device="cuda")
    assert cache["a"] is value
    assert cache.info().devices == {}


def test_a_value_of_the_device_has_a_copy_on_the_host() -> None:
    cache: Cache = PatternCache()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LATE_CYCLES)
        copy = cache.get_or_create("a", lambda: torch.arange(1.0, COUNT + 1, device="cuda"), device="cpu")
    assert torch.equal(copy, numbers())
    assert cache.info().devices["cpu"].nbytes == NBYTES


KINDS: dict[str, Any] = {
    "transposed": lambda: torch.arange(6.0).view(2, 3).T,
    "expanded": lambda: torch.ones(1, 3).expand(4, 3),
    "strided": lambda: torch.arange(8)[::2],
    "pinned": lambda: torch.arange(8.0).pin_memory(),
    "conjugated": lambda: torch.tensor([1 + 2j]).conj(),
    "empty": lambda: torch.empty(0, 3),
    "scalar": lambda: torch.tensor(3),
    "coo": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
}


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
@pytest.mark.parametrize("name", KINDS)
def test_tensors_of_all_kinds_are_copied_as_they_are(name: str) -> None:
    value = KINDS[name]()
    cache: Cache = PatternCache()
    cache[name] = value
    stream = torch.cuda.Stream()
    first = cache.get(name, device="cuda")
    with torch.cuda.stream(stream):
        copy = cache.get(name, device="cuda")
    torch.cuda.synchronize()
    assert copy is first
    assert copy is not None
    assert copy.is_cuda
    assert copy.layout == value.layout
    assert torch.equal(copy.cpu().to_dense(), value.to_dense())
    if copy.layout == torch.strided:
        assert copy.stride() == value.to("cuda").stride()


def test_memory_of_a_device_that_is_no_tensor_is_counted() -> None:
    cupy = pytest.importorskip("cupy")
    cache: PatternCache[str, Any] = PatternCache()
    cache["a"] = [cupy.zeros(COUNT, dtype="f4"), torch.zeros(COUNT, device="cuda")]
    assert cache.info().nbytes == 2 * NBYTES


def test_a_block_mask_is_copied_whole() -> None:
    cache: PatternCache[str, Any] = PatternCache()
    mask = cache.get_or_create(
        "mask", lambda: create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 512, 512, device="cpu"), device="cuda"
    )
    assert mask.kv_indices.is_cuda
    assert torch.equal(mask.to_dense().cpu(), cache["mask"].to_dense())


def test_the_copy_that_was_not_used_for_the_longest_time_leaves() -> None:
    cache: PatternCache[int, torch.Tensor] = PatternCache(max_device_bytes=2 * NBYTES)
    for key in range(3):
        cache.get_or_create(key, numbers, device="cuda")
    tier = cache.info().devices[current_name()]
    assert (tier.copies, tier.entries, tier.evictions) == (3, 2, 1)
    assert [entry.key for entry in cache.snapshot() if entry.devices] == [1, 2]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_copy_of_a_value_of_another_device_is_ready_for_any_stream() -> None:
    cache: Cache = PatternCache()
    making, using = torch.cuda.Stream("cuda:0"), torch.cuda.Stream("cuda:1")
    with torch.cuda.stream(making):
        torch.cuda._sleep(LATE_CYCLES)
        cache.get_or_create("a", lambda: torch.arange(1.0, COUNT + 1, device="cuda:0"), device="cuda:1")
    with torch.cuda.stream(using):
        copy = cache.get("a", device="cuda:1")
        assert copy is not None
        result = copy + 1
    torch.cuda.synchronize("cuda:1")
    assert torch.equal(result.cpu(), numbers() + 1)


# ------------------------------------------------------------------------------------------------ streams


def test_a_copy_that_is_late_is_right_on_another_stream_at_once() -> None:
    cache: Cache = PatternCache()
    cache["a"] = numbers()
    copying, using = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(copying):
        garbage = torch.full((COUNT,), -1.0, device="cuda")
        del garbage  # what the copy's memory holds until it arrives
        torch.cuda._sleep(LATE_CYCLES)
        first = cache.get("a", device="cuda")
    with torch.cuda.stream(using):
        copy = cache.get("a", device="cuda")
        assert copy is not None
        result = copy + 1
    torch.cuda.synchronize()
    assert copy is first
    assert torch.equal(result.cpu(), numbers() + 1)


def test_many_threads_with_a_stream_each_get_one_copy_and_its_contents() -> None:
    cache: Cache = PatternCache()
    cache["a"] = numbers()
    results: list[torch.Tensor] = []
    barrier = threading.Barrier(16)

    def use() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            barrier.wait(SECONDS)
            torch.cuda._sleep(LATE_CYCLES // 16)
            copy = cache.get("a", device="cuda")
            assert copy is not None
            results.append(copy + 1)

    threads = [threading.Thread(target=use, daemon=True) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    torch.cuda.synchronize()
    assert len(results) == 16
    expected = numbers() + 1
    assert all(torch.equal(result.cpu(), expected) for result in results)
    assert cache.info().devices[current_name()].copies == 1


def test_the_memory_of_a_copy_that_was_evicted_is_not_reused_under_a_running_kernel() -> None:
    cache: Cache = PatternCache()
    cache.get_or_create("a", numbers, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        copy = cache.get("a", device="cuda")
        assert copy is not None
        torch.cuda._sleep(LATE_CYCLES)
        result = copy + 1
    del copy
    cache.clear()
    overwritten = [torch.full((COUNT,), -1.0, device="cuda") for _ in range(4)]  # where the copy was, were it free
    torch.cuda.synchronize()
    assert torch.equal(result.cpu(), numbers() + 1)
    assert len(overwritten) == 4


def test_the_host_memory_of_a_value_that_is_gone_was_read_before() -> None:
    cache: Cache = PatternCache()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LATE_CYCLES)
        copy = cache.get_or_create("a", numbers, device="cuda")
        cache.clear()
        for _ in range(4):
            torch.full((COUNT,), -1.0).pin_memory()
        result = copy + 1
    torch.cuda.synchronize()
    assert torch.equal(result.cpu(), numbers() + 1)


# ------------------------------------------------------------------------------------------------ captures


def test_a_copy_cannot_be_made_in_a_capture_which_goes_on() -> None:
    cache: Cache = PatternCache()
    cache["a"] = numbers()
    x, graph = torch.ones(COUNT, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="warm the cache for the device"):
            cache.get("a", device="cuda")
        x.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert x.eq(2).all()


def test_a_copy_that_was_not_seen_to_be_there_is_an_error_in_a_capture_which_goes_on() -> None:
    cache: Cache = PatternCache()
    x, graph = torch.ones(COUNT, device="cuda"), torch.cuda.CUDAGraph()
    copy = cache.get_or_create("a", numbers, device="cuda")
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="warm the cache for the device"):
            cache.get("a", device="cuda")
        x.add_(1)
    torch.cuda.synchronize()
    assert cache.get("a", device="cuda") is copy


def test_a_warm_copy_is_used_in_a_capture() -> None:
    cache: Cache = PatternCache()
    x, graph = torch.ones(COUNT, device="cuda"), torch.cuda.CUDAGraph()
    cache.warm({"a": numbers}, device="cuda", pin=True)
    torch.cuda.synchronize()
    warm = cache.get("a", device="cuda")
    with torch.cuda.graph(graph):
        copy = cache.get("a", device="cuda")
        assert copy is not None
        y = x * copy
    assert copy is warm
    x.fill_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y.cpu(), 3 * numbers())


# ------------------------------------------------------------------------------------------------ compiled


def test_a_compiled_function_has_the_pattern_on_the_device_in_its_graph() -> None:
    cache: PatternCache[int, torch.Tensor] = PatternCache()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + cache.get_or_create(x.shape[0], lambda: torch.arange(x.shape[0]), device="cuda")

    for length in (5, 7, 11):
        assert torch.equal(function(torch.ones(length, device="cuda")).cpu(), torch.arange(length) + 1.0)
    assert len(cache) == 0
