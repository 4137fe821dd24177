"""Memory without a tensor: what ``MemoryPool.allocate`` returns."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dilated_memory_pool.backends import Backend
from dilated_memory_pool.placement.spans import Lease, Span

_DLPACK_CPU, _DLPACK_CUDA = 1, 2  # DLDeviceType of dlpack.h
_LEGACY_STREAM = 1  # the name of CUDA's default stream in array interfaces, where 0 is not allowed


class Block:
    """``nbytes`` of a pool's memory, uninitialised. It returns when the block and all that was made of it are gone.

    On the host (``memoryview(block)``, ``numpy.frombuffer(block, dtype)``) it is a writable buffer; on a GPU it has
    ``__cuda_array_interface__``; everywhere it is an exporter of DLPack, as a vector of unsigned bytes.

    Attributes:
        nbytes: its length.
        address: of its first byte.
    """

    __slots__ = ()
    nbytes: int
    address: int
    _lease: Lease
    _backend: Backend

    if TYPE_CHECKING:  # true of blocks on the host

        def __len__(self) -> int: ...
        def __buffer__(self, flags: int, /) -> memoryview: ...

    @property
    def device(self) -> str:
        """Where it is, as PyTorch writes it, such as "cpu"."""
        return self._backend.device

    @property
    def addressable(self) -> bool:
        """Whether the host reads and writes it, as a buffer."""
        return self._backend.addressable

    @property
    def span(self) -> Span:
        """Its place in the pool."""
        return self._lease.span

    def __dlpack_device__(self) -> tuple[int, int]:
        """(kind, index) by DLPack's numbering."""
        kind, _, index = self.device.partition(":")
        return _DLPACK_CUDA if kind == "cuda" else _DLPACK_CPU, int(index or 0)

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A capsule that shares the memory.

        Args:
            stream: the consumer's; all work queued to the current stream is finished before this returns, unless it
                is that very stream, or -1.
            max_version: the newest version the consumer takes; None for the unversioned form.
            dl_device: must be where the block is.
            copy: must not be True.

        Raises:
            BufferError: a copy, or another device, was asked for; no library is installed that makes capsules.
        """
        if copy:
            raise BufferError("copy: expected False or None, as a block is shared and never copied, got True")
        if dl_device is not None and tuple(dl_device) != tuple(self.__dlpack_device__()):
            raise BufferError(
                f"dl_device: expected {self.__dlpack_device__()}, where the block is, got {tuple(dl_device)}"
            )
        streams = self._backend.streams
        if streams is not None and stream != -1:
            current = streams.current()
            # The host is behind no queue. A stream is behind its own work, and in a graph's capture nothing may wait.
            if self.addressable or stream != (current or _LEGACY_STREAM):
                streams.record(current).wait()
        from dilated_memory_pool.interop.dlpack import capsule

        return capsule(self, max_version)

    def __reduce__(self) -> str:
        raise TypeError("a block is neither copied nor pickled: copy its bytes")

    def __repr__(self) -> str:
        return f"<Block of {self.nbytes} bytes at 0x{self.address:x} on {self.device}>"


class DeviceBlock(Block):
    """A block that the host cannot address."""

    __slots__ = ("__weakref__", "_backend", "_lease", "address", "nbytes")

    def __len__(self) -> int:
        return self.nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3: a vector of unsigned bytes, ready on the stream it was allocated for."""
        stream = self._lease.span.arena.locality
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "stream": _LEGACY_STREAM if stream in (0, None) else stream,
            "version": 3,
        }


@lru_cache(maxsize=512)
def _host_block(nbytes: int) -> type[Block]:
    """The class of host blocks of a length. An array type is the one way to a buffer before Python 3.12."""
    array: Any = ctypes.c_ubyte * nbytes
    names = ("_backend", "_lease")
    methods = {"__slots__": names, "nbytes": nbytes, "address": property(ctypes.addressof)}
    methods["__repr__"] = Block.__repr__
    kind: type[Block] = type(array)("HostBlock", (Block, array), methods)
    return kind


def make_block(lease: Lease, nbytes: int, backend: Backend) -> Block:
    """A block on the first ``nbytes`` of the lease's span."""
    block: Any
    if backend.addressable:
        kind: Any = _host_block(nbytes)
        block = kind.from_address(lease.span.address)
    else:
        block = DeviceBlock()
        block.address, block.nbytes = lease.span.address, nbytes
    block._lease, block._backend = lease, backend
    return block  # type: ignore[no-any-return]  # either is one
