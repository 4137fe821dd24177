"""The engine of "dilated": whole sequences by ``dilated_attention``, the last rows of one tile by tile.

Imports torch and dilated_core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dilated_core import Partial, attend, checks, dilated_attention, merge
from dilated_core.partial import accumulation_dtype
from dilated_core.plan import check_torchscale, head_phases
from dilated_core.resources import Resources
from dilated_factory.interop.transformers.settings import DilatedSettings, of_module

_EXAMPLE = {"segment_lengths": [512, 2048], "dilation_rates": [1, 4]}


class DilatedEngine:
    """LongNet's dilated attention (arXiv 2307.02486) for transformers; see ``rows.Engine``."""

    name = "dilated"

    def __init__(self, defaults: DilatedSettings | None, resources: Resources) -> None:
        self.defaults, self.resources = defaults, resources

    def settings(self, module: nn.Module) -> DilatedSettings:
        """What ``config.dilated`` says, or the defaults."""
        found: DilatedSettings = of_module(module, self.name, self.defaults, DilatedSettings.from_config, _EXAMPLE)
        return found

    def check_heads(self, settings: DilatedSettings, heads: int, all_heads: int | None) -> None:
        """Refuse a shard of tensor parallelism whose heads would take other grids than they have in the whole."""
        if all_heads is None or heads >= all_heads or all_heads % heads:
            return
        branches = len(settings.segment_lengths)
        for index, rate in enumerate(settings.dilation_rates):
            here = head_phases(settings.semantics, index, branches, rate, heads)
            if here * (all_heads // heads) != head_phases(settings.semantics, index, branches, rate, all_heads):
                raise ValueError(
                    f"query: expected all {all_heads} heads, got {heads}: a shard of tensor parallelism, whose heads "
                    f'would take other grids than theirs in branch {index} (semantics "{settings.semantics}", rate '
                    f'{rate}; with "paper", rates that divide {heads} are right on every shard)'
                )

    def whole(
        self,
        settings: DilatedSettings,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        real: Tensor | None,
        *,
        is_causal: bool,
        scale: float | None,
        dropout_p: float,
    ) -> Tensor:
        """Self-attention over all rows."""
        return dilated_attention(
            query,
            key,
            value,
            settings.segment_lengths,
            settings.dilation_rates,
            is_causal=is_causal,
            scale=scale,
            dropout_p=dropout_p,
            key_padding_mask=real,
            enable_gqa=True,
            semantics=settings.semantics,
            kernel=settings.kernel,
            allocator=self.resources.allocator,
            patterns=self.resources.patterns,
        )

    def last_rows(
        self,
        settings: DilatedSettings,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        real: Tensor | None,
        *,
        scale: float | None,
        dropout_p: float,
    ) -> Tensor:
        """The last rows of the causal call, for the cost of the keys that they reach: no other row is computed."""
        query, key, value = checks.autocast(query, key, value)
        query, key, value = checks.query_key_value(query, key, value, same_length=False, enable_gqa=True)
        options = {"scale": scale, "dropout_p": dropout_p, "kernel": settings.kernel}
        branches = len(settings.segment_lengths)
        partials = []
        for index, (length, rate) in enumerate(zip(settings.segment_lengths, settings.dilation_rates, strict=True)):
            if settings.semantics == "torchscale":
                check_torchscale(index, length, rate, key.shape[1])
            phases = head_phases(settings.semantics, index, branches, rate, query.shape[2])
            partials.append(_branch(query, key, value, real, length, rate, phases, options))
        out = merge(*partials).out
        return out / branches if settings.semantics == "grouped" else out


def _branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    segment_length: int,
    rate: int,
    phases: tuple[int | None, ...],
    options: dict[str, Any],
) -> Partial:
    """What one branch gives the last rows: 0 and -inf where a row is not on a head's grid."""
    tokens = key.shape[1]
    past = tokens - query.shape[1]
    batch, seq, heads, _ = query.shape
    out = torch.zeros_like(query)
    lse = torch.full((batch, heads, seq), -math.inf, dtype=accumulation_dtype(query.dtype), device=query.device)
    for start in range(past // segment_length * segment_length, tokens, segment_length):
        stop = min(start + segment_length, tokens)
        for phase in sorted({phase for phase in phases if phase is not None}):
            before = max(0, -((start + phase - past) // rate))  # rows of this grid that came before the new ones
            rows = range(start + phase + before * rate, stop, rate)
            if not rows:
                continue
            chosen = [head for head, own in enumerate(phases) if own == phase]
            tile = _tile(query, key, value, real, range(start + phase, rows[0], rate), rows, chosen, options)
            at = slice(rows[0] - past, rows[-1] - past + 1, rate)
            out[:, at, _slice(chosen)] = tile.out
            lse[:, _slice(chosen), at] = tile.lse
    return Partial(out, lse)


def _tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    earlier: range,
    rows: range,
    heads: list[int],
    options: dict[str, Any],
) -> Partial:
    """New rows of one grid in one segment: all of its earlier keys, and of its new ones those up to the row's own."""
    past = key.shape[1] - query.shape[1]
    group = query.shape[2] // key.shape[2]
    kv_heads = [head // group for head in heads]
    new = query[:, rows.start - past : rows.stop - past : rows.step][:, :, _slice(heads)]
    if len(rows) == 1:  # one token sees every key up to its own: no triangle, and one call
        return _attend_all(
            new, _taken(key, value, real, range(earlier.start, rows[0] + 1, earlier.step)), kv_heads, options
        )
    k, v, kept = _taken(key, value, real, rows)
    shared = _slice(kv_heads)
    partial = attend(new, k[:, :, shared], v[:, :, shared], is_causal=True, key_padding_mask=kept, **options)
    if not earlier:
        return partial
    return merge(partial, _attend_all(new, _taken(key, value, real, earlier), kv_heads, options))


def _attend_all(
    query: Tensor, keys: tuple[Tensor, Tensor, Tensor | None], kv_heads: list[int], options: dict[str, Any]
) -> Partial:
    """Every row attends every key. Where all key heads have equally many query heads, these become rows: no copies."""
    key, value, real = keys
    distinct = sorted(set(kv_heads))
    share = len(kv_heads) // len(distinct)
    if share == 1 or kv_heads != [head for head in distinct for _ in range(share)]:
        chosen = _slice(kv_heads)
        return attend(query, key[:, :, chosen], value[:, :, chosen], key_padding_mask=real, **options)
    chosen = _slice(distinct)
    rows = query.shape[1]
    folded = query.unflatten(2, (-1, share)).permute(0, 3, 1, 2, 4).flatten(1, 2)
    out, lse = attend(folded, key[:, :, chosen], value[:, :, chosen], key_padding_mask=real, **options)
    out = out.unflatten(1, (share, rows)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    return Partial(out, lse.unflatten(2, (share, rows)).flatten(1, 2))


def _taken(key: Tensor, value: Tensor, real: Tensor | None, positions: range) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask at these positions, a constant step apart: views."""
    at = slice(positions.start, positions.stop, positions.step)
    return key[:, at], value[:, at], None if real is None else real[:, at]


def _slice(numbers: Sequence[int]) -> slice | list[int]:
    """Numbers a constant step apart as a slice, which copies nothing; others as a list."""
    steps = {second - first for first, second in pairwise(numbers)}
    if len(steps) > 1 or any(step < 1 for step in steps):
        return list(numbers)
    return slice(numbers[0], numbers[-1] + 1, *steps)
