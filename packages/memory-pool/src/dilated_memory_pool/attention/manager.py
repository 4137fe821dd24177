"""The memory of an attention computation, by purpose: one pool for each kind of buffer, one limit for all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, overload

from dilated_memory_pool.attention.growable import GrowableBuffer
from dilated_memory_pool.attention.kinds import BufferKind
from dilated_memory_pool.attention.policies import BufferPolicy
from dilated_memory_pool.attention.pools import KindPools, backend_of
from dilated_memory_pool.attention.report import table
from dilated_memory_pool.attention.shared import SharedTensors, lies_in, make_in
from dilated_memory_pool.backends import Backend
from dilated_memory_pool.errors import PoolMemoryError
from dilated_memory_pool.interop.torch import import_torch
from dilated_memory_pool.statistics import PoolStatistics

if TYPE_CHECKING:
    import torch

    from dilated_memory_pool.blocks import Block


@dataclass(frozen=True)
class KindAllocator:
    """Tensors of one kind: what ``dilated_attention(allocator=...)`` and its like take.

    Attributes:
        manager: whose tensors they are.
        kind: of them all.
    """

    manager: AttentionBufferManager
    kind: BufferKind

    def empty(
        self, size: int | Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """As ``AttentionBufferManager.empty``."""
        return self.manager.empty(size, dtype=dtype, device=device, kind=self.kind)


class AttentionBufferManager:
    """A memory pool for each of the ten kinds of buffer, made when the kind is first used.

    So numbers, reuse and trimming are those of one purpose, and its policy fits it. A kind is a ``BufferKind`` or its
    name in any case. The manager may be used from many threads, survives a fork, and may be dropped or closed while
    its tensors live on.

    Args:
        backend: of the kinds whose policy says "device", as in ``MemoryPool``. A ``SharedBackend`` is shared with the
            other pools on it.
        limit: as in ``MemoryPool``, for all kinds on one backend together. At the limit, what lies idle in one kind
            makes room for another. None beside a ``SharedBackend``, which has its own.
        policies: of the kinds that shall not have their default policy.
        device: index of the CUDA device, for backends that have one; the current one by default.

    Raises:
        TypeError, ValueError: an argument is none of the above.
        ImportError, RuntimeError: the backend's library or device is missing.

    >>> import torch
    >>> with AttentionBufferManager("host", limit="1GiB") as manager:
    ...     scores = manager.empty((2048, 2048), dtype=torch.float32, kind="scores")
    ...     del scores
    ...     smaller = manager.empty((1024, 2048), dtype=torch.float32, kind="scores")
    ...     manager.statistics("scores").hit_rate
    0.5
    """

    def __init__(
        self,
        backend: str | Backend = "auto",
        *,
        limit: float | str | None = None,
        policies: Mapping[BufferKind, BufferPolicy] | Mapping[str, BufferPolicy] | None = None,
        device: int | None = None,
    ) -> None:
        self._pools = KindPools(backend, limit, policies or {}, device)
        self._shared = SharedTensors()

    # ------------------------------------------------------------------------------------------ tensors

    def empty(
        self,
        size: int | Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        kind: BufferKind | str = BufferKind.TEMP,
    ) -> torch.Tensor:
        """An uninitialised, contiguous tensor from the pool of ``kind``. See ``MemoryPool.empty``.

        Pools are not made under ``torch.compile``: use the kind, or take its allocator, before.

        Raises:
            TypeError, ValueError: ``kind`` is none; ``size`` is no shape; ``device`` is not the kind's.
            PoolLimitError: the limit does not allow it, after all kinds were trimmed and garbage was collected. Its
                numbers are those of all kinds on the backend.
            PoolMemoryError: the backend has no more memory; as above.
            RuntimeError: the manager is closed.
            ImportError: PyTorch is not installed.
        """
        pool = self._pools.get(kind)
        try:
            return pool.empty(size, dtype=dtype, device=device)
        except PoolMemoryError as failure:
            raise backend_of(pool).failure(failure) from failure

    def allocator(self, kind: BufferKind | str) -> KindAllocator:
        """An object whose ``empty(size, *, dtype, device)`` draws from the pool of ``kind``, which is made if need be.

        Raises:
            TypeError, ValueError: ``kind`` is none.
            RuntimeError: the manager is closed.
        """
        kind = BufferKind(kind)
        self._pools.get(kind)
        return KindAllocator(self, kind)

    def shared(
        self,
        key: Hashable,
        create: Callable[[Callable[..., torch.Tensor]], torch.Tensor],
        *,
        kind: BufferKind | str = BufferKind.MASK,
    ) -> torch.Tensor:
        """The one tensor of ``key``: all who ask get it for as long as one of them, or a view, holds it.

        ``create(empty)`` is called where there is none, by one thread at a time, without a lock and without autograd;
        ``empty`` allocates from the pool of ``kind``. What it returns is copied there unless it lies there already. If
        it raises, its caller gets the exception, and those who waited for it call theirs in turn. Do not write to the
        result. What the pool does not serve (tracing, graph capture, no bytes) is created for its caller alone.

        Raises:
            TypeError: ``key`` is not hashable, or ``create`` returns no dense tensor.
            ValueError: ``kind`` does not share, by its policy; the tensor requires a gradient.
            RuntimeError: the tensor is needed to make itself; the manager is closed.
            PoolLimitError, PoolMemoryError: as ``empty``.

        >>> import torch
        >>> manager = AttentionBufferManager("host")
        >>> mask = manager.shared(("causal", 8), lambda empty: torch.ones(8, 8, dtype=torch.bool).tril())
        >>> manager.shared(("causal", 8), lambda empty: 1 / 0) is mask
        True
        """
        allocator = self.allocator(kind)
        if not self._pools.policies[allocator.kind].shared:
            kinds = [kind.value for kind, policy in self._pools.policies.items() if policy.shared]
            raise ValueError(f"kind: expected one whose policy has shared=True, {kinds} here, got {kind!r}")
        if import_torch().compiler.is_compiling():
            return create(allocator.empty)
        try:
            hash(key)
        except TypeError as error:
            raise TypeError(f"key: expected a hashable one, got {key!r}") from error
        pool = self._pools.get(allocator.kind)
        tensor = self._shared.get((allocator.kind, key), lambda: make_in(pool, allocator.empty, create))
        streams = pool.backend.streams
        if streams is not None and lies_in(pool, tensor):
            backend_of(pool).record_stream(pool, tensor, streams.current())
        return tensor

    def growable(
        self,
        row_shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        dim: int = 0,
        capacity: int = 0,
        kind: BufferKind | str = BufferKind.CACHE,
    ) -> GrowableBuffer:
        """A tensor that rows are appended to. See ``GrowableBuffer``.

        Args:
            row_shape: of the whole, without ``dim``.
            dtype: of the rows; PyTorch's default by default.
            dim: where the rows lie in the shape of the whole.
            capacity: rows to make room for now.
            kind: one whose policy has ``growth``.

        Raises:
            TypeError, ValueError: an argument is none of the above.
            RuntimeError: the manager is closed.
            PoolLimitError, PoolMemoryError: as ``empty``.

        >>> import torch
        >>> keys = AttentionBufferManager("host").growable((2, 8, 64), dim=2)  # batch 2, 8 heads of 64
        >>> for token in range(3):
        ...     keys.append(torch.randn(2, 8, 1, 64))
        >>> keys.view().shape
        torch.Size([2, 8, 3, 64])
        """
        allocator = self.allocator(kind)
        growth = self._pools.policies[allocator.kind].growth
        if growth is None:
            kinds = [kind.value for kind, policy in self._pools.policies.items() if policy.growth is not None]
            raise ValueError(f"kind: expected one whose policy has growth, {kinds} here, got {kind!r}")
        place = self._pools.get(allocator.kind).device
        return GrowableBuffer(
            allocator.empty, row_shape, dtype=dtype, device=place, dim=dim, capacity=capacity, growth=growth
        )

    # ------------------------------------------------------------------------------------------ ownership

    def kind_of(self, owner: torch.Tensor | Block) -> BufferKind | None:
        """The kind whose pool the memory of ``owner`` is from; None for memory from elsewhere."""
        return next((kind for kind, pool in list(self._pools.made.items()) if pool.owns(owner)), None)

    def record_stream(self, owner: torch.Tensor | Block, stream: object) -> None:
        """Tell the pool of ``owner`` that ``stream`` uses it too. See ``MemoryPool.record_stream``.

        Raises:
            TypeError, ValueError: as there; ``owner`` is of none of the pools.
        """
        kind = self.kind_of(owner)
        if kind is None:
            raise ValueError("owner: expected memory of this manager, got other")
        pool = self._pools.made[kind]
        backend_of(pool).record_stream(pool, owner, stream)

    # ------------------------------------------------------------------------------------------ the whole

    @property
    def reasons(self) -> dict[BufferKind, str]:
        """For every kind, which backend it has or would have, and why."""
        return {kind: self._pools.place(kind)[1] for kind in BufferKind}

    @overload
    def statistics(self, kind: BufferKind | str) -> PoolStatistics: ...

    @overload
    def statistics(self, kind: None = None) -> dict[BufferKind, PoolStatistics]: ...

    def statistics(self, kind: BufferKind | str | None = None) -> PoolStatistics | dict[BufferKind, PoolStatistics]:
        """The numbers of one kind, whose pool is made if need be, or of every kind that has one. The reuse rate is
        ``hit_rate``.
        """
        if kind is None:
            return {kind: pool.statistics() for kind, pool in list(self._pools.made.items())}
        pool = self._pools.made.get(BufferKind(kind)) or self._pools.get(kind)  # closed ones have numbers too
        return pool.statistics()

    def trim(self, kind: BufferKind | str | None = None) -> int:
        """Give what nobody uses back to the backend, of one kind or of all; the bytes given back."""
        if kind is None:
            return sum(pool.trim() for pool in list(self._pools.made.values()))
        pool = self._pools.made.get(BufferKind(kind))
        return pool.trim() if pool is not None else 0

    def set_limit(self, limit: float | str | None) -> None:
        """A new limit, as in the constructor. What is over it and unused is given back; what is in use stays."""
        self._pools.set_limit(limit)

    def report(self) -> str:
        """A table of the kinds that were used, as plain text."""
        return table(
            [(kind.value, pool.backend.name, pool.statistics()) for kind, pool in list(self._pools.made.items())]
        )

    def close(self) -> None:
        """Give back what is unused and serve no more requests. What is in use lives on and is freed when it dies."""
        self._pools.close()

    def __enter__(self) -> AttentionBufferManager:  # noqa: PYI034  # Self is Python 3.11's
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        kinds = ", ".join(kind.value for kind in list(self._pools.made)) or "no kind used yet"
        return f"<AttentionBufferManager {self._pools.chosen.name} on {self._pools.chosen.device}: {kinds}>"
