"""Fitting measurements into the time there is: what a cell will take, foreseen from the smaller ones.

Pure but for the clock, which a test can replace. Imports the standard library.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

# Rounds of a cell: fewer give no spread to speak of, more no better median.
FEWEST, MOST = 5, 11
# A cell takes at most this share of the time that its part has left, unless the fewest rounds take more.
SHARE_OF_CELL = 0.25
# The first cell of a series is measured though there is no time left, where its fewest rounds take no more than this.
GRACE_SECONDS = 2.0


class OutOfTime(Exception):  # noqa: N818  # an answer rather than a fault: the cell is left out
    """One round has shown that a cell takes much longer than the time there is."""


def foresee(taken: Sequence[tuple[int, float]], size: int) -> float | None:
    """Seconds for that size, from (size, seconds) of smaller ones; None where there are none.

    Grows as between the last two, at least with the size and at most with its square; from one alone with the size.

    >>> foresee([], 8), foresee([(4, 1.0)], 8), foresee([(2, 1.0), (4, 4.0)], 8)
    (None, 2.0, 16.0)
    """
    if not taken:
        return None
    last, seconds = taken[-1]
    power = 1.0
    if len(taken) > 1:
        before, then = taken[-2]
        if seconds > 0 and then > 0 and last != before:
            power = min(2.0, max(1.0, math.log(seconds / then) / math.log(last / before)))
    return float(seconds * (size / last) ** power)


class Budget:
    """The time of one part.

    Args:
        seconds: that it may take from now on.
        clock: seconds, rising.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = seconds
        self._end = clock() + seconds
        self._taken: dict[str, list[tuple[int, float]]] = {}

    @property
    def left(self) -> float:
        """Seconds; below 0 where it was overdrawn."""
        return self._end - self._clock()

    def refusal(self, series: str, size: int) -> str | None:
        """Why the cell of that size is not measured; None where it is.

        The first of a series is begun, unless the part has taken twice its time already.
        """
        seconds = foresee(self._taken.get(series, []), size)
        left = self.left
        if seconds is None:
            late = left < -max(self._seconds, GRACE_SECONDS)
            return "it would take time, and the parts before it have taken too much" if late else None
        return None if seconds <= left else self._too_long(seconds)

    def rounds(self, seconds: float) -> int:
        """How many rounds of that many seconds to take.

        Raises:
            OutOfTime: the fewest would take ``GRACE_SECONDS`` more than there is.
        """
        if FEWEST * seconds > max(0.0, self.left) + GRACE_SECONDS:
            raise OutOfTime(self._too_long(FEWEST * seconds))
        return max(FEWEST, min(MOST, int(self.left * SHARE_OF_CELL / max(seconds, 1e-9))))

    def _too_long(self, seconds: float) -> str:
        return f"it would take about {seconds:,.1f} s, and {max(0.0, self.left):,.1f} s were left for this part"

    def note(self, series: str, size: int, seconds: float) -> None:
        """What a cell takes with the fewest rounds."""
        self._taken.setdefault(series, []).append((size, seconds))
