"""What a module holds of the shared resources: an allocator that can be switched, and a store of plans.

Both are small, and a copy or a pickle of the module is another holder of the same resources. They satisfy
``dilated_core``'s protocols. Imports torch and the memory pool's errors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from dilated_factory.policy import PoolMode
from dilated_factory.resources.shared import POOLED_DEVICES, SharedResources
from dilated_memory_pool import MemoryPool, PoolMemoryError


class PooledAllocator:
    """Tensors from the pool of their device, in the mode it was last switched to.

    Attributes:
        mode: "off" leaves them to torch.empty.

    >>> allocator = PooledAllocator(SharedResources())
    >>> allocator.mode = "full"
    >>> allocator.empty((512, 1024), dtype=torch.float32, device=torch.device("cpu")).shape
    torch.Size([512, 1024])
    """

    def __init__(self, resources: SharedResources, mode: PoolMode = "off") -> None:
        self.resources, self.mode = resources, mode
        self._pools: dict[tuple[torch.device, PoolMode], MemoryPool] = {}  # those that were asked for

    def __reduce__(self) -> tuple[type[PooledAllocator], tuple[SharedResources, PoolMode]]:
        """A copy, or what a pickle becomes, asks for pools anew."""
        return PooledAllocator, (self.resources, self.mode)

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised, contiguous tensor.

        Raises:
            PoolLimitError: the limit of the shared resources does not allow it; its numbers are those of all pools on
                the device. PoolMemoryError: the device has no more memory.
        """
        mode = self.mode
        if mode == "off" or device.type not in POOLED_DEVICES:  # meta and fake tensors have no memory
            return torch.empty(size, dtype=dtype, device=device)
        try:
            pool = self._pools.get((device, mode))
            if pool is None:
                pool = self._pools[device, mode] = self.resources.pool(device, mode)
            return pool.empty(size, dtype=dtype, device=device)
        except PoolMemoryError as failure:
            raise self.resources.backend(device).failure(failure) from failure


class BuffersByKind:
    """Tensors from the buffer manager of their device: a ``dilated_core.BufferManager``.

    >>> buffers = BuffersByKind(SharedResources())
    >>> buffers.allocator("scores").empty((512, 1024), dtype=torch.float32, device=torch.device("cpu")).shape
    torch.Size([512, 1024])
    """

    def __init__(self, resources: SharedResources) -> None:
        self.resources = resources
        self._of_kinds: dict[str, KindOfBuffer] = {}

    def allocator(self, kind: str) -> KindOfBuffer:
        """The allocator of one kind."""
        found = self._of_kinds.get(kind)
        return self._of_kinds.setdefault(kind, KindOfBuffer(self.resources, kind)) if found is None else found

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of the kind "temp"."""
        return self.allocator("temp").empty(size, dtype=dtype, device=device)


class KindOfBuffer:
    """Tensors of one kind, from the manager of their device."""

    def __init__(self, resources: SharedResources, kind: str) -> None:
        self.resources, self.kind = resources, kind

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised, contiguous tensor. Raises as ``AttentionBufferManager.empty``."""
        if device.type not in POOLED_DEVICES:
            return torch.empty(size, dtype=dtype, device=device)
        return self.resources.manager(device).empty(size, dtype=dtype, device=device, kind=self.kind)


class CachedPatterns:
    """Plans from the shared pattern cache."""

    def __init__(self, resources: SharedResources) -> None:
        self.resources = resources

    def get_or_create(self, key: Hashable, create: Callable[[], Any]) -> Any:
        """What is kept under ``key``, made by ``create()`` where it is not."""
        return self.resources.cache.get_or_create(key, create)
