"""The memory pool, as its users see it. The machinery is in ``heap``.

There is no release() to call, so none can be forgotten, called twice or called too early.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from dilated_memory_pool import sizes
from dilated_memory_pool.backends import Backend, choose
from dilated_memory_pool.blocks import Block, make_block
from dilated_memory_pool.events import Observer
from dilated_memory_pool.heap import Heap
from dilated_memory_pool.numa import Numa
from dilated_memory_pool.placement.best_fit import BestFitPlacement
from dilated_memory_pool.placement.bins import BinPlacement
from dilated_memory_pool.placement.spans import Placement
from dilated_memory_pool.sizes import Exact, Geometric, SizeClasses, parse_bytes, parse_limit
from dilated_memory_pool.snapshot import PoolSnapshot
from dilated_memory_pool.statistics import PoolStatistics

if TYPE_CHECKING:
    import torch

    from dilated_memory_pool.interop.torch import TensorMaker


class MemoryPool:
    """Memory that is kept when its user is done with it, for the next one.

    Memory goes back to the pool when the last tensor, view, export or autograd node that uses it dies, in any thread.
    A pool may be used from many threads, survives a fork (the child has a copy of its own), and may be dropped or
    closed while its tensors live on.

    Args:
        backend: "host", "pinned", "cupy", "torch", or an object like one in ``backends``; "auto" takes CuPy's device
            memory where there is a CUDA device, else PyTorch's, else the host's. ``reasons`` says why.
        limit: how much the pool may reserve: bytes, text such as "2GiB", or a float, the fraction of the backend's
            memory. None for no limit.
        size_classes: "geometric", "power_of_two", "exact", a list of bins, or an object with ``round_up``. By default
            exact in full mode, where spans are cut to size, and geometric in lightweight mode.
        min_bytes: tensors smaller than this come from ``torch.empty``, which is as fast for them and wastes nothing.
        mode: "full": best fit over all free memory with splitting and joining, arenas local to NUMA nodes, observers.
            "lightweight": every block its own arena, reused within its size class.
        device: index of the CUDA device, for backends that have one; the current one by default.
        arena_bytes: full mode: the least to ask of the backend at a time; 64 MiB by default.
        strict_streams: also wait, before memory is used again, for every other stream the pool has seen. Then a
            forgotten ``record_stream`` costs time and cannot corrupt. Only where the backend has streams.
        observers: full mode: called with every event.

    Attributes:
        backend: the object that memory is drawn from.
        device: of the tensors, as PyTorch writes it.
        mode: as given.
        min_bytes: as given, in bytes.
        reasons: why this backend was taken, and what is active here and what is not.

    Raises:
        TypeError, ValueError: an argument is none of the above, or has no effect in this mode or on this backend.
        ImportError, RuntimeError: the backend's library or device is missing.

    >>> import torch
    >>> pool = MemoryPool("host", min_bytes=0)
    >>> scores = pool.empty((1024, 1024), dtype=torch.float32)
    >>> first = scores.data_ptr()
    >>> del scores
    >>> pool.empty((512, 2048), dtype=torch.float32).data_ptr() == first
    True
    """

    def __init__(
        self,
        backend: str | Backend = "auto",
        *,
        limit: float | str | None = None,
        size_classes: str | SizeClasses | Iterable[int | str] | None = None,
        min_bytes: int | str = "1MiB",
        mode: Literal["lightweight", "full"] = "full",
        device: int | None = None,
        arena_bytes: int | str | None = None,
        strict_streams: bool = False,
        observers: Iterable[Observer] = (),
    ) -> None:
        if mode not in ("lightweight", "full"):
            raise ValueError(f"mode: expected 'lightweight' or 'full', got {mode!r}")
        observers = tuple(observers)
        if mode == "lightweight" and observers:
            raise ValueError(f"observers: expected none in lightweight mode, got {len(observers)}")
        if mode == "lightweight" and arena_bytes is not None:
            raise ValueError(f"arena_bytes: expected None in lightweight mode, got {arena_bytes!r}")
        self.min_bytes = parse_bytes(min_bytes, "min_bytes")
        self.mode: Literal["lightweight", "full"] = mode
        self.backend, why = choose(backend, device)
        if strict_streams and self.backend.streams is None:
            raise ValueError(
                f"strict_streams: expected False, as the {self.backend.name} backend has no streams, got True"
            )
        self.device = self.backend.device
        limit_bytes = parse_limit(limit, self.backend.total_bytes)
        placement: Placement
        classes: SizeClasses
        if mode == "lightweight":
            placement, classes = BinPlacement(), Geometric()
        else:
            chunk = parse_bytes("64MiB" if arena_bytes is None else arena_bytes, "arena_bytes")
            placement, classes = BestFitPlacement(Exact(self.backend.granule).round_up(chunk)), Exact()
        if size_classes is not None:
            classes = sizes.size_classes(size_classes)
        numa = Numa() if mode == "full" and self.backend.streams is None else None
        self._heap = Heap(self.backend, placement, classes, limit_bytes, numa, strict_streams, observers)
        self._tensors: TensorMaker | None = None
        if sys.modules.get("torch") is not None:
            self._make_tensors()  # now, for torch.compile would see it change, and compile again
        self.reasons = (why, *self.backend.reasons, *_features(mode, self.backend, numa))

    # ------------------------------------------------------------------------------------------ tensors

    def empty(
        self, size: int | Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """An uninitialised, contiguous tensor, as ``torch.empty`` makes it.

        Left to PyTorch, and counted as a bypass: fewer than ``min_bytes``; the meta device; graph capture; a call from
        a finaliser that interrupts the pool. Left to it and not counted: calls under ``torch.compile``,
        ``torch.export``, ``torch.jit.trace``, a transform of ``torch.func`` or a dispatch mode such as FakeTensorMode.

        The memory cannot grow: ``resize_`` to more elements, and ``out=`` of another shape, is PyTorch's RuntimeError.

        Args:
            size: the shape.
            dtype: PyTorch's default by default.
            device: the pool's by default, whatever ``torch.set_default_device`` says; another is an error, but for
                "meta".

        Returns:
            A tensor that may be written to, saved by autograd and viewed like any other.

        Raises:
            TypeError, ValueError: ``size`` is no shape; ``dtype`` is quantized; ``device`` is not the pool's.
            PoolLimitError: the limit does not allow it.
            PoolMemoryError: the backend has no more memory.
            RuntimeError: the pool is closed.
            ImportError: PyTorch is not installed.
        """
        return (self._tensors or self._make_tensors()).empty(size, dtype, device)

    def zeros(
        self, size: int | Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """As ``empty``, filled with zeros.

        Raises:
            TypeError, ValueError, PoolLimitError, PoolMemoryError, RuntimeError, ImportError: as ``empty``.
        """
        return self.empty(size, dtype=dtype, device=device).zero_()

    def empty_like(self, tensor: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As ``torch.empty_like``: of the shape and the order of strides of ``tensor``.

        Args:
            tensor: on the pool's device.
            dtype: that of ``tensor`` by default.

        Raises:
            ValueError: ``tensor`` is on another device.
            PoolLimitError, PoolMemoryError, RuntimeError, ImportError: as ``empty``.
        """
        return (self._tensors or self._make_tensors()).empty_like(tensor, dtype)

    # ------------------------------------------------------------------------------------------ blocks

    def allocate(self, nbytes: int | str) -> Block:
        """``nbytes`` of memory, without PyTorch; ``min_bytes`` does not apply.

        On the host a block has the buffer protocol; on a GPU ``__cuda_array_interface__``; everywhere DLPack. The
        memory returns when the block and all that was made of it are gone.

        Args:
            nbytes: bytes, or text such as "64MiB".

        Raises:
            TypeError, ValueError: ``nbytes`` is no size.
            PoolLimitError, PoolMemoryError, RuntimeError: as ``empty``.

        >>> block = MemoryPool("host").allocate("1kB")
        >>> memoryview(block).cast("B")[:3] = b"abc"
        >>> block.nbytes, bytes(block)[:3]
        (1000, b'abc')
        """
        count = parse_bytes(nbytes)
        lease = self._heap.lease(max(count, 1))
        if lease is None:
            lease = self._heap.stray(max(count, 1))
        return make_block(lease, count, self.backend)

    def reserve(self, nbytes: int | str) -> None:
        """Have memory ready for a request of ``nbytes``, so that the request itself needs no new arena.

        Raises:
            TypeError, ValueError, PoolLimitError, PoolMemoryError, RuntimeError: as ``allocate``.

        >>> pool = MemoryPool("host")
        >>> pool.reserve("2MiB")
        >>> block = pool.allocate("2MiB")
        >>> pool.statistics().hits, pool.statistics().misses
        (1, 1)
        """
        self.allocate(nbytes)

    def share_with_cupy(self) -> AbstractContextManager[None]:
        """Inside ``with pool.share_with_cupy():`` CuPy arrays of this thread are allocated from this pool.

        Raises:
            ValueError: the pool's memory is not a CUDA device's.
            ImportError: CuPy is not installed.
        """
        from dilated_memory_pool.interop.cupy import sharing

        return sharing(self)

    # ------------------------------------------------------------------------------------------ ownership

    def owns(self, owner: torch.Tensor | Block) -> bool:
        """Whether the memory of ``owner``, a tensor or a block, is this pool's.

        Raises:
            TypeError: ``owner`` is neither.
        """
        return self._heap.span_of(_address(owner)) is not None

    def record_stream(self, owner: torch.Tensor | Block, stream: object) -> None:
        """Tell the pool that ``stream`` uses the memory of ``owner`` too.

        Once its owners are dead, the memory is used again only after all work queued to that stream by then is done.
        ``Tensor.record_stream`` does nothing for memory that is not PyTorch's own: this is what to call instead.

        Args:
            owner: a tensor or a block of this pool.
            stream: a stream of PyTorch or CuPy, or its handle.

        Raises:
            ValueError: the backend has no streams, or ``owner`` is not of this pool.
            TypeError: ``stream`` is no stream, or ``owner`` neither a tensor nor a block.
        """
        streams = self.backend.streams
        if streams is None:
            raise ValueError(f"record_stream needs a backend with streams, and {self.backend.name} has none")
        if not self._heap.record_stream(_address(owner), streams.handle(stream)):
            raise ValueError("owner: expected memory of this pool, got other")

    # ------------------------------------------------------------------------------------------ the whole pool

    def trim(self, keep_bytes: int | str = 0) -> int:
        """Give arenas nobody uses back to the backend, the longest unused first, until ``keep_bytes`` are reserved.

        Nothing is given back while the current stream is captured into a graph.

        Args:
            keep_bytes: bytes, or text such as "64MiB".

        Returns:
            The bytes given back.

        Raises:
            TypeError, ValueError: ``keep_bytes`` is no size.
        """
        return self._heap.trim(parse_bytes(keep_bytes, "keep_bytes"))

    def set_limit(self, limit: float | str | None) -> None:
        """A new limit, as in the constructor. What is over it and unused is given back; what is in use stays.

        Raises:
            TypeError, ValueError: ``limit`` is none.
        """
        self._heap.limit = parse_limit(limit, self.backend.total_bytes)
        if self._heap.limit is not None:
            self._heap.trim(self._heap.limit)

    def statistics(self) -> PoolStatistics:
        """The numbers of this moment."""
        return self._heap.statistics()

    def reset_peaks(self) -> None:
        """Let the peaks start again from what is now."""
        self._heap.reset_peaks()

    def snapshot(self) -> PoolSnapshot:
        """Every arena and every span of this moment, beside the numbers."""
        statistics, arenas = self._heap.snapshot()
        return PoolSnapshot(self.backend.name, self.device, self.mode, self.reasons, statistics, arenas)

    def close(self) -> None:
        """Give back what is unused and serve no more requests. What is in use lives on and is freed when it dies."""
        self._heap.close()

    def __enter__(self) -> MemoryPool:  # noqa: PYI034  # Self is Python 3.11's
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " closed" if self._heap.closed else ""
        return f"<MemoryPool {self.backend.name} on {self.device}, {self.mode}{state}>"

    def _make_tensors(self) -> TensorMaker:
        from dilated_memory_pool.interop.torch import TensorMaker

        self._tensors = TensorMaker(self._heap, self.min_bytes)
        return self._tensors


def _address(owner: torch.Tensor | Block) -> int:
    if isinstance(owner, Block):
        return owner.address
    try:
        return owner.untyped_storage().data_ptr()
    except AttributeError:
        raise TypeError(f"owner: expected a tensor or a block, got {type(owner).__name__}") from None


def _features(mode: str, backend: Backend, numa: Numa | None) -> tuple[str, ...]:
    """What of the modes' features is active here, and why the others are not."""
    if mode == "lightweight":
        return ("lightweight mode: no splitting and joining, no NUMA, no observers",)
    reasons = ["full mode: best fit, splitting and joining, observers"]
    if numa is None:
        reasons.append("NUMA: off, arenas belong to streams of a device")
    elif numa.active:
        binding = f"by first touch alone: {numa.binding_reason}" if numa.binding_reason else "bound by libnuma"
        reasons.append(f"NUMA: arenas local to nodes, {binding}")
    else:
        reasons.append(f"NUMA: off, {numa.reason}")
    return tuple(reasons)
