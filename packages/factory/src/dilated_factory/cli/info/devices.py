"""What only torch knows: its devices, and every kernel on each of them, with the reasons of those that refuse.

Imports torch and dilated_core, and is itself imported for ``dilated info --kernels`` only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from dilated_core import kernels
from dilated_factory import profile
from dilated_factory.hardware import Hardware

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The head_dim that kernels are asked about: the one most models have.
HEAD_DIM = 64


@dataclass(frozen=True)
class KernelInfo:
    """One kernel on one device: the dtypes it takes at ``head_dim``, and why it refuses the others."""

    name: str
    dtypes: tuple[str, ...]
    refusals: dict[str, str]


@dataclass(frozen=True)
class DeviceInfo:
    """One device, and every kernel on it, in the order that kernel="auto" asks them.

    ``key`` is what a profile of this machine is known by, ``profile`` whether the user's profile is used, or why not.
    """

    device: str
    key: str
    profile: str
    hardware: Hardware
    head_dim: int
    kernels: tuple[KernelInfo, ...]


def gather() -> tuple[DeviceInfo, ...]:
    """Ask torch for its devices: the CPU, then every CUDA device.

    >>> [kernel.name for kernel in gather()[0].kernels][-1]
    'math'
    """
    rows = []
    for name in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        hardware = Hardware.detect(name)
        state = _profile_state(hardware)
        rows.append(DeviceInfo(name, hardware.key(), state, hardware, HEAD_DIM, _kernels(torch.device(name))))
    return tuple(rows)


def _profile_state(hardware: Hardware) -> str:
    """Whether the user's profile is used on that device, in words; no file is no fault."""
    if os.environ.get(profile.VARIABLE) == "off":
        return "none"
    path = profile.default_path()
    if not path.is_file():
        return "none"
    try:
        found = profile.load(path)
    except (OSError, ValueError) as error:
        return f"not used: {error}"
    if found.device_type != hardware.device_type:
        return f"not used: it is for {found.device_type}"
    objection = found.objection(hardware.key())
    return "used" if objection is None else f"not used: {objection}"


def _kernels(device: torch.device) -> tuple[KernelInfo, ...]:
    surveys = {str(dtype).removeprefix("torch."): kernels.survey(device, dtype, HEAD_DIM) for dtype in DTYPES}
    rows = []
    for kernel in kernels.table():
        refusals = {dtype: survey[kernel.name] for dtype, survey in surveys.items()}
        taken = tuple(dtype for dtype, reason in refusals.items() if reason is None)
        rows.append(KernelInfo(kernel.name, taken, {dtype: no for dtype, no in refusals.items() if no}))
    return tuple(rows)
