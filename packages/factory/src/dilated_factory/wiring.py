"""What of pools and caches a type's builder is handed, and what is said of it.

A type takes a pool by its option ``allocator`` and a cache by ``patterns``. Where it has no such option, the policy's
wish is noted as not wired, and the caller's word is an error. Imports torch and the resources' handles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dilated_factory.hooks import Rules
from dilated_factory.policy import PoolMode
from dilated_factory.request import Request
from dilated_factory.resources.handles import BuffersByKind, CachedPatterns, PooledAllocator
from dilated_factory.resources.shared import POOLED_DEVICES
from dilated_factory.types import names_option


@dataclass
class Wiring:
    """One builder, and what it is handed beside the caller's options.

    Attributes:
        request: what was asked for.
        builder: of the type that was chosen.
        rules: what goes by the length of a call; a pool that calls switch is entered here.
        device_type: where the module will run.
        options: for the builder; begins as the caller's.
        unwired: what the policy wishes for and the type cannot take, as in ``Decision``.
    """

    request: Request
    builder: Callable[..., nn.Module]
    rules: Rules
    device_type: str
    options: dict[str, Any] = field(init=False)
    unwired: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.options = dict(self.request.options)

    def pool(self) -> tuple[PoolMode, str]:
        """Wire the pool: its mode, and a reason.

        Raises:
            TypeError: the type cannot take what the caller asks for.
            ValueError: the device has no pool, or the caller's words contradict each other.
        """
        request, name = self.request, self.rules.attention_type
        given = self.options.get("allocator")
        if given is not None:
            own: PoolMode = "lightweight" if getattr(given, "mode", None) == "lightweight" else "full"
            return own, f"the caller's allocator, {given!r}"
        takes, poolable = names_option(self.builder, "allocator"), self.device_type in POOLED_DEVICES
        if not poolable and (request.buffer_manager or request.enable_memory_pool or request.lightweight_pool):
            raise ValueError(f"device: expected one of {POOLED_DEVICES} for a memory pool, got {self.device_type}")
        if request.buffer_manager:
            if not takes:
                raise TypeError(f'buffer_manager: attention type "{name}" has no option allocator to take it by')
            self.options["allocator"] = BuffersByKind(request.shared)
            return "full", "buffer_manager=True was asked for: a pool for each kind of buffer, in a mode of its own"
        mode, reason = self.rules.policy.choose_pool(
            name, request.sequence_length, enable=request.enable_memory_pool, lightweight=request.lightweight_pool
        )
        if takes and mode != "off" and not poolable:
            self.unwired.append("memory pool")
            return mode, f"{reason}; not wired, since there is none on {self.device_type}"
        if not takes:
            if mode == "off":
                return mode, reason
            if request.enable_memory_pool or request.lightweight_pool:
                word = "enable_memory_pool" if request.enable_memory_pool else "lightweight_pool"
                raise TypeError(f'{word}: attention type "{name}" has no option allocator to take a pool by')
            self.unwired.append("memory pool")
            return mode, f'{reason}; not wired, since the type "{name}" has no option allocator'
        if request.enable_memory_pool is False:
            return mode, reason
        allocator = PooledAllocator(request.shared, mode)
        self.options["allocator"] = allocator
        # A mode that the caller has named is settled; any other goes by the length of each call.
        if not (request.lightweight_pool or (request.enable_memory_pool and request.lightweight_pool is False)):
            self.rules.allocator = allocator
        return mode, reason

    def cache(self) -> tuple[bool, str]:
        """Wire the pattern cache: whether plans are cached, and a reason.

        Raises:
            TypeError: the type cannot take what the caller asks for.
        """
        asked, name = self.request.enable_pattern_cache, self.rules.attention_type
        if self.options.get("patterns") is not None:
            return True, f"on, the caller's, {self.options['patterns']!r}"
        wanted = self.rules.policy.pattern_cache if asked is None else asked
        by = "the policy's default" if asked is None else "as was asked for"
        if not wanted:
            return False, f"off, {by}"
        if names_option(self.builder, "patterns"):
            self.options["patterns"] = CachedPatterns(self.request.shared)
            return True, f"on, {by}; the one that modules of this process share"
        if asked:
            raise TypeError(f'enable_pattern_cache: attention type "{name}" has no option patterns to take a cache by')
        self.unwired.append("pattern cache")
        return True, f'on, {by}; not wired, since the type "{name}" has no option patterns'
