"""A real device's streams: kernels that are late, graph captures, copies from page-locked memory."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from conftest import MakePool
from gpu_checks import COUNT, EARLY, LATE, LATE_CYCLES, NEXT, bytes_of, is_all, late_fill
from torch.utils.dlpack import from_dlpack

from dilated_memory_pool import MemoryPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_record_stream_keeps_a_late_kernel_from_the_next_owner(make_on_gpu: MakePool) -> None:
    pool, side = make_on_gpu(), torch.cuda.Stream()
    tensor = bytes_of(pool, EARLY)
    address = tensor.data_ptr()
    pool.record_stream(tensor, side)
    late_fill(tensor, side)
    del tensor
    following = bytes_of(pool, NEXT)
    assert following.data_ptr() != address
    assert pool.statistics().waiting_bytes == COUNT
    assert is_all(following, NEXT)
    assert pool.statistics().waiting_bytes == 0
    assert bytes_of(pool).data_ptr() == address


def test_the_default_streams_late_kernel_is_waited_for_too(make_on_gpu: MakePool) -> None:
    pool, side = make_on_gpu(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        tensor = bytes_of(pool, EARLY)
    address = tensor.data_ptr()
    pool.record_stream(tensor, torch.cuda.default_stream())
    torch.cuda.synchronize()
    late_fill(tensor, torch.cuda.default_stream())
    del tensor
    with torch.cuda.stream(side):
        following = bytes_of(pool, NEXT)
        assert following.data_ptr() != address
        assert pool.statistics().waiting_bytes == COUNT
    assert is_all(following, NEXT)
    assert pool.statistics().waiting_bytes == 0


def test_without_record_stream_a_late_kernel_corrupts_the_next_owner(make_on_gpu: MakePool) -> None:
    pool, side = make_on_gpu(), torch.cuda.Stream()
    tensor = bytes_of(pool, EARLY)
    address = tensor.data_ptr()
    late_fill(tensor, side)
    del tensor
    following = bytes_of(pool, NEXT)
    assert following.data_ptr() == address
    assert is_all(following, LATE)


def test_strict_streams_protects_without_record_stream(make_on_gpu: MakePool) -> None:
    pool, side = make_on_gpu(strict_streams=True), torch.cuda.Stream()
    with torch.cuda.stream(side):
        bytes_of(pool)
    tensor = bytes_of(pool, EARLY)
    address = tensor.data_ptr()
    late_fill(tensor, side)
    del tensor
    following = bytes_of(pool, NEXT)
    assert following.data_ptr() != address
    assert is_all(following, NEXT)


def test_each_stream_has_memory_of_its_own(make_on_gpu: MakePool) -> None:
    pool, side = make_on_gpu(), torch.cuda.Stream()
    address = bytes_of(pool).data_ptr()
    with torch.cuda.stream(side):
        other = bytes_of(pool).data_ptr()
        assert other != address
        assert bytes_of(pool).data_ptr() == other
    assert bytes_of(pool).data_ptr() == address
    assert {arena.locality for arena in pool.snapshot().arenas} == {"0", str(side.cuda_stream)}


def test_a_stream_may_be_given_in_many_ways(make_on_gpu: MakePool) -> None:
    pool, side = make_on_gpu(), torch.cuda.Stream()
    streams = [side, side.cuda_stream, torch.cuda.ExternalStream(side.cuda_stream)]
    if find_spec("cupy") is not None:
        cupys = pytest.importorskip("cupy").cuda
        from_external = getattr(cupys.Stream, "from_external", None)  # since CuPy 14, which warns of the other
        streams.append(from_external(side) if from_external else cupys.ExternalStream(side.cuda_stream))
    for stream in streams:
        tensor = bytes_of(pool, EARLY)
        pool.record_stream(tensor, stream)
        late_fill(tensor, side)
        del tensor
        assert pool.statistics().waiting_bytes == COUNT
        torch.cuda.synchronize()
        assert pool.statistics().waiting_bytes == 0
    with pytest.raises(TypeError, match="stream: expected"):
        pool.record_stream(bytes_of(pool), torch.cuda.Event())


def test_at_its_limit_the_pool_waits_for_a_late_kernel(make_on_gpu: MakePool) -> None:
    pool, side = make_on_gpu(limit=COUNT), torch.cuda.Stream()
    tensor = bytes_of(pool, EARLY)
    pool.record_stream(tensor, side)
    late_fill(tensor, side)
    del tensor
    assert is_all(bytes_of(pool, NEXT), NEXT)
    assert pool.statistics().ooms == 0


# ------------------------------------------------------------------------------------------------ capture


def test_a_capture_uses_torchs_memory(make_on_gpu: MakePool) -> None:
    pool = make_on_gpu()
    bytes_of(pool)
    given = torch.full((COUNT,), EARLY, dtype=torch.uint8, device=pool.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = bytes_of(pool)
        output.copy_(given).add_(1)
    assert not pool.owns(output)
    assert pool.statistics().bypasses == 1
    given.fill_(NEXT)
    graph.replay()
    assert is_all(output, NEXT + 1)
    assert pool.owns(bytes_of(pool))


def test_a_block_may_be_made_and_dropped_in_a_capture(make_on_gpu: MakePool) -> None:
    pool = make_on_gpu()
    output = torch.zeros(COUNT, dtype=torch.uint8, device=pool.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block = pool.allocate(COUNT)
        assert not pool.owns(block)
        del block
        output.add_(1)
    graph.replay()
    assert is_all(output, 1)
    assert pool.statistics().bypasses == 1


def test_a_block_of_a_capture_can_be_exported_in_it(make_on_gpu: MakePool) -> None:
    pool = make_on_gpu()
    given = torch.full((COUNT,), EARLY, dtype=torch.uint8, device=pool.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = from_dlpack(pool.allocate(COUNT))
        output.copy_(given).add_(1)
    given.fill_(NEXT)
    graph.replay()
    assert is_all(output, NEXT + 1)


def test_a_capture_goes_on_where_memory_dies_and_is_to_be_given_back(make_on_gpu: MakePool) -> None:
    pool, side = make_on_gpu(), torch.cuda.Stream()
    output = torch.zeros(COUNT, dtype=torch.uint8, device=pool.device)
    owned, recorded = bytes_of(pool), bytes_of(pool)
    pool.record_stream(recorded, side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        del owned, recorded
        assert pool.statistics().allocated_bytes == 2 * COUNT
        assert pool.trim() == 0
        output.add_(1)
    graph.replay()
    assert is_all(output, 1)
    assert pool.statistics().allocated_bytes == 0
    assert pool.trim() > 0


# ------------------------------------------------------------------------------------------------ pinned


def test_pinned_memory_is_page_locked_and_holds_what_is_written(pinned: MemoryPool) -> None:
    tensor = bytes_of(pinned, EARLY)
    assert tensor.is_pinned()
    assert tensor.device.type == "cpu"
    assert is_all(tensor.to("cuda", non_blocking=True), EARLY)


def test_a_copy_from_pinned_memory_does_not_keep_the_host_waiting(pinned: MemoryPool) -> None:
    tensor, copy = late_copy(pinned)
    assert not torch.cuda.current_stream().query()
    assert is_all(copy, EARLY)
    assert tensor.numel() == COUNT


def late_copy(pool: MemoryPool) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor, and what a copy on the current stream makes of it, long after the host has gone on."""
    tensor = bytes_of(pool, EARLY)
    copy = torch.empty(COUNT, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(LATE_CYCLES)
    copy.copy_(tensor, non_blocking=True)
    return tensor, copy


def test_a_queued_copy_reads_the_owner_it_was_queued_for(pinned: MemoryPool) -> None:
    tensor, copy = late_copy(pinned)
    address = tensor.data_ptr()
    del tensor
    following = bytes_of(pinned, NEXT)
    assert following.data_ptr() != address
    assert is_all(copy, EARLY)
    assert bytes_of(pinned).data_ptr() == address


def test_a_queued_copy_on_another_stream_is_waited_for_once_recorded(pinned: MemoryPool) -> None:
    tensor = bytes_of(pinned)
    address, side = tensor.data_ptr(), torch.cuda.Stream()
    copy = torch.empty(COUNT, dtype=torch.uint8, device="cuda")
    pinned.record_stream(tensor.fill_(EARLY), side)
    with torch.cuda.stream(side):
        torch.cuda._sleep(LATE_CYCLES)
        copy.copy_(tensor, non_blocking=True)
    del tensor
    assert bytes_of(pinned, NEXT).data_ptr() != address
    assert is_all(copy, EARLY)


def test_a_copy_still_queued_when_the_pool_closes_is_waited_for() -> None:
    pinned = MemoryPool("pinned", min_bytes=0, arena_bytes=0)
    tensor, copy = late_copy(pinned)
    pinned.close()
    del tensor
    torch.empty(COUNT, dtype=torch.uint8, pin_memory=True).fill_(NEXT)  # may get the same memory
    assert is_all(copy, EARLY)
