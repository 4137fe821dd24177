"""Streams, on a fake device whose work is done when a test says so: what is too late is too late every time."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from typing import Literal, TypeAlias

import pytest
from fake_device import FakeBackend, FakeDevice

from dilated_memory_pool import Block, MemoryPool, PoolLimitError, PoolMemoryError
from dilated_memory_pool.adaptors import SharedBackend

Mode: TypeAlias = Literal["lightweight", "full"]

NBYTES = 8192  # a size class of its own in both modes
EARLY, LATE, NEXT = b"\x01", b"\x02", b"\x03"
both_flavours = pytest.mark.parametrize("addressable", [True, False], ids=["pinned-like", "gpu-like"])


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    device = FakeDevice()
    yield device
    if device.live:
        gc.collect()
    assert device.live == {}, "memory of a pool that is gone"


@pytest.fixture(params=["lightweight", "full"])
def mode(request: pytest.FixtureRequest) -> Mode:
    mode: Mode = request.param
    return mode


def make_pool(
    device: FakeDevice, mode: Mode, *, addressable: bool = False, limit: int | None = None, strict_streams: bool = False
) -> MemoryPool:
    """Arenas of one block, so that both modes reuse the same block."""
    return MemoryPool(
        FakeBackend(device, addressable),
        mode=mode,
        min_bytes=0,
        arena_bytes=NBYTES if mode == "full" else None,
        limit=limit,
        strict_streams=strict_streams,
    )


def write(device: FakeDevice, block: Block, byte: bytes, stream: int) -> None:
    """Queue a kernel that fills the block, wherever its owner is by then."""
    address = block.address
    device.enqueue(lambda: ctypes.memset(address, ord(byte), NBYTES), stream)


def content(block: Block) -> set[bytes]:
    """The different bytes in it."""
    return {bytes([byte]) for byte in ctypes.string_at(block.address, NBYTES)}


# ------------------------------------------------------------------------------------------------ one stream


def test_a_stream_reuses_at_once_what_it_freed_and_order_keeps_it_right(device: FakeDevice, mode: Mode) -> None:
    pool = make_pool(device, mode)
    with device.stream(3):
        first = pool.allocate(NBYTES)
        address = first.address
        write(device, first, EARLY, 3)
        del first
        second = pool.allocate(NBYTES)
    assert second.address == address
    assert device.recorded == [], "its own stream's order is enough"
    write(device, second, NEXT, 3)
    device.run()
    assert content(second) == {NEXT}


@both_flavours
def test_without_queued_work_memory_is_reused_at_once(device: FakeDevice, mode: Mode, addressable: bool) -> None:
    pool = make_pool(device, mode, addressable=addressable)
    address = pool.allocate(NBYTES).address
    assert pool.allocate(NBYTES).address == address


def copy_of_a_block_that_is_written_again(device: FakeDevice, pool: MemoryPool) -> tuple[bool, set[bytes]]:
    """(whether the next owner got the same memory, what a copy read that was queued before)."""
    staging = pool.allocate(NBYTES)
    address, copied = staging.address, bytearray()
    ctypes.memset(address, ord(EARLY), NBYTES)
    device.enqueue(lambda: copied.extend(ctypes.string_at(address, NBYTES)))
    del staging
    following = pool.allocate(NBYTES)
    ctypes.memset(following.address, ord(NEXT), NBYTES)  # by the host: behind no queue
    device.run()
    return following.address == address, {bytes([byte]) for byte in copied}


def test_memory_that_the_host_writes_waits_for_its_own_stream(device: FakeDevice, mode: Mode) -> None:
    pool = make_pool(device, mode, addressable=True)
    reused, copied = copy_of_a_block_that_is_written_again(device, pool)
    assert not reused
    assert copied == {EARLY}
    assert pool.statistics().waiting_bytes == 0
    assert pool.statistics().free_bytes == 2 * NBYTES, "both are free after the copy"


def test_a_copy_would_read_the_next_owners_bytes_without_that_wait(device: FakeDevice, mode: Mode) -> None:
    pool = make_pool(device, mode)  # like memory that only the device writes
    reused, copied = copy_of_a_block_that_is_written_again(device, pool)
    assert reused
    assert copied == {NEXT}


# ------------------------------------------------------------------------------------------------ many streams


@both_flavours
def test_what_one_stream_freed_no_other_gets(device: FakeDevice, mode: Mode, addressable: bool) -> None:
    pool = make_pool(device, mode, addressable=addressable)
    addresses = []
    for stream in (0, 1, 2):
        with device.stream(stream):
            addresses.append(pool.allocate(NBYTES).address)
    assert len(set(addresses)) == 3
    for stream in (2, 0, 1):
        with device.stream(stream):
            assert pool.allocate(NBYTES).address == addresses[stream]
    assert [arena.locality for arena in pool.snapshot().arenas] == [
        str(addresses.index(address)) for address in sorted(addresses)
    ]


def late_write_of_another_stream(device: FakeDevice, pool: MemoryPool, *, record: bool) -> tuple[Block, int]:
    """The next owner of a block that stream 5 still writes to after its death, and that block's address."""
    block = pool.allocate(NBYTES)
    address = block.address
    if record:
        pool.record_stream(block, 5)
    write(device, block, LATE, 5)
    del block
    following = pool.allocate(NBYTES)
    write(device, following, NEXT, 0)
    device.run(0)
    device.run(5)
    return following, address


@both_flavours
def test_record_stream_keeps_a_late_write_from_the_next_owner(
    device: FakeDevice, mode: Mode, addressable: bool
) -> None:
    pool = make_pool(device, mode, addressable=addressable)
    following, address = late_write_of_another_stream(device, pool, record=True)
    assert following.address != address
    assert content(following) == {NEXT}
    assert pool.allocate(NBYTES).address == address, "reused once the work was done"


@both_flavours
def test_without_record_stream_a_late_write_corrupts_the_next_owner(
    device: FakeDevice, mode: Mode, addressable: bool
) -> None:
    pool = make_pool(device, mode, addressable=addressable)
    following, address = late_write_of_another_stream(device, pool, record=False)
    assert following.address == address
    assert content(following) == {LATE}


@both_flavours
def test_memory_waits_for_all_its_streams_and_is_shown_as_waiting(
    device: FakeDevice, mode: Mode, addressable: bool
) -> None:
    pool = make_pool(device, mode, addressable=addressable)
    block = pool.allocate(NBYTES)
    for stream in (1, 2):
        pool.record_stream(block, stream)
        write(device, block, LATE, stream)
    del block
    for finished in (1, 2):
        statistics = pool.statistics()
        assert statistics.waiting_bytes == statistics.allocated_bytes == NBYTES
        assert [span.state for arena in pool.snapshot().arenas for span in arena.spans] == ["waiting"]
        device.run(finished)
    statistics = pool.statistics()
    assert (statistics.waiting_bytes, statistics.allocated_bytes, statistics.free_bytes) == (0, 0, NBYTES)


def test_work_queued_after_record_stream_and_before_death_counts(device: FakeDevice, mode: Mode) -> None:
    pool = make_pool(device, mode)
    block = pool.allocate(NBYTES)
    pool.record_stream(block, 1)
    device.run()
    write(device, block, LATE, 1)
    del block
    assert pool.statistics().waiting_bytes == NBYTES


def test_work_queued_after_death_does_not_count(device: FakeDevice, mode: Mode) -> None:
    pool = make_pool(device, mode)
    block = pool.allocate(NBYTES)
    pool.record_stream(block, 1)
    device.enqueue(int, 1)
    del block
    assert pool.statistics().waiting_bytes == NBYTES
    device.enqueue(int, 1)
    device.run(1, steps=1)
    assert pool.statistics().waiting_bytes == 0
    assert len(device.pending(1)) == 1


def test_the_next_owner_does_not_wait_for_streams_of_the_one_before(device: FakeDevice, mode: Mode) -> None:
    pool = make_pool(device, mode)
    block = pool.allocate(NBYTES)
    pool.record_stream(block, 1)
    address = block.address
    del block
    assert pool.allocate(NBYTES).address == address
    device.enqueue(int, 1)
    assert pool.allocate(NBYTES).address == address
    assert device.recorded == [1]


def test_recording_the_stream_of_the_allocation_changes_nothing(device: FakeDevice, mode: Mode) -> None:
    pool = make_pool(device, mode)
    with device.stream(4):
        block = pool.allocate(NBYTES)
        address = block.address
        pool.record_stream(block, 4)
        write(device, block, EARLY, 4)
        del block
        assert pool.allocate(NBYTES).address == address


@both_flavours
def test_a_view_of_a_tensor_records_for_the_whole_tensor(device: FakeDevice, mode: Mode, addressable: bool) -> None:
    torch = pytest.importorskip("torch")
    pool = make_pool(device, mode, addressable=addressable)
    tensor = pool.empty(NBYTES, dtype=torch.uint8)
    address = tensor.data_ptr()
    pool.record_stream(tensor[NBYTES // 2 :].view(2, -1), 5)
    device.enqueue(lambda: ctypes.memset(address, ord(LATE), NBYTES), 5)
    del tensor
    following = pool.empty(NBYTES, dtype=torch.uint8).fill_(ord(NEXT))
    device.run()
    assert following.data_ptr() != address
    assert following.eq(ord(NEXT)).all()


# ------------------------------------------------------------------------------------------------ strict


@both_flavours
@pytest.mark.parametrize("seen_by", ["allocation", "record_stream"])
def test_strict_streams_protects_from_a_stream_that_was_seen(
    device: FakeDevice, mode: Mode, addressable: bool, seen_by: str
) -> None:
    pool = make_pool(device, mode, addressable=addressable, strict_streams=True)
    if seen_by == "allocation":
        with device.stream(5):
            other = pool.allocate(NBYTES)
    else:
        other = pool.allocate(NBYTES)
        pool.record_stream(other, 5)
    following, address = late_write_of_another_stream(device, pool, record=False)
    assert following.address != address
    assert content(following) == {NEXT}
    assert pool.allocate(NBYTES).address == address


def test_strict_streams_cannot_know_of_a_stream_that_was_never_seen(device: FakeDevice, mode: Mode) -> None:
    pool = make_pool(device, mode, strict_streams=True)
    following, _ = late_write_of_another_stream(device, pool, record=False)
    assert content(following) == {LATE}


def test_a_stream_stays_seen_when_its_memory_is_gone(device: FakeDevice, mode: Mode) -> None:
    pool = make_pool(device, mode, strict_streams=True)
    with device.stream(5):
        pool.reserve(NBYTES)
    pool.trim()
    following, _ = late_write_of_another_stream(device, pool, record=False)
    assert content(following) == {NEXT}


def test_strict_streams_need_streams() -> None:
    with pytest.raises(ValueError, match="strict_streams: expected False, as the host backend has no streams"):
        MemoryPool("host", strict_streams=True)


# ------------------------------------------------------------------------------------------------ out of memory


def waiting_block(device: FakeDevice, pool: MemoryPool) -> None:
    """A block dies that waits for stream 1."""
    block = pool.allocate(NBYTES)
    pool.record_stream(block, 1)
    write(device, block, LATE, 1)


@both_flavours
def test_at_its_limit_the_pool_waits_for_streams_before_it_fails(
    device: FakeDevice, mode: Mode, addressable: bool
) -> None:
    pool = make_pool(device, mode, addressable=addressable, limit=NBYTES)
    waiting_block(device, pool)
    block = pool.allocate(NBYTES)
    write(device, block, NEXT, 0)
    device.run()
    assert content(block) == {NEXT}
    statistics = pool.statistics()
    assert (statistics.ooms, statistics.waiting_bytes, statistics.peak_reserved_bytes) == (0, 0, NBYTES)


def test_at_the_end_of_the_memory_the_pool_waits_for_streams_before_it_fails(mode: Mode) -> None:
    device = FakeDevice(capacity=NBYTES)
    pool = make_pool(device, mode)
    waiting_block(device, pool)
    block = pool.allocate(NBYTES)
    assert device.pending(1) == []
    assert (block.nbytes, device.live_bytes, pool.statistics().ooms) == (NBYTES, NBYTES, 0)


def test_memory_of_another_stream_is_given_up_for_a_limit(device: FakeDevice, mode: Mode) -> None:
    pool = make_pool(device, mode, limit=NBYTES)
    with device.stream(1):
        pool.reserve(NBYTES)
    pool.reserve(NBYTES)
    statistics = pool.statistics()
    assert (statistics.trims, statistics.peak_reserved_bytes) == (1, NBYTES)


def test_what_is_in_use_is_not_waited_for(mode: Mode) -> None:
    device = FakeDevice(capacity=NBYTES)
    pool, limited = make_pool(device, mode), make_pool(FakeDevice(), mode, limit=NBYTES)
    for full, error in ((pool, PoolMemoryError), (limited, PoolLimitError)):
        block = full.allocate(NBYTES)
        full.record_stream(block, 1)
        device.enqueue(int, 1)
        with pytest.raises(error):
            full.allocate(NBYTES)
        assert full.statistics().ooms == 1
    assert len(device.pending(1)) == 2


# ------------------------------------------------------------------------------------------------ capture


@both_flavours
def test_a_tensor_made_in_a_capture_is_torchs(device: FakeDevice, mode: Mode, addressable: bool) -> None:
    pytest.importorskip("torch")
    pool = make_pool(device, mode, addressable=addressable)
    pool.reserve(NBYTES)
    with device.capture():
        tensor = pool.empty(NBYTES // 4)
        zeros = pool.zeros(NBYTES // 4)
    assert not pool.owns(tensor)
    assert not zeros.any()
    statistics = pool.statistics()
    assert (statistics.bypasses, statistics.hits, statistics.misses) == (2, 0, 1)
    assert pool.owns(pool.empty(NBYTES // 4))


@both_flavours
def test_a_block_made_in_a_capture_has_memory_of_its_own(device: FakeDevice, mode: Mode, addressable: bool) -> None:
    pool = make_pool(device, mode, addressable=addressable)
    with device.capture():
        block = pool.allocate(NBYTES)
    ctypes.memset(block.address, 7, NBYTES)
    assert not pool.owns(block)
    assert pool.statistics().bypasses == 1
    assert pool.statistics().reserved_bytes == 0
    assert device.live_bytes == NBYTES
    del block
    assert device.live_bytes == 0


def test_nothing_is_given_back_in_a_capture(device: FakeDevice, mode: Mode) -> None:
    pool = make_pool(device, mode)
    pool.reserve(NBYTES)
    with device.capture():
        assert pool.trim() == 0
        pool.set_limit(0)
    assert device.live_bytes == NBYTES
    assert pool.trim() == NBYTES


def test_memory_that_is_short_in_a_capture_waits_for_no_stream(mode: Mode) -> None:
    device = FakeDevice(capacity=NBYTES)
    shared = SharedBackend(FakeBackend(device, addressable=False), None)
    pool = MemoryPool(shared, mode=mode, arena_bytes=NBYTES if mode == "full" else None)
    shared.attach("pool", pool)
    waiting_block(device, pool)
    with device.capture(), pytest.raises(MemoryError):
        pool.allocate(NBYTES)
    assert len(device.pending(1)) == 1
    assert pool.allocate(NBYTES).nbytes == NBYTES


# ------------------------------------------------------------------------------------------------ exports


def test_an_export_waits_for_what_is_queued_unless_its_consumer_is_behind_it(device: FakeDevice, mode: Mode) -> None:
    pytest.importorskip("torch")
    pool = make_pool(device, mode)
    with device.stream(5):
        block = pool.allocate(NBYTES)
        device.enqueue(int)
        for stream in (-1, 5):
            block.__dlpack__(stream=stream)
            assert len(device.pending(5)) == 1
        block.__dlpack__(stream=6)
        assert device.pending(5) == []


def test_the_host_is_behind_no_stream(device: FakeDevice, mode: Mode) -> None:
    pytest.importorskip("torch")
    block = make_pool(device, mode, addressable=True).allocate(NBYTES)
    with device.stream(5):
        device.enqueue(int)
        block.__dlpack__()
        assert device.pending(5) == []


def test_a_block_can_be_exported_to_the_stream_that_is_captured(device: FakeDevice, mode: Mode) -> None:
    pytest.importorskip("torch")
    pool = make_pool(device, mode)
    with device.stream(5), device.capture():
        pool.allocate(NBYTES).__dlpack__(stream=5)
    assert device.recorded == []


# ------------------------------------------------------------------------------------------------ the end


@both_flavours
def test_close_lets_late_work_finish_before_memory_goes(device: FakeDevice, mode: Mode, addressable: bool) -> None:
    pool = make_pool(device, mode, addressable=addressable)
    waiting_block(device, pool)
    owned = pool.allocate(NBYTES)
    assert pool.statistics().waiting_bytes == NBYTES
    pool.close()
    assert device.pending() == []
    assert device.live_bytes == NBYTES, "what has an owner stays"
    ctypes.memset(owned.address, ord(NEXT), NBYTES)
    assert content(owned) == {NEXT}
    with pytest.raises(ValueError, match="owner: expected memory of this pool"):
        pool.record_stream(owned, 1)
    with pytest.raises(RuntimeError, match="the pool is closed"):
        pool.allocate(NBYTES)
    del owned
    assert device.live == {}


@both_flavours
def test_a_pool_dropped_with_waiting_memory_gives_everything_back(
    device: FakeDevice, mode: Mode, addressable: bool
) -> None:
    pool = make_pool(device, mode, addressable=addressable)
    waiting_block(device, pool)
    assert pool.statistics().waiting_bytes == NBYTES
    del pool
    assert device.live == {}, "without the garbage collector"


# ------------------------------------------------------------------------------------------------ errors


def test_record_stream_refuses_memory_of_another_pool(device: FakeDevice, mode: Mode) -> None:
    pool, other = make_pool(device, mode), make_pool(device, mode)
    with pytest.raises(ValueError, match="owner: expected memory of this pool, got other"):
        pool.record_stream(other.allocate(NBYTES), 1)


def test_record_stream_refuses_a_tensor_of_torchs_own(device: FakeDevice, mode: Mode) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="owner: expected memory of this pool, got other"):
        make_pool(device, mode).record_stream(torch.empty(3), 1)


def test_record_stream_refuses_what_is_no_owner(device: FakeDevice, mode: Mode) -> None:
    with pytest.raises(TypeError, match="owner: expected a tensor or a block, got bytes"):
        make_pool(device, mode).record_stream(b"memory", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", [None, True, 1.5, "1"])
def test_record_stream_refuses_what_is_no_stream(device: FakeDevice, mode: Mode, stream: object) -> None:
    pool = make_pool(device, mode)
    block = pool.allocate(NBYTES)
    with pytest.raises(TypeError, match=r"stream: expected .* got"):
        pool.record_stream(block, stream)
    del block
    assert pool.statistics().waiting_bytes == 0


def test_record_stream_needs_a_backend_with_streams() -> None:
    pool = MemoryPool("host")
    with pytest.raises(ValueError, match="record_stream needs a backend with streams, and host has none"):
        pool.record_stream(pool.allocate(NBYTES), 0)
