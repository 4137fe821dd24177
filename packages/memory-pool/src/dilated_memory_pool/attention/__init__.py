"""The memory of an attention computation, by purpose. ``manager`` is where to begin."""

from __future__ import annotations

from dilated_memory_pool.attention.growable import GrowableBuffer
from dilated_memory_pool.attention.kinds import BufferKind
from dilated_memory_pool.attention.manager import AttentionBufferManager, KindAllocator
from dilated_memory_pool.attention.policies import DEFAULT_POLICIES, BufferPolicy

__all__ = [
    "DEFAULT_POLICIES",
    "AttentionBufferManager",
    "BufferKind",
    "BufferPolicy",
    "GrowableBuffer",
    "KindAllocator",
]
