"""Rows in and out: what a call attends is gathered into buffers that all calls share, or read where it lies.

What was found by running it (torch 2.13, CPU): ``index_select`` of contiguous tensors into a buffer that is there
already costs a fifth of advanced indexing; of strided ones it copies element by element. Stretches of tokens are
cheaper than tokens. New memory costs more than filling it. All heads at once are faster than a few heads at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_block_sparse.plan import Axis
from dilated_core.resources import BufferKind, Resources

# Elements gathered of each tensor at a time, or an eighth of the query's if that is more: on a CPU what its shared
# cache holds, on a GPU what fills the card. Half as many in half precision, around which much is float32.
GATHER_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}

# What a buffer of a name is allocated as: copies of rows, and of all rows of a head block. Every other is "temp".
KINDS: dict[str, BufferKind] = {
    "query": "query",
    "key": "key",
    "keys": "key",
    "value": "value",
    "values": "value",
    "real": "mask",
}


def budget(tensor: Tensor) -> int:
    """Elements that may be gathered of each tensor at a time, of one as large as this."""
    least = GATHER_ELEMENTS.get(tensor.device.type, GATHER_ELEMENTS["cuda"])
    elements = max(least, tensor.numel() // 8)
    return elements // 2 if tensor.element_size() == 2 else elements


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
            kind = KINDS.get(name, "temp")
            buffer = self.buffers[name] = self.resources.empty((size,), dtype=dtype, device=self.device, kind=kind)
        return buffer[:size].view(*shape)

    def contiguous(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, or a contiguous copy."""
        return tensor if tensor.is_contiguous() else self.empty(name, tensor.shape, tensor.dtype).copy_(tensor)

    def select(self, name: str, tensor: Tensor, numbers: Tensor) -> Tensor:
        """tensor[:, numbers], contiguous."""
        if not tensor.is_contiguous():
            return tensor[:, numbers].contiguous()
        selected = self.empty(name, (tensor.shape[0], len(numbers), *tensor.shape[2:]), tensor.dtype)
        return torch.index_select(tensor, 1, numbers, out=selected)


NO_NUMBERS = torch.empty(0, dtype=torch.int64, device="cpu")


@dataclass(frozen=True)
class Place:
    """Where the rows, or keys, of some rectangles lie.

    Attributes:
        count, length: rectangles, and tokens of each.
        span: the tokens, where they follow each other; nothing else is said then.
        numbers: elsewhere, which stretches of ``size`` tokens, counted from the first of the sequence.
    """

    count: int
    length: int
    span: slice | None
    numbers: Tensor = NO_NUMBERS
    size: int = 1

    @classmethod
    def of(cls, axis: Axis, first: int, last: int, device: torch.device) -> Place:
        """Of rectangles ``first`` to ``last``."""
        if axis.span is not None:
            return cls.of_span(axis.span)
        return cls(last - first, axis.length, None, *axis.index(first, last, device))

    @classmethod
    def of_span(cls, span: slice) -> Place:
        """Of one rectangle, whose tokens follow each other."""
        return cls(1, span.stop - span.start, span)

    def stretches(self, tensor: Tensor) -> Tensor:
        """(batch, seq, ...) as (batch, stretches, size, ...), a view."""
        whole = tensor.shape[1] // self.size
        view: Tensor = tensor[:, : whole * self.size].unflatten(1, (whole, self.size))
        return view

    def get(self, name: str, tensor: Tensor, scratch: Scratch) -> Tensor:
        """Rows of (batch, seq, ...): (batch, count * length, ...), a view where they follow each other."""
        if self.span is not None:
            return tensor[:, self.span]
        return scratch.select(name, self.stretches(tensor), self.numbers).flatten(1, 2)

    def put(self, total: Tensor, rows: Tensor) -> None:
        """Write rows, (batch, count * length, ...), to their place."""
        if self.span is not None:
            total[:, self.span] = rows
        else:
            self.stretches(total).index_copy_(1, self.numbers, self._in_stretches(rows, total.dtype))

    def add(self, total: Tensor, rows: Tensor) -> None:
        """Add rows, (batch, count * length, ...), to their place; a token may occur in several rectangles."""
        if self.span is not None:
            total[:, self.span] += rows
        else:
            add_at(self.stretches(total), self.numbers, self._in_stretches(rows, total.dtype))

    def _in_stretches(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        cut: Tensor = rows.to(dtype).unflatten(1, (len(self.numbers), self.size))
        return cut

    def tokens(self) -> Tensor:
        """The tokens, (count, length), in CPU memory."""
        if self.span is not None:
            return torch.arange(self.span.start, self.span.stop, device="cpu").unsqueeze(0)
        tokens = self.numbers.cpu().unsqueeze(-1) * self.size + torch.arange(self.size, device="cpu")
        return tokens.view(self.count, self.length)


def add_at(total: Tensor, numbers: Tensor, rows: Tensor) -> None:
    """Add rows, (batch, numbers, ...), to ``total`` (batch, places, ...); a place may occur several times.

    On CUDA ``index_add_`` adds in the order in which threads come, so that sums round otherwise at every run.
    """
    if total.device.type == "cuda":
        batch = torch.arange(total.shape[0], device=total.device).unsqueeze(1)
        total.index_put_((batch, numbers), rows, accumulate=True)
    else:
        total.index_add_(1, numbers, rows)
