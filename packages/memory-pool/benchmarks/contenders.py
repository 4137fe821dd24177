"""The pools to compare: both modes of every backend that a machine has, and kinds of size classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch

from dilated_memory_pool import MemoryPool
from dilated_memory_pool.backends import Backend
from dilated_memory_pool.sizes import Geometric

MODES: tuple[Literal["lightweight", "full"], ...] = ("lightweight", "full")

LIGHTWEIGHT_EXACT = "lightweight, exact"
# Modes with their size classes, by name: arguments of ``MemoryPool``.
KINDS: dict[str, dict[str, Any]] = {
    "lightweight, 4 a doubling": {"mode": "lightweight", "size_classes": Geometric(4)},
    "lightweight, 8 a doubling (default)": {"mode": "lightweight"},
    "lightweight, power_of_two": {"mode": "lightweight", "size_classes": "power_of_two"},
    LIGHTWEIGHT_EXACT: {"mode": "lightweight", "size_classes": "exact"},
    "full, exact (default)": {"mode": "full"},
    "full, 8 a doubling": {"mode": "full", "size_classes": "geometric"},
}


def backends(device: torch.device) -> list[dict[str, Any]]:
    """Arguments for ``MemoryPool``, one for each backend of ``device`` that works here; says which does not."""
    if device.type == "cpu":
        return [{"backend": "host"}]
    found: list[dict[str, Any]] = []
    for name in ("torch", "cupy"):
        try:
            MemoryPool(name, device=device.index)
        except (ImportError, RuntimeError) as refusal:
            print(f"without the {name} backend: {refusal}", flush=True)
        else:
            found.append({"backend": name, "device": device.index})
    return found


def named(backend: str | Backend, mode: str) -> str:
    """The mode, and the backend too where there is a choice."""
    return mode if backend == "host" else f"{backend} {mode}"


def makers(device: torch.device) -> dict[str, Callable[..., MemoryPool]]:
    """name -> what makes such a pool; it takes the other arguments of ``MemoryPool``."""
    return {
        named(chosen["backend"], mode): partial(MemoryPool, mode=mode, **chosen)
        for chosen in backends(device)
        for mode in MODES
    }
