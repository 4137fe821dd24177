"""Rows in and out: what a call attends is gathered into buffers that all calls share, or read where it lies.

What was found by running it (torch 2.13, CPU): ``index_select`` of contiguous tensors into a buffer that is there
already costs a fifth of advanced indexing; of strided ones it copies element by element. Stretches of tokens are
cheaper than tokens. New memory costs more than filling it. With 128 rows a call, the flash operator is a tenth faster
where the keys of a head lie together: so keys are copied head by head once, and gathered from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_block_sparse.plan import Axis
from dilated_core.resources import Resources

# Elements gathered of each tensor at a time, or an eighth of the query's if that is more: on a CPU what its shared
# cache holds, on a GPU what fills the card.
GATHER_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}


def budget(tensor: Tensor) -> int:
    """Elements that may be gathered of each tensor at a time, of one as large as this."""
    least = GATHER_ELEMENTS.get(tensor.device.type, GATHER_ELEMENTS["cuda"])
    return max(least, tensor.numel() // 8)


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
        return buffer[:size].view(*shape)

    def by_head(self, name: str, tensor: Tensor) -> Tensor:
        """The (batch, seq, heads, head_dim) tensor, or a copy in which each head's rows follow each other."""
        heads_first = tensor.transpose(1, 2)
        if not heads_first.is_contiguous():
            heads_first = self.empty(name, heads_first.shape, tensor.dtype).copy_(heads_first)
        return heads_first.transpose(1, 2)

    def select(self, name: str, tensor: Tensor, dim: int, numbers: Tensor) -> Tensor:
        """The slices of a contiguous tensor at ``numbers`` of a dimension."""
        shape = (*tensor.shape[:dim], len(numbers), *tensor.shape[dim + 1 :])
        return torch.index_select(tensor, dim, numbers, out=self.empty(name, shape, tensor.dtype))


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

    def stretches(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """(batch, seq, ...) as (batch, stretches, size, ...), a view; ``dim``: that of seq."""
        whole = tensor.shape[dim] // self.size
        view: Tensor = tensor.narrow(dim, 0, whole * self.size).unflatten(dim, (whole, self.size))
        return view

    def get(self, name: str, tensor: Tensor, scratch: Scratch) -> Tensor:
        """Rows of (batch, seq, ...): (batch, count * length, ...), a view where they follow each other."""
        if self.span is not None:
            return tensor[:, self.span]
        if tensor.is_contiguous():
            return scratch.select(name, self.stretches(tensor), 1, self.numbers).flatten(1, 2)
        heads_first = tensor.transpose(1, 2)
        if heads_first.is_contiguous():
            stretches = self.stretches(heads_first, dim=2)
            return scratch.select(name, stretches, 2, self.numbers).flatten(2, 3).transpose(1, 2)
        return self.stretches(tensor)[:, self.numbers].flatten(1, 2)

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
            self.stretches(total).index_add_(1, self.numbers, self._in_stretches(rows, total.dtype))

    def _in_stretches(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        cut: Tensor = rows.to(dtype).unflatten(1, (len(self.numbers), self.size))
        return cut

    def tokens(self) -> Tensor:
        """The tokens, (count, length), in CPU memory."""
        if self.span is not None:
            return torch.arange(self.span.start, self.span.stop).unsqueeze(0)
        tokens = self.numbers.cpu().unsqueeze(-1) * self.size + torch.arange(self.size)
        return tokens.view(self.count, self.length)
