"""What is known of this Python, this machine and what is installed on it, without importing torch.

Versions come from metadata, and torch's own from its file version.py. Imports the standard library only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dilated_factory import profile, registry
from dilated_factory.cli import version
from dilated_factory.hardware import flash, host, nvidia

# Ours, then what they and the optional parts use.
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
    "safetensors",
    "matplotlib",
    "rich",
    "transformers",
)
# What of these is needed for what, and the extra of dilated-factory that brings it ("" for its own dependencies).
_PARTS = (
    ("every attention and model", ("torch", "dilated-core"), ""),
    ("memory pools", ("dilated-memory-pool",), ""),
    ("pattern caches", ("dilated-pattern-cache",), ""),
    ("dilated demo and bench", ("rich", "matplotlib"), "bench"),
    ("models in folders", ("safetensors",), "safetensors"),
    ("transformers' models", ("transformers",), "transformers"),
)


@dataclass(frozen=True)
class FlashInfo:
    """One generation of the flash attention packages; ``usable`` is None where no device's capability is known."""

    name: str
    distribution: str
    version: str | None
    usable: bool | None


@dataclass(frozen=True)
class TypeInfo:
    """One attention type: who provides it, and what would install it."""

    name: str
    installed: bool
    provider: str
    install: str | None = None


@dataclass(frozen=True)
class Lack:
    """Something that is not installed: what it would bring, what is missing, and the command that installs it."""

    what: str
    missing: tuple[str, ...]
    install: str


@dataclass(frozen=True)
class ProfileInfo:
    """What ``dilated tune`` left: the path where it is looked for, None where nobody looks, and its state in words."""

    path: str | None
    state: str


@dataclass(frozen=True)
class Info:
    """Everything ``dilated info`` tells without torch. A version is None where the distribution is not installed.

    ``cuda_visible_devices`` is the environment's variable, None where it is not set.
    """

    python: str
    platform: str
    versions: dict[str, str | None]
    host: host.Host
    nvidia: nvidia.Nvidia
    cuda_visible_devices: str | None
    flash: tuple[FlashInfo, ...]
    attention_types: tuple[TypeInfo, ...]
    lacking: tuple[Lack, ...]
    profile: ProfileInfo


def gather(root: Path = host.ROOT) -> Info:
    """Look at this Python, this machine (the folder ``root`` stands for "/") and the installed distributions.

    >>> gather().attention_types[0].name
    'standard'
    """
    versions = {name: _torch_version() if name == "torch" else version(name) for name in DISTRIBUTIONS}
    driver = nvidia.survey(root)
    types = _types()
    return Info(
        python=platform.python_version(),
        platform=platform.platform(),
        versions=versions,
        host=host.survey(root),
        nvidia=driver,
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        flash=_flash([device.capability for device in driver.devices]),
        attention_types=types,
        lacking=_lacking({name for name, found in versions.items() if found is None}, types),
        profile=profile_info(),
    )


def _torch_version() -> str | None:
    """torch's own word, which names its build (2.13.0+cu130); a published wheel's metadata leaves that out."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    try:
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        text = ""
    own = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return own[1] if own else version("torch")


def _flash(capabilities: list[str]) -> tuple[FlashInfo, ...]:
    installed = flash.found()
    known = [capability for capability in capabilities if capability]
    rows = []
    for one in flash.GENERATIONS:
        if one.name in installed:
            usable = any(one.refusal(capability) is None for capability in known) if known else None
            rows.append(FlashInfo(one.name, one.distribution, version(one.distribution), usable))
    return tuple(rows)


def _types() -> tuple[TypeInfo, ...]:
    usable = registry.installed()
    rows = [
        TypeInfo(one.name, True, " ".join(filter(None, (one.distribution, one.version)))) for one in usable.values()
    ]
    rows += [
        TypeInfo(name, False, known.distribution, registry.install_command(name))
        for name, known in registry.KNOWN.items()
        if name not in usable
    ]
    return tuple(rows)


def _lacking(absent: Collection[str], types: tuple[TypeInfo, ...]) -> tuple[Lack, ...]:
    """One line a part, and one for all types that the same command installs."""
    rows = []
    for what, needed, extra in _PARTS:
        missing = tuple(name for name in needed if name in absent)
        if missing:
            names = f'"dilated-factory[{extra}]"' if extra else " ".join(missing)
            rows.append(Lack(what, missing, f"pip install {names}"))
    commands: dict[str, list[TypeInfo]] = {}
    for one in types:
        if one.install:
            commands.setdefault(one.install, []).append(one)
    rows += [
        Lack(", ".join(one.name for one in ones), (ones[0].provider,), command) for command, ones in commands.items()
    ]
    return tuple(rows)


def profile_info() -> ProfileInfo:
    """The user's profile: where it is, and what it says of itself.

    Whether it fits a device is known with torch only, which counts the threads that are part of a machine's key.
    """
    if os.environ.get(profile.VARIABLE) == "off":
        return ProfileInfo(None, f"off, by {profile.VARIABLE}")
    try:
        path = profile.default_path()
    except ModuleNotFoundError as error:  # platformdirs, without which nobody knows where to look
        return ProfileInfo(None, f"unknown, {error.name} is not installed")
    if not path.is_file():
        return ProfileInfo(str(path), "none, `dilated tune` writes one")
    try:
        found = profile.load(path)
    except (OSError, ValueError) as error:
        return ProfileInfo(str(path), f"not used: {error}")
    return ProfileInfo(str(path), f"{path}, of {found.created}, for {found.hardware}")
