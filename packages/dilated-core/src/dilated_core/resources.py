"""What a caller may lend an attention: memory to work in, and a place to keep plans. Protocols only, and a bundle."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Allocator(Protocol):
    """Where the memory of results and scratch comes from. A ``dilated_memory_pool.MemoryPool`` is one."""

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised, contiguous tensor."""


@runtime_checkable
class PatternStore(Protocol):
    """Where plans are kept between calls. A ``dilated_pattern_cache.PatternCache`` is one."""

    def get_or_create(self, key: Hashable, create: Callable[[], Any]) -> Any:
        """Return what is kept under ``key``, or keep and return ``create()``."""


class Resources(NamedTuple):
    """Attributes: allocator: None for torch.empty; patterns: None to plan at every call."""

    allocator: Allocator | None = None
    patterns: PatternStore | None = None

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised, contiguous tensor."""
        if self.allocator is None:
            return torch.empty(size, dtype=dtype, device=device)
        return self.allocator.empty(size, dtype=dtype, device=device)


NO_RESOURCES = Resources()
