"""Tensors from a pool, safe by construction. Needs nothing but Python; PyTorch and CuPy where you have them.

>>> pool = MemoryPool("host", limit="8GiB")
>>> tokens = pool.empty((65536, 64))  # goes back to the pool when its last user is gone
"""

from dilated_memory_pool.blocks import Block
from dilated_memory_pool.current import current_pool, use_pool
from dilated_memory_pool.errors import PoolLimitError, PoolMemoryError
from dilated_memory_pool.events import Observer, PoolEvent
from dilated_memory_pool.pool import MemoryPool
from dilated_memory_pool.snapshot import ArenaSnapshot, PoolSnapshot, SpanSnapshot
from dilated_memory_pool.statistics import PoolStatistics

__version__ = "0.1.0"

__all__ = [
    "ArenaSnapshot",
    "Block",
    "MemoryPool",
    "Observer",
    "PoolEvent",
    "PoolLimitError",
    "PoolMemoryError",
    "PoolSnapshot",
    "PoolStatistics",
    "SpanSnapshot",
    "current_pool",
    "use_pool",
]
