"""Where PyTorch watches what is made, the cache steps aside: nothing of it is stored, and nobody is given any of it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_pattern_cache import CacheInfo, PatternCache
from dilated_pattern_cache.values import devices

LENGTHS = (5, 7, 11, 64)
Cache = PatternCache[Any, torch.Tensor]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture(params=["cold", "warm"])
def cache(request: pytest.FixtureRequest) -> Cache:
    """Empty, or with the values that the tests ask for."""
    cache: Cache = PatternCache()
    if request.param == "warm":
        for length in LENGTHS:
            cache["pattern", length] = torch.arange(float(length))
    return cache


def pattern_of(cache: Cache, length: int, device: str | None = None) -> torch.Tensor:
    return cache.get_or_create(("pattern", length), lambda: torch.arange(length).float(), device=device)


def state(cache: Cache) -> tuple[CacheInfo, list[Any]]:
    return cache.info(), [(key, id(value)) for key, value in cache.items()]


def assert_only_real_tensors(cache: Cache) -> None:
    for value in cache.values():
        assert type(value) is torch.Tensor
        assert not value.is_meta


# ------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_one_graph_without_breaks_has_the_pattern_in_it(cache: Cache, backend: str, device: str | None) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x * pattern_of(cache, x.shape[-1], device) + pattern_of(cache, x.shape[-1], device)

    before = state(cache)
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    for length in LENGTHS:
        x = torch.full((2, length), 3.0)
        assert torch.equal(compiled(x), 4 * torch.arange(float(length)).expand(2, length))
    assert state(cache) == before


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")], ids=str)
def test_one_graph_serves_all_lengths(cache: Cache, device: Any) -> None:
    counter = CompileCounter()
    before = state(cache)

    @torch.compile(fullgraph=True, backend=counter)
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + pattern_of(cache, x.shape[0], device)

    for length in LENGTHS:
        assert torch.equal(function(torch.ones(length)), torch.arange(float(length)) + 1)
    assert counter.frame_count == 2  # once for the first length, once for any
    assert state(cache) == before


def test_what_the_cache_holds_is_not_looked_at(cache: Cache) -> None:
    cache["pattern", 5] = torch.full((5,), -1.0)
    compiled = torch.compile(lambda x: x + pattern_of(cache, 5), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(5)), torch.arange(5.0))


class Pair(NamedTuple):
    one: Any
    other: Any


@dataclass(frozen=True)
class Plan:
    parts: dict[str, Any]
    name: str = "plan"


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_nested_value_is_moved_in_the_graph(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "meta":  # another device than where it was made, which every machine has
        monkeypatch.setattr(devices, "canonical", torch.device)
    cache: PatternCache[str, Any] = PatternCache()
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 256, 256, device="cpu")

    @torch.compile(fullgraph=True, backend="eager")
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def create() -> Any:
            shared = x + 1
            return Plan({"a": Pair(shared, [x + 2, None, 3]), "b": (mask, shared)})

        parts = cache.get_or_create("a", create, device=place).parts
        return parts["a"].one, parts["a"].other[0], parts["b"][0].kv_indices, parts["b"][1]

    results = function(torch.ones(3))
    assert [result.device.type for result in results] == [place] * 4
    if place == "cpu":
        assert torch.equal(results[0], torch.full((3,), 2.0))
        assert torch.equal(results[1], torch.full((3,), 3.0))
    assert len(cache) == 0


def test_gradients_flow_into_what_is_created_in_a_graph() -> None:
    cache: Cache = PatternCache()
    weight = torch.ones(3, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x: torch.Tensor) -> torch.Tensor:
        return (x * cache.get_or_create("a", lambda: torch.arange(3.0))).sum()

    function(weight).backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.arange(3.0))


def test_to_look_up_in_a_graph_is_to_find_nothing(cache: Cache) -> None:
    before = state(cache)

    @torch.compile(fullgraph=True, backend="eager")
    def function(x: torch.Tensor) -> torch.Tensor:
        found = cache.get(("pattern", 5))
        return x if found is None else x + found

    assert torch.equal(function(torch.ones(5)), torch.ones(5))
    assert state(cache) == before


def test_a_default_is_found_in_a_graph(cache: Cache) -> None:
    before = state(cache)
    compiled = torch.compile(lambda x: x + cache.get(("pattern", 5), x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(5)), torch.full((5,), 2.0))
    assert state(cache) == before


def test_to_index_in_a_graph_is_a_key_error(cache: Cache) -> None:
    before = state(cache)

    @torch.compile(fullgraph=True, backend="eager")
    def function(x: torch.Tensor) -> torch.Tensor:
        try:
            return x + cache["pattern", 5]
        except KeyError:
            return x - 1

    assert torch.equal(function(torch.ones(5)), torch.zeros(5))
    assert state(cache) == before


def test_to_store_in_a_graph_is_to_store_nothing(cache: Cache) -> None:
    before = state(cache)

    @torch.compile(fullgraph=True, backend="eager")
    def function(x: torch.Tensor) -> torch.Tensor:
        cache.put("new", x + 1)
        cache["newer"] = x + 2
        return x * 2

    assert torch.equal(function(torch.ones(5)), torch.full((5,), 2.0))
    assert state(cache) == before


def test_to_ask_for_a_key_in_a_graph_without_breaks_works(cache: Cache) -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if ("pattern", 5) in cache else x - 1

    expected = torch.full((5,), 2.0) if ("pattern", 5) in cache else torch.zeros(5)
    assert torch.equal(function(torch.ones(5)), expected)


def test_what_is_not_compiled_uses_the_cache_between_graphs(cache: Cache) -> None:
    misses = cache.info().misses

    @torch.compiler.disable
    def outside(length: int) -> torch.Tensor:
        return pattern_of(cache, length)

    @torch.compile(backend="eager")
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + outside(5)

    was_warm = ("pattern", 5) in cache
    for _ in range(3):
        assert torch.equal(function(torch.ones(5)), torch.arange(5.0) + 1)
    assert cache.info().misses - misses == int(not was_warm)
    assert_only_real_tensors(cache)


class Layer(torch.nn.Module):
    def __init__(self, cache: Cache, device: str | None) -> None:
        super().__init__()
        self.cache, self.device = cache, device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * pattern_of(self.cache, x.shape[-1], self.device)


@pytest.mark.slow
@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_exported_program_has_the_pattern_in_it(cache: Cache, strict: bool, device: str | None) -> None:
    before = state(cache)
    length = torch.export.Dim("length", min=2, max=1000)
    program = torch.export.export(
        Layer(cache, device), (torch.ones(2, 5),), dynamic_shapes=({1: length},), strict=strict
    )
    for size in LENGTHS:
        assert torch.equal(program.module()(torch.ones(2, size))[1], torch.arange(float(size)))
    assert state(cache) == before


# ------------------------------------------------------------------------------------------------ modes


class Counting(TorchDispatchMode):
    """A mode that does what is asked, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("guard", ["version", "contents"])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_a_fake_tensor_is_given_within_its_mode_alone(warm: bool, guard: Any, device: str | None) -> None:
    cache: Cache = PatternCache(guard=guard)
    if warm:
        pattern_of(cache, 5)
    for _ in range(2):
        with FakeTensorMode():
            assert isinstance(pattern_of(cache, 5, device), FakeTensor)
    assert len(cache) == int(warm)
    assert (cache.info().bypasses, cache.info().hits) == (2, 0)
    assert torch.equal(pattern_of(cache, 5, device), torch.arange(5.0))
    assert_only_real_tensors(cache)


def test_a_fake_tensor_is_given_within_its_mode_without_a_guard() -> None:
    cache: Cache = PatternCache(guard=None)
    pattern_of(cache, 5)
    with FakeTensorMode():
        assert isinstance(pattern_of(cache, 5), FakeTensor)


def test_a_fake_tensor_cannot_be_put(cache: Cache) -> None:
    before = state(cache)
    with FakeTensorMode() as mode:
        fake = torch.ones(3)
        with pytest.raises(ValueError, match="'a' cannot be stored: it has tensors without memory"):
            cache.put("a", fake)
    with pytest.raises(ValueError, match="without memory"):
        cache["a"] = mode.from_tensor(torch.ones(3))
    assert state(cache) == before


def test_a_fake_tensor_that_is_created_outside_of_its_mode_is_rejected() -> None:
    fake = FakeTensorMode().from_tensor(torch.ones(3))
    cache: Cache = PatternCache()
    assert cache.get_or_create("a", lambda: fake) is fake
    assert (len(cache), cache.info().rejections) == (0, 1)


def test_a_dispatch_mode_sees_all_that_is_made_within_it(cache: Cache) -> None:
    before = cache.info()
    for _ in range(2):
        with Counting() as mode:
            pattern_of(cache, 5)
        assert mode.calls > 0
    after = cache.info()
    assert (after.entries, after.creations) == (before.entries, before.creations)
    assert after.bypasses == before.bypasses + 2


def test_what_is_made_under_a_function_mode_alone_is_kept() -> None:
    from torch.overrides import TorchFunctionMode

    class Passing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    cache: Cache = PatternCache()
    with Passing():
        value = pattern_of(cache, 5)
    assert pattern_of(cache, 5) is value


# ------------------------------------------------------------------------------------------------ transforms


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_traced_function_has_the_pattern_in_it(cache: Cache, device: str | None) -> None:
    entries = len(cache)
    for tracing_mode in ("real", "fake", "symbolic"):
        traced = make_fx(lambda x: x + pattern_of(cache, 5, device), tracing_mode=tracing_mode)(torch.ones(5))
        assert torch.equal(traced(torch.ones(5)), torch.arange(5.0) + 1)
    assert len(cache) == entries
    assert cache.info().bypasses == 3
    assert torch.equal(pattern_of(cache, 5), torch.arange(5.0))
    assert_only_real_tensors(cache)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_under_vmap_nothing_is_kept(cache: Cache, device: str | None) -> None:
    entries = len(cache)
    result = torch.vmap(lambda row: row + pattern_of(cache, 5, device))(torch.ones(3, 5))
    assert torch.equal(result, (torch.arange(5.0) + 1).expand(3, 5))
    assert len(cache) == entries
    assert_only_real_tensors(cache)


def test_a_batched_tensor_never_meets_others(cache: Cache) -> None:
    entries = len(cache)
    torch.vmap(lambda row: cache.get_or_create("rows", lambda: row * 2))(torch.ones(3, 5))
    assert "rows" not in cache
    assert len(cache) == entries
    assert cache.info().bypasses == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch says it to itself
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_a_tensor_of_a_transform_never_meets_others(cache: Cache, transform: Callable[..., Any]) -> None:
    entries = len(cache)
    derivative = transform(lambda x: (x * cache.get_or_create("own", lambda: x * 2) * pattern_of(cache, 5)).sum())
    result = derivative(torch.ones(5))
    expected = torch.arange(5.0) * 4
    assert torch.equal(result.diagonal() if result.dim() == 2 else result, expected)
    assert "own" not in cache
    assert len(cache) == entries
    assert cache.info().bypasses > 0


def test_to_put_within_a_transform_stores_nothing_of_it() -> None:

    cache: Cache = PatternCache()

    def function(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(ValueError, match="cannot be stored"):
            cache.put("a", x * 2)
        return (x * 2).sum()

    torch.vmap(function)(torch.ones(3, 5))
    with torch.no_grad():
        torch.func.grad(function)(torch.ones(5))
    assert len(cache) == 0


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace_method` is deprecated:DeprecationWarning")
def test_a_trace_of_torchscript_has_its_own_pattern_in_it(cache: Cache) -> None:
    entries, before = len(cache), cache.info().bypasses
    traced = torch.jit.trace(
        lambda x: x + cache.get_or_create("own", lambda: x * 2),
        torch.ones(5),
        check_trace=False,  # it would run the function again, outside of a trace
    )
    assert torch.equal(traced(torch.full((5,), 3.0)), torch.full((5,), 9.0))
    assert "own" not in cache
    assert len(cache) == entries
    assert cache.info().bypasses > before


# ------------------------------------------------------------------------------------------------ meta


def meta_context() -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = torch.device("meta")
    return context


def test_a_tensor_made_on_meta_is_returned_and_not_kept() -> None:
    cache: Cache = PatternCache()
    for _ in range(2):
        with meta_context():
            assert pattern_of(cache, 5).is_meta
    info = cache.info()
    assert (info.entries, info.rejections, info.creations) == (0, 2, 2)
    assert torch.equal(pattern_of(cache, 5), torch.arange(5.0))


def test_a_real_tensor_is_found_where_meta_is_the_default() -> None:
    cache: Cache = PatternCache()
    value = pattern_of(cache, 5)
    with meta_context():
        assert pattern_of(cache, 5) is value


@pytest.mark.parametrize("device", ["meta", torch.device("meta")], ids=str)
def test_nothing_is_copied_to_meta(cache: Cache, device: Any) -> None:
    with pytest.raises(ValueError, match="meta"):
        pattern_of(cache, 5, device)


# ------------------------------------------------------------------------------------------------ before PyTorch


@pytest.mark.slow
def test_a_cache_that_is_older_than_torch_is_compiled_into_one_graph() -> None:
    script = """
        import sys
        from dilated_pattern_cache import PatternCache

        cache = PatternCache(max_bytes=1000)
        cache.get_or_create("a", lambda: [1, 2, b"bytes"])
        cache["b"] = {"c": 3}
        assert cache.get("b") and cache.info() and cache.snapshot() and repr(cache)
        assert "torch" not in sys.modules and "numpy" not in sys.modules and "asyncio" not in sys.modules

        import torch
        compiled = torch.compile(
            lambda x: x + cache.get_or_create(("t", x.shape[0]), lambda: torch.arange(float(x.shape[0]))),
            fullgraph=True, backend="eager",
        )
        for length in (4, 5, 6):
            assert torch.equal(compiled(torch.ones(length)), torch.arange(float(length)) + 1)
        assert len(cache) == 2 and cache.info().misses == 1
        value = cache.get_or_create("t", lambda: torch.ones(3))
        assert cache["t"] is value
        value.add_(1)
        try:
            cache["t"]
        except RuntimeError as error:
            print(type(error).__name__)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["PatternMutatedError"]
