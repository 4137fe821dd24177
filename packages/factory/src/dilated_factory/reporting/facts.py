"""The numbers and decisions of a report, as plain data, and their forms: text, JSON and a picture.

Imports the standard library, the decision and the statistics of the pool and the cache; never torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dilated_factory.decision import Decision
from dilated_memory_pool import PoolStatistics
from dilated_pattern_cache import CacheInfo

# The version of the JSON's form.
FORMAT = 1


@dataclass(frozen=True)
class ModuleReport:
    """One module that has a decision.

    Attributes:
        name: dotted, as in ``named_modules``; "" for the model itself.
        class_name: of the module.
        decision: as of its latest call.
        resources: where its shared resources are in ``Report.resources``; None where it has none.
        own: which of "allocator" and "patterns" are the caller's own.
    """

    name: str
    class_name: str
    decision: Decision
    resources: int | None = None
    own: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResourcesReport:
    """One ``SharedResources``.

    Attributes:
        of_process: whether it is the process's own.
        limit: of all pools on one device, as it was given.
        limits: the same in bytes, by device, for those that have a pool; None for no limit.
        pools: by (device, mode).
        kinds: by (device, kind of buffer).
        backends: by (device, mode), which backend serves the pool and why.
        cache: of its pattern cache.
    """

    of_process: bool
    limit: float | str | None
    limits: dict[str, int | None] = field(hash=False)
    pools: dict[tuple[str, str], PoolStatistics] = field(hash=False)
    kinds: dict[tuple[str, str], PoolStatistics] = field(hash=False)
    backends: dict[tuple[str, str], tuple[str, ...]] = field(hash=False)
    cache: CacheInfo = field(hash=False)


@dataclass(frozen=True)
class OwnReport:
    """An allocator or a store of plans that a caller gave, and that has numbers.

    Attributes:
        class_name: of the object.
        modules: the dotted names of those that have it.
        pools: by kind of buffer, "" for an allocator without kinds; empty for a store.
        cache: None for an allocator.
    """

    class_name: str
    modules: tuple[str, ...]
    pools: dict[str, PoolStatistics] = field(default_factory=dict, hash=False)
    cache: CacheInfo | None = field(default=None, hash=False)


@dataclass(frozen=True)
class Report:
    """What ``report`` found. ``str`` of it is a text of at most 100 columns.

    Attributes:
        title: the model's class.
        modules: those with a decision, in the model's order.
        resources: the sets that they share.
        own: what callers gave instead.

    >>> print(Report("Linear"))
    Linear: no module with a decision; the creators of dilated_factory leave one on what they make
    """

    title: str
    modules: tuple[ModuleReport, ...] = ()
    resources: tuple[ResourcesReport, ...] = ()
    own: tuple[OwnReport, ...] = ()

    def totals(self) -> dict[str, float]:
        """The sums over all shared resources: bytes, requests, lookups, and the seconds that the caches saved."""
        pools = [one for each in self.resources for one in (*each.pools.values(), *each.kinds.values())]
        caches = [each.cache for each in self.resources]
        of_pools = ("allocated_bytes", "reserved_bytes", "hits", "misses", "bypasses", "ooms")
        sums: dict[str, float] = {name: sum(getattr(one, name) for one in pools) for name in of_pools}
        return sums | {
            "cache_hits": sum(one.hits for one in caches),
            "cache_misses": sum(one.misses for one in caches),
            "cache_entries": sum(one.entries for one in caches),
            "cache_bytes": sum(one.nbytes for one in caches),
            "seconds_saved": sum(one.seconds_saved for one in caches),
        }

    def __str__(self) -> str:
        from dilated_factory.reporting.text import render

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything, of types that JSON knows. ``format`` is the version of this form.

        >>> Report("Linear").to_dict()["format"]
        1
        """
        return {
            "format": FORMAT,
            "title": self.title,
            "modules": [{**asdict(one), "summary": one.decision.summary()} for one in self.modules],
            "resources": [_resources(one) for one in self.resources],
            "own": [
                {
                    "class_name": one.class_name,
                    "modules": list(one.modules),
                    "pools": [{"kind": kind, **_pool(now)} for kind, now in one.pools.items()],
                    "cache": None if one.cache is None else _cache(one.cache),
                }
                for one in self.own
            ],
            "totals": self.totals(),
        }

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def save_picture(self, path: Path | str) -> Path:
        """Draw the pools' bytes, the hit rates and the decisions by layer; PNG at ``path``, which is returned.

        Raises:
            ImportError: matplotlib is not installed; the message says how to install it.
        """
        from dilated_factory.reporting.picture import draw

        place = Path(path)
        draw(self, place)
        return place


def _resources(one: ResourcesReport) -> dict[str, Any]:
    return {
        "of_process": one.of_process,
        "limit": one.limit,
        "limits": one.limits,
        "pools": _by_place(one.pools, "mode", one.backends),
        "kinds": _by_place(one.kinds, "kind", {}),
        "cache": _cache(one.cache),
    }


def _by_place(
    pools: Mapping[tuple[str, str], PoolStatistics], word: str, backends: Mapping[tuple[str, str], tuple[str, ...]]
) -> list[dict[str, Any]]:
    rows = []
    for (device, name), now in pools.items():
        backend = {"backend": list(backends[device, name])} if (device, name) in backends else {}
        rows.append({"device": device, word: name, **_pool(now), **backend})
    return rows


def _pool(now: PoolStatistics) -> dict[str, Any]:
    derived = {name: getattr(now, name) for name in ("free_bytes", "hit_rate", "waste", "fragmentation")}
    return asdict(now) | derived


def _cache(now: CacheInfo) -> dict[str, Any]:
    return asdict(now) | {"hit_rate": now.hit_rate}
