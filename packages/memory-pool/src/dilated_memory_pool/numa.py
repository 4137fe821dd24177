"""Which NUMA node a thread runs on, and the binding of host memory to a node.

A CPU reads the memory of its own node faster than that of another. Linux places a page on the node of the thread that
touches it first; binding makes that certain. Imports the standard library only, and looks for libnuma at first use.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SYSFS = Path("/sys/devices/system/node")  # Documentation/ABI/stable/sysfs-devices-node of the kernel
MPOL_DEFAULT, MPOL_PREFERRED = 0, 1  # linux/mempolicy.h
MASK_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)  # the kernel takes sets of nodes as arrays of unsigned long


class Topology(NamedTuple):
    """The nodes of a machine and the CPUs beside them.

    Attributes:
        nodes: the nodes that have memory, ascending, at least one. Some have no CPU: memory expanders, GPU memory.
        node_of_cpu: for every CPU the node where its threads should place memory. A CPU whose own node has none
            is sent to the node with memory that its node's ``distance`` calls nearest, the lowest number of equals.
    """

    nodes: tuple[int, ...]
    node_of_cpu: Mapping[int, int]

    @classmethod
    def read(cls, root: Path = SYSFS) -> Topology:
        """What Linux tells under ``root``; a single node 0 where it tells nothing, or nothing that makes sense.

        So it is on macOS and Windows, and in containers that hide sysfs.
        """
        try:
            online = sorted(int(folder.name[4:]) for folder in root.iterdir() if re.fullmatch(r"node\d+", folder.name))
            nodes = tuple(node for node in online if _has_memory(root / f"node{node}"))
            node_of_cpu: dict[int, int] = {}
            for node in online if nodes else ():
                home = node if node in nodes else _nearest(root / f"node{node}", nodes, online)
                node_of_cpu.update(dict.fromkeys(_cpus((root / f"node{node}" / "cpulist").read_text()), home))
        except (OSError, ValueError):
            nodes, node_of_cpu = (), {}
        return cls(nodes or (0,), node_of_cpu)


class Numa:
    """Where threads run and where memory lies, on a machine of a given topology: by default, this one.

    Attributes:
        topology: as given or read.
        active: whether threads can run beside more than one node, so that keeping memory by node has a point.
        reason: "" when active, else a sentence that says why not.

    >>> Numa(Topology(nodes=(0,), node_of_cpu={0: 0, 1: 0})).reason
    'one NUMA node on this machine: there is nothing to choose between'
    """

    def __init__(self, topology: Topology | None = None) -> None:
        self.topology = Topology.read() if topology is None else topology
        homes = set(self.topology.node_of_cpu.values())
        sched_getcpu = _sched_getcpu()
        if len(self.topology.nodes) == 1:
            self.reason = "one NUMA node on this machine: there is nothing to choose between"
        elif len(homes) < 2:
            self.reason = "all CPUs of this machine belong to one NUMA node: there is nothing to choose between"
        elif sched_getcpu is None:
            self.reason = "no sched_getcpu on this system: the NUMA node of a thread is unknown"
        else:
            self.reason = ""
        self.active = not self.reason
        self._home = min(homes, default=self.topology.nodes[0])
        self._sched_getcpu = sched_getcpu or (lambda: -1)

    @property
    def binding_reason(self) -> str:
        """Why ``bind`` cannot work, "" where it can. The first question loads libnuma."""
        return _libnuma()[1]

    def current_node(self) -> int:
        """The node where the calling thread should place memory now. The scheduler may move it a moment later.

        Without ``active`` that is one and the same node. A CPU that came after the topology was read counts as a
        CPU of the first node.
        """
        if not self.active:
            return self._home
        return self.topology.node_of_cpu.get(self._sched_getcpu(), self._home)

    def bind(self, address: int, nbytes: int, node: int) -> bool:
        """Have the whole pages within ``[address, address + nbytes)`` placed on ``node`` when they are first touched.

        Pages in use already stay where they are. A full node gives way to the next: slow memory beats none. The
        choice holds until the range is unmapped, so bind what is mapped for the purpose, not what malloc will reuse.

        Returns:
            Whether the kernel agreed. It does not where libnuma is missing, where no whole page lies in the range,
            where the range is not mapped, or where a container may not use the node.

        Raises:
            ValueError: for a node that the topology lacks, or a negative address or size.
        """
        if node not in self.topology.nodes:
            raise ValueError(f"node: expected one with memory, of {self.topology.nodes}, got {node}")
        if address < 0 or nbytes < 0:
            raise ValueError(f"address, nbytes: expected at least 0, got {address}, {nbytes}")
        first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        library, _ = _libnuma()
        if library is None or length <= 0:
            return False
        mask = (ctypes.c_ulong * (node // MASK_BITS + 1))()
        mask[node // MASK_BITS] = 1 << node % MASK_BITS
        # The kernel reads one bit less than it is told: get_nodes() in mm/mempolicy.c begins with --maxnode.
        return bool(library.mbind(first, length, MPOL_PREFERRED, mask, len(mask) * MASK_BITS + 1, 0) == 0)

    def node_of(self, address: int) -> int | None:
        """The node that holds the page of ``address``; None where none was written yet, or where no one can tell."""
        library, _ = _libnuma()
        if library is None:
            return None
        # move_pages without targets only asks. get_mempolicy would place an untouched page to have an answer.
        status = ctypes.c_int(-1)
        page = ctypes.c_void_p(address)
        asked = library.move_pages(0, 1, ctypes.byref(page), None, ctypes.byref(status), 0) == 0
        return status.value if asked and status.value >= 0 else None


def _has_memory(folder: Path) -> bool:
    try:
        total = re.search(r"MemTotal:\s*(\d+)", (folder / "meminfo").read_text())
    except FileNotFoundError:
        return False
    return total is not None and int(total[1]) > 0


def _nearest(folder: Path, nodes: Sequence[int], online: Sequence[int]) -> int:
    try:
        distances = map(int, (folder / "distance").read_text().split())
        distance = dict(zip(online, distances, strict=True))  # one number per node online, whatever its own number
    except (OSError, ValueError):
        return nodes[0]
    return min(nodes, key=distance.__getitem__)


def _cpus(cpulist: str) -> Iterator[int]:
    """The numbers in a list such as "0-3,8,10-11"; a node without CPUs has an empty one."""
    for part in filter(None, cpulist.strip().split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _sched_getcpu() -> Callable[[], int] | None:
    """The C library's own, as Python has none."""
    try:
        # PyDLL keeps the GIL: beside a busy thread a call took 0.12 us with it, and 26 us with CDLL, which lets it go.
        function = ctypes.PyDLL(None).sched_getcpu
    except (AttributeError, TypeError):  # as on macOS; on Windows, where no library has the name None
        return None
    function.argtypes, function.restype = (), ctypes.c_int
    return function


@functools.cache
def _libnuma() -> tuple[ctypes.CDLL | None, str]:
    """Libnuma, or why it is of no use.

    Its numa_tonode_memory returns nothing: it prints a refusal to stderr, and ends the process where the variable
    numa_exit_on_error says so. Its mbind is the bare system call: it answers, and leaves the choice of policy to us.
    """
    system = sys.platform  # by another name, or mypy calls the rest unreachable elsewhere
    if system != "linux":
        return None, f"binding memory to a NUMA node needs Linux, this is {system}"
    try:
        library = ctypes.CDLL("libnuma.so.1", use_errno=True)  # not find_library: it starts processes to look around
        mbind, move_pages = library.mbind, library.move_pages
    except (OSError, AttributeError) as error:
        return None, f"libnuma is not usable, install libnuma1 or numactl-libs: {error}"
    word, number, pointer = ctypes.c_ulong, ctypes.c_int, ctypes.c_void_p
    mbind.argtypes, mbind.restype = (pointer, word, number, pointer, word, ctypes.c_uint), ctypes.c_long
    move_pages.argtypes, move_pages.restype = (number, word, pointer, pointer, pointer, number), ctypes.c_long
    # An empty range changes nothing, and asks whether the call is allowed at all.
    if mbind(None, 0, MPOL_DEFAULT, None, 0, 0) != 0:
        refusal = os.strerror(ctypes.get_errno())
        return None, f"the kernel refuses mbind ({refusal}): a container may need the capability SYS_NICE"
    return library, ""
