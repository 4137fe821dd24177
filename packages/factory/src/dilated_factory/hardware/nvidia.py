"""NVIDIA devices, without torch and without CUDA: from the driver's files, or from its own command.

The files are read first, since they cost nothing; they name the devices, but tell neither memory nor capability.
Imports the standard library only.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from dilated_factory.hardware.host import ROOT

# Seconds after which the driver's command is given up: a driver that hangs must not hang who asks.
SMI_TIMEOUT = 5.0
_SMI_FIELDS = ("name", "memory.total", "compute_cap", "driver_version")


@dataclass(frozen=True)
class NvidiaDevice:
    """One device; ``memory_total`` in bytes and ``capability`` ("9.0") where the source tells them."""

    name: str
    memory_total: int | None = None
    capability: str = ""


@dataclass(frozen=True)
class Nvidia:
    """The driver's version and its devices; ``source`` is the file or command that told, ``problem`` why none could."""

    driver: str = ""
    devices: tuple[NvidiaDevice, ...] = ()
    source: str = ""
    problem: str = ""


def survey(root: Path = ROOT, command: str | None = None, timeout: float = SMI_TIMEOUT) -> Nvidia:
    """Return what the driver's files tell, or else what ``command`` does; an empty Nvidia where there is no driver.

    ``command`` is the path of nvidia-smi, by default the one on PATH; ``timeout`` is in seconds.
    """
    found = _from_files(root)
    if found is not None:
        return found
    command = command or shutil.which("nvidia-smi")
    return _from_command(command, timeout) if command else Nvidia()


def _from_files(root: Path) -> Nvidia | None:
    folder = root / "proc/driver/nvidia"
    try:
        version = (folder / "version").read_text(encoding="utf-8", errors="replace")
        names = sorted(os.listdir(folder / "gpus"))
    except OSError:
        return None
    driver = re.search(r"Kernel Module\D*?\s(?:for \S+\s+)?(\d+\.[\d.]+)", version)
    devices = []
    for name in names:
        try:
            information = (folder / "gpus" / name / "information").read_text(encoding="utf-8", errors="replace")
        except OSError:
            information = ""
        model = re.search(r"^Model:\s*(.+?)\s*$", information, re.MULTILINE)
        devices.append(NvidiaDevice(model[1] if model else f"unknown, at {name}"))
    return Nvidia(driver[1] if driver else "", tuple(devices), str(folder))


def _from_command(command: str, timeout: float) -> Nvidia:
    import subprocess  # only here: it is dear to import, and most machines never need it

    query = [command, f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(query, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return Nvidia(source=command, problem=f"{command} did not answer in {timeout:g} s")
    except OSError as error:
        return Nvidia(source=command, problem=f"{command} cannot be run: {error}")
    lines = [line.split(", ") for line in ran.stdout.splitlines() if line]
    if ran.returncode or any(len(line) != len(_SMI_FIELDS) for line in lines):
        words = " ".join((ran.stderr or ran.stdout).split())
        return Nvidia(source=command, problem=f"{command} failed with status {ran.returncode}: {words}")
    devices = tuple(
        # The command counts in MiB, and writes a word in brackets for what a device does not tell.
        NvidiaDevice(name, int(mib) * 2**20 if mib.isdigit() else None, capability if capability[:1].isdigit() else "")
        for name, mib, capability, _ in lines
    )
    return Nvidia(lines[0][3] if lines else "", devices, command)
