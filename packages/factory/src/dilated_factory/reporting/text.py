"""A report as text: tables of at most 100 columns, each left out where it would be empty.

Imports the standard library only.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from dilated_factory.decision import Decision
from dilated_factory.reporting.facts import ModuleReport, Report, ResourcesReport
from dilated_factory.reporting.layers import Group, grouped
from dilated_memory_pool import PoolStatistics
from dilated_pattern_cache import CacheInfo

WIDTH = 100
# The least that is shown of a name that has no room.
_NAME = 16
_NOT_WIRED = "* wished for by the policy and not wired: the type has no option to take it by"
_OF_POOLS = ("in use", "reserved", "peak", "hit rate", "waste", "bypasses", "refused")


def render(report: Report) -> str:
    """Write the report."""
    count = len(report.modules)
    if count == 0:
        none = "no module with a decision; the creators of dilated_factory leave one on what they make"
        head = [f"{report.title}: {none}"]
    else:
        head = [f"{report.title}: {count} module{'s' if count > 1 else ''} with a decision", *_modules(report)]
    lines = [line for line in head for line in _wrapped(line, "")]
    for number, resources in enumerate(report.resources):
        lines += _resources(resources, number, several=len(report.resources) > 1)
    for own in report.own:
        names = ", ".join(name or "the model" for name in own.modules)
        lines += ["", *_wrapped(f"{own.class_name} of the caller's own, for {names}", "  ", first="")]
        if own.pools:
            lines += _pools("kind", {kind or "(all)": now for kind, now in own.pools.items()})
        if own.cache is not None:
            lines += _cache(own.cache)
    return "\n".join(lines)


def pool_word(decision: Decision, own: tuple[str, ...]) -> str:
    """What a table says of a module's pool: a star for one that is not wired."""
    if "allocator" in own:
        return "own"
    word = "by kind" if decision.buffer_manager else decision.pool_mode
    return f"{word}*" if "memory pool" in decision.unwired else word


def cache_word(decision: Decision, own: tuple[str, ...]) -> str:
    """What a table says of a module's pattern cache."""
    if "patterns" in own:
        return "own"
    word = "on" if decision.pattern_cache else "off"
    return f"{word}*" if "pattern cache" in decision.unwired else word


def size(nbytes: int) -> str:
    """Bytes with a unit.

    >>> size(1000), size(3 * 2**20), size(1_500_000_000)
    ('1,000 B', '3.0 MiB', '1.4 GiB')
    """
    if abs(nbytes) < 1024:
        return f"{nbytes:,} B"
    scaled = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(scaled) < 1024:
            return f"{scaled:.1f} {unit}"
        scaled /= 1024
    return f"{scaled:,.1f} TiB"


def _modules(report: Report) -> list[str]:
    groups = grouped(report.modules)
    several = len(report.resources) > 1
    header = ["module", "", "type", "kernel", "pool", "cache", "tokens", *(["shares"] if several else [])]
    rows = [_module_row(group, several) for group in groups]
    lines = ["", *table(header, rows, right=(6,))]
    if any(group.first.decision.unwired for group in groups):
        lines += [_NOT_WIRED]
    lines += ["", "Why"]
    why: dict[tuple[str, ...], list[str]] = {}
    for group in groups:
        why.setdefault(group.first.decision.reasons, []).append(group.name)
    for reasons, names in why.items():
        lines += _wrapped(", ".join(names), "  ")
        lines += [line for reason in reasons for line in _wrapped(f"- {reason}", "      ", first="    ")]
    return lines


def _module_row(group: Group, several: bool) -> list[str]:
    one: ModuleReport = group.first
    decision = one.decision
    tokens = "" if decision.sequence_length is None else f"{decision.sequence_length:,}"
    row = [
        group.name,
        f"x{len(group.modules)}" if len(group.modules) > 1 else "",
        decision.attention_type,
        decision.kernel,
        pool_word(decision, one.own),
        cache_word(decision, one.own),
        tokens,
    ]
    shares = "" if one.resources is None else f"set {one.resources}"
    return [*row, shares] if several else row


def _resources(resources: ResourcesReport, number: int, several: bool) -> list[str]:
    which = "of this process" if resources.of_process else "of the caller's own"
    title = f"Shared resources{f', set {number}' if several else ''}, {which}"
    lines = ["", title, f"  limit: {_limit(resources)}"]
    if resources.pools:
        lines += ["", *_pools("pool", {" ".join(place): now for place, now in sorted(resources.pools.items())})]
    if resources.kinds:
        lines += ["", *_pools("kind", {" ".join(place): now for place, now in sorted(resources.kinds.items())})]
    if not (resources.pools or resources.kinds):
        lines.append("  no pool has been used yet")
    return [*lines, "", *_cache(resources.cache)]


def _limit(resources: ResourcesReport) -> str:
    """As it was given, and what that comes to on the devices that have a pool."""
    limit = resources.limit
    if limit is None:
        return "none"
    given = f"{limit:.0%} of a device" if isinstance(limit, float) else limit if isinstance(limit, str) else size(limit)
    comes_to = [f"{size(nbytes)} on {device}" for device, nbytes in resources.limits.items() if nbytes is not None]
    return f"{given} ({', '.join(comes_to)})" if comes_to else given


def _pools(word: str, pools: dict[str, PoolStatistics]) -> list[str]:
    rows = [[name, *_pool_row(now)] for name, now in pools.items()]
    return table([word, *_OF_POOLS], rows, right=range(1, len(_OF_POOLS) + 1))


def _pool_row(now: PoolStatistics) -> list[str]:
    served = now.hits + now.misses
    return [
        size(now.allocated_bytes),
        size(now.reserved_bytes),
        size(now.peak_reserved_bytes),
        f"{now.hit_rate:.1%}" if served else "-",
        f"{now.waste:.1%}" if now.allocated_bytes else "-",
        f"{now.bypasses:,}",
        f"{now.ooms:,}",
    ]


def _cache(info: CacheInfo) -> list[str]:
    lookups = info.hits + info.misses + info.waits
    if not (lookups or info.entries):
        return ["pattern cache: not used yet"]
    limit = "" if info.max_entries is None else f" of {info.max_entries:,}"
    weight = "" if info.max_bytes is None else f" of {size(info.max_bytes)}"
    written = (
        f"pattern cache: {info.entries:,}{limit} entries, {size(info.nbytes)}{weight}; {info.hit_rate:.1%} hits "
        f"({info.hits:,} hits, {info.misses:,} misses, {info.waits:,} waits); {info.evictions:,} evictions; "
        f"{info.seconds_spent:.3g} s spent, {info.seconds_saved:.3g} s saved"
    )
    lines = _wrapped(written, "  ", first="")
    for name, now in info.devices.items():
        lines += _wrapped(f"on {name}: {now}", "    ", first="  ")
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    r"""Aligned columns, indented by two; the first is shortened in its middle where a line would be too long.

    >>> print("\n".join(table(["a", "b"], [["one", "1"], ["two", "10"]], right=[1])))
      a     b
      one   1
      two  10
    """
    to_right = set(right)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    used = 2 + 2 * (len(widths) - 1) + sum(widths[1:])
    widths[0] = min(widths[0], max(WIDTH - used, _NAME))
    lines = []
    for row in (header, *rows):
        cells = [_shortened(row[0], widths[0]), *row[1:]]
        aligned = [
            cell.rjust(width) if place in to_right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append(f"  {'  '.join(aligned)}".rstrip())
    return lines


def _shortened(name: str, width: int) -> str:
    if len(name) <= width:
        return name
    kept = width - 3
    return f"{name[: kept // 3]}...{name[len(name) - (kept - kept // 3) :]}"


def _wrapped(line: str, indent: str, first: str | None = None) -> list[str]:
    """Lines of at most WIDTH characters; one that fits is left as it is."""
    start = indent if first is None else first
    if len(start) + len(line) <= WIDTH:
        return [start + line]
    return textwrap.wrap(line, WIDTH, initial_indent=start, subsequent_indent=indent)
