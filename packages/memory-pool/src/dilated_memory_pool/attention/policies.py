"""Where the buffers of each kind come from: data, for the user to read and to replace.

``BufferPolicy`` says it for one kind, ``DEFAULT_POLICIES`` for all ten. One number per kind would not do: what is
asked for again at the same size wants blocks of its own, and what comes at other sizes every time wants to be split and
joined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from dilated_memory_pool import sizes
from dilated_memory_pool.attention.kinds import BufferKind
from dilated_memory_pool.backends import Backend
from dilated_memory_pool.sizes import Exact, Geometric, SizeClasses, parse_bytes

DEVICE = "device"
_BACKENDS = (DEVICE, "host", "pinned", "cupy", "torch")


@dataclass(frozen=True)
class BufferPolicy:
    """How a ``MemoryPool`` for one kind is made. ``dataclasses.replace`` changes one field of a default.

    Attributes:
        backend: "device" for the manager's own, "host", "pinned", "cupy", "torch", or a backend object; of a tuple of
            these the first that this machine has.
        mode: as in ``MemoryPool``.
        size_classes: as in ``MemoryPool``.
        min_bytes: as in ``MemoryPool``.
        arena_bytes: full mode: the least to ask of the backend at a time. By default no more than the request, since
            what one kind holds in advance is missing to the others under their common limit.
        growth: how many times larger a growable buffer gets when it is full; None where the kind has none.
        shared: whether ``AttentionBufferManager.shared`` may keep tensors of this kind; only with ``min_bytes=0``,
            because a small tensor that came from PyTorch would not be shared.
        why: the reason, for reports.

    Raises:
        TypeError, ValueError: a field is none of the above, or has no effect beside the others.

    >>> from dataclasses import replace
    >>> replace(DEFAULT_POLICIES[BufferKind.CACHE], growth=1.5).growth
    1.5
    """

    backend: str | Backend | tuple[str | Backend, ...] = DEVICE
    mode: Literal["lightweight", "full"] = "lightweight"
    size_classes: str | SizeClasses | tuple[int | str, ...] | None = None
    min_bytes: int | str = "1MiB"
    arena_bytes: int | str | None = None
    growth: float | None = None
    shared: bool = False
    why: str = "as the user wishes"

    def __post_init__(self) -> None:
        if not self.backends:
            raise ValueError("backend: expected one or more, got ()")
        for backend in self.backends:
            if isinstance(backend, str) and backend not in _BACKENDS:
                raise ValueError(f"backend: expected one of {list(_BACKENDS)} or a backend object, got {backend!r}")
        if self.mode not in ("lightweight", "full"):
            raise ValueError(f"mode: expected 'lightweight' or 'full', got {self.mode!r}")
        if self.size_classes is not None:
            sizes.size_classes(self.size_classes)
        least = parse_bytes(self.min_bytes, "min_bytes")
        if self.arena_bytes is not None:
            parse_bytes(self.arena_bytes, "arena_bytes")
            if self.mode == "lightweight":
                raise ValueError(f"arena_bytes: expected None in lightweight mode, got {self.arena_bytes!r}")
        if self.growth is not None:
            _check_growth(self.growth)
        if self.shared and least:
            raise ValueError(f"min_bytes: expected 0 beside shared=True, got {self.min_bytes!r}")

    @property
    def backends(self) -> tuple[str | Backend, ...]:
        """The candidates, in the order in which they are tried."""
        return self.backend if isinstance(self.backend, tuple) else (self.backend,)


def _check_growth(growth: float) -> None:
    if isinstance(growth, bool) or not isinstance(growth, (int, float)):
        raise TypeError(f"growth: expected a number, got {growth!r}")
    if not 1 < growth < math.inf:
        raise ValueError(f"growth: expected a finite factor above 1, got {growth}")


_PROJECTION = BufferPolicy(
    size_classes=Geometric(),
    why="the same few shapes in every layer, so a block per size class is met again",
)
# Arenas of one score matrix are the next one's, whatever its shape.
_LARGE_AND_SHORT = BufferPolicy(
    mode="full",
    size_classes=Exact(),
    why="large, short-lived and of changing size, so freed memory is split and joined to fit",
)

DEFAULT_POLICIES: Mapping[BufferKind, BufferPolicy] = MappingProxyType(
    {
        BufferKind.QUERY: _PROJECTION,
        BufferKind.KEY: _PROJECTION,
        BufferKind.VALUE: _PROJECTION,
        BufferKind.OUTPUT: _PROJECTION,
        BufferKind.SCORES: _LARGE_AND_SHORT,
        BufferKind.WEIGHTS: _LARGE_AND_SHORT,
        BufferKind.TEMP: BufferPolicy(
            size_classes=Geometric(steps=4),
            min_bytes="64KiB",
            why="small too, and of many sizes, so classes are few and begin low",
        ),
        # NCCL sends from the device, and so do the rings. Who sends by way of the host says backend=("pinned", "host"):
        # copies overlap with work only where its memory is page-locked.
        BufferKind.COMM: BufferPolicy(
            size_classes=Geometric(steps=4),
            why="sent and received where the data are, in messages of many sizes, so classes are few",
        ),
        BufferKind.MASK: BufferPolicy(
            size_classes=Geometric(steps=4, smallest=4096),
            min_bytes=0,
            shared=True,
            why="small and the same for many callers, so all hold one tensor",
        ),
        BufferKind.CACHE: BufferPolicy(
            size_classes=Exact(),
            growth=2.0,
            why="grows by doubling, which moves a row twice at most on average",
        ),
    }
)
