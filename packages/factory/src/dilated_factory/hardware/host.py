"""The machine's processor, memory and NUMA nodes, read from the files in which Linux tells them.

Elsewhere only what Python itself knows is filled in. Every function takes the folder that stands for "/", so that
a test can write a machine of its own. Imports the standard library only.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")

# The vector instructions that attention's kernels and matrix products are compiled for, as Linux spells them:
# x86 first, then ARM (where "asimd" is NEON).
VECTOR_FLAGS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip


@dataclass(frozen=True)
class Host:
    """One machine, as far as this process may use it.

    ``usable_cores`` are those the process is allowed on, ``cpu_quota`` is the control group's limit in cores (None:
    no limit). ``memory_total`` is the machine's and ``memory_limit`` the control group's where that is lower, both in
    bytes and None where unknown. ``numa_nodes`` holds the cores of each node, empty where the machine does not say.
    """

    cpu_name: str
    logical_cores: int
    physical_cores: int | None
    usable_cores: int
    cpu_quota: float | None
    vector_flags: tuple[str, ...]
    memory_total: int | None
    memory_limit: int | None
    numa_nodes: tuple[str, ...]


def survey(root: Path = ROOT) -> Host:
    """Read everything.

    >>> survey().logical_cores >= 1
    True
    """
    blocks = _processors(root)
    cores = {(block.get("physical id"), block["core id"]) for block in blocks if "core id" in block}
    allowed = re.search(r"^Cpus_allowed_list:\s*(\S+)", _read(root / "proc/self/status"), re.MULTILINE)
    logical = len(blocks) or os.cpu_count() or 1
    total, limit = memory(root)
    first = blocks[0] if blocks else {}
    flags = set((first.get("flags") or first.get("Features") or "").split())
    return Host(
        cpu_name=cpu_name(root),
        logical_cores=logical,
        physical_cores=len(cores) or None,
        usable_cores=_count(allowed[1]) if allowed else logical,
        cpu_quota=cpu_quota(root),
        vector_flags=tuple(flag for flag in VECTOR_FLAGS if flag in flags),
        memory_total=total,
        memory_limit=limit,
        numa_nodes=numa_nodes(root),
    )


def cpu_name(root: Path = ROOT) -> str:
    """The processor's own name: /proc first, since platform.processor() is empty on many Linux systems."""
    try:
        with open(root / "proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory(root: Path = ROOT) -> tuple[int | None, int | None]:
    """Bytes: the machine's, and the control group's limit where it is lower. None for what is not known."""
    total = re.search(r"^MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    bytes_ = int(total[1]) * 1024 if total else _physical_pages() if root == ROOT else None
    files = ("memory.max", "memory.limit_in_bytes")
    # Version 2 writes "max" for no limit, version 1 a number near 2**63.
    words = [_read(folder / file).strip() for folder in _control_groups("memory", root) for file in files]
    limit = min((int(word) for word in words if word.isdigit()), default=None)
    if limit is not None and (limit >= 2**60 if bytes_ is None else limit >= bytes_):
        limit = None
    return bytes_, limit


def usable_memory(root: Path = ROOT) -> int | None:
    """Bytes this process may use: the smaller of the machine's memory and its control group's limit."""
    total, limit = memory(root)
    return total if limit is None else limit


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores that the control group gives, 1.5 for one and a half; None for no limit."""
    quotas = []
    for folder in _control_groups("cpu", root):
        both = _read(folder / "cpu.max").split() or [
            _read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
        # No limit is "max" in version 2 and -1 in version 1: neither is a number of microseconds.
        if len(both) == 2 and all(word.isdigit() for word in both) and int(both[1]):
            quotas.append(int(both[0]) / int(both[1]))
    return min(quotas, default=None)


def numa_nodes(root: Path = ROOT) -> tuple[str, ...]:
    """The cores of each NUMA node, as "0-31,64-95"; empty where the machine does not say."""
    try:
        names = [name for name in os.listdir(root / "sys/devices/system/node") if re.fullmatch(r"node\d+", name)]
    except OSError:
        return ()
    names.sort(key=lambda name: int(name[4:]))
    return tuple(_read(root / "sys/devices/system/node" / name / "cpulist").strip() for name in names)


def _processors(root: Path) -> list[dict[str, str]]:
    """One dict for each logical processor of /proc/cpuinfo."""
    blocks = []
    for text in _read(root / "proc/cpuinfo").split("\n\n"):
        pairs = (line.partition(":") for line in text.splitlines())
        block = {name.strip(): value.strip() for name, _, value in pairs}
        if "processor" in block:
            blocks.append(block)
    return blocks


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's control group and of those above it, of both versions.

    A container often sees its own group at the top and a path that does not exist; the top is always among them.
    """
    top = root / "sys/fs/cgroup"
    tops = {"2": top, "1": top / controller}
    yield from tops.values()
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = tops["1" if controllers else "2"]
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), 0, -1):
            yield base.joinpath(*parts[:depth])


def _count(cores: str) -> int:
    """How many cores a list such as "0-3,8" names."""
    spans = (span.partition("-") for span in cores.split(","))
    return sum(int(last or first) - int(first) + 1 for first, _, last in spans)


def _physical_pages() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # a system without sysconf, or without these names
        return None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
