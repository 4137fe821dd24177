"""How many rows a program takes at a time, by what the card can hold. Imports torch.

The choice is fixed for a kind of card, so that results are the same bit for bit from run to run.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Pass = Literal["forward", "grad_query", "grad_key_value"]


class Blocks(NamedTuple):
    """Attributes: rows: of a tile; others: walked at a time; warps: of a program; stages: of its software pipeline."""

    rows: int
    others: int
    warps: int
    stages: int


# What Triton's interpreter takes: small, so that short sequences have several tiles and blocks.
INTERPRETED = Blocks(16, 16, 4, 1)


def choose_blocks(which: Pass, capability: tuple[int, int], head_dim: int, dtype: torch.dtype) -> Blocks:
    """The blocks of a program."""
    wide = max(16, 1 << (head_dim - 1).bit_length()) * (dtype.itemsize // 2)  # a row's bytes, halved
    if which == "forward":
        if wide <= 64:
            return Blocks(128, 64, 4, 3)
        if wide <= 128:
            return Blocks(128, 64, 8, 3 if capability >= (9, 0) else 2)
        if wide <= 256:
            return Blocks(64, 32, 4, 2)
        return Blocks(32, 32, 4, 2)
    if wide <= 64:
        return Blocks(64, 64, 4, 2)
    if wide <= 128:
        return Blocks(64, 32, 4, 2)
    if wide <= 256:
        return Blocks(32, 32, 4, 2)
    return Blocks(16, 16, 4, 1)
