"""A thread-safe cache that computes each value once: attention patterns, layouts, plans, or anything dear to make.

>>> cache = PatternCache(max_entries=100)
>>> cache.get_or_create(("squares", 4), lambda: [n * n for n in range(4)])
[0, 1, 4, 9]
"""

from dilated_pattern_cache.cache import PatternCache
from dilated_pattern_cache.dilated import DilatedPatternCache, KindInfo
from dilated_pattern_cache.errors import PatternMutatedError
from dilated_pattern_cache.keys import (
    BlockLayoutKey,
    BlockMaskKey,
    CommunicationPlanKey,
    DilatedIndexKey,
    PatternKey,
)
from dilated_pattern_cache.statistics import CacheInfo, DeviceInfo, EntryInfo, Eviction, WarmReport

__version__ = "0.1.0"

__all__ = [
    "BlockLayoutKey",
    "BlockMaskKey",
    "CacheInfo",
    "CommunicationPlanKey",
    "DeviceInfo",
    "DilatedIndexKey",
    "DilatedPatternCache",
    "EntryInfo",
    "Eviction",
    "KindInfo",
    "PatternCache",
    "PatternKey",
    "PatternMutatedError",
    "WarmReport",
]
