"""Where PyTorch watches what is made, the pool steps aside: Dynamo, export, dispatch modes, torch.func, jit.trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_memory_pool import MemoryPool

MakePool = Callable[..., MemoryPool]
LENGTHS = (5, 7, 11, 64, 1000)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture(params=["empty", "zeros", "empty_like"])
def doubled(request: pytest.FixtureRequest) -> Callable[..., torch.Tensor]:
    """2 x + 1 by way of a buffer of a pool, got by one of its methods."""

    def function(pool: MemoryPool, x: torch.Tensor) -> torch.Tensor:
        if request.param == "empty_like":
            buffer = pool.empty_like(x)
        else:
            buffer = getattr(pool, request.param)(x.shape, dtype=x.dtype, device=x.device)
        buffer.copy_(x).mul_(2)
        return buffer + 1

    return function


# ------------------------------------------------------------------------------------------------ compiled


def test_one_graph_without_breaks_serves_all_lengths(
    make_on_host: MakePool, doubled: Callable[..., torch.Tensor]
) -> None:
    pool = make_on_host()
    before = pool.statistics()
    counter = CompileCounter()
    compiled = torch.compile(doubled, fullgraph=True, backend=counter)
    for length in LENGTHS:
        x = torch.arange(2.0 * length).view(2, length)
        assert torch.equal(compiled(pool, x), 2 * x + 1)
    assert counter.frame_count == 2  # once for the first length, once for any
    assert pool.statistics() == before


def test_a_pool_that_is_older_than_torch_is_compiled_into_one_graph(
    make_on_host: MakePool, doubled: Callable[..., torch.Tensor]
) -> None:
    pool = make_on_host()
    pool._tensors = None  # as where PyTorch was imported after the pool was made
    counter = CompileCounter()
    compiled = torch.compile(doubled, fullgraph=True, backend=counter)
    for length in LENGTHS:
        x = torch.arange(2.0 * length).view(2, length)
        assert torch.equal(compiled(pool, x), 2 * x + 1)
    assert counter.frame_count == 2
    assert pool.owns(pool.empty(3))  # what tracing made serves eager calls as well


def test_a_pool_that_eager_calls_use_too_is_not_compiled_again(
    make_on_host: MakePool, doubled: Callable[..., torch.Tensor]
) -> None:
    pool = make_on_host()
    counter = CompileCounter()
    compiled = torch.compile(doubled, fullgraph=True, backend=counter, dynamic=True)
    x = torch.arange(6.0).view(2, 3)
    for _ in range(3):
        assert torch.equal(compiled(pool, x), doubled(pool, x))
        pool.empty((3, 4)), pool.empty(0), pool.trim()
    assert counter.frame_count == 1


def test_a_pool_of_a_module_and_a_default_type_compile(make_on_host: MakePool) -> None:
    pool = make_on_host()

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = pool

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pool.empty(x.shape[0]).copy_(x).neg()

    x = torch.arange(5.0)
    assert torch.equal(torch.compile(Layer(), fullgraph=True, backend="aot_eager")(x), -x)


def test_gradients_through_a_compiled_function(make_on_host: MakePool, doubled: Callable[..., torch.Tensor]) -> None:
    pool = make_on_host()
    x = torch.arange(6.0).requires_grad_()
    cotangent = torch.linspace(-1, 1, 6)
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(pool, x), x, cotangent)
    assert torch.equal(gradient, 2 * cotangent)


@pytest.mark.slow
def test_the_default_backend_compiles_it() -> None:
    pool = MemoryPool("host", min_bytes=0)

    def function(x: torch.Tensor) -> torch.Tensor:
        return pool.empty_like(x).copy_(x).mul_(2) + pool.zeros(x.shape)

    # Most of the time would go by with what one small graph has no use for: a look for vector units, headers that are
    # compiled ahead, and processes that wait for more to compile.
    frugal = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False, "compile_threads": 1}
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    with torch._inductor.config.patch(frugal):
        for length in LENGTHS:
            x = torch.arange(float(length))
            assert torch.equal(compiled(x), 2 * x)


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_the_length_open(
    make_on_host: MakePool, doubled: Callable[..., torch.Tensor], strict: bool
) -> None:
    pool = make_on_host()

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return doubled(pool, x)

    dynamic = ({0: torch.export.Dim("length", min=2, max=2000)},)
    exported = torch.export.export(Layer(), (torch.ones(8),), dynamic_shapes=dynamic, strict=strict)
    for length in LENGTHS:
        x = torch.arange(float(length))
        assert torch.equal(exported.module()(x), 2 * x + 1)
    assert pool.statistics().misses == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_function_keeps_no_memory_of_the_pool(
    make_on_host: MakePool, doubled: Callable[..., torch.Tensor]
) -> None:
    pool = make_on_host()
    x = torch.arange(5.0)
    traced = torch.jit.trace(lambda x: doubled(pool, x), (x,))
    one, two = traced(x), traced(x + 1)
    assert torch.equal(one, 2 * x + 1)
    assert torch.equal(two, 2 * x + 3)
    assert pool.statistics().requested_bytes == 0


# ------------------------------------------------------------------------------------------------ modes


def test_under_a_fake_mode_tensors_are_fake(make_on_host: MakePool) -> None:
    pool = make_on_host()
    with FakeTensorMode():
        huge = pool.empty((2**20, 2**20), dtype=torch.bfloat16)
        assert isinstance(huge, FakeTensor)
        assert isinstance(pool.empty_like(huge.t()), FakeTensor)
        assert pool.empty_like(huge.t()).stride() == (1, 2**20)
        assert isinstance(pool.zeros(3), FakeTensor)
    assert pool.statistics().misses == pool.statistics().bypasses == 0
    assert type(pool.empty(3)) is torch.Tensor


def test_another_device_is_refused_where_tensors_are_left_to_torch(make_on_host: MakePool) -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match=r"device: expected cpu, .* got cuda"):
        make_on_host().empty(3, device="cuda")


class Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_mode_that_logs_sees_what_it_sees_of_torch(make_on_host: MakePool) -> None:
    pool = make_on_host()
    with Log() as pooled:
        pool.empty((2, 3)), pool.zeros(4), pool.empty_like(torch.ones(2, 3).t())
    with Log() as plain:
        torch.empty((2, 3)), torch.empty(4).zero_(), torch.empty_like(torch.ones(2, 3).t())
    assert pooled.names == plain.names


# ------------------------------------------------------------------------------------------------ torch.func


def through_a_buffer(empty: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The sum of 2 x sin(x), by way of a buffer that the transforms have to know."""

    def function(x: torch.Tensor) -> torch.Tensor:
        buffer = empty(x.shape, dtype=x.dtype)
        buffer.copy_(x * 2)
        return (buffer * x.sin()).sum()

    return function


TRANSFORMS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "grad-of-grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).pow(2).sum())(x),
    "jvp": lambda f, x: torch.stack(torch.func.jvp(f, (x,), (x.cos(),))),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, of itself
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_transforms_give_what_they_give_with_plain_tensors(
    make_on_host: MakePool, transform: Callable[[Any, torch.Tensor], torch.Tensor]
) -> None:
    x = torch.linspace(-1, 1, 6, dtype=torch.float64)
    pooled = transform(through_a_buffer(make_on_host().empty), x)
    assert torch.equal(pooled, transform(through_a_buffer(torch.empty), x))


def test_vmap_over_buffers_made_from_its_batch(make_on_host: MakePool) -> None:
    pool = make_on_host()
    x = torch.arange(12.0).view(4, 3)

    def function(row: torch.Tensor) -> torch.Tensor:
        return pool.empty_like(row).copy_(row).mul_(2) + pool.zeros(3)

    assert torch.equal(torch.func.vmap(function)(x), 2 * x)
    assert type(pool.empty_like(x)) is torch.Tensor
    assert pool.owns(pool.empty_like(x))
