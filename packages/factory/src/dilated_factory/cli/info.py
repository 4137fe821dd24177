"""`dilated info`: what is here, what can run, and why the rest cannot.

One gathering of plain data, and two ways to write it: aligned text and JSON.
Imports torch and dilated_core.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass

import torch

from dilated_core import kernels
from dilated_factory import registry
from dilated_factory.cli import version
from dilated_factory.hardware import Hardware

# Ours, then what the optional parts would use.
DISTRIBUTIONS = (
    "dilated-core",
    "dilated-factory",
    "dilated-memory-pool",
    "dilated-pattern-cache",
    "dilated-ring",
    "dilated-block-sparse",
    "torch",
    "triton",
    "numpy",
    "matplotlib",
    "rich",
    "transformers",
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The head_dim that kernels are asked about: the one most models have.
HEAD_DIM = 64


@dataclass(frozen=True)
class KernelInfo:
    """One kernel on one device: the dtypes it takes at `HEAD_DIM`, and why it refuses the others."""

    name: str
    dtypes: tuple[str, ...]
    refusals: dict[str, str]


@dataclass(frozen=True)
class DeviceInfo:
    """One device, and every kernel of the table on it, in the order that kernel="auto" asks them."""

    device: str
    hardware: Hardware
    kernels: tuple[KernelInfo, ...]


@dataclass(frozen=True)
class TypeInfo:
    """One attention type: who provides it, and what would install it, now or in a later release."""

    name: str
    installed: bool
    provider: str
    install: str | None = None
    not_yet_in: str | None = None


@dataclass(frozen=True)
class Info:
    """Everything `dilated info` tells. A version is None where the distribution is not installed."""

    python: str
    platform: str
    versions: dict[str, str | None]
    devices: tuple[DeviceInfo, ...]
    attention_types: tuple[TypeInfo, ...]


def gather() -> Info:
    """Look at this Python, its devices and its distributions.

    >>> [kernel.name for kernel in gather().devices[0].kernels][-1]
    'math'
    """
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return Info(
        python=platform.python_version(),
        platform=platform.platform(),
        # torch's own word names its build too (2.13.0+cu130), which the metadata of a published wheel leaves out.
        versions={name: version(name) for name in DISTRIBUTIONS} | {"torch": str(torch.__version__)},
        devices=tuple(DeviceInfo(name, Hardware.detect(name), _kernels(torch.device(name))) for name in names),
        attention_types=_types(),
    )


def _kernels(device: torch.device) -> tuple[KernelInfo, ...]:
    surveys = {_word(dtype): kernels.survey(device, dtype, HEAD_DIM) for dtype in DTYPES}
    rows = []
    for kernel in kernels.table():
        refusals = {dtype: survey[kernel.name] for dtype, survey in surveys.items()}
        taken = tuple(dtype for dtype, reason in refusals.items() if reason is None)
        rows.append(KernelInfo(kernel.name, taken, {dtype: no for dtype, no in refusals.items() if no}))
    return tuple(rows)


def _types() -> tuple[TypeInfo, ...]:
    usable = registry.installed()
    rows = [
        TypeInfo(one.name, True, " ".join(filter(None, (one.distribution, one.version)))) for one in usable.values()
    ]
    rows += [
        TypeInfo(name, False, known.distribution, registry.install_command(name), registry.lacks_extra(name))
        for name, known in registry.KNOWN.items()
        if name not in usable
    ]
    return tuple(rows)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def render(info: Info) -> str:
    """Write the information as aligned text."""
    sections = [("", _table([("Python", info.python), ("Platform", info.platform)], indent=""))]
    versions = [(name, found or "not installed") for name, found in info.versions.items()]
    sections.append(("Versions", _table(versions)))
    for device in info.devices:
        sections.append((f"Device {device.device}", _hardware_lines(device.hardware)))
        sections.append((f"Kernels on {device.device}, head_dim {HEAD_DIM}", _kernel_lines(device.kernels)))
    rows = [(one.name, _availability(one)) for one in info.attention_types]
    sections.append(("Attention types", _table([*rows, ("auto", "yes  the policy's choice among these")])))
    return "\n\n".join("\n".join([title] * bool(title) + lines) for title, lines in sections)


def _hardware_lines(hardware: Hardware) -> list[str]:
    rows = [("name", hardware.device_name or "unknown"), ("capability", hardware.capability or "unknown")]
    if hardware.memory_total is not None:
        rows.append(("memory", f"{hardware.memory_total / 2**30:.1f} GiB"))
    rows.append(("bfloat16", "yes" if hardware.bf16 else "no"))
    if hardware.device_type == "cpu":
        rows.append(("threads", str(hardware.threads)))
    return _table(rows)


def _kernel_lines(rows: tuple[KernelInfo, ...]) -> list[str]:
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
    return _table(cells)


def _availability(one: TypeInfo) -> str:
    if one.installed:
        return f"yes  {one.provider}"
    return f"no   not in dilated-factory {one.not_yet_in} yet" if one.not_yet_in else f"no   {one.install}"


def _table(rows: list[tuple[str, str]], indent: str = "  ") -> list[str]:
    width = max((len(left) for left, _ in rows), default=0)
    return [f"{indent}{left:<{width}}  {right}" for left, right in rows]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dilated info`."""
    parser.add_argument("--json", action="store_true", help="write JSON instead of text")


def run(options: argparse.Namespace) -> int:
    """Print the information."""
    info = gather()
    print(json.dumps(asdict(info), indent=2) if options.json else render(info))
    return 0
