"""A tensor that rows are appended to, in memory that grows by a factor: what decoding keeps of earlier tokens."""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from dilated_memory_pool.errors import PoolMemoryError
from dilated_memory_pool.interop.torch import import_torch

if TYPE_CHECKING:
    import torch


class GrowableBuffer:
    """Rows side by side along one dimension. Growing moves each row at most growth / (growth - 1) times on average,
    however many are appended: twice with the factor 2.

    It is for inference: no gradient flows through it. Views taken before a growth keep the memory and the contents
    they had. Rows that were truncated and appended anew lie in the same memory, so older views show the new ones.
    On a GPU it belongs to the stream it is first appended on.

    Args:
        empty: allocates, as ``MemoryPool.empty``.
        row_shape: of one row, without ``dim``.
        dtype: of the rows; PyTorch's default by default.
        device: of the rows.
        dim: where the rows lie in the shape of the whole; negative counts from its end.
        capacity: rows to make room for before the first is appended.
        growth: how many times larger it gets when it is full, above 1.

    Attributes:
        row_shape: as given, as a tuple.
        dim: as given, counted from the front.
        dtype: of the rows.
        device: of the rows.

    Raises:
        TypeError, ValueError: an argument is none of the above.
    """

    def __init__(
        self,
        empty: Callable[..., torch.Tensor],
        row_shape: Sequence[int],
        *,
        dtype: torch.dtype | None,
        device: str,
        dim: int,
        capacity: int,
        growth: float,
    ) -> None:
        self._torch = import_torch()
        if not isinstance(row_shape, Sequence):
            raise TypeError(f"row_shape: expected a sequence of whole numbers, got {row_shape!r}")
        self.row_shape = tuple(_count(length, "row_shape") for length in row_shape)
        rank = len(self.row_shape) + 1
        place = _whole(dim, "dim")
        if not -rank <= place < rank:
            raise ValueError(f"dim: expected one in [{-rank}, {rank - 1}] for rows of {self.row_shape}, got {dim}")
        self.dim = place % rank
        if dtype is not None and not isinstance(dtype, self._torch.dtype):
            raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r}")
        self.dtype: torch.dtype = self._torch.get_default_dtype() if dtype is None else dtype
        self.device: torch.device = self._torch.device(device)
        self._empty, self._growth = empty, growth
        self._lock = threading.Lock()  # for changes; who looks, perhaps in a signal handler amid a change, needs none
        self._kept = self._allocate(_count(capacity, "capacity")), 0  # memory and length, exchanged in one step

    # ------------------------------------------------------------------------------------------ looking

    def __len__(self) -> int:
        return self._kept[1]

    @property
    def capacity(self) -> int:
        """Rows there is room for without growing."""
        return self._kept[0].shape[self.dim]

    def view(self) -> torch.Tensor:
        """The rows so far, without a copy. Its shape is ``row_shape`` with ``len(self)`` at ``dim``."""
        memory, length = self._kept
        return memory.narrow(self.dim, 0, length)

    def __repr__(self) -> str:
        return f"<GrowableBuffer of {len(self)} rows of {self.row_shape} {self.dtype}, room for {self.capacity}>"

    # ------------------------------------------------------------------------------------------ changing

    def append(self, rows: torch.Tensor) -> None:
        """Copy ``rows``, of ``row_shape`` with their number at ``dim``, behind the others.

        Where the limit does not allow the growth asked for, it grows by what these rows need.

        Raises:
            TypeError: ``rows`` is no tensor.
            ValueError: its shape, dtype or device is another, or it requires a gradient.
            PoolLimitError, PoolMemoryError: as ``MemoryPool.empty``; nothing has changed.
        """
        self._check(rows)
        with self._alone(), self._torch.no_grad():
            memory, length = self._kept
            end = length + rows.shape[self.dim]
            if end > self.capacity:
                memory = self._grown(end)
            memory.narrow(self.dim, length, end - length).copy_(rows)
            self._kept = memory, end

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` rows, and the memory.

        Raises:
            TypeError, ValueError: ``length`` is no whole number, or there are fewer.
        """
        with self._alone():
            kept = _whole(length, "length")
            memory, now = self._kept
            if not 0 <= kept <= now:
                raise ValueError(f"length: expected one in [0, {now}], got {length}")
            self._kept = memory, kept

    def clear(self) -> None:
        """Keep no rows and no memory."""
        with self._alone():
            self._kept = self._allocate(0), 0

    # ------------------------------------------------------------------------------------------ helpers

    def _alone(self) -> AbstractContextManager[object]:
        """No other thread changes the buffer meanwhile. A graph being traced cannot hold a lock."""
        return nullcontext() if self._torch.compiler.is_compiling() else self._lock

    def _check(self, rows: torch.Tensor) -> None:
        if not isinstance(rows, self._torch.Tensor):
            raise TypeError(f"rows: expected a tensor, got {type(rows).__name__}")
        shape = tuple(rows.shape)
        if len(shape) != len(self.row_shape) + 1 or shape[: self.dim] + shape[self.dim + 1 :] != self.row_shape:
            expected = [*map(str, self.row_shape)]
            expected.insert(self.dim, "n")
            raise ValueError(f"rows: expected the shape ({', '.join(expected)}), got {shape}")
        if rows.dtype != self.dtype or rows.device != self.device:
            raise ValueError(
                f"rows: expected {self.dtype} on {self.device}, got {rows.dtype} on {rows.device}: "
                "convert them where it can be seen"
            )
        if rows.requires_grad:
            raise ValueError(
                "rows: expected none that require a gradient, which does not flow through here: append rows.detach()"
            )

    def _grown(self, needed: int) -> torch.Tensor:
        """The rows, with room for ``needed``, and for more where the memory allows it."""
        wanted = max(needed, math.ceil(self.capacity * self._growth))
        try:
            larger = self._allocate(wanted)
        except PoolMemoryError:
            if wanted == needed:
                raise
            larger = self._allocate(needed)
        larger.narrow(self.dim, 0, len(self)).copy_(self.view())
        return larger

    def _allocate(self, rows: int) -> torch.Tensor:
        """Memory for so many, that may be written to in inference mode and outside of it."""
        with self._torch.inference_mode(False):
            return self._empty((*self.row_shape[: self.dim], rows, *self.row_shape[self.dim :]), dtype=self.dtype)


def _whole(value: int, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: expected a whole number, got {value!r}") from error


def _count(value: int, name: str) -> int:
    if _whole(value, name) < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")
    return _whole(value, name)
