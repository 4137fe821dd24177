"""A snapshot as what JSON can hold."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dilated_memory_pool.snapshot import PoolSnapshot

if TYPE_CHECKING:
    from dilated_memory_pool import MemoryPool


def to_json(pool: MemoryPool | PoolSnapshot) -> dict[str, Any]:
    """A dictionary of dictionaries, lists, text and numbers, named as the attributes of ``PoolSnapshot``.

    Addresses are hexadecimal text, as in the log of events: numbers that large are not safe in every JSON reader.

    >>> import json
    >>> from dilated_memory_pool import MemoryPool
    >>> pool = MemoryPool("host", mode="lightweight")
    >>> block = pool.allocate("4KiB")
    >>> json.loads(json.dumps(to_json(pool)))["arenas"][0]["spans"]
    [{'offset': 0, 'nbytes': 4096, 'requested': 4096, 'state': 'used'}]
    """
    plain = asdict(snapshot_of(pool))
    plain["reasons"] = list(plain["reasons"])
    plain["arenas"] = [
        {**arena, "address": f"{arena['address']:#x}", "spans": list(arena["spans"])} for arena in plain["arenas"]
    ]
    return plain


def snapshot_of(pool: MemoryPool | PoolSnapshot) -> PoolSnapshot:
    """A snapshot of the pool; the snapshot itself where it is one.

    Raises:
        TypeError: ``pool`` is neither.
    """
    if isinstance(pool, PoolSnapshot):
        return pool
    from dilated_memory_pool.pool import MemoryPool

    if not isinstance(pool, MemoryPool):
        raise TypeError(f"pool: expected a MemoryPool or a PoolSnapshot, got {type(pool).__name__}")
    return pool.snapshot()
