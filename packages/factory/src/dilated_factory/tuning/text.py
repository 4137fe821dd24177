"""What ``dilated tune`` found, as plain tables of at most 80 columns. Imports the standard library and the rules."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dilated_factory.policy import Policy
from dilated_factory.profile import AUTO, NEVER_BYTES, Profile
from dilated_factory.tuning.rules import Figure, gains

WIDTH = 80


def render(profile: Profile, policy: Policy) -> str:
    """The figures, what they come to, and what the policy says without them."""
    sections = (
        _heading(profile),
        _pool_by_bytes(profile),
        _pool_by_tokens(profile, policy),
        _kernels(profile),
        _blocks(profile),
        _decided(profile, policy),
    )
    return "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines)


def mode_names(profile: Profile, policy: Policy, length: int) -> tuple[str, str]:
    """The pool's mode at a length by the policy, and by the profile.

    >>> mode_names(Profile("here", "cpu", pool_thresholds=(None, 16384)), Policy(), 4096)
    ('lightweight', 'off')
    """
    one, other = (rules.choose_pool("improved", length)[0] for rules in (policy, profile.policy(policy)))
    return one, other


def _heading(profile: Profile) -> Iterator[str]:
    setting = next((one for one in _of(profile, "setting")), None)
    yield from _wrapped(profile.hardware)
    versions = ", ".join(f"{name} {version}" for name, version in profile.versions.items())
    yield from _wrapped(versions)
    if setting is not None:
        pattern = f"segments {setting['segment_lengths']}, rates {setting['dilation_rates']}"
        yield from _wrapped(
            f"{setting['heads']} heads of {setting['head_dim']}, {pattern}; {setting['seconds']:,.0f} s taken of "
            f"{setting['budget_seconds']:,.0f}"
        )


def _pool_by_bytes(profile: Profile) -> Iterator[str]:
    cells = _of(profile, "pool_bytes")
    if not cells:
        return
    yield "To get a tensor and write it once: torch.empty in ms, and a pool times as fast"
    rows = []
    for cell in _timed(cells):
        figures = _figures(cell)
        rows.append([_bytes(cell["bytes"]), _ms(figures["torch"]), *_ratios(figures, "torch", ("lightweight", "full"))])
    yield from _table(["tensor", "torch.empty", "lightweight", "full"], rows)
    yield from _left_out(cells, lambda cell: _bytes(cell["bytes"]))


def _pool_by_tokens(profile: Profile, policy: Policy) -> Iterator[str]:
    cells = _of(profile, "pool_tokens")
    if not cells:
        return
    yield f"Attention, {cells[0]['dtype']}: without a pool in ms, and a pool times as fast"
    rows = []
    for cell in _timed(cells):
        figures = _figures(cell)
        by_policy, by_profile = mode_names(profile, policy, cell["tokens"])
        gain = "same"
        if by_policy != by_profile:
            gain = _ratio(figures, by_policy, by_profile)
        times = _ratios(figures, "off", ("lightweight", "full"))
        off = _ms(figures["off"]) if "off" in figures else "wrong"
        rows.append([f"{cell['tokens']:,}", cell["pass"], off, *times, _short(by_policy), _short(by_profile), gain])
    yield from _table(["tokens", "pass", "off", "light", "full", "policy", "profile", "gain"], rows, words=(1, 5, 6))
    yield from _left_out(cells, lambda cell: f"{cell['tokens']:,} tokens")


def _kernels(profile: Profile) -> Iterator[str]:
    cells = _of(profile, "kernels")
    if not cells:
        return
    yield 'Kernels, forward and backward in ms; * is what kernel="auto" takes'
    names = list(dict.fromkeys(name for cell in _timed(cells) for name in cell["figures"]))
    rows = []
    for cell in _timed(cells):
        figures = _figures(cell)
        times = [
            _ms(figures[name]) + ("*" if name == cell["auto"] else " ") if name in figures else "- " for name in names
        ]
        chosen = profile.kernel(cell["dtype"], cell["tokens"]) or AUTO
        rows.append([cell["dtype"], f"{cell['tokens']:,}", *times, chosen])
    yield from _table(["dtype", "tokens", *(f"{name} " for name in names), "profile"], rows, words=(0, len(names) + 2))
    yield from _left_out(cells, lambda cell: f"{cell['tokens']:,} tokens in {cell['dtype']}")


def _blocks(profile: Profile) -> Iterator[str]:
    cells = _of(profile, "block_size")
    if not cells:
        return
    yield "Block-sparse attention, forward and backward"
    rows = []
    for cell in _timed(cells):
        for name, figure in _figures(cell).items():
            rows.append([name, _ms(figure), f"{figure.seconds / cell['pairs'][name] * 1e9:.2f}"])
    yield from _table(["rows x columns", "ms", "ns a live pair"], rows)
    yield from _left_out(cells, lambda cell: "block sizes")


def _decided(profile: Profile, policy: Policy) -> Iterator[str]:
    yield "Decided"
    least = profile.pool_min_bytes
    served = "no finding; from 1 MiB as built in" if least is None else f"from {_bytes(least)} (built in: 1 MiB)"
    if least == NEVER_BYTES:
        served = "none: torch.empty was as fast at every size (built in: from 1 MiB)"
    yield from _item("a pool serves tensors", served)
    yield from _item("pool, by the policy", _thresholds(policy.pool_lightweight_from, policy.pool_full_from))
    measured = "not measured, so as the policy says"
    if profile.pool_thresholds is not None:
        measured = _thresholds(*profile.pool_thresholds)
    yield from _item("pool, by the profile", measured)
    yield from _item("where the profile wins", _compared(profile, policy, wins=True))
    losses = _compared(profile, policy, wins=False)
    if losses != "nowhere":
        yield from _item("where it loses", losses)
    rules = [f"{rule.kernel} from {rule.from_length:,} in {rule.dtype}" for rule in profile.kernels]
    yield from _item("kernels", ", ".join(rules) or "auto's own choice everywhere: none was faster")
    if profile.block_size is not None:
        rows, columns = profile.block_size
        yield from _item("block size", f"{rows} x {columns} is the fastest; told, not applied: it is another function")


def _compared(profile: Profile, policy: Policy, *, wins: bool) -> str:
    """Where the profile's mode was faster, or slower, than the policy's, beyond the spread."""
    found = []
    for cell in _timed(_of(profile, "pool_tokens")):
        figures = _figures(cell)
        by_policy, by_profile = mode_names(profile, policy, cell["tokens"])
        if by_policy == by_profile or not {by_policy, by_profile} <= set(figures):
            continue
        faster, slower = (by_profile, by_policy) if wins else (by_policy, by_profile)
        if gains(figures[faster], figures[slower]):
            found.append(f"{cell['tokens']:,} {cell['pass']} {_ratio(figures, by_policy, by_profile)}")
    return ", ".join(found) or "nowhere"


def _thresholds(lightweight: int | None, full: int | None) -> str:
    starts = (("lightweight", lightweight), ("full", full))
    parts = [f"{name} from {start:,} tokens" for name, start in starts if start is not None]
    return ", ".join(parts) or "off at every length"


def _of(profile: Profile, part: str) -> list[dict[str, Any]]:
    return [one for one in profile.measurements if one["part"] == part]


def _timed(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [cell for cell in cells if "figures" in cell]


def _figures(cell: Mapping[str, Any]) -> dict[str, Figure]:
    return {name: Figure(one["seconds"], one["spread"]) for name, one in cell["figures"].items()}


def _ratio(figures: Mapping[str, Figure], slow: str, fast: str) -> str:
    if slow not in figures or fast not in figures:
        return "-"
    return f"{figures[slow].seconds / figures[fast].seconds:.2f}x"


def _ratios(figures: Mapping[str, Figure], base: str, names: Sequence[str]) -> list[str]:
    return [_ratio(figures, base, name) for name in names]


def _left_out(cells: Sequence[dict[str, Any]], words: Callable[[dict[str, Any]], str]) -> Iterator[str]:
    """What is missing of a table and why, one line a reason; of a candidate that was dropped, the first reason."""
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        if "left_out" in cell:
            kind = "time" if cell["left_out"].startswith("it would take") else cell["left_out"]
            reasons.setdefault(kind, []).append(words(cell))
    for reason, names in reasons.items():
        told = "there was no time (--budget)" if reason == "time" else reason
        listed = ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]}"
        yield from _wrapped(f"left out: {listed}: {told}")
    dropped: dict[str, str] = {}
    for cell in cells:
        for name, why in cell.get("dropped", {}).items():
            candidate = f"{name} in {cell['dtype']}" if "dtype" in cell else name
            since = f" from {cell['tokens']:,} tokens" if "tokens" in cell else ""
            dropped.setdefault(candidate, f"{candidate}{since}: {why}")
    for words_of_it in dropped.values():
        yield from _wrapped(f"dropped: {words_of_it}")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = ()) -> Iterator[str]:
    """Aligned columns; those numbered in ``words`` on the left."""
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [f"{cell:{'<' if index in words else '>'}{widths[index]}}" for index, cell in enumerate(row)]
        yield ("  " + "  ".join(cells)).rstrip()


def _item(name: str, value: str) -> list[str]:
    return textwrap.wrap(value, WIDTH, initial_indent=f"  {name:<24}", subsequent_indent=" " * 26)


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ")


def _short(mode: str) -> str:
    return "light" if mode == "lightweight" else mode


def _ms(figure: Figure) -> str:
    milliseconds = figure.seconds * 1000
    return f"{milliseconds:,.4f}" if milliseconds < 0.1 else f"{milliseconds:,.2f}"


def _bytes(nbytes: int) -> str:
    return f"{nbytes // 2**20:,} MiB" if nbytes >= 2**20 else f"{nbytes // 2**10:,} KiB"
