"""Arguments: what is wrong with them is said before any work."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from operator import index
from typing import Any

from dilated_pattern_cache.policies import POLICIES, EvictionPolicy

_NAME = re.compile(r"[A-Za-z0-9.+-]+")


def limit(name: str, value: int | None) -> int | None:
    """``value``, if it is a whole number of at least 0, or None for no limit."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number, or None for no limit, got {value!r}")
    if value < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")
    return value


def policy_named(policy: str | Callable[[], EvictionPolicy]) -> Callable[[], EvictionPolicy]:
    """A function that makes the policy."""
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(
                f"policy: expected one of {list(POLICIES)} or a function that returns an EvictionPolicy, got {policy!r}"
            )
        return POLICIES[policy]
    if not callable(policy):
        raise TypeError(f"policy: expected a name or a function that returns an EvictionPolicy, got {policy!r}")
    made = policy()
    if isinstance(made, type) or not all(hasattr(made, name) for name in ("clock", "rank", "evicted")):
        raise TypeError(f"policy: expected a function that returns an EvictionPolicy, got one that returns {made!r}")
    return policy


def duration(name: str, value: float) -> float:
    """``value``, if it is a number of seconds."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number of seconds, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    return value


def whole(name: str, value: Any, least: int = 1) -> int:
    """``value`` as an int, if it is a whole number of at least ``least``."""
    try:
        number = index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def truth(name: str, value: Any) -> bool:
    """``value``, if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def fraction(name: str, value: Any) -> float:
    """``value`` as a float, if it is a number from 0 to 1."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number between 0 and 1, got {value}")
    return float(value) + 0.0  # -0.0 is 0.0


def check_name(name: str, value: Any) -> None:
    """See that ``value`` is text that a key's own text can hold without being mistaken for something else."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a name, got {value!r}")
    if not _NAME.fullmatch(value):
        raise ValueError(f"{name}: expected letters, digits, '.', '+' and '-', got {value!r}")
