"""Pool limits and trimming over ranks that share a memory: a host's, a device's, or a budget.

Ranks of one host share its memory, and processes may share a GPU. A rank that is short makes the others give back what
lies idle in their pools, before anyone fails; and a common limit holds over all of them. They speak through a
``torch.distributed`` store: one round trip an arena, none an allocation.

- ``coordinator``: where to begin. ``backend``: what stands between a pool and its memory.
- ``table``, ``ledger``: who reserves how much, and charges that never exceed the limit.
- ``pressure``: asking the others to give back, and answering them.
- ``members``, ``line``: who takes part, and the way to the store.

Imports torch and dilated_memory_pool, and nothing else of the factory.
"""

from __future__ import annotations

from dilated_factory.coordination.backend import CoordinatedBackend
from dilated_factory.coordination.coordinator import PoolCoordinator
from dilated_factory.coordination.errors import GroupLimitError, GroupMemoryError

__all__ = ["CoordinatedBackend", "GroupLimitError", "GroupMemoryError", "PoolCoordinator"]
