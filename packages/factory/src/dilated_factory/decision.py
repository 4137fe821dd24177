"""What the factory decided about one module, in a form people and programs can read.

Imports nothing but the standard library and the policy.
"""

from __future__ import annotations

from dataclasses import dataclass

from dilated_factory.policy import Policy, PoolMode


@dataclass(frozen=True)
class Decision:
    """The choices behind one module, readable at ``module.decision``.

    The module's calls may change it: where a rule goes by sequence length, it is that of the latest call.

    Attributes:
        attention_type: the type that was built, never "auto".
        kernel: the kernel's name, or "auto" where it is chosen at each call.
        pool_mode: "off", "lightweight" or "full".
        pattern_cache: whether plans are kept in a cache.
        reasons: one sentence for each choice.
        buffer_manager: whether buffers come from a pool for each of their kinds.
        sequence_length: the tokens that were decided for; None where none were known.
        policy: the thresholds.
        profile: where the tuned profile is that was used; None for none.
        unwired: what the policy wishes for and the type, another's, has no option to take: "memory pool", "pattern
            cache". Nothing reads as active which is not.

    >>> print(Decision("improved", "math", "off", False, ("attention_type='improved' was asked for",)))
    improved attention, kernel math, pool off, pattern cache off
      - attention_type='improved' was asked for
    """

    attention_type: str
    kernel: str
    pool_mode: PoolMode
    pattern_cache: bool
    reasons: tuple[str, ...]
    buffer_manager: bool = False
    sequence_length: int | None = None
    policy: Policy = Policy()  # noqa: RUF009  # frozen
    profile: str | None = None
    unwired: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return the choices in one line, without the reasons.

        >>> Decision("improved", "auto", "full", False, (), unwired=("memory pool",)).summary()
        'improved attention, kernel auto, pool full (not wired), pattern cache off'
        """
        pool: str = "by kind of buffer" if self.buffer_manager else self.pool_mode
        pool += " (not wired)" if "memory pool" in self.unwired else ""
        cache = "on" if self.pattern_cache else "off"
        cache += " (not wired)" if "pattern cache" in self.unwired else ""
        return f"{self.attention_type} attention, kernel {self.kernel}, pool {pool}, pattern cache {cache}"

    def __str__(self) -> str:
        return "\n  - ".join((self.summary(), *self.reasons))
