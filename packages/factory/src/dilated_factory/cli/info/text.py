"""``dilated info`` as aligned text: sections of two columns, wrapped where a terminal is narrow.

Imports the standard library only; what torch told comes as plain data.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dilated_factory.cli.info.devices import DeviceInfo, KernelInfo
    from dilated_factory.cli.info.machine import FlashInfo, Info, TypeInfo
    from dilated_factory.hardware.host import Host
    from dilated_factory.hardware.nvidia import Nvidia

Rows = list[tuple[str, str]]

# What the list of kernels does not say of them.
_USE = "for kernels asked for by name; fa2 for none"
_MORE = "Devices and kernels as torch sees them: dilated info --kernels"


def render(info: Info, seen: tuple[DeviceInfo, ...] | None = None, width: int | None = None) -> str:
    """Write the information, with ``seen`` (what torch told) where there is some.

    Lines are at most ``width`` characters long where words allow it; None for no limit.
    """
    sections: list[tuple[str, Rows]] = [
        ("", [("Python", info.python), ("Platform", info.platform), ("Profile", info.profile.state)]),
        ("Versions", [(name, found or "not installed") for name, found in info.versions.items()]),
        ("CPU", _host(info.host)),
        ("NVIDIA devices", _nvidia(info.nvidia, info.cuda_visible_devices)),
        (f"Flash attention packages ({_USE})", _flash(info.flash)),
        ("Attention types", _types(info.attention_types)),
    ]
    for device in seen or ():
        sections.append((f"Device {device.device}", _hardware(device)))
        sections.append((f"Kernels on {device.device}, head_dim {device.head_dim}", _kernels(device.kernels)))
    if info.lacking:
        sections.append(("Not installed", [(lack.what, lack.install) for lack in info.lacking]))
    written = "\n\n".join(_section(title, rows, width) for title, rows in sections)
    return f"{written}\n\n{_MORE}" if seen is None else written


def _section(title: str, rows: Rows, width: int | None) -> str:
    indent = "  " if title else ""
    left = max(len(name) for name, _ in rows)
    lines = [title] if title else []
    for name, value in rows:
        start = f"{indent}{name:<{left}}  "
        lines += _wrapped(start, value, width)
    return "\n".join(lines)


def _wrapped(start: str, value: str, width: int | None) -> list[str]:
    """``value`` behind ``start``; what does not fit goes on below itself, past a leading "yes" or "no"."""
    if width is None or len(start) + len(value) <= width:
        return [f"{start}{value}".rstrip()]
    verdict = value[:5] if value[:5] in ("yes  ", "no   ") else ""
    hanging = " " * (len(start) + len(verdict))
    # A column of fewer than twenty characters is worse to read than a line that the terminal breaks.
    room = max(width, len(hanging) + 20)
    return textwrap.wrap(
        value[len(verdict) :],
        room,
        initial_indent=start + verdict,
        subsequent_indent=hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _gib(bytes_: int) -> str:
    return f"{bytes_ / 2**30:.1f} GiB"


def _host(host: Host) -> Rows:
    cores = str(host.logical_cores)
    if host.physical_cores not in (None, host.logical_cores):
        cores += f" ({host.physical_cores} physical)"
    if host.usable_cores != host.logical_cores:
        cores += f", {host.usable_cores} allowed to this process"
    if host.cpu_quota is not None:
        cores += f", limited to {host.cpu_quota:g} by the control group"
    memory = "unknown" if host.memory_total is None else _gib(host.memory_total)
    if host.memory_limit is not None:
        memory += f", limited to {_gib(host.memory_limit)} by the control group"
    nodes = f"{len(host.numa_nodes)}: cores {' and '.join(host.numa_nodes)}" if host.numa_nodes else "unknown"
    return [
        ("name", host.cpu_name or "unknown"),
        ("cores", cores),
        ("memory", memory),
        ("vectors", " ".join(host.vector_flags) or "unknown"),
        ("NUMA nodes", nodes),
    ]


def _nvidia(nvidia: Nvidia, visible: str | None) -> Rows:
    rows = [("driver", nvidia.driver or "none found")]
    if nvidia.problem:
        rows.append(("problem", nvidia.problem))
    for device in nvidia.devices:
        parts = [device.name]
        if device.memory_total is not None:
            parts.append(_gib(device.memory_total))
        if device.capability:
            parts.append(f"compute capability {device.capability}")
        rows.append(("device", ", ".join(parts)))
    if visible is not None:
        rows.append(("visible", f'CUDA_VISIBLE_DEVICES="{visible}"'))
    return rows


def _flash(packages: tuple[FlashInfo, ...]) -> Rows:
    words = {True: "the device can run it", False: "no device here can run it", None: "device not known"}
    rows = [
        (one.name, f"{one.distribution} {one.version or ''}".rstrip() + f", {words[one.usable]}") for one in packages
    ]
    return rows or [("none", "found")]


def _types(types: tuple[TypeInfo, ...]) -> Rows:
    rows = [(one.name, f"{'yes' if one.installed else 'no':<3}  {_provider(one)}") for one in types]
    return [*rows, ("auto", "yes  the policy's choice among these")]


def _provider(one: TypeInfo) -> str:
    if one.installed:
        return one.provider
    return f"comes with {one.provider}"


def _hardware(device: DeviceInfo) -> Rows:
    hardware = device.hardware
    rows = [("name", hardware.device_name or "unknown"), ("capability", hardware.capability or "unknown")]
    if hardware.memory_total is not None:
        rows.append(("memory", _gib(hardware.memory_total)))
    rows.append(("bfloat16", "yes" if hardware.bf16 else "no"))
    if hardware.device_type == "cpu":
        rows.append(("threads", str(hardware.threads)))
    if hardware.flash:
        rows.append(("flash", ", ".join(hardware.flash)))
    return [*rows, ("key", device.key), ("profile", device.profile)]


def _kernels(rows: tuple[KernelInfo, ...]) -> Rows:
    """One line a kernel, and one more for each different reason where only some dtypes are refused."""
    cells = []
    for row in rows:
        reasons: dict[str, list[str]] = {}
        for dtype, reason in row.refusals.items():
            reasons.setdefault(reason, []).append(dtype)
        if row.dtypes:
            cells.append((row.name, f"yes  {', '.join(row.dtypes)}"))
        for index, (reason, dtypes) in enumerate(reasons.items()):
            name = "" if row.dtypes or index else row.name
            whose = f"{', '.join(dtypes)}: " if row.dtypes or len(reasons) > 1 else ""
            cells.append((name, f"no   {whose}{reason}"))
    return cells
