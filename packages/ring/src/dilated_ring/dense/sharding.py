"""Which positions of a sequence a rank holds. Pure functions of sizes and of tensors, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dilated_core import checks
from dilated_ring.plan import even_bounds

BALANCES = ("contiguous", "head_tail")

Pieces = tuple[tuple[int, int], ...]
"""Stretches of positions, (start, stop), not empty, in the order of their rows in a shard, which is rising."""


def rows_of(pieces: Pieces) -> int:
    """How many positions the pieces have."""
    return sum(stop - start for start, stop in pieces)


def pieces_of(bounds: Sequence[int], balance: str) -> tuple[Pieces, ...]:
    """Every rank's positions.

    Args:
        bounds: world_size + 1 positions: rank i's shard has ``bounds[i + 1] - bounds[i]``.
        balance: "contiguous" or "head_tail".

    Raises:
        ValueError: with "head_tail", lengths other than those that ``shard`` makes.

    >>> pieces_of((0, 3, 6, 8), "contiguous")
    (((0, 3),), ((3, 6),), ((6, 8),))
    >>> pieces_of((0, 3, 6, 8), "head_tail")
    (((0, 2), (7, 8)), ((2, 4), (6, 7)), ((4, 6),))
    """
    if balance == "contiguous":
        return tuple(_joined([own]) for own in pairwise(bounds))
    shards = _head_tail(bounds[-1], len(bounds) - 1)
    expected, found = [rows_of(pieces) for pieces in shards], [stop - start for start, stop in pairwise(bounds)]
    if expected != found:
        raise ValueError(
            f'balance: "head_tail" expects shards of {expected} of the {bounds[-1]} positions, got {found} '
            f"(dilated_ring.shard makes them)"
        )
    return shards


def _head_tail(length: int, world_size: int) -> tuple[Pieces, ...]:
    chunks = list(pairwise(even_bounds(length, 2 * world_size)))
    return tuple(_joined([chunks[rank], chunks[-1 - rank]]) for rank in range(world_size))


def gather_pieces(shards: Sequence[Pieces]) -> tuple[Pieces, list[list[slice]]]:
    """The pieces of several shards as one shard, and where each shard's pieces lie in it.

    >>> gather_pieces([((0, 2), (7, 8)), ((2, 4), (6, 7))])
    (((0, 4), (6, 8)), [[slice(0, 2, None), slice(5, 6, None)], [slice(2, 4, None), slice(4, 5, None)]])
    """
    every = sorted(piece for pieces in shards for piece in pieces)
    offsets = accumulate((stop - start for start, stop in every), initial=0)
    places = {piece: slice(at, at + piece[1] - piece[0]) for piece, at in zip(every, offsets, strict=False)}
    return _joined(every), [[places[piece] for piece in pieces] for pieces in shards]


def _joined(pieces: Sequence[tuple[int, int]]) -> Pieces:
    """Without empty pieces, and those that touch as one."""
    joined: list[tuple[int, int]] = []
    for start, stop in pieces:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return tuple(joined)


def shard(tensor: Tensor, rank: int, world_size: int, *, dim: int = 1, balance: str = "contiguous") -> Tensor:
    """One rank's part of a whole sequence, as ``ring_attention`` takes it. Differentiable; ``unshard`` undoes it.

    Args:
        tensor: any shape and dtype, the whole sequence along ``dim``.
        rank: whose part. On a mesh of two dimensions ranks are numbered row by row.
        world_size: how many ranks there are.
        dim: of the positions.
        balance: "contiguous": stretches as equal as can be. "head_tail": the sequence is cut into 2 * world_size
            stretches, and rank r holds those numbered r and 2 * world_size - 1 - r, which makes causal work equal.

    Returns:
        A view where the part is one stretch, else a copy.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> shard(torch.arange(10), 0, 2, dim=0), shard(torch.arange(10), 0, 2, dim=0, balance="head_tail")
    (tensor([0, 1, 2, 3, 4]), tensor([0, 1, 2, 8, 9]))
    """
    world_size = checks.positive_integer("world_size", world_size)
    if checks.length("rank", rank) >= world_size:
        raise ValueError(f"rank: expected less than world_size = {world_size}, got {rank}")
    checks.choice("balance", balance, BALANCES)
    _check_dim("tensor", tensor, dim)
    length = tensor.shape[dim]
    if balance == "contiguous":
        start, stop = even_bounds(length, world_size)[rank : rank + 2]
        return tensor.narrow(dim, start, stop - start)
    parts = [tensor.narrow(dim, start, stop - start) for start, stop in _head_tail(length, world_size)[rank]]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim) if parts else tensor.narrow(dim, 0, 0)


def unshard(shards: Sequence[Tensor], *, dim: int = 1, balance: str = "contiguous") -> Tensor:
    """The whole sequence from all ranks' parts, in the order of the ranks. Differentiable; undoes ``shard``.

    Args:
        shards: alike but for their lengths along ``dim``; with "contiguous" these are free.
        dim, balance: as in ``shard``.

    Returns:
        Like each of them, with all positions along ``dim``.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value, or lengths that "head_tail" does not make.

    >>> unshard([torch.tensor([0, 1, 2, 8, 9]), torch.tensor([3, 4, 5, 6, 7])], dim=0, balance="head_tail")
    tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    checks.choice("balance", balance, BALANCES)
    if not shards:
        raise ValueError("shards: expected at least one tensor, got none")
    for index, part in enumerate(shards):
        _check_dim(f"shards[{index}]", part, dim)
    if balance == "contiguous":
        return torch.cat(list(shards), dim)
    ranks = pieces_of((0, *accumulate(part.shape[dim] for part in shards)), balance)
    parts: list[tuple[tuple[int, int], Tensor]] = []
    for part, pieces in zip(shards, ranks, strict=True):
        lengths = [stop - start for start, stop in pieces]
        parts += zip(pieces, part.split(lengths, dim) if lengths else (), strict=True)
    parts.sort(key=lambda pair: pair[0])
    return torch.cat([part for _, part in parts], dim) if parts else shards[0]


def _check_dim(name: str, tensor: object, dim: int) -> None:
    """Raise TypeError or ValueError where it is no tensor, or has no such dimension."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(f"dim: expected a dimension of {name}, of shape {tuple(tensor.shape)}, got {dim}")
