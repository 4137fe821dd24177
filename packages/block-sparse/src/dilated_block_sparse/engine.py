"""The executor: attend the plan's rectangles with the core's kernels, merge them, and the exact backward by the same plan.

Forward: of each rectangle the query rows and keys are gathered (or read where they lie, if they follow each other), the
kernel attends them, and the result is written to its rows, or merged where a rectangle before had them. Backward: the
same rectangles through the kernel's stock backward with the merged out and lse. How PyTorch calls this: ``operators``.

Memory beyond the result: what is gathered of one call, in buffers that all calls share. Where the result is half
precision and rows are merged, float32 sums for a quarter of the heads at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.plan import Axis, HeadPlan, Stack, plan_of
from dilated_core.kernels import Dropout, Kernel, Needs, Problem, choose, rows_for_backward, tile_backward
from dilated_core.partial import accumulation_dtype
from dilated_core.resources import NO_RESOURCES, Resources
from dilated_core.tiles import attend_tile, make_problem, merge_tile

# Elements gathered of each tensor at a time, or a quarter of the query's if that is more: on a CPU what its shared cache
# holds, on a GPU what fills the card.
GATHER_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
# The heads are taken in so many blocks where something as long as the sequence is made of each: float32 sums, copies.
HEAD_BLOCKS = 4
# Columns that carry a bias on the scores: head dimensions stay multiples of 8 for the CUDA kernels.
COLUMNS = 8
SUMS = ("grad_query", "grad_key", "grad_value")


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


# ------------------------------------------------------------------------------------------------ heads


class HeadBlock(NamedTuple):
    """Heads that are attended together.

    Attributes:
        layout_head: the head of the layout that they follow.
        queries, keys: the heads; with one key head, all the query heads are of its group and become rows.
    """

    layout_head: int
    queries: slice
    keys: slice


def _head_blocks(query: Tensor, key: Tensor, layout: BlockLayout, blocks: int) -> list[HeadBlock]:
    """Cut the heads; ``blocks``: into how many at least, where all heads share the layout and none shares keys."""
    heads, kv_heads = query.shape[2], key.shape[2]
    group = heads // kv_heads
    if layout.heads == 1 and group == 1:
        size = -(-heads // blocks)
        starts = range(0, heads, size)
        return [HeadBlock(0, own, own) for own in (slice(at, min(at + size, heads)) for at in starts)]
    if layout.heads in (1, kv_heads):
        return [
            HeadBlock(head % layout.heads, slice(head * group, (head + 1) * group), slice(head, head + 1))
            for head in range(kv_heads)
        ]
    return [HeadBlock(head, slice(head, head + 1), slice(head // group, head // group + 1)) for head in range(heads)]


def _heads_of(tensor: Tensor, heads: slice) -> Tensor:
    return tensor if heads == slice(0, tensor.shape[2]) else tensor[:, :, heads]


def _budget(tensor: Tensor) -> int:
    """Elements that may be gathered of each tensor at a time, of one as large as this."""
    least = GATHER_ELEMENTS.get(tensor.device.type, GATHER_ELEMENTS["cuda"])
    return max(least, tensor.numel() // 4)


# ------------------------------------------------------------------------------------------------ gathering


class Scratch:
    """Buffers by name, which grow to the largest that is asked for and are used again."""

    def __init__(self, resources: Resources, device: torch.device) -> None:
        self.resources = resources
        self.device = device
        self.buffers: dict[str, Tensor] = {}

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor; what was called ``name`` before is gone."""
        size = math.prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            self.buffers.pop(name, None)
            buffer = self.buffers[name] = self.resources.empty((size,), dtype=dtype, device=self.device)
        return buffer[:size].view(shape)

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A contiguous copy."""
        return self.empty(name, tensor.shape, tensor.dtype).copy_(tensor)

    def select(self, name: str, tensor: Tensor, index: Tensor) -> Tensor:
        """tensor[:, index], contiguous."""
        if not tensor.is_contiguous():  # index_select copies strided slices element by element
            return tensor[:, index].contiguous()
        selected = self.empty(name, (tensor.shape[0], len(index), *tensor.shape[2:]), tensor.dtype)
        return torch.index_select(tensor, 1, index, out=selected)


class Place(NamedTuple):
    """Where the rows, or keys, of some rectangles lie.

    Attributes:
        count, length: rectangles, and tokens of each.
        span: the tokens, where they follow each other.
        index: elsewhere, stretches of ``size`` tokens by number; of one token where stretches are cut short.
    """

    count: int
    length: int
    span: slice | None
    index: Tensor
    size: int

    @classmethod
    def of(cls, axis: Axis, first: int, last: int, device: torch.device) -> Place:
        """Of rectangles ``first`` to ``last``."""
        return cls(last - first, axis.length, axis.span, *axis.index(first, last, device))

    def stretches(self, tensor: Tensor) -> Tensor:
        """(batch, seq, ...) as (batch, stretches, size, ...), a view."""
        whole = tensor.shape[1] // self.size
        return tensor[:, : whole * self.size].unflatten(1, (whole, self.size))

    def get(self, name: str, tensor: Tensor, scratch: Scratch) -> Tensor:
        """Rows of (batch, seq, ...): (batch, count * length, ...), a view where they follow each other."""
        if self.span is not None:
            return tensor[:, self.span]
        if self.size == 1:
            return scratch.select(name, tensor, self.index)
        return scratch.select(name, self.stretches(tensor), self.index).flatten(1, 2)

    def put(self, total: Tensor, rows: Tensor) -> None:
        """Write rows, (batch, count * length, ...), to their place."""
        if self.span is not None:
            total[:, self.span] = rows
        else:
            rows = rows.to(total.dtype).unflatten(1, (len(self.index), self.size))
            self.stretches(total).index_copy_(1, self.index, rows)

    def add(self, total: Tensor, rows: Tensor) -> None:
        """Add rows, (batch, count * length, ...), to their place; a token may occur in several rectangles."""
        if self.span is not None:
            total[:, self.span] += rows
        else:
            rows = rows.to(total.dtype).unflatten(1, (len(self.index), self.size))
            self.stretches(total).index_add_(1, self.index, rows)

    def tokens(self) -> Tensor:
        """The tokens, (count, length), in CPU memory."""
        if self.span is not None:
            return torch.arange(self.span.start, self.span.stop).unsqueeze(0)
        tokens = self.index.cpu().unsqueeze(-1) * self.size + torch.arange(self.size)
        return tokens.view(self.count, self.length)


class Call(NamedTuple):
    """Rectangles of one stack that are attended in one call.

    Attributes:
        number: of the call, in the order of the plan: the same forward and backward.
        batch: which batch rows.
    """

    number: int
    stack: Stack
    rows: Place
    keys: Place
    batch: slice


class Work(NamedTuple):
    """One head block: what all of its calls share."""

    plan: HeadPlan
    options: Options
    extras: Extras
    scratch: Scratch
    layout: BlockLayout
    block: HeadBlock
    seed: int | None

    def calls(self, query: Tensor, key: Tensor) -> Iterator[Call]:
        """Cut the plan into calls that are small enough to gather."""
        batch = query.shape[0]
        row, token = (tensor.shape[2] * tensor.shape[3] for tensor in (query, key))
        budget = _budget(query)
        number = 0
        for stack in self.plan.stacks:
            size = 0 if stack.in_place else max(stack.rows.length * row, stack.keys.length * token)
            batch_rows = max(1, min(batch, budget // size)) if size else batch
            count = max(1, budget // (size * batch_rows)) if size else 1
            for first in range(0, stack.count, count):
                last = min(first + count, stack.count)
                rows, keys = (Place.of(axis, first, last, query.device) for axis in (stack.rows, stack.keys))
                for at in range(0, batch, batch_rows):
                    yield Call(number, stack, rows, keys, slice(at, at + batch_rows))
                    number += 1

    def query_rows(self, name: str, call: Call, tensor: Tensor) -> Tensor:
        """(batch * rectangles, heads, rows, ...) of a tensor that goes with the query.

        Query heads that share a key head become rows of it, but not in a causal square: (row, head) in turn.
        """
        rows = call.rows.get(name, tensor, self.scratch)
        if self.folds(call, tensor.shape[2]):
            rows = rows.contiguous()
            return rows.view(rows.shape[0] * call.rows.count, 1, call.rows.length * tensor.shape[2], *rows.shape[3:])
        return rows.unflatten(1, (call.rows.count, call.rows.length)).transpose(2, 3).flatten(0, 1)

    def folds(self, call: Call, heads: int) -> bool:
        """Whether query heads become rows."""
        return heads > self.kv_heads and not call.stack.is_causal

    @property
    def kv_heads(self) -> int:
        """Key heads of the block."""
        return self.block.keys.stop - self.block.keys.start

    def as_rows(self, call: Call, result: Tensor, heads: int) -> Tensor:
        """The inverse of ``query_rows``: (batch, rectangles * rows, heads, ...)."""
        if self.folds(call, heads):
            return result.reshape(-1, call.rows.count * call.rows.length, heads, *result.shape[3:])
        result = result.transpose(1, 2)
        return result.reshape(-1, call.rows.count * call.rows.length, *result.shape[2:])

    def key_rows(self, name: str, call: Call, tensor: Tensor, heads: int) -> Tensor:
        """(batch * rectangles, heads, keys, ...) of a tensor that goes with the keys."""
        rows = call.keys.get(name, tensor, self.scratch)
        rows = rows.unflatten(1, (call.keys.count, call.keys.length)).transpose(2, 3).flatten(0, 1)
        if heads > self.kv_heads and call.stack.is_causal:
            rows = rows.expand(-1, heads, *rows.shape[2:])
        return rows

    def as_keys(self, call: Call, grad: Tensor, heads: int) -> Tensor:
        """The inverse of ``key_rows``, for gradients."""
        if heads > self.kv_heads and call.stack.is_causal:
            grad = grad.sum(1, keepdim=True)
        grad = grad.transpose(1, 2)
        return grad.reshape(-1, call.keys.count * call.keys.length, *grad.shape[2:])

    def problem(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Problem | None:
        """What the kernel is to attend; None where all keys are padding."""
        heads = query.shape[2]
        q = self.query_rows("query", call, query)
        k, v = (self.key_rows(name, call, tensor, heads) for name, tensor in (("key", key), ("value", value)))
        real = None
        if self.extras.real is not None:
            mask = self.extras.real[call.batch]
            chosen = call.keys.get("real", mask, self.scratch)
            chosen = chosen.unflatten(1, (call.keys.count, call.keys.length)).flatten(0, 1)
            real = chosen.unsqueeze(1).expand(-1, k.shape[1], -1)
        dropout = None
        if self.seed is not None:
            dropout = Dropout(self.options.dropout_p, (self.seed + call.number) % 2**63)
        problem = make_problem(q, k, v, real, is_causal=call.stack.is_causal, scale=self.options.scale, dropout=dropout)
        if problem is not None and self.extras.bias is not None:
            problem = _with_bias(problem, self.key_bias(call, self.extras.bias))
        return problem

    # ---------------------------------------------------------------------------------------- bias

    def positions(self, call: Call) -> Tensor:
        """Where the bias of each key lies, (rectangles * keys,): a rectangle has one block of rows here."""
        rows, columns = self.layout.block_size
        starts, kv_blocks = self.layout.indptr[self.block.layout_head], self.layout.kv_blocks
        own = self.layout.indices[int(starts[0]) : int(starts[-1])]
        live = torch.arange(self.layout.q_blocks).repeat_interleave(starts.diff()) * kv_blocks + own
        wanted = call.rows.tokens()[:, :1] // rows * kv_blocks + call.keys.tokens() // columns
        return starts[0] + torch.searchsorted(live, wanted.flatten())

    def key_bias(self, call: Call, bias: Tensor) -> Tensor:
        """The bias of each key over the scale, (rectangles, 1, keys)."""
        own = bias.to(accumulation_dtype(bias.dtype))[self.positions(call).to(bias.device)]
        return own.view(call.keys.count, 1, -1) / self.options.scale


def _with_bias(problem: Problem, bias: Tensor) -> Problem:
    """The same problem with two columns more, of which the scores get the bias; in half precision one its rounding.

    Values get as many zeros, which the caller cuts off.
    """
    query, key, value = (F.pad(tensor, (0, COLUMNS)) for tensor in problem[:3])
    head_dim = problem.query.shape[-1]
    bias = bias.repeat(key.shape[0] // bias.shape[0], 1, 1)
    rounded = bias.to(key.dtype)
    query[..., head_dim : head_dim + 2] = 1.0
    key[..., head_dim] = rounded
    key[..., head_dim + 1] = (bias - rounded).to(key.dtype)
    return problem._replace(query=query, key=key, value=value)


# ------------------------------------------------------------------------------------------------ forward


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: Extras,
    layout: BlockLayout,
    options: Options,
    resources: Resources = NO_RESOURCES,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention of (batch, seq, heads, head_dim) tensors -> out like query, lse (batch, heads, q_len).

    Takes its arguments as checked: ``block_sparse_attention`` is the door.
    """
    needs = Needs(extras.real is not None, extras.seed is not None)
    wider = 0 if extras.bias is None else COLUMNS
    engine = choose(options.kernel, query.device, query.dtype, query.shape[-1] + wider, needs)
    out, lse = results_of_forward(query, resources)
    out.zero_()
    lse.fill_(-math.inf)
    if query.numel() == 0 or key.numel() == 0:
        return out, lse
    lse_rows = lse.transpose(1, 2)
    for work in _work(query, key, layout, extras, options, resources):
        queries, keys = work.block.queries, work.block.keys
        own_query, own_out, own_lse = (_heads_of(tensor, queries) for tensor in (query, out, lse_rows))
        own_key, own_value = (
            _readable(work.scratch, name, _heads_of(tensor, keys))
            for name, tensor in (("keys", key), ("values", value))
        )
        sums = own_out
        if not work.plan.once and lse.dtype != query.dtype:
            sums = work.scratch.empty("sums", own_out.shape, lse.dtype).zero_()
        _forward_heads(engine, work, (_last_stride_1(own_query), own_key, own_value), sums, own_lse)
        if sums is not own_out:
            own_out.copy_(sums)
    return out, lse


def _work(
    query: Tensor, key: Tensor, layout: BlockLayout, extras: Extras, options: Options, resources: Resources
) -> Iterator[Work]:
    """Every head block, and how to attend it."""
    half = accumulation_dtype(query.dtype) != query.dtype
    plan = plan_of(
        layout,
        resources.patterns,
        is_causal=options.is_causal,
        half=half,
        by_row_block=extras.bias is not None,
    )
    scratch = Scratch(resources, query.device)
    seed = None if extras.seed is None else int(extras.seed)
    blocks = HEAD_BLOCKS if half or not key.is_contiguous() else 1
    longest = max((stack.keys.length for stack in plan[0].stacks if not stack.in_place), default=0)
    blocks = max(blocks, -(-longest * key.shape[2] * key.shape[3] // _budget(query)))
    for number, block in enumerate(_head_blocks(query, key, layout, blocks)):
        apart = None if seed is None else seed + (number << 40)
        yield Work(plan[block.layout_head], options, extras, scratch, layout, block, apart)


def _last_stride_1(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _readable(scratch: Scratch, name: str, tensor: Tensor) -> Tensor:
    """Keys, or values, of a head block as they are gathered fast."""
    return tensor if tensor.is_contiguous() else scratch.copy(name, tensor)


def _forward_heads(engine: Kernel, work: Work, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor) -> None:
    """Write out and lse of a head block, (batch, seq, heads, ...), which hold 0 and -inf."""
    query, key, _ = qkv
    heads, head_dim = query.shape[2:]
    for call in work.calls(query, key):
        problem = work.problem(call, *(tensor[call.batch] for tensor in qkv))
        if problem is None:
            continue
        rows, rows_lse = attend_tile(engine, problem)
        chosen_out, chosen_lse = out[call.batch], lse[call.batch]
        rows = work.as_rows(call, rows[..., :head_dim], chosen_out.shape[2])
        rows_lse = work.as_rows(call, rows_lse, chosen_out.shape[2])
        if not call.stack.fresh:
            sums = call.rows.get("out", chosen_out, work.scratch), call.rows.get("lse", chosen_lse, work.scratch)
            merge_tile((rows, rows_lse), *sums, all_have_keys=work.extras.real is None)
            if call.rows.span is not None:
                continue
            rows, rows_lse = sums
        call.rows.put(chosen_out, rows)
        call.rows.put(chosen_lse, rows_lse)


def results_of_forward(query: Tensor, resources: Resources = NO_RESOURCES) -> tuple[Tensor, Tensor]:
    """Tensors shaped like the results. lse lies in memory as (batch, seq, heads)."""
    out = resources.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = resources.empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype), device=query.device)
    return out, lse.transpose(1, 2)


# ------------------------------------------------------------------------------------------------ backward


class Gradients(NamedTuple):
    """Of query, key, value and, where there is one, the bias."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    extras: Extras,
    layout: BlockLayout,
    options: Options,
    resources: Resources = NO_RESOURCES,
) -> Gradients:
    """The gradients, given those of out and (or None) of lse, and the forward's results.

    ``out`` and ``lse`` may be those of a larger softmax that the forward's were merged into.
    """
    dtype = accumulation_dtype(query.dtype)
    grad_bias = None if extras.bias is None else torch.zeros_like(extras.bias, dtype=dtype)
    if query.numel() == 0 or key.numel() == 0:
        zeros = (torch.zeros_like(tensor) for tensor in (query, key, value))
        return Gradients(*zeros, None if extras.bias is None else torch.zeros_like(extras.bias))
    by_query = [_last_stride_1(tensor) for tensor in (query, grad_out, out)]
    by_query += [rows.transpose(1, 2) for rows in rows_for_backward(lse, grad_lse) if rows is not None]
    grads = [resources.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (query, key, value)]
    added: slice | None = None  # the key heads that the sums are of
    for work in _work(query, key, layout, extras, options, resources):
        queries, keys = work.block.queries, work.block.keys
        own_query = [_heads_of(tensor, queries) for tensor in by_query]
        own_keys = [
            _readable(work.scratch, name, _heads_of(tensor, keys))
            for name, tensor in (("keys", key), ("values", value))
        ]
        places = [grad[:, :, heads] for grad, heads in zip(grads, (queries, keys, keys), strict=True)]
        own = [_summable(work.scratch, name, place, dtype) for name, place in zip(SUMS, places, strict=True)]
        if added == keys:  # query heads of the same group
            own[0].zero_()
        else:
            for total in own:
                total.zero_()
            added = keys
        _backward_heads(work, own_query, own_keys, own, grad_bias)
        for place, total in zip(places, own, strict=True):
            if total is not place:
                place.copy_(total)
    if grad_bias is not None and extras.bias is not None:
        grad_bias = grad_bias.to(extras.bias.dtype)
    return Gradients(*grads, grad_bias)


def _summable(scratch: Scratch, name: str, place: Tensor, dtype: torch.dtype) -> Tensor:
    """Where gradients are summed: their own place, or scratch where that is less precise or lies scattered."""
    if place.dtype == dtype and place.is_contiguous():
        return place
    return scratch.empty(name, place.shape, dtype)


def _backward_heads(
    work: Work,
    by_query: list[Tensor],
    keys: list[Tensor],
    sums: list[Tensor],
    grad_bias: Tensor | None,
) -> None:
    """Add the gradients of a head block to ``sums``, (batch, seq, heads, head_dim), and to that of the bias."""
    head_dim = keys[0].shape[-1]
    names = ("grad_out", "out", "lse", "grad_lse")
    for call in work.calls(by_query[0], keys[0]):
        query, *others = (tensor[call.batch] for tensor in by_query)
        problem = work.problem(call, query, *(tensor[call.batch] for tensor in keys))
        if problem is None:
            continue
        grad_out, out, lse, *rest = (
            work.query_rows(name, call, tensor) for name, tensor in zip(names, others, strict=False)
        )
        if grad_bias is not None:
            grad_out, out = (F.pad(tensor, (0, COLUMNS)) for tensor in (grad_out, out))
        grads = tile_backward(work.options.kernel, problem, grad_out, rest[0] if rest else None, out, lse)
        heads = query.shape[2]
        totals = [total[call.batch] for total in sums]
        call.rows.add(totals[0], work.as_rows(call, grads[0][..., :head_dim], heads))
        for total, grad in zip(totals[1:], grads[1:], strict=True):
            call.keys.add(total, work.as_keys(call, grad[..., :head_dim], heads))
        if grad_bias is not None:
            # The column of ones in the query: the score gradients' sum over rows, times the scale.
            column = grads[1][..., head_dim].to(grad_bias.dtype) / work.options.scale
            column = column.unflatten(0, (-1, call.keys.count)).sum((0, 2))
            grad_bias.index_add_(0, work.positions(call).to(column.device), column.flatten())
