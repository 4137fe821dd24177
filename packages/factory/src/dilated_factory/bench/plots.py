"""One picture a report. Colours are Okabe and Ito's, which people with any colour vision can tell apart.

Figures are drawn without pyplot, so no display and no global state are needed. Imports matplotlib when drawing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dilated_core.measure import Timing
from dilated_factory.bench import ring_sizes, stages
from dilated_factory.bench.claims import Comparison
from dilated_factory.bench.results import Results, Row
from dilated_factory.figures import BLUE, GREEN, GRID, INK, ORANGE, PURPLE, SKY, VERMILLION, make_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MIB = 2**20
LINES = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (SKY, "P"))


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """Report -> its PNG, of those that have something to draw."""
    drawn = {}
    for name, (title, _) in results.reports.items():
        rows = results.rows_of(name)
        figure = _PICTURES.get(name, _ratios)(rows, title)
        if figure is not None:
            drawn[name] = folder / f"{name}.png"
            figure.savefig(drawn[name], facecolor="white")
    return drawn


def _ratios(rows: Sequence[Row], title: str) -> Figure | None:
    """Claimed and found ratios of speed, a line each."""
    lines = [
        (row.name, comparison)
        for row in rows
        for comparison in row.comparisons
        if comparison.our_ratio and comparison.claimed_ratio and comparison.what in ("speed", "peak memory")
    ]
    if not lines:
        return None
    figure, [axes] = make_figure(1, 10.0, 1.9 + 0.42 * len(lines))
    _dumbbells(axes, lines)
    figure.suptitle(f'"{title}": the specification beside this machine', x=0.01, ha="left", fontsize=12)
    return figure


def _dumbbells(axes: Axes, lines: Sequence[tuple[str, Comparison]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    places = range(len(lines))
    ours = [comparison.our_ratio or 1.0 for _, comparison in lines]
    claimed = [comparison.claimed_ratio or 1.0 for _, comparison in lines]
    axes.hlines(places, claimed, ours, color=GRID, linewidth=3, zorder=1)
    noise = [comparison.noise * value for (_, comparison), value in zip(lines, ours, strict=True)]
    noise = [min(one, 0.95 * value) for one, value in zip(noise, ours, strict=True)]
    axes.errorbar(
        ours,
        places,
        xerr=noise,
        color=BLUE,
        marker="o",
        markersize=7,
        linewidth=0,
        elinewidth=1.5,
        capsize=3,
        label="here",
    )
    axes.plot(
        claimed,
        places,
        color=VERMILLION,
        marker="D",
        markersize=6,
        linewidth=0,
        markerfacecolor="white",
        markeredgewidth=1.5,
        label="specification (middle of a range)",
    )
    axes.axvline(1.0, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(min(0.5, 0.8 * min(*ours, *claimed)), max(2.0, 1.25 * max(*ours, *claimed)))
    axes.set_yticks(list(places), [f"{name}\n{one.what}" for name, one in lines], fontsize=8)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel("ratio to the baseline: speed above 1 is faster, peak memory above 1 is more")
    axes.figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )


def _rings(rows: Sequence[Row], title: str) -> Figure | None:
    """Extra memory and time against ring size."""
    key = ring_sizes.EXTRA
    families: dict[str, dict[int, Row]] = {"ring": {}, "streamed": {}}
    for row in rows:
        kind, _, size = row.name.partition(" ")
        if kind in families and size.isdecimal() and row.seconds and key in row.facts:
            families[kind][int(size)] = row
    sizes = sorted({size for family in families.values() for size in family})
    if not sizes:
        return None
    figure, (memory_axes, time_axes) = make_figure(2, 11.0, 4.8)
    for (kind, family), (colour, marker) in zip(families.items(), LINES, strict=False):
        own = sorted(family)
        memory = [float(family[size].facts[key]) for size in own]
        memory_axes.plot(own, memory, color=colour, marker=marker, linewidth=2, label=f"{kind}, here")
        if own and own[0] == 1 and memory[0] > 0:
            ideal = [memory[0] / size for size in own]
            label = "1/ring_size" if kind == "streamed" else None
            memory_axes.plot(own, ideal, color=colour, linestyle=":", linewidth=1.2, label=label)
        _times(time_axes, own, [family[size] for size in own], colour, marker, f"{kind}, here")
    said = {size: milliseconds for size, (milliseconds, _) in ring_sizes.SAID.items()}
    time_axes.plot(
        list(said),
        list(said.values()),
        color=INK,
        marker="D",
        linestyle="--",
        linewidth=1,
        label="specification (GTX 1080)",
    )
    for name, colour in ((ring_sizes.FUSED, GREEN), (ring_sizes.STANDARD, ORANGE)):
        for row in rows:
            if row.name == name and row.median:
                label = name.removeprefix("standard attention, ")
                time_axes.axhline(1e3 * row.median, color=colour, linewidth=1.5, linestyle="-.", label=label)
    for axes in (memory_axes, time_axes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(plain)
        axes.set_xlabel("ring size")
    _round_ticks(memory_axes)
    _round_ticks(time_axes)
    memory_axes.set_ylabel("peak beyond inputs and results (MiB)")
    memory_axes.set_title("Memory (dotted: the first value over the ring size)", loc="left", fontsize=10)
    memory_axes.legend(frameon=False, fontsize=8, loc="lower left")
    time_axes.set_ylabel("one forward pass (ms)")
    time_axes.set_title("Time: median, whiskers from fastest to slowest", loc="left", fontsize=10)
    low, high = time_axes.get_ylim()
    time_axes.set_ylim(low, high * 4)  # room for the legend
    time_axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    figure.suptitle(f'"{title}": attention to all keys, in chunks', x=0.01, ha="left", fontsize=12)
    return figure


def _stages(rows: Sequence[Row], title: str) -> Figure | None:
    """Time and speed-up against length, a line each stage."""
    names = [*(stage.name for stage in stages.STAGES), stages.DENSE_RING]
    by_name: dict[str, dict[int, Row]] = {name: {} for name in names}
    for row in rows:
        if row.name in by_name and row.seconds:
            by_name[row.name][int(row.table.split()[0].replace(",", ""))] = row
    lengths = sorted({length for own in by_name.values() for length in own})
    if not lengths:
        return None
    figure, (time_axes, speed_axes) = make_figure(2, 12.0, 6.0)
    for (name, own), (colour, marker) in zip(by_name.items(), LINES, strict=True):
        known = sorted(own)
        _times(time_axes, known, [own[length] for length in known], colour, marker, name)
        found = {
            length: comparison
            for length in known
            for comparison in own[length].comparisons
            if comparison.what == "speed" and comparison.our_ratio
        }
        # Those with no claim carry no number; their ratio is made of the medians.
        baseline = by_name[stages.BASELINE]
        ratios = {
            length: (baseline[length].median or 0) / (own[length].median or 1) for length in known if length in baseline
        }
        if name != stages.BASELINE:
            speed_axes.plot(list(ratios), list(ratios.values()), color=colour, marker=marker, linewidth=2)
        said = {length: one.claimed_ratio for length, one in found.items() if one.claimed_ratio}
        if said:
            speed_axes.plot(
                list(said),
                list(said.values()),
                color=colour,
                marker=marker,
                markerfacecolor="white",
                linestyle="--",
                linewidth=1,
            )
    speed_axes.axhline(1.0, color=INK, linewidth=1)
    for axes in (time_axes, speed_axes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(plain)
        axes.set_xlabel("sequence length (tokens)")
        _round_ticks(axes)
    time_axes.set_ylabel("one forward pass (ms)")
    time_axes.set_title("Time: median, whiskers from fastest to slowest", loc="left", fontsize=10)
    speed_axes.set_ylabel("times faster than the baseline")
    speed_axes.set_title("Speed-up: here filled, the specification's hollow and dashed", loc="left", fontsize=10)
    figure.legend(
        *time_axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )
    figure.suptitle(f'"{title}"', x=0.01, ha="left", fontsize=12)
    return figure


def _times(axes: Axes, places: Sequence[int], rows: Sequence[Row], colour: str, marker: str, label: str) -> None:
    medians = [1e3 * Timing(row.seconds).median for row in rows]
    below = [median - 1e3 * min(row.seconds) for row, median in zip(rows, medians, strict=True)]
    above = [1e3 * max(row.seconds) - median for row, median in zip(rows, medians, strict=True)]
    if rows:
        axes.errorbar(
            list(places), medians, yerr=(below, above), color=colour, marker=marker, linewidth=2, capsize=4, label=label
        )


def _round_ticks(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))


_PICTURES: dict[str, Callable[[Sequence[Row], str], Figure | None]] = {
    ring_sizes.NAME: _rings,
    stages.NAME: _stages,
}
