"""Where arenas come from. ``choose`` turns the argument ``backend=`` into one of these."""

from __future__ import annotations

from dilated_memory_pool.backends.base import Backend, Event, Memory, Streams
from dilated_memory_pool.backends.choose import choose
from dilated_memory_pool.backends.host import HostBackend

__all__ = ["Backend", "Event", "HostBackend", "Memory", "Streams", "choose"]
