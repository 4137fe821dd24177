"""Where the memory that is still alive was allocated."""

from __future__ import annotations

import linecache
import os
import sys
import threading
from collections import defaultdict
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from dilated_memory_pool.events import PoolEvent
from dilated_memory_pool.sizes import format_bytes

if TYPE_CHECKING:
    from dilated_memory_pool import MemoryPool

_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")


class Frame(NamedTuple):
    """One line of a stack.

    Attributes:
        filename: of the source.
        lineno: the line in it.
        name: of the function.
    """

    filename: str
    lineno: int
    name: str

    def __str__(self) -> str:
        """As a traceback writes it, with the line itself where the file is there."""
        line = linecache.getline(self.filename, self.lineno).strip()
        return f"{self.filename}:{self.lineno} in {self.name}" + (f": {line}" if line else "")


Stack: TypeAlias = tuple[Frame, ...]


@dataclass(frozen=True)
class Allocation:
    """What is alive of one stack.

    Attributes:
        stack: innermost frame first.
        count: live allocations made there.
        requested_bytes: bytes that they asked for, all together.
    """

    stack: Stack
    count: int
    requested_bytes: int


class LeakTracker:
    """Keeps the stack of every live allocation of one or more pools.

    A block or tensor is alive while anything refers to its memory: a view, an export, a saved tensor of autograd. The
    methods take the pools to hear from first, because a pool tells of a death at its next call; without them, what
    died since is still listed. Ask before a pool is closed: what dies after that is told to nobody.

    Memory left to PyTorch (smaller than ``min_bytes``, in graph capture) is not the pool's and is not listed.

    Args:
        depth: frames to keep of each stack, the innermost; this package's own are left out.

    Raises:
        ValueError: ``depth`` is not a positive whole number.

    >>> from dilated_memory_pool import MemoryPool
    >>> tracker = LeakTracker()
    >>> pool = MemoryPool("host", mode="full", observers=[tracker])
    >>> kept = [pool.allocate("1MiB") for _ in range(3)]
    >>> [(leak.count, leak.requested_bytes) for leak in tracker.live(pool)]
    [(3, 3145728)]
    >>> kept.clear()
    >>> tracker.assert_none(pool)
    """

    def __init__(self, depth: int = 16) -> None:
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth: expected a positive whole number of frames, got {depth!r}")
        self._depth = depth
        # Only ever changed by one atomic step, so that no lock is needed.
        self._live: dict[int, tuple[Stack, int]] = {}

    def __call__(self, event: PoolEvent) -> None:
        """Take note of an "allocate" or a "free"; other events change nothing."""
        if event.kind == "allocate":
            self._live[event.address] = self._stack(event.thread), event.requested
        elif event.kind == "free":
            self._live.pop(event.address, None)

    def live(self, *pools: MemoryPool) -> list[Allocation]:
        """Live allocations by stack, most bytes first."""
        for pool in pools:
            pool.statistics()
        sizes: defaultdict[Stack, list[int]] = defaultdict(list)
        for stack, requested in self._live.copy().values():
            sizes[stack].append(requested)
        found = [Allocation(stack, len(several), sum(several)) for stack, several in sizes.items()]
        return sorted(found, key=lambda allocation: allocation.requested_bytes, reverse=True)

    def report(self, *pools: MemoryPool) -> str:
        """``live`` as text: for every stack its bytes and its frames."""
        live = self.live(*pools)
        count, nbytes = sum(found.count for found in live), sum(found.requested_bytes for found in live)
        lines = [f"live allocations: {count}, of {format_bytes(nbytes)}, from {len(live)} places"]
        for found in live:
            lines += ["", f"{format_bytes(found.requested_bytes)} in {found.count} allocations, made at"]
            lines += [f"    {frame}" for frame in found.stack]
        return "\n".join(lines)

    def assert_none(self, *pools: MemoryPool) -> None:
        """See that nothing is alive.

        Raises:
            AssertionError: something is; with the report.
        """
        if self.live(*pools):
            raise AssertionError(self.report())

    def _stack(self, thread: int) -> Stack:
        """The frames of ``thread``, which is inside its call of the pool until every observer was told."""
        # It need not be this one, which may have come first to tell what another thread did.
        here = thread == threading.get_ident()
        frame: FrameType | None = sys._getframe(1) if here else sys._current_frames().get(thread)
        stack: list[Frame] = []
        while frame is not None and len(stack) < self._depth:
            code = frame.f_code
            if not code.co_filename.startswith(_PACKAGE):
                stack.append(Frame(code.co_filename, frame.f_lineno or 0, code.co_name))
            frame = frame.f_back
        return tuple(stack)
