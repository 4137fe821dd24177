"""What one head block has to do: its calls, and the tensors of each as the kernels take them and give them back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_block_sparse.engine.bias import BlockBias, with_bias
from dilated_block_sparse.engine.gather import Place, Scratch, budget
from dilated_block_sparse.engine.heads import HeadBlock, head_blocks
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.plan import HeadPlan, Stack, plan_of
from dilated_core.kernels import Dropout, Problem
from dilated_core.partial import accumulation_dtype
from dilated_core.resources import Resources
from dilated_core.tiles import last_stride_1, make_problem

# Rows of a call at least, where there are more: long calls are fast.
FEWEST_ROWS = 512
# The heads are taken in so many blocks where something as long as the sequence is made of each: float32 sums, copies.
HEAD_BLOCKS = 4


class Options(NamedTuple):
    """How to attend; checked by whoever made it."""

    is_causal: bool
    scale: float
    dropout_p: float
    kernel: str


class Extras(NamedTuple):
    """Tensors beside query, key and value.

    Attributes:
        real: (batch, kv_len), bool, True where a key is no padding; None for all.
        bias: (live blocks,), added to the scores of each block; None for none.
        seed: (), int64, of the dropout; None without.
    """

    real: Tensor | None = None
    bias: Tensor | None = None
    seed: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """Rectangles of one stack that are attended in one call.

    Attributes:
        number: of the call, in the order of the plan: the same forward and backward.
        rows, keys: where they lie.
        batch: which batch rows.
    """

    number: int
    stack: Stack
    rows: Place
    keys: Place
    batch: slice


@dataclass(frozen=True)
class Work:
    """One head block, and what all of its calls share.

    Query heads that share a key head become rows of it: (row, head) in turn. Not so in a causal square, where rows and
    keys must be as many; there the keys are shown to each of the heads.
    """

    block: HeadBlock
    plan: HeadPlan
    layout: BlockLayout
    options: Options
    extras: Extras
    bias: BlockBias | None
    scratch: Scratch
    seed: int | None

    def calls(self, query: Tensor, key: Tensor) -> Iterator[Call]:
        """Cut the plan into calls that are small enough to gather. Takes the block's heads of both."""
        batch = query.shape[0]
        row, token = (tensor.shape[2] * tensor.shape[3] for tensor in (query, key))
        number = 0
        for stack in self.plan.stacks:
            size = max(stack.rows.length * row, 0 if stack.keys.span else stack.keys.length * token)
            batch_rows = max(1, min(batch, budget(query) // size))
            count = max(1, budget(query) // (size * batch_rows))
            for rows, keys in self._places(stack, count, max(FEWEST_ROWS, budget(query) // row), query.device):
                for at in range(0, batch, batch_rows):
                    yield Call(number, stack, rows, keys, slice(at, at + batch_rows))
                    number += 1

    def _places(self, stack: Stack, count: int, rows: int, device: torch.device) -> Iterator[tuple[Place, Place]]:
        """Of a stack ``count`` rectangles at a time; of rows that follow each other ``rows`` at a time."""
        span = stack.rows.span
        if span is not None and not stack.is_causal:
            keys = Place.of(stack.keys, 0, 1, device)
            for start in range(span.start, span.stop, rows):
                yield Place.of_span(slice(start, min(start + rows, span.stop))), keys
            return
        for first in range(0, stack.count, count):
            last = min(first + count, stack.count)
            yield Place.of(stack.rows, first, last, device), Place.of(stack.keys, first, last, device)

    def problem(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Problem | None:
        """What the kernel is to attend; None where all keys are padding. Takes the call's batch rows."""
        heads = query.shape[2]
        q = self.query_rows("query", call, query)
        k, v = (self.key_rows(name, call, tensor, heads) for name, tensor in (("key", key), ("value", value)))
        real = None
        if self.extras.real is not None:
            rows = call.keys.get("real", self.extras.real[call.batch], self.scratch)
            real = rows.reshape(-1, 1, call.keys.length).expand(-1, k.shape[1], -1)
        dropout = None
        if self.seed is not None:
            dropout = Dropout(self.options.dropout_p, (self.seed + call.number) % 2**63)
        is_causal, scale = call.stack.is_causal, self.options.scale
        problem = make_problem(q, k, v, real, is_causal=is_causal, scale=scale, dropout=dropout)
        if problem is None or self.bias is None:
            return problem
        return with_bias(problem, self.bias.values[self.bias_positions(self.bias, call)])

    def bias_positions(self, bias: BlockBias, call: Call) -> Tensor:
        """Where the bias of each key lies, (rectangles, keys)."""
        return bias.positions(self.layout, self.block.layout_head, call.rows, call.keys)

    def query_rows(self, name: str, call: Call, tensor: Tensor) -> Tensor:
        """(batch * rectangles, heads, rows, ...) of a tensor that goes with the query, (batch, q_len, heads, ...)."""
        rows = call.rows.get(name, tensor, self.scratch)
        heads = tensor.shape[2]
        if self._folds(call, heads):
            return rows.reshape(len(rows) * call.rows.count, 1, call.rows.length * heads, *rows.shape[3:])
        apart: Tensor = rows.unflatten(1, (call.rows.count, call.rows.length)).transpose(2, 3).flatten(0, 1)
        return apart

    def as_rows(self, call: Call, result: Tensor, heads: int) -> Tensor:
        """The inverse of ``query_rows``, for results: (batch, rectangles * rows, heads, ...)."""
        if self._folds(call, heads):
            return result.reshape(-1, call.rows.count * call.rows.length, heads, *result.shape[3:])
        result = result.transpose(1, 2)
        return result.reshape(-1, call.rows.count * call.rows.length, *result.shape[2:])

    def key_rows(self, name: str, call: Call, tensor: Tensor, heads: int) -> Tensor:
        """(batch * rectangles, key heads, keys, ...) of a tensor that goes with the keys, for so many query heads."""
        rows: Tensor = call.keys.get(name, tensor, self.scratch)
        rows = rows.unflatten(1, (call.keys.count, call.keys.length)).transpose(2, 3).flatten(0, 1)
        return rows.expand(-1, heads, *rows.shape[2:]) if self._repeats(call, heads) else rows

    def as_keys(self, call: Call, grad: Tensor, heads: int) -> Tensor:
        """The inverse of ``key_rows``, for gradients: (batch, rectangles * keys, key heads, ...)."""
        if self._repeats(call, heads):
            grad = grad.sum(1, keepdim=True, dtype=accumulation_dtype(grad.dtype))
        grad = grad.transpose(1, 2)
        return grad.reshape(-1, call.keys.count * call.keys.length, *grad.shape[2:])

    def _folds(self, call: Call, heads: int) -> bool:
        return heads > self.block.kv_heads and not call.stack.is_causal

    def _repeats(self, call: Call, heads: int) -> bool:
        return heads > self.block.kv_heads and call.stack.is_causal


def work_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    extras: Extras,
    options: Options,
    resources: Resources,
    *,
    sums: bool,
) -> Iterator[Work]:
    """The work of every head block. ``sums``: whether something is summed in any case, as gradients are."""
    half = accumulation_dtype(query.dtype) != query.dtype
    plan = plan_of(
        layout, resources.patterns, is_causal=options.is_causal, half=half, by_row_block=extras.bias is not None
    )
    bias = None if extras.bias is None else BlockBias.of(extras.bias, layout)
    scratch = Scratch(resources, query.device)
    seed = None if extras.seed is None else int(extras.seed)
    summed = half and (sums or not all(head.once for head in plan))
    blocks = HEAD_BLOCKS if summed or not (key.is_contiguous() and value.is_contiguous()) else 1
    if seed is not None:  # each head's numbers are its own, so forward and backward draw the same
        blocks = query.shape[2]
    for block in head_blocks(query, key, layout, blocks, split_groups=summed or seed is not None):
        apart = None if seed is None else seed + (block.queries.start << 40)
        yield Work(block, plan[block.layout_head], layout, options, extras, bias, scratch, apart)


def readable(work: Work, name: str, tensor: Tensor) -> Tensor:
    """Keys, or values, of a head block as they are gathered, or read in place, fastest."""
    if all(stack.in_place for stack in work.plan.stacks):
        return last_stride_1(tensor)
    return work.scratch.contiguous(name, tensor)
