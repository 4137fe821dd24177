"""Arguments: what is wrong with them is said before any work."""

from __future__ import annotations

import math
from collections.abc import Callable

from dilated_pattern_cache.policies import POLICIES, EvictionPolicy


def limit(name: str, value: int | None) -> int | None:
    """``value``, if it is a whole number of at least 0, or None for no limit."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, or None for no limit, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def policy_named(policy: str | Callable[[], EvictionPolicy]) -> Callable[[], EvictionPolicy]:
    """A function that makes the policy."""
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(
                f"policy must be {' or '.join(map(repr, POLICIES))}, or make an EvictionPolicy, got {policy!r}"
            )
        return POLICIES[policy]
    if not callable(policy):
        raise TypeError(f"policy must be a name or a function that returns an EvictionPolicy, got {policy!r}")
    made = policy()
    if isinstance(made, type) or not all(hasattr(made, name) for name in ("clock", "rank", "evicted")):
        raise TypeError(f"policy must return an EvictionPolicy, and returned {made!r}")
    return policy


def duration(name: str, value: float) -> float:
    """``value``, if it is a number of seconds."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number of seconds, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return value
