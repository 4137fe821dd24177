"""What the specification claims, and whether it is found here: pure rules on plain numbers.

``RULE`` states them, in report.md too. A ratio within the noise of 1 is on neither side of it: a claimed gain of 3 % is
not reproduced by a machine that cannot tell 3 % from nothing. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["reproduced", "direction only", "not reproduced", "no claim"]

WITHIN = 0.2
LEAST_NOISE = 0.02
"""Of a ratio, where its two figures have smaller spreads or none."""
NOISE_OF_FEW, FEW = 0.1, 5
"""The same of times with fewer rounds than five, whose spread says little."""

RULE = (
    "A ratio is *reproduced* where it is on the same side of 1 as the specification's and within 20 % of it, "
    "*direction only* where it is merely on the same side, and *not reproduced* otherwise. A ratio is on neither side "
    "where it differs from 1 by no more than the noise, which is half the sum of the two spreads, at least 2 %, and at "
    "least 10 % with fewer than five rounds; where both did the same work, all of the difference is noise. A range is "
    "reproduced by what lies in it. A change in bytes goes by its sign and by 20 % of its size, and is none below 1 % "
    "of the peak; other facts have to be equal."
)


@dataclass(frozen=True)
class Comparison:
    """One claim beside our figure, in words, and the verdict.

    Attributes:
        what: of which quantity.
        claimed, ours: as text; claimed is "-" where nothing is claimed.
        verdict: by the rule.
        claimed_ratio, our_ratio: the numbers, where they are ratios; noise of ours.
    """

    what: str
    claimed: str
    ours: str
    verdict: Verdict
    claimed_ratio: float | None = None
    our_ratio: float | None = None
    noise: float = LEAST_NOISE


def side(value: float, noise: float) -> int:
    """1 above 1, -1 below it, 0 where the difference is within the noise.

    >>> side(1.3, 0.1), side(0.95, 0.1), side(0.8, 0.1)
    (1, 0, -1)
    """
    return 0 if abs(value - 1) <= noise else int(math.copysign(1, value - 1))


def ratio(what: str, claimed: float, ours: float, *, noise: float = LEAST_NOISE, text: str = "") -> Comparison:
    """A claimed ratio.

    >>> ratio("speed", 1.72, 1.6).verdict, ratio("speed", 1.72, 1.1).verdict, ratio("speed", 1.03, 1.0).verdict
    ('reproduced', 'direction only', 'not reproduced')
    """
    noise = max(noise, LEAST_NOISE)
    verdict: Verdict = "not reproduced"
    if side(ours, noise) == side(claimed, LEAST_NOISE):
        verdict = "reproduced" if abs(ours / claimed - 1) <= WITHIN else "direction only"
    return Comparison(what, text or f"{claimed:.2f}x", f"{ours:.2f}x", verdict, claimed, ours, noise)


def within(
    what: str, low: float, high: float, ours: float, *, noise: float = LEAST_NOISE, text: str = ""
) -> Comparison:
    """A claimed range of ratios, both ends on one side of 1.

    >>> within("peak memory", 1.7, 2.8, 2.0).verdict, within("peak memory", 1.7, 2.8, 1.2).verdict
    ('reproduced', 'direction only')
    """
    noise = max(noise, LEAST_NOISE)
    verdict: Verdict = "not reproduced"
    if side(ours, noise) == side(math.sqrt(low * high), LEAST_NOISE):
        verdict = "reproduced" if low <= ours <= high else "direction only"
    shown = text or f"{low:.2f} to {high:.2f}x"
    return Comparison(what, shown, f"{ours:.2f}x", verdict, math.sqrt(low * high), ours, noise)


def memory_within(low: float, high: float, ours: float, text: str) -> Comparison:
    """A claimed rise of peak memory; exact, so without noise but the least."""
    return within("peak memory", low, high, ours, text=text)


def change(what: str, claimed: float, ours: float, whole: float) -> Comparison:
    """A claimed change in MiB, against ours, of a peak of ``whole`` MiB.

    >>> change("peak memory", -8.0, -7.0, 100.0).verdict, change("peak memory", 0.0, 0.5, 100.0).verdict
    ('reproduced', 'reproduced')
    >>> change("peak memory", -8.0, 30.0, 100.0).verdict
    'not reproduced'
    """
    none = 0.01 * abs(whole)
    ours_sign = 0 if abs(ours) <= none else int(math.copysign(1, ours))
    claimed_sign = 0 if claimed == 0 else int(math.copysign(1, claimed))
    verdict: Verdict = "not reproduced"
    if ours_sign == claimed_sign:
        near = claimed == 0 or abs(ours - claimed) <= WITHIN * abs(claimed)
        verdict = "reproduced" if near else "direction only"
    said = "no difference" if claimed == 0 else f"{claimed:+g} MB"
    return Comparison(what, said, f"{ours:+.1f} MiB", verdict)


def equal(what: str, claimed: object, ours: object) -> Comparison:
    """A claimed fact.

    >>> equal("pool", "full", "off").verdict
    'not reproduced'
    """
    return Comparison(what, str(claimed), str(ours), "reproduced" if claimed == ours else "not reproduced")


def at_most(what: str, limit: float, ours: float, unit: str) -> Comparison:
    """A claimed upper end, which is not reached itself.

    >>> at_most("overhead", 1.0, 0.1, "MB").claimed
    'below 1 MB'
    """
    return Comparison(
        what, f"below {limit:g} {unit}", f"{ours:.3g} {unit}", "reproduced" if ours < limit else "not reproduced"
    )


def no_claim(what: str, ours: str, said: str = "-") -> Comparison:
    """A figure of ours where the specification has none, or none that can be weighed (an error, out of memory)."""
    return Comparison(what, said, ours, "no claim")
