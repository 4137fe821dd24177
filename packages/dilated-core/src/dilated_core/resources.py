"""What a caller may lend an attention: memory to work in, and a place to keep plans. Protocols only, and a bundle."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

BufferKind = Literal["query", "key", "value", "output", "scores", "weights", "temp", "comm", "mask", "cache"]
"""What a buffer is for: copies and gradients of query, key and value; results; messages between ranks; masks; rows kept
for decoding; and "temp", all other scratch. "scores" and "weights" are for attentions that form them: these do not."""

OF_QKV: tuple[BufferKind, BufferKind, BufferKind] = ("query", "key", "value")
"""The kinds of their copies, and of their gradients."""


@runtime_checkable
class Allocator(Protocol):
    """Where the memory of results and scratch comes from. A ``dilated_memory_pool.MemoryPool`` is one.

    One that is a ``BufferManager`` too is told what each buffer is for.
    """

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised, contiguous tensor.

        Args:
            size: its shape.
            dtype: of its elements.
            device: where it lies.

        Returns:
            The tensor; its memory is the caller's until the tensor and all views of it are gone.
        """


@runtime_checkable
class BufferManager(Protocol):
    """An allocator for each kind of buffer. A ``dilated_memory_pool.AttentionBufferManager`` is one."""

    def allocator(self, kind: str) -> Allocator:
        """Return the allocator of one kind of buffer.

        Args:
            kind: a ``BufferKind``: "query", "key", "value", "output", "scores", "weights", "temp", "comm", "mask" or
                "cache".
        """


@runtime_checkable
class PatternStore(Protocol):
    """Where plans are kept between calls. A ``dilated_pattern_cache.PatternCache`` is one."""

    def get_or_create(self, key: Hashable, create: Callable[[], Any]) -> Any:
        """Return what is kept under ``key``, or keep and return ``create()``.

        Args:
            key: hashable, and the same in every process for the same plan.
            create: makes the value; called where nothing is kept.
        """


class Resources(NamedTuple):
    """What one call was lent. ``of`` makes it.

    Attributes:
        allocator: None for torch.empty.
        patterns: None to plan at every call.
        manager: the allocator again, where it is a BufferManager; None where it is not.
    """

    allocator: Allocator | None = None
    patterns: PatternStore | None = None
    manager: BufferManager | None = None

    @classmethod
    def of(cls, allocator: Allocator | None, patterns: PatternStore | None) -> Resources:
        """The two, and whether the allocator is a manager: looked up here once, not for every buffer.

        A plain look at the attribute: ``isinstance`` takes microseconds, and takes an attribute that is no method too.
        """
        by_kind = callable(getattr(allocator, "allocator", None))
        return cls(allocator, patterns, allocator if by_kind else None)  # type: ignore[arg-type]

    def empty(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device, kind: BufferKind = "temp"
    ) -> Tensor:
        """An uninitialised, contiguous tensor, from the manager's allocator of ``kind`` where there is a manager."""
        if self.allocator is None:
            return torch.empty(size, dtype=dtype, device=device)
        allocator = self.allocator if self.manager is None else self.manager.allocator(kind)
        return allocator.empty(size, dtype=dtype, device=device)


NO_RESOURCES = Resources()
