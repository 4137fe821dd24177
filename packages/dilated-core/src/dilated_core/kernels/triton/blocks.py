"""How many rows a program takes at a time, by what the card can hold, or as tuned on it. Imports torch.

The choice is fixed for a kind of card, so that results are the same bit for bit from run to run. ``tuning.tune``
changes it for the cards of one machine, when asked, by a file in Triton's cache folder.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

Pass = Literal["forward", "grad_query", "grad_key_value"]


class Blocks(NamedTuple):
    """Block sizes of a program.

    Attributes:
        rows: of a tile.
        others: rows walked at a time.
        warps: of a program.
        stages: of its software pipeline.
    """

    rows: int
    others: int
    warps: int
    stages: int


Tuned = dict[tuple[str, int, torch.dtype], Blocks]
"""By pass, head_dim and dtype."""

# What Triton's interpreter takes: small, so that short sequences have several tiles and blocks.
INTERPRETED = Blocks(16, 16, 4, 1)
# By head_dim up to 64, 128 and 256: the largest whose loops spill no registers without options, and few with all of
# them (docs/benchmarks/triton_compile.md).
HALF_AMPERE: dict[Pass, tuple[Blocks, Blocks, Blocks]] = {
    "forward": (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2)),
    "grad_query": (Blocks(64, 64, 4, 2), Blocks(64, 64, 8, 2), Blocks(64, 32, 8, 2)),
    "grad_key_value": (Blocks(64, 32, 4, 2), Blocks(64, 64, 8, 2), Blocks(32, 32, 8, 2)),
}
# 64 rows at least: wgmma takes no fewer.
HALF_HOPPER: dict[Pass, tuple[Blocks, Blocks, Blocks]] = {
    "forward": (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 2)),
    "grad_query": (Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 2)),
    "grad_key_value": (Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2), Blocks(64, 16, 8, 2)),
}
# Exact products run out of registers, on the ordinary units.
FLOAT32: dict[Pass, tuple[Blocks, Blocks, Blocks]] = {
    "forward": (Blocks(64, 32, 8, 2), Blocks(32, 16, 8, 2), Blocks(16, 16, 4, 2)),
    "grad_query": (Blocks(32, 32, 4, 2), Blocks(32, 32, 8, 2), Blocks(16, 16, 8, 2)),
    "grad_key_value": (Blocks(32, 32, 8, 2), Blocks(32, 16, 8, 2), Blocks(16, 16, 8, 2)),
}


def choose_blocks(which: Pass, capability: tuple[int, int], head_dim: int, dtype: torch.dtype) -> Blocks:
    """The blocks of a program where none were tuned. docs/benchmarks/triton_compile.md says what they come to."""
    table = FLOAT32 if dtype == torch.float32 else HALF_HOPPER if capability >= (9, 0) else HALF_AMPERE
    small, middle, large = table[which]
    return small if head_dim <= 64 else middle if head_dim <= 128 else large


def block_dim(head_dim: int) -> int:
    """The power of two that holds a row; at least what a matrix product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


# ------------------------------------------------------------------------------------------------ tuned


def tuned_file() -> Path:
    """Where tuned choices are kept."""
    from triton import knobs

    return Path(knobs.cache.dir) / "dilated_core_blocks.json"


@cache
def tuned_blocks(device: torch.device) -> Tuned:
    """What was tuned on such a card with these versions; read once a process."""
    path = tuned_file()
    if not path.exists():
        return {}
    lines = json.loads(path.read_text()).get(card(device), [])
    return {(which, head_dim, getattr(torch, dtype)): Blocks(*blocks) for which, head_dim, dtype, blocks in lines}


def keep_tuned(device: torch.device, tuned: Tuned) -> None:
    """Add to what is kept for such a card, and take it from now on."""
    path = tuned_file()
    kept = json.loads(path.read_text()) if path.exists() else {}
    merged = {**tuned_blocks(device), **tuned}
    kept[card(device)] = [
        [which, head_dim, str(dtype).removeprefix("torch."), blocks]
        for (which, head_dim, dtype), blocks in merged.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".new")
    written.write_text(json.dumps(kept, indent=1) + "\n")
    written.replace(path)  # whole or not at all
    tuned_blocks.cache_clear()


def card(device: torch.device) -> str:
    """The device's name and the versions that a choice depends on."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, triton {triton.__version__}, torch {torch.__version__}"
