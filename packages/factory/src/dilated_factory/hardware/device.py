"""One device and the process around it, behind one object that a test can simply construct.

Imports torch when a device is looked at, not before: ``dilated info`` reads the machine without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dilated_factory.hardware import flash, host

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Hardware:
    """One device and the process around it: what decisions go by, so that a test can write a machine of its own.

    Attributes:
        device_type: "cpu", "cuda" or another of torch's.
        device_name: the device's own name; "" where it is not known.
        capability: "9.0" for a CUDA device, the vector instruction set ("AVX512") for a CPU; "" where unknown.
        memory_total: bytes; None where it cannot be read.
        bf16: whether bfloat16 arithmetic runs. A CPU always can, natively or not.
        threads: torch's own number of threads inside one operation.
        world_size: ranks of torch.distributed's default group, 1 without one.
        process_group: whether that group is initialised.
        flash: the flash attention packages ("fa2", "fa3", "fa4") that are installed and that this device can run.
        numa_nodes: memory nodes of the host.
        local_world_size, local_rank: how many ranks share this host and which of them this is, as the launcher's
            environment tells; None without one.

    >>> Hardware(device_type="cuda", capability="9.0").process_group
    False
    """

    device_type: str
    device_name: str = ""
    capability: str = ""
    memory_total: int | None = None
    bf16: bool = True
    threads: int = 1
    world_size: int = 1
    process_group: bool = False
    flash: tuple[str, ...] = ()
    numa_nodes: int = 1
    local_world_size: int | None = None
    local_rank: int | None = None

    @classmethod
    def detect(
        cls,
        device: torch.device | str | None = None,
        *,
        root: Path = host.ROOT,
        environ: Mapping[str, str] | None = None,
    ) -> Hardware:
        """Look at a device.

        Args:
            device: which; None for the best that is present, CUDA before CPU.
            root: the folder that stands for "/".
            environ: the environment; None for the process's own.

        Raises:
            RuntimeError: torch knows no such device.
            ValueError: a launcher's variable (LOCAL_WORLD_SIZE, LOCAL_RANK) is no number.

        >>> Hardware.detect("cpu").device_type
        'cpu'
        """
        import torch

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        group = torch.distributed.is_available() and torch.distributed.is_initialized()
        environ = os.environ if environ is None else environ
        around = cls(
            device.type,
            bf16=False,
            threads=torch.get_num_threads(),
            world_size=torch.distributed.get_world_size() if group else 1,
            process_group=group,
            numa_nodes=max(1, len(host.numa_nodes(root))),
            local_world_size=_number(environ, "LOCAL_WORLD_SIZE", at_least=1),
            local_rank=_number(environ, "LOCAL_RANK", at_least=0),
        )
        if device.type == "cuda" and torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(device)
            with torch.cuda.device(device):
                bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            capability = f"{properties.major}.{properties.minor}"
            return replace(
                around,
                device_name=properties.name,
                capability=capability,
                memory_total=properties.total_memory,
                bf16=bf16,
                flash=flash.usable(capability, flash.found()),
            )
        if device.type == "cpu":
            return replace(
                around,
                device_name=host.cpu_name(root),
                capability=torch.backends.cpu.get_cpu_capability(),
                memory_total=host.usable_memory(root),
                bf16=True,
            )
        return around

    def key(self) -> str:
        """Return a short text that is the same wherever a profile measured here holds: equal keys, equal machines.

        It names the device, its capability, its memory in whole GiB and torch's threads, and nothing of the process
        group, which says nothing about speed.

        >>> Hardware("cpu", "AMD EPYC", "AVX512", 24 * 2**30, threads=2).key()
        'cpu AMD EPYC, AVX512, 24 GiB, 2 threads'
        """
        memory = "memory unknown" if self.memory_total is None else f"{round(self.memory_total / 2**30)} GiB"
        name = " ".join(f"{self.device_type} {self.device_name}".split())
        return f"{name}, {self.capability or 'capability unknown'}, {memory}, {self.threads} threads"


def usable_device(device: torch.device | str | None) -> torch.device:
    """Return the device, of those that pools and kernels are made for and that are here; None is the best present.

    Raises:
        TypeError: ``device`` is neither a device nor its name.
        ValueError: another kind than cpu and cuda, or one that is not here.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    import torch

    if not isinstance(device, (str, torch.device, type(None))):
        raise TypeError(f"device: expected cpu, cuda[:index] or None, got {device!r}")
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu or cuda[:index], got {device!r}") from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda[:index], got {device!r}")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected a device that is here, got {device!r}, and torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    return place


def _number(environ: Mapping[str, str], name: str, *, at_least: int) -> int | None:
    """The launcher's number, None where it is not set."""
    word = environ.get(name)
    if word is None:
        return None
    if not word.isdecimal() or int(word) < at_least:
        raise ValueError(f"{name} in the environment: expected an int of at least {at_least}, got {word!r}")
    return int(word)
