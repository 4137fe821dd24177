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
    "sparse_above",
    "memory_budget_bytes",
    "live_tensors",
)
# Those that may be None: a pool mode that no length switches on, and a budget that is the device's own.
_OPTIONAL = ("pool_lightweight_from", "pool_full_from", "memory_budget_bytes")


@dataclass(frozen=True)
class Policy:
    """What the factory does where the caller has not spoken; change a rule with ``dataclasses.replace``.

    Lengths are in tokens, memory in bytes.

    Attributes:
        pool_lightweight_from, pool_full_from: the lengths from which each mode of a pool is on; None for never.
        pool_always: types that have a pool at any length.
        sparse_above: above this length "auto" may be a block-sparse type, where the caller allows one.
        pattern_cache: whether plans are kept in a cache.
        memory_budget_bytes: what one attention call may hold before the decision warns; None for all that the device
            has.
        live_tensors: how many tensors like the query a call holds at the very least: query, key, value, output and a
            gradient of each.

    Raises:
        TypeError, ValueError: a threshold that is no positive int, or two of them out of order.

    >>> Policy().choose_pool("improved", 4095)[0], Policy().choose_pool("improved", 4096)[0]
    ('off', 'lightweight')
    >>> Policy(pool_full_from=16384).choose_pool("improved", 8192)[0]
    'lightweight'
    """

    # Specification, "Factory Auto-Enable Benchmark Report": pools cost time below 4,096 tokens and are
    # switched on from there; its verification table gives 4,096 the lightweight pool and 8,192 the full one.
    pool_lightweight_from: int | None = 4096
    pool_full_from: int | None = 8192
    # Same report, "Special Implementations", and the rule in "Memory Pool Integration Summary Report".
    pool_always: tuple[str, ...] = ("ring", "distributed", "block_sparse", "block_sparse_ring")
    # Specification, "Performance Benchmark Report", "For Long Sequences": block_sparse_ring above 64K. Its ring from 8K
    # on would need shards of the sequence, and those need a ring at any length: see ``choose_type``.
    sparse_above: int = 65536
    # Specification, "Pattern Caching Performance Analysis Report", recommendation 1: on by default.
    pattern_cache: bool = True
    # What one attention call may hold before the decision warns; None: all the memory the device has.
    memory_budget_bytes: int | None = None
    # Query, key, value, output and a gradient for each: what training one attention holds at the very least.
    live_tensors: int = 8

    def __post_init__(self) -> None:
        for name in _THRESHOLDS:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
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
        lower, upper = self.pool_lightweight_from, self.pool_full_from
        if lower is not None and upper is not None and lower > upper:
            raise ValueError(f"Policy.pool_lightweight_from: expected at most pool_full_from = {upper}, got {lower}")

    def choose_pool(
        self,
        attention_type: str,
        sequence_length: int | None,
        *,
        enable: bool | None = None,
        lightweight: bool | None = None,
    ) -> tuple[PoolMode, str]:
        """Return the pool mode and the reason for it.

        Args:
            attention_type: the type's name.
            sequence_length: tokens; None where it is not known.
            enable: the caller's own word, which wins over the thresholds: False is off, True is on at any length.
            lightweight: the same: True asks for a lightweight pool (so it is on), and False makes whatever pool is on a
                full one.

        Raises:
            ValueError: the two words contradict each other.

        >>> Policy().choose_pool("ring", 511)
        ('lightweight', 'ring always uses a pool; lightweight, because 511 tokens is below 4,096')
        """
        if enable is False and lightweight is True:
            raise ValueError(
                "enable_memory_pool=False and lightweight_pool=True contradict: leave out lightweight_pool "
                "for no pool, or enable_memory_pool for a lightweight one"
            )
        if enable is False:
            return "off", "enable_memory_pool=False was asked for"
        by_length, why = self._pool_by_length(sequence_length)
        if enable is True:
            on = "enable_memory_pool=True was asked for"
        elif lightweight is True:
            return "lightweight", "lightweight_pool=True was asked for"
        elif attention_type in self.pool_always:
            on = f"{attention_type} always uses a pool"
        elif by_length == "off":
            return "off", why
        else:
            on = ""
        if lightweight is not None:
            return ("lightweight" if lightweight else "full"), f"{on or why}; lightweight_pool={lightweight}"
        if by_length == "off":
            return "lightweight", f"{on}; lightweight, because {why}"
        return by_length, f"{on}; {why}" if on else why

    def length_class(self, sequence_length: int) -> int:
        """Return a number that is the same for lengths between which no rule of the pool changes.

        >>> [Policy().length_class(length) for length in (1, 4095, 4096, 8191, 8192)]
        [0, 0, 1, 1, 2]
        """
        light, full = self.pool_lightweight_from, self.pool_full_from
        return (light is not None and sequence_length >= light) + (full is not None and sequence_length >= full)

    def _pool_by_length(self, sequence_length: int | None) -> tuple[PoolMode, str]:
        if sequence_length is None:
            return "off", "no sequence length is known, and no length rule can switch a pool on"
        tokens = f"{sequence_length:,} tokens is"
        light, full = self.pool_lightweight_from, self.pool_full_from
        if full is not None and sequence_length >= full:
            return "full", f"{tokens} at or above {full:,}"
        if light is not None and sequence_length >= light:
            return "lightweight", f"{tokens} at or above {light:,}" + ("" if full is None else f" and below {full:,}")
        first = light if light is not None else full
        return "off", "no length switches a pool on" if first is None else f"{tokens} below {first:,}"

    def choose_type(
        self,
        sequence_length: int | None,
        *,
        installed: Collection[str],
        sharded: bool = False,
        world_size: int = 1,
        working_set: int | None = None,
        memory_total: int | None = None,
        allow_sparse: bool = False,
    ) -> tuple[str, tuple[str, ...]]:
        """Return what "auto" means here, and the reasons in the order they were weighed.

        Args:
            sequence_length: tokens; None where it is not known.
            installed: the names of the usable types.
            sharded: whether the ranks of a group hold shards of one sequence, which only the ring types attend as one:
                they are then the answer at any length.
            world_size: ranks of the process group that is initialised. It says nothing of shards, since data-parallel
                training has one too.
            working_set, memory_total: bytes that a call holds at least, and that the device has; None for unknown.
            allow_sparse: whether a block-sparse type may be chosen, where one is installed.

        >>> Policy().choose_type(8192, installed={"improved", "ring"}, sharded=True)[0]
        'ring'
        >>> Policy().choose_type(10**6, installed={"improved", "block_sparse"})[0]
        'improved'
        """
        tokens = f"{sequence_length:,} tokens" if sequence_length is not None else "an unknown number of tokens"
        reasons: list[str] = []
        if sequence_length is not None and sequence_length > self.sparse_above:
            sparse = "block_sparse_ring" if sharded else "block_sparse"
            above = f"{tokens} is above {self.sparse_above:,}"
            if allow_sparse and sparse in installed:
                return sparse, (f"auto: {sparse}, because {above} and allow_sparse=True",)
            why = (
                f" and allow_sparse=True: it is not installed ({install_command(sparse)})"
                if allow_sparse
                else ": it computes a different function, and allow_sparse=True was not given"
            )
            reasons.append(f"auto: not {sparse}, though {above}{why}")

        if sharded:
            reasons.append(f"auto: ring, because group= says that ranks hold shards of one sequence; {tokens}")
            return "ring", tuple(reasons)
        if sequence_length is None:
            hint = "give sequence_length=; the largest segment says nothing about it"
            reasons.append(f"auto: improved, because no sequence length is known ({hint})")
        else:
            reasons.append(f"auto: improved, because no group= was given; {self._room(working_set, memory_total)}")
        if world_size > 1:
            reasons.append(
                f"auto: not ring, though a process group of {world_size} ranks is initialised: only group= says that "
                "its ranks hold shards of one sequence, and not a sequence each"
            )
        return "improved", tuple(reasons)

    def _room(self, working_set: int | None, memory_total: int | None) -> str:
        """Whether what a call must hold fits, in words."""
        budget = memory_total if self.memory_budget_bytes is None else self.memory_budget_bytes
        if working_set is None:
            return "what the call will hold is not known here"
        if budget is None:
            return "the device's memory is not known"
        if working_set <= budget:
            return f"{working_set:,} bytes fit the budget of {budget:,}"
        return (
            f"at least {working_set:,} bytes would be held where the budget is {budget:,}: shard the sequence over the "
            "ranks of a group (group=), or keep keys in host memory with dilated_ring.streamed_attention"
        )
