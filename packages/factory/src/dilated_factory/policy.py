"""The thresholds, as data: which attention, which pool, and why.

Every rule is a pure function of plain values, so each boundary can be tested without a tensor or a device.
Imports the registry's table of known types (for what to install) and the standard library, never torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from dilated_factory.registry import install_command

PoolMode = Literal["off", "lightweight", "full"]

_THRESHOLDS = (
    "pool_lightweight_from",
    "pool_full_from",
    "ring_from",
    "sparse_above",
    "memory_budget_bytes",
    "live_tensors",
)


@dataclass(frozen=True)
class Policy:
    """What the factory does where the caller has not spoken; change a rule with `dataclasses.replace`.

    Lengths are in tokens, memory in bytes. Raises TypeError or ValueError when a threshold is not a positive
    whole number or two of them are out of order.

    >>> Policy().choose_pool("improved", 4095)[0], Policy().choose_pool("improved", 4096)[0]
    ('off', 'lightweight')
    >>> Policy(pool_full_from=16384).choose_pool("improved", 8192)[0]
    'lightweight'
    """

    # Specification, "Factory Auto-Enable Benchmark Report": pools cost time below 4,096 tokens and are
    # switched on from there; its verification table gives 4,096 the lightweight pool and 8,192 the full one.
    pool_lightweight_from: int = 4096
    pool_full_from: int = 8192
    # Same report, "Special Implementations", and the rule in "Memory Pool Integration Summary Report".
    pool_always: tuple[str, ...] = ("ring", "distributed", "block_sparse", "block_sparse_ring")
    # Specification, "Performance Benchmark Report", "For Long Sequences": improved below 8K, ring from 8K to
    # 64K, block_sparse_ring above 64K.
    ring_from: int = 8192
    sparse_above: int = 65536
    # Specification, "Pattern Caching Performance Analysis Report", recommendation 1: on by default.
    pattern_cache: bool = True
    # What one attention call may hold before "auto" prefers ring; None: all the memory the device has.
    memory_budget_bytes: int | None = None
    # Query, key, value, output and a gradient for each: what training one attention holds at the very least.
    live_tensors: int = 8

    def __post_init__(self) -> None:
        for name in _THRESHOLDS:
            value = getattr(self, name)
            if value is None and name == "memory_budget_bytes":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Policy.{name}: expected a positive int, got {value!r}")
            if value < 1:
                raise ValueError(f"Policy.{name}: expected a positive int, got {value}")
        if not isinstance(self.pattern_cache, bool):
            raise TypeError(f"Policy.pattern_cache: expected a bool, got {self.pattern_cache!r}")
        always: object = self.pool_always
        if not (isinstance(always, tuple) and all(isinstance(name, str) for name in always)):
            raise TypeError(f"Policy.pool_always: expected a tuple of type names, got {always!r}")
        for low, high in (("pool_lightweight_from", "pool_full_from"), ("ring_from", "sparse_above")):
            lower, upper = getattr(self, low), getattr(self, high)
            if lower > upper:
                raise ValueError(f"Policy.{low}: expected at most Policy.{high} = {upper}, got {lower}")

    def choose_pool(
        self,
        attention_type: str,
        sequence_length: int | None,
        *,
        enable: bool | None = None,
        lightweight: bool | None = None,
    ) -> tuple[PoolMode, str]:
        """Return the pool mode and the reason for it.

        `enable` and `lightweight` are the caller's own words and win over the thresholds: `enable=False` is
        off, `enable=True` is on at any length, `lightweight=True` asks for a lightweight pool (so it is on),
        and `lightweight=False` makes whatever pool is on a full one. Raises ValueError when the two
        contradict.

        >>> Policy().choose_pool("ring", 511)
        ('lightweight', 'ring always uses a pool; lightweight below 8,192 tokens')
        """
        if enable is False and lightweight is True:
            raise ValueError(
                "enable_memory_pool=False and lightweight_pool=True contradict: leave out lightweight_pool "
                "for no pool, or enable_memory_pool for a lightweight one"
            )
        if enable is False:
            return "off", "enable_memory_pool=False was asked for"
        if enable is True:
            on = "enable_memory_pool=True was asked for"
        elif lightweight is True:
            on = "lightweight_pool=True was asked for"
        elif attention_type in self.pool_always:
            on = f"{attention_type} always uses a pool"
        elif sequence_length is None:
            return "off", "no sequence length is known, so no length rule can switch a pool on"
        elif sequence_length >= self.pool_lightweight_from:
            on = f"{sequence_length:,} tokens is at or above {self.pool_lightweight_from:,}"
        else:
            return "off", f"{sequence_length:,} tokens is below {self.pool_lightweight_from:,}"

        if lightweight is not None:
            mode: PoolMode = "lightweight" if lightweight else "full"
            return mode, on if on.startswith("lightweight_pool") else f"{on}; lightweight_pool={lightweight}"
        if sequence_length is None:
            return "lightweight", f"{on}; lightweight, because no sequence length is known"
        if sequence_length >= self.pool_full_from:
            return "full", f"{on}; full from {self.pool_full_from:,} tokens"
        return "lightweight", f"{on}; lightweight below {self.pool_full_from:,} tokens"

    def choose_type(
        self,
        sequence_length: int | None,
        *,
        installed: Collection[str],
        process_group: bool = False,
        working_set: int | None = None,
        memory_total: int | None = None,
        allow_sparse: bool = False,
    ) -> tuple[str, tuple[str, ...]]:
        """Return what "auto" means here, and the reasons in the order they were weighed.

        `installed` holds the names of the usable types, `working_set` and `memory_total` are bytes (None:
        unknown). An approximation is chosen only with `allow_sparse=True`; a type that is not installed is
        never chosen.

        >>> Policy().choose_type(8192, installed={"improved", "ring"}, process_group=True)[0]
        'ring'
        >>> Policy().choose_type(10**6, installed={"improved", "block_sparse_ring"})[0]
        'improved'
        """
        if sequence_length is None:
            hint = "give sequence_length=; the largest segment says nothing about it"
            return "improved", (f"auto: improved, because no sequence length is known ({hint})",)
        tokens = f"{sequence_length:,} tokens"
        if sequence_length < self.ring_from:
            return "improved", (f"auto: improved, because {tokens} is below {self.ring_from:,}",)

        reasons: list[str] = []
        if sequence_length > self.sparse_above:
            above = f"{tokens} is above {self.sparse_above:,}"
            if not allow_sparse:
                reasons.append(
                    f"auto: not block_sparse_ring, though {above}: it computes a different function, "
                    "and allow_sparse=True was not given"
                )
            elif "block_sparse_ring" in installed:
                return "block_sparse_ring", (f"auto: block_sparse_ring, because {above} and allow_sparse=True",)
            else:
                reasons.append(
                    f"auto: not block_sparse_ring, though {above} and allow_sparse=True: it is not installed "
                    f"({install_command('block_sparse_ring')})"
                )

        budget = memory_total if self.memory_budget_bytes is None else self.memory_budget_bytes
        if process_group:
            need = "a process group is initialised"
        elif working_set is not None and budget is not None and working_set > budget:
            need = f"at least {working_set:,} bytes would be held where the budget is {budget:,}"
        else:
            if working_set is None:
                room = "what the call will hold is not known here"
            elif budget is None:
                room = "the device's memory is not known"
            else:
                room = f"{working_set:,} bytes fit the budget of {budget:,}"
            reasons.append(f"auto: improved, because no process group is initialised and {room}")
            return "improved", tuple(reasons)
        if "ring" in installed:
            reasons.append(f"auto: ring, because {tokens} is at or above {self.ring_from:,} and {need}")
            return "ring", tuple(reasons)
        reasons.append(
            f"auto: improved, though {need}: ring, which the policy would use, is not installed "
            f"({install_command('ring')})"
        )
        return "improved", tuple(reasons)
