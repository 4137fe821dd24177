"""What can be told of a pool's events: ``MemoryPool(mode="full", observers=[...])``.

A "free" is told at the pool's next call after the memory's last owner died. Where a count must be exact at a given
moment, methods here take the pools to hear from first; asking a pool for its statistics makes it tell what it knows.
"""

from dilated_memory_pool.observers.json_lines import JsonLinesLog, LoggedEvent, read, replay
from dilated_memory_pool.observers.leaks import Allocation, Frame, LeakTracker
from dilated_memory_pool.observers.statistics import Counters, StatisticsObserver

__all__ = [
    "Allocation",
    "Counters",
    "Frame",
    "JsonLinesLog",
    "LeakTracker",
    "LoggedEvent",
    "StatisticsObserver",
    "read",
    "replay",
]
