"""Which flash attention packages are here, and which of them a device can run.

Being installed is one thing and being of use another: a generation is built for certain devices. Nothing is
imported to find out, not even a parent package. Imports the standard library only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Generation:
    """One generation: the module to import, the distribution that brings it, and the capabilities it runs on.

    ``lowest`` and ``highest`` are the first number of a compute capability, ``highest`` None where there is no end.
    """

    name: str
    module: str
    distribution: str
    lowest: int
    highest: int | None

    def refusal(self, capability: str) -> str | None:
        """Why a device of this capability cannot run it; None where it can.

        >>> GENERATIONS[1].refusal("8.0")
        'it needs compute capability 9.x, the device has 8.0'
        """
        if self.lowest <= int(capability.partition(".")[0]) <= (self.highest or 10**9):
            return None
        if self.highest is None:
            wanted = f"{self.lowest}.0 or higher"
        else:
            wanted = " or ".join(f"{major}.x" for major in range(self.lowest, self.highest + 1))
        return f"it needs compute capability {wanted}, the device has {capability}"


# What their own checks ask for: 2 Ampere and newer (as torch's flash kernels do), 3 Hopper. Releases of 4 differ;
# Hopper and Blackwell are what all of them take.
GENERATIONS = (
    Generation("fa2", "flash_attn", "flash-attn", 8, None),
    Generation("fa3", "flash_attn_interface", "flash-attn-3", 9, 9),
    Generation("fa4", "flash_attn.cute", "flash-attn-4", 9, 10),
)


def found() -> tuple[str, ...]:
    """Return the names of the generations that are installed, for whatever device."""
    names = []
    package = importlib.util.find_spec("flash_attn")
    # Generation 4 lives inside the folder of 2, and alone leaves that a folder without a module of its own.
    if package is not None and package.origin is not None:
        names.append("fa2")
    if importlib.util.find_spec("flash_attn_interface") is not None:
        names.append("fa3")
    folders = package.submodule_search_locations or () if package is not None else ()
    sources = any((Path(folder) / "cute" / "interface.py").is_file() for folder in folders)
    # Some builds of 2 carry the sources of 4 without "cutlass", the compiler they need.
    if sources and importlib.util.find_spec("cutlass") is not None:
        names.append("fa4")
    return tuple(names)


def usable(capability: str, installed: Collection[str]) -> tuple[str, ...]:
    """Return those of the ``installed`` generations that a CUDA device of this compute capability can run.

    >>> usable("9.0", ["fa2", "fa3", "fa4"]), usable("8.6", ["fa2", "fa3"])
    (('fa2', 'fa3', 'fa4'), ('fa2',))
    """
    return tuple(one.name for one in GENERATIONS if one.name in installed and one.refusal(capability) is None)
