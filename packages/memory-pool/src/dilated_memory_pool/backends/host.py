"""Ordinary memory of this machine: private anonymous mappings, one for each arena.

glibc stops keeping freed blocks at 32 MiB: a tensor above that is mapped, faulted in page by page and unmapped at
every use. An arena is mapped and faulted in once. Mappings are private, so that a forked child has its own copy and
cannot write into its parent's tensors.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from dilated_memory_pool.backends.base import Streams
from dilated_memory_pool.placement.spans import HiddenLease, Lease

if TYPE_CHECKING:
    import torch

_HUGE_PAGE = 2 * 2**20  # of x86-64, and of arm64 with 4 KiB pages


@lru_cache(maxsize=512)
def lease_type(nbytes: int) -> Any:
    """The class of leases on ``nbytes`` that the host can address. Making a class costs twenty microseconds."""
    array: Any = ctypes.c_ubyte * nbytes
    return type(array)("HostLease", (HiddenLease, array), {"__slots__": HiddenLease.SLOTS})


def leases_at(address: int, nbytes: int) -> Callable[[], Lease]:
    """Makes leases on ``nbytes`` of host memory at ``address``."""
    make: Any = lease_type(nbytes).from_address
    return partial(make, address)


class HostMemory:
    """One mapping; see ``Memory``. It is unmapped when the last lease and the arena are gone."""

    def __init__(self, nbytes: int, huge_pages: bool) -> None:
        align = _HUGE_PAGE if huge_pages and nbytes >= _HUGE_PAGE else 1
        # Address space alone: what is cut off at either end is never touched, so it is never there.
        length = nbytes + align - 1
        try:
            if sys.platform == "win32":  # anonymous, and there is no fork to share it with
                self._mapping = mmap.mmap(-1, length)
            else:
                self._mapping = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as refusal:
            raise MemoryError(f"the system does not map {nbytes} bytes: {refusal}") from refusal
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self.address = -(-start // align) * align
        self._offset = self.address - start
        self.nbytes = nbytes
        self.lease = leases_at(self.address, nbytes)
        if align > 1:
            self._mapping.madvise(mmap.MADV_HUGEPAGE)

    def tensor(self) -> torch.Tensor:
        """Over all of it."""
        import torch

        return torch.frombuffer(self._mapping, dtype=torch.uint8, count=self.nbytes, offset=self._offset)


class HostBackend:
    """See ``Backend``.

    Args:
        huge_pages: ask for transparent huge pages in arenas of 2 MiB and more, where the system has them: 512 times
            fewer page faults on first touch. The last, partly used huge page of an arena then takes up 2 MiB.
    """

    name = "host"
    device = "cpu"
    addressable = True
    streams: Streams | None = None
    reasons: tuple[str, ...]

    def __init__(self, huge_pages: bool = True) -> None:
        reason = "they were not asked for" if not huge_pages else _no_huge_pages()
        self._huge_pages = not reason
        self.reasons = (f"huge pages: off, {reason}" if reason else "huge pages: on for arenas of 2 MiB and more",)
        self.granule = mmap.PAGESIZE
        self.total_bytes = _physical_memory()

    def allocate(self, nbytes: int) -> HostMemory:
        """A new mapping. MemoryError where the system refuses it."""
        return HostMemory(nbytes, self._huge_pages)


def _no_huge_pages() -> str:
    """Why transparent huge pages cannot be asked for; empty when they can."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return "this system has no transparent huge pages"
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as setting:
            return "the system's setting is never" if "[never]" in setting.read() else ""
    except OSError:
        return "this kernel has no transparent huge pages"


def _physical_memory() -> int:
    """Bytes of memory of this machine. Where the system does not say, what can be addressed."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize
