"""From figures to thresholds: pure functions of plain numbers, so that each rule can be tested on made-up figures.

All of them are slow to change what the policy says: a threshold holds only if it holds at every larger size that was
measured, a gain that is within the noise is none, and what was not measured is left as it is. Imports the profile's
types and the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from dilated_factory.policy import Policy
from dilated_factory.profile import AUTO, NEVER_BYTES, KernelRule

# A pool has to be this much faster at a size of tensor to be worth the memory that it keeps.
GAIN_BY_BYTES = 0.05
# In whole attentions memory is a small share of the time, and less counts; never less than the spreads.
GAIN = 0.02
# What was seen at one size alone has to be so many times above the noise: of many sizes one is always lucky.
ALONE = 3.0

# glibc's malloc keeps nothing above 32 MiB (its largest M_MMAP_THRESHOLD). Who has not measured beyond has not seen
# where a pool gains most, and finds nothing.
ENOUGH_BYTES = 64 * 2**20

Cell = TypeVar("Cell")


class Figure(NamedTuple):
    """Seconds (median), and the spread: interquartile range over the median."""

    seconds: float
    spread: float = 0.0


def gains(one: Figure, other: Figure, least: float = GAIN, times: float = 1.0) -> bool:
    """Whether ``one`` is faster than ``other`` by more than ``least`` and by more than ``times`` both spreads together.

    Of two candidates that are equal, one gains by luck in about 3 of 100 cells of five rounds: hence ``ALONE``.

    >>> gains(Figure(0.9), Figure(1.0)), gains(Figure(0.9), Figure(1.0, spread=0.2)), gains(Figure(0.99), Figure(1.0))
    (True, False, False)
    """
    return 1 - one.seconds / other.seconds > max(least, times * (one.spread + other.spread))


def smallest_from_which(cells: Mapping[int, Cell], holds: Callable[[Cell], bool]) -> int | None:
    """The smallest size at which something holds, and holds at every larger one that was measured; None for none.

    >>> smallest_from_which({1: True, 2: False, 4: True, 8: True}, bool)
    4
    """
    found = None
    for size in sorted(cells, reverse=True):
        if not holds(cells[size]):
            break
        found = size
    return found


def pool_min_bytes(figures: Mapping[int, Mapping[str, Figure]]) -> int | None:
    """The size of a tensor from which a pool is worth it: ``Profile.pool_min_bytes``.

    Args:
        figures: bytes -> {"torch", "lightweight", "full"}, the time to get a tensor and write it once.

    Returns:
        The smallest size from which every mode that was measured is faster than torch.empty by ``GAIN_BY_BYTES`` or
        more and beyond the spreads, NEVER_BYTES where there is none. None, no finding, where nothing of
        ``ENOUGH_BYTES`` was measured.

    >>> same, faster = {"torch": Figure(1.0), "full": Figure(1.0)}, {"torch": Figure(4.0), "full": Figure(2.0)}
    >>> pool_min_bytes({2**20: same, 2**26: faster})
    67108864
    """

    def holds(cell: Mapping[str, Figure]) -> bool:
        modes = [figure for name, figure in cell.items() if name != "torch"]
        plain = cell["torch"]
        return bool(modes) and all(
            1 - mode.seconds / plain.seconds >= GAIN_BY_BYTES and gains(mode, plain) for mode in modes
        )

    if max(figures, default=0) < ENOUGH_BYTES:
        return None
    found = smallest_from_which(figures, holds)
    return NEVER_BYTES if found is None else found


def pool_thresholds(
    figures: Mapping[int, Mapping[str, Mapping[str, Figure]]], policy: Policy
) -> tuple[int | None, int | None] | None:
    """The lengths from which each mode of the pool wins: ``Profile.pool_thresholds``.

    A mode wins at a length where it is faster than no pool in one of the passes (``gains``), and in none slower by more
    than ``GAIN``, noise or not. "full" has to be no slower than "lightweight" besides. A threshold is the first length
    from which that holds, at it and at every longer one that was measured; the longest alone counts where the gain is
    ``ALONE`` times above the spreads.

    Args:
        figures: tokens -> pass ("forward", "training") -> {"off", "lightweight", "full"}; a length at which a pool
            serves no tensor has no passes, and nothing wins there.
        policy: whose thresholds stand beyond the longest length that was measured.

    Returns:
        (lightweight from, full from), None for never; None alone where nothing was measured.

    >>> cell = {"forward": {"off": Figure(2.0), "lightweight": Figure(1.5), "full": Figure(1.0)}}
    >>> pool_thresholds({4096: cell, 8192: cell}, Policy())
    (None, 4096)
    """

    def no_slower(cell: Mapping[str, Mapping[str, Figure]], mode: str, than: str) -> bool:
        return all(of[mode].seconds <= of[than].seconds * (1 + GAIN) for of in cell.values() if than in of)

    def wins(cell: Mapping[str, Mapping[str, Figure]], mode: str, times: float = 1.0) -> bool:
        if not cell or not all({"off", mode} <= set(of) for of in cell.values()):
            return False
        faster = any(gains(of[mode], of["off"], times=times) for of in cell.values())
        return faster and no_slower(cell, mode, "off") and (mode != "full" or no_slower(cell, "full", "lightweight"))

    def first(mode: str) -> int | None:
        found = smallest_from_which(figures, lambda cell: wins(cell, mode))
        if found == longest and not wins(figures[longest], mode, ALONE):
            return None
        return found

    if not figures:
        return None
    longest = max(figures)
    lightweight, full = first("lightweight"), first("full")
    if lightweight is None and policy.pool_lightweight_from is not None and policy.pool_lightweight_from > longest:
        lightweight = policy.pool_lightweight_from
    if full is None and policy.pool_full_from is not None and policy.pool_full_from > longest:
        full = policy.pool_full_from
    if lightweight is not None and full is not None and lightweight >= full:
        lightweight = None
    return lightweight, full


def kernel_rules(
    figures: Mapping[str, Mapping[int, tuple[str, Mapping[str, Figure]]]],
) -> tuple[KernelRule, ...]:
    """The fastest kernel by dtype and length, where it is not the one that "auto" takes: ``Profile.kernels``.

    A kernel is named where it is faster than auto's own choice, as ``gains`` has it, and is so at a neighbour too, or
    by ``ALONE`` times the spreads. Neighbours that agree are one rule; AUTO ends one. Nothing is said of lengths below
    the shortest that was measured, nor from twice the longest on: there a kernel may take memory that nobody has seen.

    Args:
        figures: dtype -> tokens -> (auto's own choice, kernel -> figure). Where the kernel that "auto" takes has no
            figure, its output was wrong, and the fastest of the others is taken.

    >>> cell = ("slow", {"slow": Figure(2.0), "fast": Figure(1.0)})
    >>> kernel_rules({"float32": {1024: cell, 2048: cell, 4096: ("fast", cell[1])}})
    (KernelRule(dtype='float32', from_length=1024, kernel='fast'),
     KernelRule(dtype='float32', from_length=4096, kernel='auto'))
    """

    def fastest(usual: str, kernels: Mapping[str, Figure], times: float) -> str:
        best = min(kernels, key=lambda name: kernels[name].seconds)
        better = usual not in kernels or gains(kernels[best], kernels[usual], times=times)
        return best if better else AUTO

    rules = []
    for dtype, lengths in figures.items():
        cells = {length: lengths[length] for length in sorted(lengths) if lengths[length][1]}
        winners = [fastest(*cell, times=1.0) for cell in cells.values()]
        latest = AUTO
        for place, (length, cell) in enumerate(cells.items()):
            neighbours = winners[max(0, place - 1) : place] + winners[place + 1 : place + 2]
            chosen = winners[place] if winners[place] in neighbours else fastest(*cell, times=ALONE)
            if chosen != latest:
                rules.append(KernelRule(dtype, length, chosen))
                latest = chosen
        if latest != AUTO:
            rules.append(KernelRule(dtype, 2 * max(cells), AUTO))
    return tuple(rules)


def fastest_block_size(figures: Mapping[tuple[int, int], Figure]) -> tuple[int, int] | None:
    """The (rows, columns) with the least time a live pair; None where fewer than two were measured.

    >>> fastest_block_size({(64, 64): Figure(2e-9), (128, 128): Figure(1e-9)})
    (128, 128)
    """
    return min(figures, key=lambda size: figures[size].seconds) if len(figures) > 1 else None
