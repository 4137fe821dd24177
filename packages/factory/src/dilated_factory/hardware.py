"""What the factory knows about the machine, behind one object that a test can simply construct.

Imports torch; nothing is probed until `Hardware.detect` is called.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Hardware:
    """One device and the process around it.

    `capability` is "9.0" for a CUDA device and the vector instruction set ("AVX512") for a CPU.
    `memory_total` is in bytes, None where it cannot be read. `bf16` says whether bfloat16 arithmetic runs (a
    CPU always can, natively or not). `threads` is torch's own intra-op number. `process_group` says whether
    torch.distributed's default group is initialised, `world_size` how many ranks it has (1 without).

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

    @classmethod
    def detect(cls, device: torch.device | str | None = None) -> Hardware:
        """Look at `device`, or without one at the best device present (CUDA before CPU).

        Raises RuntimeError, as torch does, for a device string torch does not know.

        >>> Hardware.detect("cpu").device_type
        'cpu'
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        group = torch.distributed.is_available() and torch.distributed.is_initialized()
        world_size = torch.distributed.get_world_size() if group else 1
        threads = torch.get_num_threads()
        if device.type == "cuda" and torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(device)
            with torch.cuda.device(device):
                bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            capability = f"{properties.major}.{properties.minor}"
            return cls("cuda", properties.name, capability, properties.total_memory, bf16, threads, world_size, group)
        if device.type == "cpu":
            capability = torch.backends.cpu.get_cpu_capability()
            return cls("cpu", _cpu_name(), capability, _host_memory(), True, threads, world_size, group)
        return cls(device.type, bf16=False, threads=threads, world_size=world_size, process_group=group)


def _cpu_name() -> str:
    """The processor's own name: /proc first, since platform.processor() is empty on many Linux systems."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _host_memory() -> int | None:
    """Bytes this process may use: the smaller of the machine's memory and its control group's limit."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    for limit_file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(limit_file, encoding="ascii") as file:
                limit = file.read().strip()
        except OSError:
            continue
        # Version 2 writes "max" for no limit, version 1 a number near 2**63.
        return min(total, int(limit)) if limit.isdigit() else total
    return total
