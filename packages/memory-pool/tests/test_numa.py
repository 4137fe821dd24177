"""NUMA: topologies from trees such as sysfs has, real threads on real CPUs, and real memory bound to node 0."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilated_memory_pool import numa
from dilated_memory_pool.numa import Numa, Topology

PAGE = mmap.PAGESIZE
PAGES = 8
ONE_NODE = Topology((0,), {})
TWO_NODES = Topology((0, 1), {0: 0, 1: 1})
MPOL_F_ADDR = 2  # linux/mempolicy.h: get_mempolicy tells of an address, not of the thread
MAX_NODES = 1024  # the most that a kernel can be built for; get_mempolicy wants room for all of its own

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
binding = pytest.mark.skipif(bool(Numa(ONE_NODE).binding_reason), reason=Numa(ONE_NODE).binding_reason)


def add_node(root: Path, node: int, cpulist: str, *, kilobytes: int | None = 1024, distance: str = "") -> None:
    folder = root / f"node{node}"
    folder.mkdir()
    (folder / "cpulist").write_text(cpulist + "\n")
    if distance:
        (folder / "distance").write_text(distance + "\n")
    if kilobytes is not None:
        (folder / "meminfo").write_text(
            f"Node {node} MemTotal:       {kilobytes} kB\nNode {node} MemFree:        {kilobytes} kB\n"
        )


@pytest.fixture
def memory() -> Iterator[int]:
    """The address of private pages that nobody touched yet."""
    with mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        start = ctypes.c_char.from_buffer(pages)
        yield ctypes.addressof(start)
        del start  # pages under a buffer cannot be closed


@pytest.fixture
def fresh_lookup() -> Iterator[None]:
    """Libnuma is looked up again, within the test and after it."""
    numa._libnuma.cache_clear()
    yield
    numa._libnuma.cache_clear()


def policy(address: int) -> tuple[int, set[int]]:
    """The policy of the memory at an address, and its nodes, as the kernel tells them."""
    mode, mask = ctypes.c_int(-1), (ctypes.c_ulong * (MAX_NODES // numa.MASK_BITS))()
    get_mempolicy = ctypes.CDLL("libnuma.so.1").get_mempolicy
    got = get_mempolicy(
        ctypes.byref(mode), mask, ctypes.c_ulong(MAX_NODES), ctypes.c_void_p(address), ctypes.c_ulong(MPOL_F_ADDR)
    )
    assert got == 0
    return mode.value, {bit for bit in range(MAX_NODES) if mask[bit // numa.MASK_BITS] >> bit % numa.MASK_BITS & 1}


# ------------------------------------------------------------------------------------------------ topology


def test_nodes_and_their_cpus_are_read(tmp_path: Path) -> None:
    add_node(tmp_path, 0, "0-1,4")
    add_node(tmp_path, 1, "2-3,5,7-8")
    (tmp_path / "online").write_text("0-1\n")
    (tmp_path / "power").mkdir()
    assert Topology.read(tmp_path) == Topology((0, 1), {0: 0, 1: 0, 4: 0, 2: 1, 3: 1, 5: 1, 7: 1, 8: 1})


def test_nodes_are_ordered_by_number_not_by_name(tmp_path: Path) -> None:
    for node in (10, 2, 0):
        add_node(tmp_path, node, str(node))
    assert Topology.read(tmp_path) == Topology((0, 2, 10), {0: 0, 2: 2, 10: 10})


@pytest.mark.parametrize("kilobytes", [None, 0], ids=["no-meminfo", "zero"])
def test_cpus_of_a_node_without_memory_go_to_the_nearest_that_has_some(tmp_path: Path, kilobytes: int | None) -> None:
    # Numbers leave gaps, and a row of distances has a number for each node online: the second one is node 4's.
    add_node(tmp_path, 0, "0", distance="10 30 20 40")
    add_node(tmp_path, 4, "1", distance="30 10 40 20")
    add_node(tmp_path, 5, "2", kilobytes=kilobytes, distance="20 15 10 12")
    add_node(tmp_path, 9, "3", kilobytes=kilobytes, distance="40 40 12 10")
    assert Topology.read(tmp_path) == Topology((0, 4), {0: 0, 1: 4, 2: 4, 3: 0})


@pytest.mark.parametrize("distance", ["", "10 20", "near far 10"], ids=["absent", "short", "words"])
def test_without_distances_the_lowest_node_with_memory_stands_in(tmp_path: Path, distance: str) -> None:
    add_node(tmp_path, 0, "0", kilobytes=0, distance=distance)
    add_node(tmp_path, 1, "1")
    add_node(tmp_path, 2, "2")
    assert Topology.read(tmp_path) == Topology((1, 2), {0: 1, 1: 1, 2: 2})


def test_a_node_of_memory_alone_is_a_node(tmp_path: Path) -> None:
    add_node(tmp_path, 0, "0-1")
    add_node(tmp_path, 1, "")
    assert Topology.read(tmp_path) == Topology((0, 1), {0: 0, 1: 0})


def test_an_absent_folder_is_one_node(tmp_path: Path) -> None:
    assert Topology.read(tmp_path / "hidden") == ONE_NODE


def test_a_folder_without_nodes_is_one_node(tmp_path: Path) -> None:
    assert Topology.read(tmp_path) == ONE_NODE


def test_nodes_that_all_lack_memory_are_one_node(tmp_path: Path) -> None:
    add_node(tmp_path, 0, "0", kilobytes=None)
    add_node(tmp_path, 1, "1", kilobytes=None)
    assert Topology.read(tmp_path) == ONE_NODE


def test_a_list_of_cpus_that_makes_no_sense_is_one_node(tmp_path: Path) -> None:
    add_node(tmp_path, 0, "0")
    add_node(tmp_path, 1, "all of them")
    assert Topology.read(tmp_path) == ONE_NODE


def test_an_unreadable_list_of_cpus_is_one_node(tmp_path: Path) -> None:
    add_node(tmp_path, 0, "0")
    add_node(tmp_path, 1, "1")
    (tmp_path / "node1" / "cpulist").unlink()
    (tmp_path / "node1" / "cpulist").mkdir()
    assert Topology.read(tmp_path) == ONE_NODE


@given(
    homes=st.dictionaries(st.integers(0, 300), st.sampled_from([0, 3, 11])),
    ranges=st.sets(st.integers(0, 300)),
)
def test_any_spread_of_cpus_is_read_back(homes: dict[int, int], ranges: set[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for node in (0, 3, 11):
            cpus = sorted(cpu for cpu, home in homes.items() if home == node)
            add_node(Path(folder), node, ",".join(f"{cpu}-{cpu}" if cpu in ranges else str(cpu) for cpu in cpus))
        assert Topology.read(Path(folder)) == Topology((0, 3, 11), homes)


@pytest.mark.skipif(not numa.SYSFS.is_dir(), reason=f"needs {numa.SYSFS}")
def test_every_cpu_of_this_process_has_a_node() -> None:
    topology = Topology.read()
    assert topology.node_of_cpu.keys() >= os.sched_getaffinity(0)
    assert set(topology.nodes) >= set(topology.node_of_cpu.values())


# ------------------------------------------------------------------------------------------------ threads


def test_this_machine_is_the_default() -> None:
    assert Numa().topology == Topology.read()
    assert Numa().current_node() in Numa().topology.nodes


@linux
def test_two_nodes_with_cpus_are_active() -> None:
    assert Numa(TWO_NODES).active
    assert Numa(TWO_NODES).reason == ""


@pytest.mark.parametrize(
    ("topology", "home", "reason"),
    [
        (ONE_NODE, 0, "one NUMA node on this machine"),
        (Topology((3,), {0: 3}), 3, "one NUMA node on this machine"),
        (Topology((0, 1), {0: 1, 1: 1}), 1, "all CPUs of this machine belong to one NUMA node"),
    ],
    ids=["one", "one-that-is-not-0", "memory-alone"],
)
def test_without_a_choice_the_only_node_is_current(topology: Topology, home: int, reason: str) -> None:
    idle = Numa(topology)
    assert not idle.active
    assert idle.reason == f"{reason}: there is nothing to choose between"
    assert idle.current_node() == home


def test_without_sched_getcpu_the_first_node_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "_sched_getcpu", lambda: None)
    assert not Numa(TWO_NODES).active
    assert "sched_getcpu" in Numa(TWO_NODES).reason
    assert Numa(TWO_NODES).current_node() == 0


@pytest.mark.parametrize("error", [AttributeError, TypeError], ids=["macos", "windows"])
def test_a_system_may_lack_sched_getcpu(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    class Lacking:
        def __init__(self, name: str | None) -> None: ...

        def __getattr__(self, name: str) -> None:
            raise error

    monkeypatch.setattr(ctypes, "PyDLL", Lacking)
    assert numa._sched_getcpu() is None


@linux
def test_each_thread_has_the_node_of_its_cpu() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    node_of_cpu = {cpu: cpu % 2 for cpu in cpus} | {max(cpus) + 1: (max(cpus) + 1) % 2}  # two nodes, be it for one CPU
    threads = Numa(Topology((0, 1), node_of_cpu))
    assert threads.active

    def node_on(cpu: int) -> int:
        os.sched_setaffinity(0, {cpu})  # of the calling thread alone
        return threads.current_node()

    for cpu in cpus:
        with ThreadPoolExecutor(max_workers=1) as worker:
            assert worker.submit(node_on, cpu).result() == node_of_cpu[cpu]


@linux
def test_a_cpu_that_the_topology_lacks_counts_as_the_first_nodes() -> None:
    beyond = 1 << 20
    assert Numa(Topology((2, 5), {beyond: 5, beyond + 1: 2})).current_node() == 2


# ------------------------------------------------------------------------------------------------ memory


@binding
def test_untouched_memory_is_on_no_node(memory: int) -> None:
    assert Numa().node_of(memory) is None
    assert Numa().node_of(memory) is None, "asking must not place the page"


@binding
def test_bound_memory_is_on_its_node_once_touched(memory: int) -> None:
    node = Numa().topology.nodes[-1]
    assert Numa().bind(memory, PAGES * PAGE, node)
    assert policy(memory) == policy(memory + PAGES * PAGE - 1) == (numa.MPOL_PREFERRED, {node})
    assert Numa().node_of(memory) is None, "binding must not touch"
    ctypes.memset(memory, 1, PAGE + 1)
    assert [Numa().node_of(memory + page * PAGE) for page in range(3)] == [node, node, None]


@binding
def test_only_whole_pages_are_bound(memory: int) -> None:
    assert Numa().bind(memory + 1, 3 * PAGE, Numa().topology.nodes[0])
    modes = [policy(memory + page * PAGE)[0] for page in range(4)]
    assert modes == [numa.MPOL_DEFAULT, numa.MPOL_PREFERRED, numa.MPOL_PREFERRED, numa.MPOL_DEFAULT]


@binding
@pytest.mark.parametrize(("offset", "nbytes"), [(0, 0), (0, PAGE - 1), (1, PAGE), (1, 2 * PAGE - 2)])
def test_a_range_without_a_whole_page_is_not_bound(memory: int, offset: int, nbytes: int) -> None:
    assert not Numa().bind(memory + offset, nbytes, Numa().topology.nodes[0])
    assert policy(memory)[0] == policy(memory + PAGE)[0] == numa.MPOL_DEFAULT


@binding
@pytest.mark.parametrize("absent", [MAX_NODES - 1, MAX_NODES, 10 * MAX_NODES])
def test_a_node_that_the_kernel_lacks_is_refused_in_silence(
    memory: int, absent: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not Numa(Topology((0, absent), {})).bind(memory, PAGE, absent)
    assert policy(memory)[0] == numa.MPOL_DEFAULT
    assert capfd.readouterr() == ("", "")


@binding
def test_memory_that_is_not_mapped_is_refused_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    node = Numa().topology.nodes[0]
    assert not Numa().bind(0, PAGE, node)  # nobody maps the page of the null pointer
    assert Numa().node_of(0) is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("node", [-1, 1, 7])
def test_an_unknown_node_is_an_error(node: int) -> None:
    with pytest.raises(ValueError, match=rf"node: expected one with memory, of \(0,\), got {node}"):
        Numa(ONE_NODE).bind(0, PAGE, node)


@pytest.mark.parametrize(("address", "nbytes"), [(-PAGE, PAGE), (PAGE, -1)])
def test_a_negative_range_is_an_error(address: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"address, nbytes: expected at least 0, got {address}, {nbytes}"):
        Numa(ONE_NODE).bind(address, nbytes, 0)


# ------------------------------------------------------------------------------------------------ libnuma


def expect_no_binding(reason: str) -> None:
    idle = Numa(ONE_NODE)
    assert reason in idle.binding_reason
    assert not idle.bind(PAGE, PAGE, 0)
    assert idle.node_of(PAGE) is None


@linux
@pytest.mark.usefixtures("fresh_lookup")
def test_without_libnuma_nothing_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: Any, **options: Any) -> None:
        raise OSError("libnuma.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    expect_no_binding("install libnuma1 or numactl-libs: libnuma.so.1: cannot open")


@linux
@pytest.mark.usefixtures("fresh_lookup")
def test_where_the_kernel_refuses_nothing_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        """A container's libnuma: there, and not allowed."""

        def __init__(self, *args: Any, **options: Any) -> None:
            def refuse(*args: Any) -> int:
                ctypes.set_errno(errno.EPERM)
                return -1

            self.mbind, self.move_pages = refuse, refuse

    monkeypatch.setattr(ctypes, "CDLL", Refusing)
    expect_no_binding(f"the kernel refuses mbind ({os.strerror(errno.EPERM)}): a container may need")


@pytest.mark.usefixtures("fresh_lookup")
def test_other_systems_have_no_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    expect_no_binding("binding memory to a NUMA node needs Linux, this is darwin")


@linux
def test_libnuma_is_loaded_by_the_first_need_of_it() -> None:
    program = (
        "from pathlib import Path\n"
        "from dilated_memory_pool.numa import Numa\n"
        "Numa().current_node()\n"
        "assert 'libnuma' not in Path('/proc/self/maps').read_text()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
