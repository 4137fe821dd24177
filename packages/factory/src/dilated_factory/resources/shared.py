"""The pools and the cache that modules draw from: one set a process, or a set of one's own.

Imports torch, dilated_memory_pool and dilated_pattern_cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch

from dilated_factory.policy import PoolMode
from dilated_factory.profile import users_profile
from dilated_memory_pool import MemoryPool, PoolStatistics
from dilated_memory_pool.adaptors import SharedBackend
from dilated_memory_pool.attention import DEFAULT_POLICIES, AttentionBufferManager, BufferKind, BufferPolicy
from dilated_memory_pool.backends import Backend, choose
from dilated_memory_pool.sizes import parse_bytes, parse_limit
from dilated_pattern_cache import CacheInfo, DilatedPatternCache

# The types of device that have a pool.
POOLED_DEVICES = ("cpu", "cuda")
# The size from which a pool serves a tensor itself, where no profile has measured another: dilated_memory_pool's own.
MIN_BYTES = "1MiB"


class Coordinator(Protocol):
    """Who makes the ranks of a group share memory: ``dilated_factory.coordination.PoolCoordinator`` is one."""

    def covers(self, backend: Backend) -> bool:
        """Whether that memory is the one it coordinates."""

    def coordinated(self, upstream: Backend) -> Backend:
        """A backend that draws from ``upstream`` what the ranks' common limit allows."""

    def watch(self, pool: Any) -> None:
        """Trim ``pool`` when another rank is short of memory."""


class SharedResources:
    """Memory pools by device and mode, a buffer manager a device, and a pattern cache, all made at their first use.

    The pools and the manager of one device have one limit, and make room for each other: what lies idle in any of
    them is given back before a request is refused.

    Modules that the factory creates use the process's own set, ``shared_resources()``, unless ``resources=`` names
    another. It may be used from many threads and survives a fork. A copy of a module shares its set.

    Args:
        limit: what all pools on one device may reserve together: bytes, text such as "8GiB", or a float, the fraction
            of the device's memory.
        min_bytes: tensors smaller than this are left to PyTorch. None: what ``dilated tune`` has measured on this
            machine, else 1 MiB; and for a buffer manager what the policy of each kind says.
        cache_entries, cache_bytes: what the pattern cache keeps at most; None for no limit on bytes.
        backend: (torch.device) -> the backend or the name of one that pools on it draw from, see ``MemoryPool``. By
            default host memory on the CPU, and on a CUDA device CuPy's where that is installed, else PyTorch's.
        coordinator: of the ranks of a group, see ``dilated_factory.coordination``.

    Raises:
        TypeError, ValueError: an argument is none of the above.

    >>> resources = SharedResources(limit="1GiB")
    >>> rows = resources.pool("cpu", "full").empty((1024, 1024), dtype=torch.float32)
    >>> resources.statistics()["cpu", "full"].allocated_bytes
    4194304
    """

    def __init__(
        self,
        limit: float | str | None = 1.0,
        *,
        min_bytes: int | str | None = None,
        cache_entries: int | None = 100,
        cache_bytes: int | None = None,
        backend: Callable[[torch.device], Backend | str] | None = None,
        coordinator: Coordinator | None = None,
    ) -> None:
        parse_limit(limit, total=1)
        if min_bytes is not None:
            parse_bytes(min_bytes, "min_bytes")
        if backend is not None and not callable(backend):
            raise TypeError(f"backend: expected a callable of a torch.device, or None, got {backend!r}")
        if coordinator is not None and not callable(getattr(coordinator, "covers", None)):
            raise TypeError(f"coordinator: expected an object with covers, or None, got {coordinator!r}")
        self.limit = limit
        self.cache = DilatedPatternCache(max_entries=cache_entries, max_bytes=cache_bytes)
        self.coordinator = coordinator
        self._min_bytes, self._choose = min_bytes, backend
        self._backends: dict[torch.device, SharedBackend] = {}
        self._pools: dict[tuple[torch.device, PoolMode], MemoryPool] = {}
        self._managers: dict[torch.device, AttentionBufferManager] = {}

    # ------------------------------------------------------------------------------------------ what there is

    def pool(self, device: torch.device | str, mode: Literal["lightweight", "full"] = "full") -> MemoryPool:
        """The pool of that device and mode.

        Raises:
            ValueError: ``mode`` is neither; RuntimeError, ImportError: the device or what serves it is missing.
        """
        place = _place(device)
        pool = self._pools.get((place, mode))
        if pool is None:
            if mode not in ("lightweight", "full"):
                raise ValueError(f'mode: expected "lightweight" or "full", got {mode!r}')
            shared = self.backend(place)
            # Of two threads that make the same pool at once, one makes what is dropped again, empty.
            new = MemoryPool(shared, mode=mode, min_bytes=self._least(place), limit=shared.limit)
            pool = self._pools.setdefault((place, mode), new)
            shared.attach(mode, pool)
            if pool is new:
                self._watch(pool, shared)
        return pool

    def manager(self, device: torch.device | str) -> AttentionBufferManager:
        """The buffer manager of that device: a pool for each kind of buffer.

        Raises:
            RuntimeError, ImportError: the device or what serves it is missing.
        """
        place = _place(device)
        manager = self._managers.get(place)
        if manager is None:
            shared = self.backend(place)
            new = AttentionBufferManager(shared, policies=self._policies())
            manager = self._managers.setdefault(place, new)
            if manager is new:
                self._watch(manager, shared)
        return manager

    def _policies(self) -> dict[BufferKind, BufferPolicy]:
        """Where the buffers of each kind come from: all on the device, and from the size that was given."""
        # Messages of the rings are sent from the device, and page-locked memory is not on it.
        policies = {kind: replace(policy, backend="device") for kind, policy in DEFAULT_POLICIES.items()}
        if self._min_bytes is None:
            return policies
        least = self._min_bytes
        return {
            kind: policy if policy.shared else replace(policy, min_bytes=least) for kind, policy in policies.items()
        }

    def _watch(self, pool: MemoryPool | AttentionBufferManager, shared: SharedBackend) -> None:
        if self.coordinator is not None and self.coordinator.covers(shared):
            self.coordinator.watch(pool)

    def backend(self, device: torch.device | str) -> SharedBackend:
        """What all pools of that device draw from, under one limit."""
        place = _place(device)
        shared = self._backends.get(place)
        if shared is None:
            upstream = self._upstream(place)
            if self.coordinator is not None and self.coordinator.covers(upstream):
                upstream = self.coordinator.coordinated(upstream)
            shared = self._backends.setdefault(place, SharedBackend(upstream, self.limit))
        return shared

    def _least(self, place: torch.device) -> int | str:
        """The size from which the pools of that device serve a tensor themselves."""
        if self._min_bytes is not None:
            return self._min_bytes
        profile = users_profile(place)
        measured = None if profile is None else profile.pool_min_bytes
        return MIN_BYTES if measured is None else measured

    def _upstream(self, place: torch.device) -> Backend:
        chosen: Backend | str
        if self._choose is not None:
            chosen = self._choose(place)
        elif place.type == "cpu":
            chosen = "host"
        elif place.type == "cuda":
            chosen = "auto"
        else:
            raise ValueError(f"device: expected cpu or cuda for a memory pool, got {place}")
        return choose(chosen, place.index if chosen in ("auto", "cupy", "torch", "pinned") else None)[0]

    # ------------------------------------------------------------------------------------------ the whole

    def set_limit(self, limit: float | str | None) -> None:
        """A new limit, as in the constructor. What is over it and unused is given back; what is in use stays.

        Raises:
            TypeError, ValueError: ``limit`` is none; nothing is changed then.
        """
        parse_limit(limit, total=1)
        for shared in list(self._backends.values()):
            shared.set_limit(limit)
        self.limit = limit

    def trim(self) -> int:
        """Give what nobody uses back to the devices; the bytes given back."""
        given = sum(pool.trim() for pool in list(self._pools.values()))
        return given + sum(manager.trim() for manager in list(self._managers.values()))

    def statistics(self) -> dict[tuple[str, str], PoolStatistics]:
        """The numbers of every pool by (device, mode), and of every kind of buffer by (device, kind)."""
        numbers = {(str(device), str(mode)): pool.statistics() for (device, mode), pool in list(self._pools.items())}
        for device, manager in list(self._managers.items()):
            numbers |= {(str(device), kind.value): now for kind, now in manager.statistics().items()}
        return numbers

    def cache_info(self) -> CacheInfo:
        """The numbers of the pattern cache."""
        return self.cache.info()

    def reasons(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """For every pool, which backend it has and why."""
        return {(str(device), str(mode)): pool.reasons for (device, mode), pool in list(self._pools.items())}

    def __copy__(self) -> SharedResources:
        return self

    def __deepcopy__(self, memo: object) -> SharedResources:
        return self

    def __reduce__(self) -> tuple[Callable[[], SharedResources], tuple[()]]:
        if self is not _OF_PROCESS:
            raise TypeError(
                "a SharedResources of one's own cannot be pickled, nor a module that uses it: save its state_dict, or "
                "leave resources= out, so that it takes those of the process it is loaded in"
            )
        return shared_resources, ()

    def __repr__(self) -> str:
        made = sorted({f"{mode} on {device}" for device, mode in self.statistics()})
        used = ", ".join(made) or "nothing used yet"
        return f"<SharedResources limit={self.limit!r}: {used}; {len(self.cache)} patterns>"


# It holds nothing until a module asks.
_OF_PROCESS = SharedResources()


def shared_resources() -> SharedResources:
    """The process's own set, which created modules use by default.

    >>> shared_resources() is shared_resources()
    True
    """
    return _OF_PROCESS


def _place(device: torch.device | str) -> torch.device:
    """The device with its index, so that "cuda" and "cuda:0" are one."""
    place = torch.device(device)
    if place == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return place if place.type == "cuda" else torch.device(place.type)
