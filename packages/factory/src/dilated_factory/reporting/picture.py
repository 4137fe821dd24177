"""A report as a picture: what each layer was decided to do, the bytes of each pool, and how often they were reused.

Colours are Okabe and Ito's, which people with any colour vision can tell apart, and no bar is told by colour alone. The
figure is drawn without pyplot, so no display and no global state are needed. Imports matplotlib when drawing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dilated_factory.reporting.facts import Report, ResourcesReport
from dilated_factory.reporting.layers import Group, grouped
from dilated_factory.reporting.text import cache_word, pool_word, size
from dilated_memory_pool import PoolStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, VERMILLION, GREEN, ORANGE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#BBBBBB"
INK, FAINT = "#222222", "#777777"
OF_MODE = {"off": GREY, "lightweight": SKY, "full": BLUE}
BY_KIND, OWN = GREEN, ORANGE

DOTS_PER_INCH = 144
ROW = 0.34
"""Inches that one bar or one layer takes."""

MOST_LAYERS = 40
"""Rows of layers that a picture shows; what is left out is counted below them."""

LONGEST_NAME = 36
"""Letters of a module's name that have room beside its bar."""

Bars = list[tuple[str, PoolStatistics]]
Rates = list[tuple[str, float, str]]


def draw(report: Report, path: Path) -> None:
    """Draw ``report``; PNG at ``path``. Raises ImportError, which says what to install, where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'a picture of a report needs matplotlib, which is not installed: pip install "dilated-factory[bench]"'
        ) from error

    groups, bars, rates = grouped(report.modules), _bars(report), _rates(report)
    heights = [max(min(len(groups), MOST_LAYERS + 1), 1), max(len(bars), len(rates), 2) + 1]
    inches = [ROW * rows + 0.9 for rows in heights]
    figure = Figure(figsize=(12.0, sum(inches) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=inches, width_ratios=(3, 2))
    _draw_layers(figure.add_subplot(grid[0, :]), groups)
    _draw_bytes(figure.add_subplot(grid[1, 0]), bars)
    _draw_rates(figure.add_subplot(grid[1, 1]), rates)
    count = len(report.modules)
    title = f"{report.title}: {count} module{'' if count == 1 else 's'} with a decision"
    figure.suptitle(title, x=0.01, ha="left", color=INK)
    figure.savefig(path, format="png", dpi=DOTS_PER_INCH, facecolor="white")


def _draw_layers(axes: Axes, groups: tuple[Group, ...]) -> None:
    """One row for layers that are alike, coloured by their pool, with the rest in words."""
    _plain(axes, "Decisions by layer")
    if not groups:
        _nothing(axes, "no module has a decision")
        return
    shown = groups[:MOST_LAYERS]
    for row, group in enumerate(shown):
        decision, own = group.first.decision, group.first.own
        word = pool_word(decision, own)
        colour = OWN if word == "own" else BY_KIND if decision.buffer_manager else OF_MODE[decision.pool_mode]
        # What is wished for and not wired has no pool: an empty bar.
        wired = "memory pool" not in decision.unwired
        axes.barh(row, 1.0, color=colour if wired else "white", edgecolor=colour, linewidth=1.2, height=0.72)
        ink = "white" if wired and colour in (BLUE, BY_KIND) else INK
        tokens = "" if decision.sequence_length is None else f", at {decision.sequence_length:,} tokens"
        choices = f"kernel {decision.kernel}, pool {word}, cache {cache_word(decision, own)}{tokens}"
        axes.text(0.01, row, f"{decision.attention_type}, {choices}", va="center", color=ink, fontsize=9)
    counts = [f"  x{len(group.modules)}" if len(group.modules) > 1 else "" for group in shown]
    labels = [f"{_short(group.name)}{count}" for group, count in zip(shown, counts, strict=True)]
    if len(groups) > MOST_LAYERS:
        labels.append(f"and {len(groups) - MOST_LAYERS:,} more rows")
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    if any(group.first.decision.unwired for group in shown):
        axes.set_xlabel("* and an empty bar: wished for and not wired", fontsize=8, color=FAINT, loc="left")


def _draw_bytes(axes: Axes, pools: Bars) -> None:
    """What is in use, what lies idle, and the peak of each pool that has ever held memory."""
    _plain(axes, "Bytes reserved: in use, idle, and the peak")
    bars = [(name, now) for name, now in pools if now.reserved_bytes or now.peak_reserved_bytes]
    if not bars:
        _nothing(axes, "no pool has held memory yet")
        return
    if len(bars) < len(pools):
        axes.set_xlabel(f"{len(pools) - len(bars)} more never held memory", fontsize=8, color=FAINT, loc="right")
    most = max(max(now.peak_reserved_bytes, now.reserved_bytes) for _, now in bars)
    rows = range(len(bars))
    used, idle = [now.allocated_bytes for _, now in bars], [now.free_bytes for _, now in bars]
    axes.barh(rows, used, color=BLUE, height=0.6, label="in use")
    axes.barh(
        rows, idle, left=used, color="white", edgecolor=BLUE, hatch="///", height=0.6, linewidth=0.8, label="idle"
    )
    peaks = [now.peak_reserved_bytes for _, now in bars]
    axes.plot(peaks, rows, color=VERMILLION, marker="|", markersize=15, markeredgewidth=2.5, linewidth=0, label="peak")
    for row, (_, now) in enumerate(bars):
        end = max(now.reserved_bytes, now.peak_reserved_bytes)
        written = f"{size(now.allocated_bytes)} of {size(now.reserved_bytes)}, peak {size(now.peak_reserved_bytes)}"
        axes.text(end + 0.02 * most, row, written, va="center", fontsize=8, color=INK)
    axes.set_yticks(rows, [name for name, _ in bars], fontsize=9)
    axes.set_xlim(0, most * 1.75)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xticks([0, most / 2, most], [size(0), size(most // 2), size(most)])
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=3)


def _draw_rates(axes: Axes, rates: Rates) -> None:
    """How many of the requests to each pool and lookups in each cache were served by what was there."""
    _plain(axes, "Hit rate")
    if not rates:
        _nothing(axes, "no request and no lookup yet")
        return
    rows = range(len(rates))
    axes.barh(rows, [1.0] * len(rates), color="#EEEEEE", height=0.6)
    axes.barh(rows, [rate for _, rate, _ in rates], color=GREEN, height=0.6)
    for row, (_, rate, of) in enumerate(rates):
        axes.text(1.02, row, f"{rate:.0%} of {of}", va="center", fontsize=8, color=INK)
    axes.set_yticks(rows, [name for name, _, _ in rates], fontsize=9)
    axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"], fontsize=8)
    axes.set_xlim(0, 1.7)
    axes.set_ylim(len(rates) - 0.4, -0.6)


def _bars(report: Report) -> Bars:
    """Every pool, with its label."""
    bars: Bars = []
    for number, resources in enumerate(report.resources):
        mark = _mark(report, number)
        bars += [(f"{mark}{' '.join(place)}", now) for place, now in _places(resources)]
    for own in report.own:
        bars += [(f"own {own.class_name} {kind}".rstrip(), now) for kind, now in own.pools.items()]
    return bars


def _rates(report: Report) -> Rates:
    rates: Rates = [
        (name, now.hit_rate, f"{now.hits + now.misses:,} requests")
        for name, now in _bars(report)
        if now.hits + now.misses
    ]
    caches = [(f"{_mark(report, number)}pattern cache", one.cache) for number, one in enumerate(report.resources)]
    caches += [(f"own {own.class_name}", own.cache) for own in report.own if own.cache is not None]
    for name, info in caches:
        lookups = info.hits + info.misses + info.waits
        if lookups:
            rates.append((name, info.hit_rate, f"{lookups:,} lookups"))
    return rates


def _places(resources: ResourcesReport) -> list[tuple[tuple[str, str], PoolStatistics]]:
    return [*sorted(resources.pools.items()), *sorted(resources.kinds.items())]


def _mark(report: Report, number: int) -> str:
    """Which set of resources a bar is of, where there are several."""
    return f"set {number}: " if len(report.resources) > 1 else ""


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"...{name[3 - LONGEST_NAME :]}"


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)


def _nothing(axes: Axes, words: str) -> None:
    axes.text(0.0, 0.5, words, color=FAINT, transform=axes.transAxes, va="center")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
