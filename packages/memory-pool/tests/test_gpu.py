"""A real device: tensors, limits, and what a fork or the end of the interpreter must leave alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from conftest import MakePool
from gpu_checks import COUNT, EARLY, LATE, LATE_CYCLES, NEXT, SECONDS, bytes_of, is_all, late_fill

from dilated_memory_pool import MemoryPool, PoolLimitError, PoolMemoryError
from dilated_memory_pool.adaptors import LimitingAdaptor, SharedBackend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("mode", ["lightweight", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_tensors_hold_what_is_written_to_them(make_on_gpu: MakePool, mode: str, dtype: torch.dtype) -> None:
    pool = make_on_gpu(mode=mode)
    wanted = torch.randint(0, 2, (257, 129), generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor = pool.empty(wanted.shape, dtype=dtype)
    assert (tensor.device, tensor.dtype, tensor.shape) == (torch.device(pool.device), dtype, wanted.shape)
    assert tensor.is_contiguous()
    tensor.copy_(wanted)
    assert torch.equal(tensor.cpu(), wanted)
    assert pool.owns(tensor)


def test_memory_is_reused_by_the_next_tensor(make_on_gpu: MakePool) -> None:
    pool = make_on_gpu(arena_bytes=COUNT)
    address = bytes_of(pool).data_ptr()
    assert bytes_of(pool).data_ptr() == address
    assert pool.statistics().reserved_bytes == COUNT


def test_many_threads_may_grow_a_pool_at_once(make_on_gpu: MakePool) -> None:
    pool, start = make_on_gpu(mode="lightweight"), threading.Barrier(8)
    kept: list[torch.Tensor] = []

    def work(number: int) -> None:
        start.wait(SECONDS)
        kept.extend(bytes_of(pool, number) for _ in range(8))

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert len({tensor.data_ptr() for tensor in kept}) == 64, "an error in a thread leaves fewer"
    assert pool.statistics().misses == 64
    torch.cuda.synchronize()
    assert sorted(int(tensor[-1]) for tensor in kept) == sorted(8 * list(range(8)))


class Twice(torch.autograd.Function):
    """Doubles, in a pool's memory on the way back too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, pool: MemoryPool) -> torch.Tensor:
        ctx.pool = pool
        return pool.empty_like(x).copy_(x).mul_(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        [gradient] = gradients
        return ctx.pool.empty_like(gradient).copy_(gradient).mul_(2), None


def test_the_backward_pass_draws_from_the_stream_of_the_forward_pass(make_on_gpu: MakePool) -> None:
    pool, side = make_on_gpu(), torch.cuda.Stream()
    x = torch.arange(1024.0, device=pool.device, requires_grad=True)
    cotangent = torch.arange(1024.0, device=pool.device).flip(0)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        Twice.apply(x, pool).backward(cotangent)
    torch.cuda.synchronize()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * cotangent)
    assert {arena.locality for arena in pool.snapshot().arenas} == {str(side.cuda_stream)}
    assert pool.statistics().hits + pool.statistics().misses == 2


def test_what_autograd_saved_stays_out_of_the_pool(make_on_gpu: MakePool) -> None:
    pool = make_on_gpu()
    numbers = torch.randint(-8, 8, (3, 64, 64), generator=torch.Generator().manual_seed(0)).double()  # exact products
    kept, weight, cotangent = numbers.to(pool.device)
    weight.requires_grad_()
    given = pool.empty(kept.shape, dtype=kept.dtype).copy_(kept)
    output = given @ weight
    del given
    pool.empty(kept.shape, dtype=kept.dtype).fill_(LATE)
    output.backward(cotangent)
    assert weight.grad is not None
    assert torch.equal(weight.grad, kept.T @ cotangent)


def test_a_pool_can_be_of_any_device(make_on_gpu: MakePool) -> None:
    last = torch.cuda.device_count() - 1
    pool = make_on_gpu(device=last)
    assert pool.device == f"cuda:{last}"
    assert bytes_of(pool, EARLY).device.index == last


def test_a_device_that_is_none_is_an_error(make_on_gpu: MakePool) -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"device: expected one of .*, got {count}"):
        make_on_gpu(device=count)


# ------------------------------------------------------------------------------------------------ limits


def backend_of(pool: MemoryPool) -> Any:
    """Another backend of its kind."""
    return type(pool.backend)(0)  # type: ignore[call-arg]


def test_two_pools_share_a_budget(make_on_gpu: MakePool) -> None:
    budget = LimitingAdaptor(backend_of(make_on_gpu()), 3 * COUNT)
    first, second = MemoryPool(budget, min_bytes=0, arena_bytes=0), MemoryPool(budget, min_bytes=0, arena_bytes=0)
    budget.reclaim_from(first, second)
    first.reserve(2 * COUNT)
    kept = bytes_of(second, EARLY), bytes_of(second, NEXT)
    assert (first.statistics().reserved_bytes, budget.used_bytes) == (0, 2 * COUNT)
    with pytest.raises(PoolMemoryError) as error:
        first.allocate(2 * COUNT)
    assert "shared by the pools on it is used up" in str(error.value.__cause__)
    assert is_all(kept[0], EARLY)
    assert is_all(kept[1], NEXT)


def test_a_pool_waits_for_late_work_on_memory_that_another_freed(make_on_gpu: MakePool) -> None:
    shared, side = SharedBackend(backend_of(make_on_gpu()), COUNT), torch.cuda.Stream()
    first, second = (MemoryPool(shared, min_bytes=0, arena_bytes=0) for _ in range(2))
    shared.attach("first", first)
    shared.attach("second", second)
    tensor = bytes_of(first, EARLY)
    shared.record_stream(first, tensor, side)
    late_fill(tensor, side)
    del tensor
    assert is_all(bytes_of(second, NEXT), NEXT)
    assert first.statistics().reserved_bytes == 0


def test_a_limit_is_an_error_of_its_own(make_on_gpu: MakePool) -> None:
    pool = make_on_gpu(limit=COUNT)
    kept = bytes_of(pool)
    with pytest.raises(PoolLimitError):
        bytes_of(pool)
    assert kept.numel() == COUNT


def test_a_full_device_is_a_memory_error_and_the_pool_goes_on(make_on_gpu: MakePool) -> None:
    pool = make_on_gpu()
    assert pool.backend.total_bytes == torch.cuda.mem_get_info()[1]
    with pytest.raises(PoolMemoryError) as error:
        pool.allocate(2 * pool.backend.total_bytes)
    assert isinstance(error.value.__cause__, MemoryError)
    assert pool.statistics().ooms == 1
    assert is_all(bytes_of(pool, EARLY), EARLY)


def test_trimmed_memory_serves_another_size_when_the_device_is_nearly_full(make_on_gpu: MakePool) -> None:
    pool = make_on_gpu(size_classes="exact")
    ninth = torch.cuda.mem_get_info()[0] // 9
    for parts in (4, 6):  # the second size is not served from the memory of the first, and does not fit beside it
        pool.allocate(parts * ninth)
    statistics = pool.statistics()
    assert (statistics.ooms, statistics.misses, statistics.trims) == (0, 2, 1)


def test_close_gives_device_memory_back(make_on_gpu: MakePool) -> None:
    pool = make_on_gpu()
    kept = bytes_of(pool, EARLY)
    pool.close()
    assert is_all(kept, EARLY)
    before = torch.cuda.memory_allocated() if pool.backend.name == "torch" else torch.cuda.mem_get_info()[0]
    del kept
    after = torch.cuda.memory_allocated() if pool.backend.name == "torch" else torch.cuda.mem_get_info()[0]
    assert abs(after - before) >= COUNT


# ------------------------------------------------------------------------------------------------ processes


def output_of(program: str) -> str:
    """What a new Python prints, its errors included."""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS, check=False, env=os.environ
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


@pytest.mark.parametrize("backend", ["cupy", "torch", "pinned"])
def test_the_end_of_the_interpreter_is_quiet(backend: str) -> None:
    if backend == "cupy":
        pytest.importorskip("cupy")
    program = f"""if True:
        import torch
        from dilated_memory_pool import MemoryPool
        pool = MemoryPool({backend!r}, min_bytes=0)
        kept, waiting = pool.empty(1000).fill_(1), pool.empty(1000)
        cycle = [pool.allocate(1000), pool.empty(1000)]
        cycle.append(cycle)
        side = torch.cuda.Stream()
        pool.record_stream(waiting, side)
        with torch.cuda.stream(side):
            torch.cuda._sleep({LATE_CYCLES})
        del waiting
        module = torch.nn.Module()
        module.kept = kept[1:]
        torch.of_a_module_that_goes_last = module
    """
    assert output_of(program) == ""


@pytest.mark.parametrize("backend", ["cupy", "torch", "pinned"])
def test_a_forked_child_leaves_the_parents_memory_alone(backend: str) -> None:
    if backend == "cupy":
        pytest.importorskip("cupy")
    program = f"""if True:
        import gc, os, torch, warnings
        warnings.simplefilter("ignore")
        from dilated_memory_pool import MemoryPool
        pool = MemoryPool({backend!r}, min_bytes=0)
        kept = pool.empty(1000).fill_(1)
        pool.reserve("1MiB")
        child = os.fork()
        if child == 0:
            del kept, pool
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert kept.sum().item() == 1000
        assert pool.empty(1000).fill_(2).sum().item() == 2000
    """
    assert output_of(program) == ""
