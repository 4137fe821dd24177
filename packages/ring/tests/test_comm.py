"""The exchange and its transports: uneven, of any type, between any ranks of any group; what does not fit raises."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import RankFailedError, run_processes, started
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dilated_ring.comm import Comm, ProcessGroupComm, Purpose, RecordingComm, VirtualComm, comm_of, run_ranks
from dilated_ring.comm.virtual import _Hall
from dilated_ring.errors import PeerError, named

PURPOSE = Purpose("keys and values", "forward", 2, "segment_length 64, dilation_rate 2")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
Counts = Sequence[Sequence[int]]


def content(source: int, destination: int, count: int, dtype: torch.dtype) -> Tensor:
    """What one rank sends another: for every pair of ranks something else."""
    numbers = torch.arange(count, dtype=torch.int64) * 7 + 3 * source + 5 * destination + 1
    return (numbers % 3 == 0) if dtype == torch.bool else (numbers % 100).to(dtype)


def send_all(comm: Comm, counts: Counts, dtype: torch.dtype = torch.float64, purpose: Purpose = PURPOSE) -> None:
    """Exchange ``counts[source][destination]`` values, and check what arrives."""
    sent = torch.cat([content(comm.rank, peer, counts[comm.rank][peer], dtype) for peer in range(comm.size)])
    expected = torch.cat([content(peer, comm.rank, counts[peer][comm.rank], dtype) for peer in range(comm.size)])
    received = torch.empty(len(expected), dtype=dtype)
    before = sent.clone()
    comm.exchange(received, sent, [row[comm.rank] for row in counts], counts[comm.rank], purpose).wait()
    assert received.dtype == dtype
    assert torch.equal(received, expected)
    assert torch.equal(sent, before)


def uneven(size: int) -> Counts:
    """Some zero, and all from rank 0 and to the last rank among them."""
    return [
        [0 if source == 0 or destination == size - 1 else 5 * source + 3 * destination for destination in range(size)]
        for source in range(size)
    ]


def in_every_way(comm: Comm) -> int:
    for dtype in DTYPES:
        send_all(comm, uneven(comm.size), dtype)
    send_all(comm, [[0] * comm.size] * comm.size)
    send_all(comm, [[10_007] * comm.size] * comm.size)
    return comm.rank


# ------------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_threads_exchange_anything(size: int) -> None:
    assert run_ranks(size, in_every_way) == list(range(size))


def squares(size: int) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(st.integers(0, 9), min_size=size, max_size=size), min_size=size, max_size=size)


@settings(max_examples=50)
@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_any_counts_will_do(counts: list[list[int]]) -> None:
    run_ranks(len(counts), lambda comm: send_all(comm, counts))


def test_several_exchanges_may_be_on_their_way_and_be_waited_for_in_any_order() -> None:
    def work(comm: Comm) -> list[list[float]]:
        received = [torch.empty(3) for _ in range(3)]
        started = [
            comm.exchange(place, torch.full((3,), 10.0 * number + comm.rank), [1] * 3, [1] * 3, PURPOSE)
            for number, place in enumerate(received)
        ]
        for number in (2, 0, 1):
            started[number].wait()
        return [place.tolist() for place in received]

    assert run_ranks(3, work) == [[[0, 1, 2], [10, 11, 12], [20, 21, 22]]] * 3


def test_what_is_sent_may_require_gradients() -> None:
    def work(comm: Comm) -> Tensor:
        received = torch.empty(2)
        comm.exchange(received, torch.ones(2, requires_grad=True), [1, 1], [1, 1], PURPOSE).wait()
        return received

    assert not any(received.requires_grad for received in run_ranks(2, work))


@pytest.mark.parametrize(
    ("received", "sent", "received_counts", "sent_counts", "message"),
    [
        (torch.empty(4), torch.empty(4).half(), [2, 2], [2, 2], "received, sent: expected one dtype"),
        (torch.empty(2, 2), torch.empty(4), [2, 2], [2, 2], "received: expected a flat contiguous tensor"),
        (torch.empty(4), torch.empty(8)[::2], [2, 2], [2, 2], "sent: expected a flat contiguous tensor"),
        (torch.empty(4), torch.empty(4), [2, 3], [2, 2], "received_counts: expected 2 counts that sum to 4, got"),
        (torch.empty(4), torch.empty(4), [2, 2], [4], "sent_counts: expected 2 counts that sum to 4, got"),
        (torch.empty(4), torch.empty(4), [2, 2], [-1, 5], "sent_counts: expected 2 counts that sum to 4, got"),
        (torch.empty(4), torch.empty(4), [2, 2], [], "sent_counts: expected 2 counts that sum to 4, got"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    received: Tensor, sent: Tensor, received_counts: list[int], sent_counts: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_ranks(2, lambda comm: comm.exchange(received, sent, received_counts, sent_counts, PURPOSE))


def exchange_differently(comm: Comm, dtype: torch.dtype = torch.float64, count: int = 2, what: str = "keys") -> None:
    buffers = torch.zeros(2, 2 * count, dtype=dtype)
    comm.exchange(buffers[0], buffers[1], [count] * 2, [count] * 2, Purpose(what, "forward")).wait()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"count": 3}, r"sends 3 of torch.float64, expected 2 of torch.float64|sends 2 of .*, expected 3 of"),
        ({"dtype": torch.float32}, r"sends 2 of torch.float32, expected 2 of torch.float64|sends .*64, expected .*32"),
        ({"what": "values"}, "rank 1 sends values, forward|rank 0 sends keys, forward"),
    ],
)
def test_threads_notice_what_a_network_does_not(others: dict[str, object], message: str) -> None:
    def work(comm: Comm) -> None:
        exchange_differently(comm, **(others if comm.rank == 1 else {}))  # type: ignore[arg-type]

    with pytest.raises(PeerError, match=message):
        run_ranks(2, work)


def test_a_thread_that_never_waits_is_noticed() -> None:
    def work(comm: Comm) -> None:
        transfer = comm.exchange(torch.empty(2), torch.ones(2), [1, 1], [1, 1], PURPOSE)
        if comm.rank == 0:
            transfer.wait()

    with pytest.raises(PeerError, match=r"rank 1 of 2, .* never waited for what rank \d sends"):
        run_ranks(2, work)


def test_a_thread_that_stalls_is_named() -> None:
    failed = threading.Event()

    def work(comm: Comm) -> None:
        if comm.rank == 1:
            failed.wait(60)
            return
        try:
            send_all(comm, [[1, 1], [1, 1]])
        finally:
            failed.set()

    with pytest.raises(PeerError, match=r"rank 0 of 2, .*branch 2.*: rank 1 sent nothing in 0.1 s"):
        run_ranks(2, work, timeout=0.1)


def test_what_came_while_a_thread_was_held_up_is_taken() -> None:
    hall = _Hall(2, timeout=60.0)

    class HeldUp(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            hall.put(0, 1, [torch.zeros(1), torch.ones(1)], PURPOSE)
            return False  # and time is up

    hall.changed = HeldUp()
    assert hall.take(0, 1, 1, PURPOSE).item() == 1


def test_the_first_thread_to_fail_is_the_one_that_is_heard() -> None:
    def work(comm: Comm) -> None:
        if comm.rank == 2:
            raise KeyError("an error of its own")
        send_all(comm, [[1] * 3] * 3)

    with pytest.raises(KeyError, match="an error of its own"):
        run_ranks(3, work)


def test_the_record_is_what_passes_between_ranks() -> None:
    def work(comm: Comm) -> list[object]:
        recording = RecordingComm(comm)
        send_all(recording, [[9, 1, 2], [3, 9, 4], [5, 6, 9]], torch.float32)
        send_all(recording, [[7] * 3] * 3, torch.float64, Purpose("gradients", "backward", 0))
        whole, forward, first = (
            recording.received_bytes(),
            recording.received_bytes("forward"),
            recording.received_bytes(branch=0),
        )
        assert recording.received_bytes("forward", 0) == 0
        return [recording.records[0].received, recording.records[0].sent, whole, forward, first]

    assert run_ranks(3, work)[1] == [(4, 0, 24), (12, 0, 16), 28 + 112, 28, 112]


def test_ranks_in_words() -> None:
    assert [named(ranks) for ranks in ([2], [0, 1], [0, 2], [0, 1, 2, 4, 6, 7])] == [
        "rank 2",
        "ranks 0-1",
        "ranks 0 and 2",
        "ranks 0-2, 4 and 6-7",
    ]


# ------------------------------------------------------------------------------------------------ groups


def over_the_default_group(rank: int) -> None:
    comm = comm_of(None)
    assert isinstance(comm, ProcessGroupComm)
    assert (comm.rank, comm.size, comm.device) == (rank, distributed.get_world_size(), torch.device("cpu"))
    in_every_way(comm)
    # Several on their way at once, waited for in another order.
    received = [torch.empty(comm.size) for _ in range(3)]
    ones = [1] * comm.size
    transfers = [
        comm.exchange(place, torch.full((comm.size,), 10.0 * number + rank), ones, ones, PURPOSE)
        for number, place in enumerate(received)
    ]
    for number in (2, 0, 1):
        transfers[number].wait()
    expected = torch.arange(comm.size)
    assert all(torch.equal(place, expected + 10 * number) for number, place in enumerate(received))
    # From and to tensors that autograd knows.
    sent = torch.ones(comm.size, requires_grad=True)
    comm.exchange(received[0], sent, ones, ones, PURPOSE).wait()
    assert not received[0].requires_grad
    # What does not fit is refused here, and the group is as good as before.
    with pytest.raises(ValueError, match="sent_counts: expected"):
        comm.exchange(received[0], torch.empty(3), ones, [1] * (comm.size + 1), PURPOSE)
    with pytest.raises(ValueError, match="sent: expected a flat contiguous tensor"):
        comm.exchange(received[0], torch.empty(2 * comm.size + 2)[::2], ones, ones, PURPOSE)
    in_every_way(RecordingComm(comm))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_processes_exchange_anything(size: int, tmp_path: Path) -> None:
    run_processes(size, over_the_default_group, tmp_path=tmp_path)


def over_other_groups(rank: int) -> None:
    group = distributed.new_group([1, 3])
    if rank in (1, 3):
        comm = comm_of(group)
        assert (comm.rank, comm.size) == (rank // 2, 2)
        in_every_way(comm)
    else:
        with pytest.raises(ValueError, match="group: expected a group that this process belongs to"):
            comm_of(group)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    for name, number in (("data", rank // 2), ("sequence", rank % 2)):
        comm = comm_of(mesh[name])
        assert (comm.rank, comm.size) == (number, 2)
        in_every_way(comm)
    with pytest.raises(ValueError, match=r"expected one dimension of a mesh, got 2: \('data', 'sequence'\)"):
        comm_of(mesh)
    part = DeviceMesh("cpu", [2, 0])
    if rank in (0, 2):
        assert comm_of(part).size == 2
    else:
        with pytest.raises(ValueError, match=r"belongs to, got a mesh of ranks \[2, 0\]"):
            comm_of(part)


@pytest.mark.slow
def test_ranks_are_numbered_within_their_group(tmp_path: Path) -> None:
    run_processes(4, over_other_groups, tmp_path=tmp_path)


def test_a_comm_is_its_own() -> None:
    def work(comm: Comm) -> bool:
        recording = RecordingComm(comm)
        return comm_of(comm) is comm and comm_of(recording) is recording and isinstance(comm, VirtualComm)

    assert run_ranks(2, work) == [True, True]


def test_without_torch_distributed_a_group_is_asked_for() -> None:
    with pytest.raises(RuntimeError, match="group: expected a process group where torch"):
        comm_of(None)


@pytest.mark.parametrize("wrong", ["nccl", 4, [0, 1], object(), ProcessGroupComm])
def test_what_is_no_group_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="group: expected a ProcessGroup, a DeviceMesh, a Comm or None, got"):
        comm_of(wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ the helper


def fail(rank: int, how: str) -> None:
    if rank == 1:
        if how == "raises":
            raise KeyError("an error of its own")
        if how == "crashes":
            os.abort()
        time.sleep(1000)
    distributed.barrier()


@pytest.mark.slow
def test_the_first_process_to_fail_is_the_one_that_is_heard(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="an error of its own") as caught:
        run_processes(3, fail, "raises", tmp_path=tmp_path)
    assert "rank 1 of 3 ended with exit code 1" in str(caught.value.__cause__)
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 of 2 ended with exit code -6.*in fail"):
        run_processes(2, fail, "crashes", tmp_path=tmp_path)


@pytest.mark.slow
def test_a_process_that_hangs_says_where(tmp_path: Path) -> None:
    for seconds in (1.0, 10.0, 100.0):
        with started(2, fail, "hangs", tmp_path=tmp_path, timeout=seconds) as running:
            (ending,) = running.wait(1)
        assert ending.exitcode == 1
        if "in fail" in ending.told:  # a process that was late is asked before it hangs
            return
    raise AssertionError(ending.told)
