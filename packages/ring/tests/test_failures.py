"""Ranks that die, stall, are interrupted or lose their link: who is left raises, says why, and can go on without them.

No time is asserted. A group's timeout is longer than its processes may live, except where the timeout itself is
tested: a rank that is noticed by the timeout alone fails its test.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from processes import SECONDS, Ending, started
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from dilated_ring import ring_attention
from dilated_ring.comm import Comm, Purpose, RecordingComm, Transfer, agree, closing, comm_of
from dilated_ring.errors import PeerError, RingError

pytestmark = pytest.mark.slow

NEVER = 10 * SECONDS  # a group's timeout that no test waits for
STALL = 2.0  # a group's timeout that a test waits for
LARGE = 1_500_000  # float64 values to each peer, 12 MB: more than fits into the sockets' buffers
FORWARD = Purpose("keys and values", "forward", 2, "segment_length 64, dilation_rate 2")
BACKWARD = Purpose("gradients of keys and values", "backward", 2, "segment_length 64, dilation_rate 2")


class Failure(NamedTuple):
    """What a rank raised, and what its group was good for afterwards."""

    text: str
    peers: tuple[int, ...]
    phase: str
    rebuilt: list[int]


def join(rank: int, size: int, store: Path, patience: float = NEVER) -> Comm:
    distributed.init_process_group("gloo", f"file://{store}", timedelta(seconds=patience), size, rank)
    return comm_of(None)


def come_to(place: str, store: Path, *, number: int = 1) -> None:
    """Go on when so many processes have come to this place. None of them is named, none needs a network for it."""
    folder = store.with_name(place)
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()
    wait_until(lambda: len(list(folder.iterdir())) >= number)


def wait_until(done: Callable[[], bool]) -> None:
    while not done():
        time.sleep(0.01)


def shorten_the_timeout() -> None:
    """To the one that is tested. Not from the start: ranks may take longer to find each other."""
    distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=STALL), distributed.group.WORLD)


def start(comm: Comm, purpose: Purpose, count: int = 5) -> tuple[Transfer, torch.Tensor]:
    sent = torch.full((comm.size * count,), comm.rank + 1.0, dtype=torch.float64)
    received = torch.zeros_like(sent)
    counts = [count] * comm.size
    return comm.exchange(received, sent, counts, counts, purpose), received


def exchange(comm: Comm, purpose: Purpose = FORWARD, count: int = 5) -> list[int]:
    """Which rank each part comes from."""
    transfer, received = start(comm, purpose, count)
    transfer.wait()
    parts = received.view(comm.size, count)
    assert (parts == parts[:, :1]).all()
    return [int(value) - 1 for value in parts[:, 0]]


def rebuild(rank: int, survivors: list[int], store: Path) -> list[int]:
    """The same processes, without the lost ones, in a new group."""
    distributed.destroy_process_group()
    comm = join(survivors.index(rank), len(survivors), store.with_name("rebuilt"), SECONDS)
    found = exchange(comm)
    distributed.barrier()
    distributed.destroy_process_group()
    return found


def failure(error: PeerError, rebuilt: list[int]) -> Failure:
    assert isinstance(error.purpose, Purpose)
    return Failure(str(error), error.peers, error.purpose.phase, rebuilt)


def end(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(0)
    raise ValueError("an error of its own")


WHERE = ["agreement", "forward", "on its way", "backward"]


def attend_until(rank: int, store: Path, size: int, victim: int, how: str, where: str) -> Failure:
    """What an attention does with its network; the victim ends at one point of it."""

    def reach(point: str) -> None:
        if rank == victim and point == where:
            end(how)

    comm = join(rank, size, store)
    exchange(comm)
    try:
        reach("agreement")
        agree(comm, {"heads": 4}, length=7)
        reach("forward")
        exchange(comm)
        transfer, received = start(comm, FORWARD, LARGE)
        if rank == victim and where == "on its way":
            neighbour = (rank + 1) % size * LARGE
            while received[neighbour] == 0:  # until some of it has come, and the rest has not
                pass
        reach("on its way")
        transfer.wait()
        reach("backward")
        exchange(comm, BACKWARD)
    except PeerError as error:
        return failure(error, rebuild(rank, [other for other in range(size) if other != victim], store))
    raise AssertionError("nobody ended")


def watch(size: int, work: Callable[..., object], *args: object, tmp_path: Path) -> list[Ending]:
    with started(size, work, tmp_path / "store", size, *args, tmp_path=tmp_path) as running:
        return running.wait()


def failures_of(endings: list[Ending]) -> list[Failure]:
    for ending in endings:
        assert ending.exitcode == 0, ending.told
    return [ending.result for ending in endings]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("how", ["killed", "exit", "exception"])
def test_a_dead_peer_is_named_and_the_others_go_on_without_it(how: str, where: str, tmp_path: Path) -> None:
    endings = watch(4, attend_until, 2, how, where, tmp_path=tmp_path)
    assert endings[2].exitcode == {"killed": -signal.SIGKILL, "exit": 0, "exception": 1}[how]
    found = failures_of([endings[rank] for rank in (0, 1, 3)])
    # With a large message on its way, a rank may have had its part already.
    phases = {"on its way": ["forward", "backward"]}.get(where, [where])
    for rank, (text, peers, its_phase, rebuilt) in zip((0, 1, 3), found, strict=True):
        assert text.startswith(f"rank {rank} of 4, exchanging ")
        assert text.endswith("died, or gave up the group after an error")
        assert peers
        assert its_phase in phases
        assert (its_phase == "agreement") == ("branch 2 (segment_length 64, dilation_rate 2)" not in text)
        assert rebuilt == [0, 1, 2]
    # Who raises later may find others gone too. Who raises first finds the dead one alone.
    assert (2,) in [peers for _, peers, _, _ in found]


@pytest.mark.parametrize("size", [2, 8])
def test_any_number_of_ranks_notices(size: int, tmp_path: Path) -> None:
    endings = watch(size, attend_until, 0, "killed", "forward", tmp_path=tmp_path)
    for _, peers, _, rebuilt in failures_of(endings[1:]):
        assert peers
        assert rebuilt == list(range(size - 1))


def wait_for_the_living(rank: int, store: Path, size: int) -> Failure:
    """Rank 0 does its part and dies; rank 1 comes later; the others then wait for rank 1 alone."""
    comm = join(rank, size, store)
    exchange(comm)
    if rank == 0:
        transfer, _ = start(comm, FORWARD)  # not dropped, which would give up the group
        come_to("parted", store, number=3)
        end("killed")
    try:
        if rank == 1:
            wait_until(store.with_name("dead").exists)
        transfer, received = start(comm, FORWARD)
        if rank != 1:
            wait_until(lambda: received[0].item() != 0)  # rank 0's part
            come_to("parted", store, number=2)
        transfer.wait()
    except PeerError as error:
        come_to("raised", store, number=3)  # who noticed lives on, and still the others need not wait for it
        return failure(error, rebuild(rank, [1, 2, 3], store))
    raise AssertionError("rank 0 did not die")


def test_ranks_that_wait_for_the_living_alone_hear_of_the_dead(tmp_path: Path) -> None:
    with started(4, wait_for_the_living, tmp_path / "store", 4, tmp_path=tmp_path) as running:
        running.wait(0)
        (tmp_path / "dead").touch()
        found = failures_of(running.wait(1, 2, 3))
    assert 0 in found[0].peers
    assert all(1 in peers or 0 in peers for _, peers, _, _ in found)
    assert all(rebuilt == [0, 1, 2] for *_, rebuilt in found)


def lose_one_of_a_mesh(rank: int, store: Path, size: int) -> str:
    """Attend on a mesh that rank 3 leaves. Who has raised lives on until all have, and does not end their wait so."""
    join(rank, size, store)
    mesh = init_device_mesh("cpu", (2, 2))
    tensor = torch.ones(1, 3, 4, 8)
    ring_attention(tensor, tensor, tensor, group=mesh)
    if rank == 3:
        end("killed")
    try:
        ring_attention(tensor, tensor, tensor, group=mesh)
    except PeerError as error:
        told = str(error)
    come_to("raised", store, number=size - 1)
    return told


def test_on_a_mesh_all_hear_of_the_dead_while_the_others_live(tmp_path: Path) -> None:
    endings = watch(4, lose_one_of_a_mesh, tmp_path=tmp_path)
    for told in failures_of(endings[:3]):
        assert "died, or gave up the group after an error" in str(told)


def stall(rank: int, store: Path, size: int, how: str, where: str) -> Failure:
    comm = join(rank, size, store)

    def come_near(point: str) -> None:
        if point == where:
            shorten_the_timeout()
            come_to(point, store, number=size)  # so that it is over here, and nowhere before

    def reach(point: str) -> None:
        if rank != 1 or point != where:
            return
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            wait_until(store.with_name("continue").exists)

    exchange(comm)
    try:
        come_near("agreement")
        reach("agreement")
        agree(comm, {"heads": 4}, length=7)
        come_near("forward")
        transfer, _ = start(comm, FORWARD, LARGE)
        reach("forward")
        transfer.wait()
        come_near("backward")
        reach("backward")
        exchange(comm, BACKWARD)
    except PeerError as error:
        # A group that was given up stays so, and says so at once.
        with pytest.raises(PeerError, match=r"died, or gave up the group|this rank gave up the group"):
            exchange(comm)
        return failure(error, [] if rank == 1 else rebuild(rank, [0, 2], store))
    raise AssertionError("nobody stalled")


@pytest.mark.parametrize(
    ("how", "where"),
    [
        ("stopped", "agreement"),
        ("stopped", "forward"),
        ("stopped", "backward"),
        ("asleep", "agreement"),
        ("asleep", "backward"),  # asleep with its part on the way, a rank holds nobody up
    ],
)
def test_a_stalled_peer_ends_the_wait_at_the_timeout(how: str, where: str, tmp_path: Path) -> None:
    with started(3, stall, tmp_path / "store", 3, how, where, tmp_path=tmp_path) as running:
        found = failures_of(running.wait(0, 2))
        assert running.ending(1).exitcode is None
        (tmp_path / "continue").touch()
        deadline = time.monotonic() + SECONDS
        while running.ending(1).exitcode is None and time.monotonic() < deadline:
            os.kill(running.pid(1), signal.SIGCONT)  # more than once: it may not have stopped yet
            running.wait(1, timeout=0.2)
        (late,) = failures_of(running.wait(1))
    assert any(f"a peer stalled for {STALL:g} s, the group's timeout" in text for text, *_ in found), found
    # With a large message on its way, the stalled one may have sent all of it.
    phases = {"forward": ["forward", "backward"]}.get(where, [where])
    for text, _, phase, rebuilt in found:
        assert phase in phases
        assert re.search("stalled for|gave up the group", text)
        assert rebuilt == [0, 1]
    # The stalled one finds the others gone when it wakes up, unless it was stopped so late that it waits already, and
    # so that its own time is up.
    assert "stalled for" in late.text or ("gave up the group" in late.text and late.peers)


def lose_the_store(rank: int, folder: Path, size: int) -> Failure:
    """As ``init_method="env://"`` without a launcher: rank 0 holds the store that all others are connected to."""
    written = folder.with_name("port")
    if rank == 0:
        store = distributed.TCPStore("localhost", 0, size, True, timedelta(seconds=SECONDS), wait_for_workers=False)
        written.with_suffix(".new").write_text(str(store.port))
        written.with_suffix(".new").rename(written)
    else:
        wait_until(written.exists)
        store = distributed.TCPStore("localhost", int(written.read_text()), size, False, timedelta(seconds=SECONDS))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=NEVER))
    comm = comm_of(None)
    exchange(comm)
    if rank == 0:
        end("killed")
    try:
        exchange(comm)
    except PeerError as error:
        del store
        return failure(error, rebuild(rank, [1, 2], folder))
    raise AssertionError("rank 0 did not die")


def test_the_rank_that_holds_the_store_dies_like_any_other(tmp_path: Path) -> None:
    for _, peers, _, rebuilt in failures_of(watch(3, lose_the_store, tmp_path=tmp_path)[1:]):
        assert peers
        assert rebuilt == [0, 1]


def interrupted(rank: int, store: Path, size: int) -> str:
    comm = join(rank, size, store)
    exchange(comm)
    if rank == 2:
        wait_until(store.with_name("interrupted").exists)
    try:
        transfer, _ = start(comm, FORWARD)
        if rank == 0:
            # By then it waits. Should it come to that later, then the test shows less, and holds.
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        transfer.wait()
    except KeyboardInterrupt:
        store.with_name("interrupted").touch()
        come_to("raised", store, number=size)  # it lives on; the others need not wait for its end
        return "interrupted"
    except PeerError as error:
        come_to("raised", store, number=size)
        return str(error.peers)
    return "no failure"


def test_an_interrupt_gets_through_to_a_rank_that_waits_and_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    endings = watch(3, interrupted, tmp_path=tmp_path)
    assert [ending.exitcode for ending in endings] == [0, 0, 0], endings
    first, *others = [ending.result for ending in endings]
    assert first == "interrupted"
    assert "0" in "".join(others)
    assert all(re.fullmatch(r"\(\d.*\)", text) for text in others), others


def drop(rank: int, store: Path, size: int, how: str) -> tuple[int, ...]:
    """Rank 0 does not see its transfer through, and rank 1 never takes part in it."""
    comm = join(rank, size, store)
    exchange(comm)
    dropped = store.with_name("dropped")
    if rank == 0:
        # What is finalized at the end of a process goes by its age, the youngest first: so after the transfer.
        weakref.finalize(sys.modules[__name__], dropped.touch)
        transfer, _ = start(comm, FORWARD, LARGE)
        if how == "raises":
            raise ValueError("an error of its own")
        if how == "returns":
            sys.modules[__name__].kept = transfer  # type: ignore[attr-defined]
            return ()
        if how == "is held up":
            closing._PATIENCE = -1.0  # time is up before it has begun to close its connections
        del transfer
        dropped.touch()
        if how == "destroys":
            distributed.destroy_process_group()  # which waits for what is pending
        if how == "is held up":
            come_to("raised", store, number=size)  # it lives on: its end is not what the others hear of
        return ()
    if rank == 1:
        wait_until(dropped.exists)
    try:
        exchange(comm, count=LARGE)
    except PeerError as error:
        if how == "is held up":
            come_to("raised", store, number=size)
        return error.peers
    raise AssertionError("nothing was dropped")


@pytest.mark.parametrize("how", ["raises", "returns", "destroys", "deletes", "is held up"])
def test_a_transfer_that_is_dropped_holds_up_neither_its_process_nor_the_others(how: str, tmp_path: Path) -> None:
    spawned = [0] if how in ("raises", "returns") else []
    with started(3, drop, tmp_path / "store", 3, how, tmp_path=tmp_path, spawned=spawned) as running:
        first, *others = running.wait()
    assert first.exitcode == (how == "raises"), first
    assert all(ending.result for ending in others), others
    # gloo's threads now and then abort a process that is at its end, its work done: that is not what is shown here.
    assert all(ending.exitcode in (0, -signal.SIGABRT) for ending in others), others


def give_up_a_subgroup(rank: int, store: Path, size: int) -> list[int]:
    whole = join(rank, size, store)
    group = distributed.new_group([0, 1, 2], timeout=timedelta(seconds=NEVER))
    if rank < 3:
        part = comm_of(group)
        exchange(part)
        dropped = store.with_name("dropped")
        if rank == 1:
            start(part, FORWARD, LARGE)  # and drop it at once
            dropped.touch()
        else:
            # Who sends before it is dropped may have its parts already, and nothing to complain of.
            wait_until(dropped.exists)
            with pytest.raises(PeerError, match=r"ranks? \d.* gave up the group"):
                exchange(part, count=LARGE)
    found = exchange(whole)
    distributed.barrier()
    return found


def test_giving_up_a_group_leaves_other_groups_alone(tmp_path: Path) -> None:
    endings = watch(4, give_up_a_subgroup, tmp_path=tmp_path)
    for ending in sorted(endings, key=lambda ending: ending.at):  # what failed first is told
        assert ending.result == [0, 1, 2, 3], ending.told


# ------------------------------------------------------------------------------------------------ a link that is cut


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture
def two_machines() -> Iterator[list[str]]:
    """Two network namespaces with a link between them, "left" and "right"; gone again afterwards."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("network namespaces need Linux and its root user")
    names = [f"dilated-ring-{os.getpid()}-{side}" for side in ("left", "right")]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("-n", names[0], "link", "add", "left", "type", "veth", "peer", "name", "right", "netns", names[1])
            for number, (name, side) in enumerate(zip(names, ("left", "right"), strict=True), 1):
                ip("-n", name, "address", "add", f"10.87.65.{number}/30", "dev", side)
                ip("-n", name, "link", "set", "dev", side, "up")
                ip("-n", name, "link", "set", "dev", "lo", "up")
        except FileNotFoundError:
            pytest.skip("network namespaces need the command ip")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=SECONDS)


def move_to(name: str, side: str) -> None:
    """Move this thread, and those it starts from now on, into a network namespace; gloo is to use its link."""
    with Path("/run/netns", name).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"setns to {name}")
    os.environ["GLOO_SOCKET_IFNAME"] = side


def lose_the_link(rank: int, store: Path, size: int, names: list[str], where: str) -> Failure:
    side = rank // 2  # ranks 0 and 1 are on the left, rank 2 is on the right
    move_to(names[side], ("left", "right")[side])
    comm = join(rank, size, store)
    exchange(comm)
    shorten_the_timeout()
    come_to("linked", store, number=size)
    kept: list[object] = []  # what is dropped would give up the group, and nobody would wait
    if rank == 2:
        if where == "on its way":
            kept.append(start(comm, FORWARD, LARGE))
        ip("-n", names[1], "link", "set", "dev", "right", "down")
    try:
        exchange(comm, count=LARGE)
        exchange(comm, BACKWARD, count=LARGE)
    except PeerError as error:
        kept.clear()
        # What is left on one side goes on by itself.
        alone = [2] if rank == 2 else [0, 1]
        return failure(error, rebuild(rank, alone, store.with_name(f"side {side}") / "store"))
    raise AssertionError("the link was not cut")


@pytest.mark.parametrize("where", ["before", "on its way"])
def test_a_cut_link_ends_the_wait_at_the_timeout(where: str, two_machines: list[str], tmp_path: Path) -> None:
    for side in (0, 1):
        (tmp_path / f"side {side}").mkdir()
    found = failures_of(watch(3, lose_the_link, two_machines, where, tmp_path=tmp_path))
    for text, *_ in found:
        assert re.search(f"stalled for {STALL:g} s|gave up the group", text)
    assert [rebuilt for *_, rebuilt in found] == [[0, 1], [0, 1], [0]]


def count_on_the_wire(rank: int, store: Path, size: int, names: list[str]) -> list[tuple[int, int]]:
    """What a RecordingComm says came in by the link, and what the link says, of three exchanges."""
    side = ("left", "right")[rank]
    move_to(names[rank], side)
    comm = RecordingComm(join(rank, size, store))

    def arrived() -> int:
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        (line,) = [line for line in lines if line.strip().startswith(f"{side}:")]
        return int(line.split(":")[1].split()[0])

    exchange(comm)
    # Uneven: the right gets twice as much as it sends; what stays on a rank is not sent.
    sizes = [[1000, 2 * LARGE], [LARGE, 3000]]
    sent = torch.ones(sum(sizes[rank]), dtype=torch.float64)
    counts = [row[rank] for row in sizes]
    found = []
    for _ in range(3):
        distributed.barrier()
        noted, before = comm.received_bytes(), arrived()
        comm.exchange(torch.empty(sum(counts), dtype=torch.float64), sent, counts, sizes[rank], FORWARD).wait()
        distributed.barrier()
        found.append((comm.received_bytes() - noted, arrived() - before))
    return found


def test_the_bytes_recorded_are_those_on_the_wire(two_machines: list[str], tmp_path: Path) -> None:
    endings = watch(2, count_on_the_wire, two_machines, tmp_path=tmp_path)
    for ending, expected in zip(endings, (LARGE * 8, 2 * LARGE * 8), strict=True):
        assert ending.exitcode == 0, ending.told
        assert [recorded for recorded, _ in ending.result] == [expected] * 3
        # The network adds headers and the receipts for what went the other way, and leaves nothing out. Where a
        # processor is late, it sends some of it again: not every time.
        on_the_wire = min(arrived for _, arrived in ending.result)
        assert expected <= on_the_wire < 1.1 * expected


# ------------------------------------------------------------------------------------------------ errors that travel


def test_errors_survive_the_way_between_processes() -> None:
    error = PeerError(1, 4, FORWARD, "rank 2 died", [2])
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, RingError)
    assert (str(copy), copy.rank, copy.purpose, copy.peers) == (str(error), 1, FORWARD, (2,))
