"""One pool for each kind of buffer, made at its first use, on the backend that the kind's policy asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from dilated_memory_pool.adaptors import SharedBackend
from dilated_memory_pool.attention.kinds import BufferKind
from dilated_memory_pool.attention.policies import DEFAULT_POLICIES, DEVICE, BufferPolicy
from dilated_memory_pool.backends import Backend, choose
from dilated_memory_pool.pool import MemoryPool


class KindPools:
    """The pools of a manager, and the backends under them. Arguments are the manager's.

    There is no lock that a fork could leave locked: ``setdefault`` is one step, and of two threads that make the same
    pool at once one makes what is dropped again, empty.

    Attributes:
        policies: of every kind.
        chosen: the backend of the kinds whose policy says "device".
        made: the pools there are.
        closed: whether there are to be no more.
    """

    def __init__(
        self,
        backend: str | Backend,
        limit: float | str | None,
        policies: Mapping[BufferKind, BufferPolicy] | Mapping[str, BufferPolicy],
        device: int | None,
    ) -> None:
        self.policies = _complete(policies)
        self.chosen, why = choose(backend, device)
        self.made: dict[BufferKind, MemoryPool] = {}
        self.closed = False
        self._limit, self._index = limit, device
        if isinstance(self.chosen, SharedBackend):
            if limit is not None:
                raise ValueError(f"limit: expected None beside a SharedBackend, which has its own, got {limit!r}")
            shared = self.chosen
        else:
            shared = SharedBackend(self.chosen, limit)
        self._backends: dict[str | int, tuple[SharedBackend, str]] = {DEVICE: (shared, why)}

    def get(self, kind: BufferKind | str) -> MemoryPool:
        """The pool of ``kind``. RuntimeError when closed."""
        if self.closed:
            raise RuntimeError("the manager is closed")
        if type(kind) is not BufferKind:
            kind = BufferKind(kind)
        return self.made.get(kind) or self._open(kind)

    def _open(self, kind: BufferKind) -> MemoryPool:
        policy = self.policies[kind]
        backend, _ = self.place(kind)
        arena_bytes = policy.arena_bytes
        if arena_bytes is None and policy.mode == "full":
            arena_bytes = 0  # just the request
        new = MemoryPool(
            backend,
            limit=backend.limit,
            size_classes=policy.size_classes,
            min_bytes=policy.min_bytes,
            mode=policy.mode,
            arena_bytes=arena_bytes,
        )
        pool = self.made.setdefault(kind, new)
        backend.attach((id(self), kind), pool)
        if self.closed:  # by another thread, which may not have seen this pool
            pool.close()
        return pool

    def place(self, kind: BufferKind) -> tuple[SharedBackend, str]:
        """(backend, why) of the first candidate of the policy that this machine has."""
        policy = self.policies[kind]
        *preferred, last = policy.backends
        refusals = []
        for candidate in preferred:
            try:
                backend, why = self._backend(candidate)
                break
            except (ImportError, RuntimeError) as error:
                refusals.append(f"not {candidate}: {error}")
        else:
            backend, why = self._backend(last)
        return backend, "; ".join([why, *refusals, f"{policy.mode} mode: {policy.why}"])

    def _backend(self, wanted: str | Backend) -> tuple[SharedBackend, str]:
        if wanted == DEVICE or wanted is self.chosen or wanted == self.chosen.name:
            return self._backends[DEVICE]
        key = wanted if isinstance(wanted, str) else id(wanted)
        if key not in self._backends:
            needs_index = isinstance(wanted, str) and wanted != "host"
            backend, why = choose(wanted, self._index if needs_index else None)
            self._backends.setdefault(key, (SharedBackend(backend, self._limit), why))
        return self._backends[key]

    def set_limit(self, limit: float | str | None) -> None:
        """See ``AttentionBufferManager.set_limit``."""
        for backend, _ in list(self._backends.values()):
            backend.set_limit(limit)
        self._limit = limit

    def close(self) -> None:
        """Close all pools, and make no more."""
        self.closed = True
        for pool in list(self.made.values()):
            pool.close()


def backend_of(pool: MemoryPool) -> SharedBackend:
    """The backend under one of these pools."""
    return cast("SharedBackend", pool.backend)


def _complete(
    policies: Mapping[BufferKind, BufferPolicy] | Mapping[str, BufferPolicy],
) -> dict[BufferKind, BufferPolicy]:
    """The policy of every kind: the user's, else the default."""
    complete = dict(DEFAULT_POLICIES)
    given = set()
    for name, policy in policies.items():
        kind = BufferKind(name)
        if not isinstance(policy, BufferPolicy):
            raise TypeError(f"policies[{kind.value!r}]: expected a BufferPolicy, got {policy!r}")
        if kind in given:
            raise ValueError(f"policies: expected each kind once, got {kind.value} twice, in different case")
        given.add(kind)
        complete[kind] = policy
    return complete
