"""What a cache says of itself."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class CacheInfo:
    """Totals since the cache was made, and its size now.

    Every lookup is a hit, a miss, a wait or a bypass, but for one that finds its value changed, which raises.

    Attributes:
        hits: found.
        misses: not found, and nobody was making it.
        waits: not found, but being made by another thread or task.
        bypasses: not looked for: inside a dispatch mode of PyTorch, a transform or a trace; by a finaliser or a signal
            handler in the middle of the cache's own work.
        creations: calls of ``create`` that returned what others may share.
        failures: calls of ``create`` that raised, or returned what others could not use.
        evictions: values that left because of a limit. Copies on devices count on their own, in ``devices``.
        rejections: values that ``get_or_create`` returned and could not keep: too large, or all else is pinned.
        entries: how many there are.
        max_entries: how many there may be; None for any number.
        nbytes: of their memory; memory that several values share counts once.
        max_bytes: how many bytes there may be; None for any amount.
        seconds_spent: in ``create``.
        seconds_saved: by hits: for every one, what the value took to make. Of entries that are gone, too.
        devices: the copies on every device, by its name.
    """

    hits: int
    misses: int
    waits: int
    bypasses: int
    creations: int
    failures: int
    evictions: int
    rejections: int
    entries: int
    max_entries: int | None
    nbytes: int
    max_bytes: int | None
    seconds_spent: float
    seconds_saved: float
    devices: dict[str, DeviceInfo]

    @property
    def hit_rate(self) -> float:
        """Hits among the lookups that were no bypasses; 0 before the first."""
        lookups = self.hits + self.misses + self.waits
        return self.hits / lookups if lookups else 0.0

    def __str__(self) -> str:
        limit = "" if self.max_entries is None else f" of {self.max_entries}"
        weight = f"{self.nbytes:,} bytes" + ("" if self.max_bytes is None else f" of {self.max_bytes:,}")
        hits = f"{self.hit_rate:.1%} hits ({self.hits:,} hits, {self.misses:,} misses, {self.waits:,} waits)"
        time = f"{self.seconds_spent:.3g} s spent, {self.seconds_saved:.3g} s saved"
        lines = [f"{self.entries:,}{limit} entries, {weight}; {hits}; {self.evictions:,} evictions; {time}"]
        lines += [f"{name}: {info}" for name, info in self.devices.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class DeviceInfo:
    """The copies on one device.

    Attributes:
        entries: how many there are.
        nbytes: of their memory.
        max_bytes: how many bytes there may be; None for any amount.
        copies: how many were made.
        evictions: how many left because of the limit.
    """

    entries: int
    nbytes: int
    max_bytes: int | None
    copies: int
    evictions: int

    def __str__(self) -> str:
        weight = f"{self.nbytes:,} bytes" + ("" if self.max_bytes is None else f" of {self.max_bytes:,}")
        return f"{self.entries} copies, {weight}; {self.copies:,} made, {self.evictions:,} evicted"


@dataclass(frozen=True)
class EntryInfo:
    """One entry.

    Attributes:
        key: as it was stored.
        nbytes: of its memory, also where others share it.
        hits: how often it was found, copies included.
        seconds: what it took to make; 0 where it was put.
        pinned: whether it may not be evicted.
        devices: where there are copies.
    """

    key: Hashable
    nbytes: int
    hits: int
    seconds: float
    pinned: bool
    devices: tuple[str, ...]

    @property
    def seconds_saved(self) -> float:
        """By its hits."""
        return self.hits * self.seconds


@dataclass(frozen=True)
class Eviction:
    """What ``on_evict`` is told.

    Attributes:
        entry: what left.
        value: what it held.
        device: where it was a copy; None for the value itself.
        reason: the limit that was reached.
    """

    entry: EntryInfo
    value: Any
    device: str | None
    reason: Literal["max_entries", "max_bytes"]


@dataclass(frozen=True)
class WarmReport:
    """What ``warm`` did.

    Attributes:
        created: how many values it made.
        found: how many values were there.
        rejected: how many were made and could not be kept.
        evicted: how many entries left meanwhile: the limits are too narrow for all that is warmed.
        seconds: how long it took.
    """

    created: int
    found: int
    rejected: int
    evicted: int
    seconds: float
