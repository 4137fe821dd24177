"""What the factory decided about one module, in a form people and programs can read.

Imports nothing but the standard library and the policy's vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from dilated_factory.policy import PoolMode


@dataclass(frozen=True)
class Decision:
    """The choices behind one module, readable at `module.decision`.

    `attention_type` is the type that was built, never "auto". `kernel` is the engine's name, or "auto" where
    it is chosen at each call. `pool_mode` and `pattern_cache` are what the policy says; `unwired` names those
    of the two that this release cannot connect, so that nothing reads as active which is not. `reasons` holds
    one sentence for each choice.

    >>> print(Decision("improved", "math", "off", False, ("attention_type='improved' was asked for",)))
    improved attention, kernel math, pool off, pattern cache off
      - attention_type='improved' was asked for
    """

    attention_type: str
    kernel: str
    pool_mode: PoolMode
    pattern_cache: bool
    reasons: tuple[str, ...]
    unwired: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return the choices in one line, without the reasons.

        >>> Decision("improved", "auto", "full", False, (), unwired=("memory pool",)).summary()
        'improved attention, kernel auto, pool full (wanted, not wired), pattern cache off'
        """
        pool = self.pool_mode + (" (wanted, not wired)" if "memory pool" in self.unwired else "")
        cache = "on" if self.pattern_cache else "off"
        cache += " (wanted, not wired)" if "pattern cache" in self.unwired else ""
        return f"{self.attention_type} attention, kernel {self.kernel}, pool {pool}, pattern cache {cache}"

    def __str__(self) -> str:
        return "\n  - ".join((self.summary(), *self.reasons))
