"""The demo's three pictures: learning, cost against length, and which keys a row may reach.

Colours are Okabe and Ito's, which people with any colour vision can tell apart, and no line is told by colour alone.
Figures are drawn without pyplot, so no display and no global state are needed. Imports matplotlib when drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dilated_core import DilatedPattern
from dilated_factory.demo.baselines import Baselines
from dilated_factory.demo.comparison import SizeResult
from dilated_factory.demo.training import Step, TrainingRecord
from dilated_factory.figures import BLUE, FAINT, GRID, INK, SKY, VERMILLION, make_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SMOOTHING = 0.9
"""Weight of the past in the training curve's moving average."""

LABEL_DISTANCE = 0.24
"""Bits per byte between two labels in the learning picture, about the height of its letters."""

PICTURE_POSITIONS = 128
"""Positions along each side of the pattern's picture: few enough to see single keys."""


def draw_learning(path: Path, record: TrainingRecord, baselines: Baselines | None, held_out: float | None) -> None:
    """Bits per byte against time, with the baselines as lines; PNG at `path`."""
    figure, (axes,) = make_figure(1, width=9.0, height=5.0)
    seconds = [step.seconds for step in record.steps]
    losses = [step.bits_per_byte for step in record.steps]
    axes.plot(seconds, losses, color=SKY, linewidth=0.5, alpha=0.7, label="training, each window")
    axes.plot(seconds, _smooth(losses), color=BLUE, linewidth=2.0, label="training, moving average")
    if record.checks:
        axes.plot(
            [check.seconds for check in record.checks],
            [check.bits_per_byte for check in record.checks],
            color=VERMILLION,
            linewidth=0,
            marker="o",
            markersize=6,
            label="held out, a few windows",
        )
    if held_out is not None:
        label = f"held out, all windows: {held_out:.2f}"
        axes.plot([seconds[-1]], [held_out], color=VERMILLION, marker="*", markersize=15, linewidth=0, label=label)
    lines = [] if baselines is None else _baseline_lines(baselines)
    places = _spread([value for _, value in lines], LABEL_DISTANCE)
    for (name, value), place, style in zip(lines, places, ("-", "--", "-.", ":"), strict=False):
        axes.axhline(value, color=INK, linewidth=1.1, linestyle=style)
        where = ("axes fraction", "data")
        axes.annotate(f" {name} {value:.2f}", (1.0, place), xycoords=where, va="center", color=INK, fontsize=9)
    for started, length in _window_phases(record):
        axes.axvline(started, color=GRID, linewidth=1.2, zorder=0)
        where = ("data", "axes fraction")
        axes.annotate(f" {length:,}", (started, 0.02), xycoords=where, va="bottom", color=FAINT, fontsize=8)
    lowest = min([*losses, *(value for _, value in lines)])
    axes.set_ylim(max(0.0, lowest - 0.5), 8.2)
    axes.set_xlim(0, seconds[-1] * 1.01)
    axes.set_xlabel("seconds of training (grey: bytes in a window from there on)")
    axes.set_ylabel("bits per byte (lower is better)")
    axes.set_title(f"Learning Python sources: {record.steps[-1].bytes_read / 1e6:.1f} MB read", loc="left")
    axes.legend(frameon=False, loc="upper right")
    _save(figure, path)


def draw_comparison(path: Path, results: Sequence[SizeResult], title: str) -> None:
    """Time and memory of dense and dilated attention against length, both axes logarithmic; PNG at `path`."""
    from matplotlib.ticker import LogLocator

    measured = [result for result in results if result.measurements]
    lengths = [result.length for result in measured]
    figure, (time_axes, memory_axes) = make_figure(2, width=11.0, height=4.8)
    for name, colour, marker in (("dense", VERMILLION, "s"), ("dilated", BLUE, "o")):
        measurements = [result.measurements[name] for result in measured]
        medians = [1e3 * each.median for each in measurements]
        below = [1e3 * (each.median - min(each.seconds)) for each in measurements]
        above = [1e3 * (max(each.seconds) - each.median) for each in measurements]
        time_axes.errorbar(
            lengths, medians, yerr=(below, above), color=colour, marker=marker, linewidth=2, capsize=4, label=name
        )
        mebibytes = [each.peak_bytes / 2**20 for each in measurements]
        memory_axes.plot(lengths, mebibytes, color=colour, marker=marker, linewidth=2, label=name)
    for result in measured:
        # On the side of the dilated point that dense is not on.
        slower = result.speedup < 1
        time_axes.annotate(
            f"{result.speedup:.1f}×",
            (result.length, 1e3 * result.measurements["dilated"].median),
            textcoords="offset points",
            xytext=(0, 10 if slower else -18),
            ha="center",
            color=BLUE,
            fontsize=9,
        )
    time_axes.set_ylabel("one forward pass (ms)")
    time_axes.set_title("Time: median, whiskers from fastest to slowest", loc="left", fontsize=10)
    memory_axes.set_ylabel("peak memory beyond inputs (MiB)")
    memory_axes.set_title("Memory: output and working space", loc="left", fontsize=10)
    for axes in (time_axes, memory_axes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(plain)
        axes.minorticks_off()
        axes.set_xlabel("sequence length (tokens)")
        axes.margins(y=0.18)
        axes.legend(frameon=False, loc="upper left")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    _save(figure, path)


def draw_pattern(path: Path, pattern: DilatedPattern, heads: Sequence[int]) -> None:
    """For a few heads, which keys each row may reach through which branch; PNG at `path`.

    The pattern is drawn with every segment shortened alike to fit PICTURE_POSITIONS positions, rates kept.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    shrink = max(1, max(pattern.segment_lengths) // PICTURE_POSITIONS)
    lengths = [max(1, length // shrink) for length in pattern.segment_lengths]
    colours = ["white", *_branch_colours(pattern.branches)]
    figure, panels = make_figure(len(heads), width=5.4 * len(heads), height=6.6)
    for axes, head in zip(panels, heads, strict=True):
        cells = _reach(lengths, pattern.dilation_rates, head)
        axes.imshow(
            cells,
            cmap=ListedColormap(colours),
            norm=BoundaryNorm([value - 0.5 for value in range(len(colours) + 1)], len(colours)),
            interpolation="nearest",
            extent=(0, PICTURE_POSITIONS * shrink, PICTURE_POSITIONS * shrink, 0),
        )
        axes.set_title(f"head {head}", loc="left", fontsize=11)
        axes.set_xlabel("key position")
        axes.grid(visible=False)
        ticks = [quarter * PICTURE_POSITIONS * shrink // 4 for quarter in range(5)]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    panels[0].set_ylabel("query position")
    labels = [
        f"segments of {length:,}, every {_ordinal(rate)}key"
        for length, rate in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)
    ]
    handles = [
        Patch(facecolor=colour, edgecolor=FAINT, label=label) for colour, label in zip(colours[1:], labels, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    note = "" if shrink == 1 else f"\n(drawn at 1/{shrink} of its length, rates as they are)"
    figure.suptitle(f"Keys each query may reach, by the shortest segment that joins them{note}", x=0.01, ha="left")
    _save(figure, path)


def _reach(lengths: Sequence[int], rates: Sequence[int], head: int) -> list[list[int]]:
    """cells[query][key]: 1 + the first branch through which the causal pair meets, 0 where none does."""
    positions = range(PICTURE_POSITIONS)
    cells = [[0] * PICTURE_POSITIONS for _ in positions]
    for branch in reversed(range(len(lengths))):
        length, rate = lengths[branch], rates[branch]
        kept = [position for position in positions if position % length % rate == head % rate]
        for query in kept:
            for key in kept:
                if key <= query and key // length == query // length:
                    cells[query][key] = branch + 1
    return cells


def _branch_colours(branches: int) -> list[Any]:
    """Dark for the shortest segments to light for the longest, from a map that is monotone in lightness."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.05 + 0.8 * branch / max(branches - 1, 1)) for branch in range(branches)]


def _ordinal(rate: int) -> str:
    """'' for every key, and how many it takes to the next one otherwise.

    >>> [_ordinal(rate) for rate in (1, 2, 3, 4, 12, 32)]
    ['', '2nd ', '3rd ', '4th ', '12th ', '32nd ']
    """
    if rate == 1:
        return ""
    ending = "th" if rate // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(rate % 10, "th")
    return f"{rate}{ending} "


def _baseline_lines(baselines: Baselines) -> list[tuple[str, float]]:
    lines = [("unigram", baselines.unigram), ("gzip", baselines.gzip), ("xz", baselines.xz)]
    if baselines.xz_primed is not None:
        lines.append(("xz, primed", baselines.xz_primed))
    return lines


def _spread(values: Sequence[float], distance: float) -> list[float]:
    """Places for labels of `values`, moved down where one would touch the label above it.

    >>> _spread([5.0, 2.0, 1.9], 0.25)
    [5.0, 2.0, 1.75]
    """
    places = list(values)
    order = sorted(range(len(values)), key=lambda index: -values[index])
    for above, below in pairwise(order):
        places[below] = min(places[below], places[above] - distance)
    return places


def _window_phases(record: TrainingRecord) -> list[tuple[float, int]]:
    """(seconds at which it began, bytes in a window) of each run of steps with windows of one length."""
    phases: list[tuple[float, int]] = []
    before = Step(0.0, 0, 0.0, 0.0)
    for step in record.steps:
        length = step.bytes_read - before.bytes_read
        if not phases or phases[-1][1] != length:
            phases.append((before.seconds, length))
        before = step
    return phases


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average without the usual bias towards the first value."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(total / weight)
    return smoothed


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, facecolor="white")
