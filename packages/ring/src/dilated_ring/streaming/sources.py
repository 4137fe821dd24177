"""Where keys and values come from: a tensor in host memory, or a stored tensor that is read by slicing.

Imports torch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

# What safetensors calls the dtypes that attention takes.
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@runtime_checkable
class StoredTensor(Protocol):
    """A tensor that lies elsewhere, mostly in a file. ``safetensors.safe_open(...).get_slice(name)`` is one."""

    def get_shape(self) -> Sequence[int]:
        """Its shape, (batch, kv_seq, kv_heads, head_dim)."""

    def get_dtype(self) -> str:
        """Its dtype as safetensors writes it: "F64", "F32", "F16" or "BF16"."""

    def __getitem__(self, index: tuple[slice, slice], /) -> Tensor:
        """Its part ``[:, start:stop]``, in memory; asked for again whenever these keys are attended."""


class Source(NamedTuple):
    """Keys or values in host memory or stored, read some positions at a time.

    Attributes:
        name: of the argument, for messages; origin: what it is.
        shape: (batch, kv_seq, kv_heads, head_dim); dtype: of what is read.
    """

    name: str
    origin: Tensor | StoredTensor
    shape: torch.Size
    dtype: torch.dtype

    def read(self, rows: slice) -> Tensor:
        """These positions, (batch, rows, kv_heads, head_dim): a view of a tensor, whatever a stored one gives.

        Raises:
            ValueError: a stored tensor gives something else than its shape and dtype promise.
        """
        part = self.origin[:, rows]
        expected = (self.shape[0], rows.stop - rows.start, *self.shape[2:])
        if not isinstance(part, Tensor) or part.shape != expected or part.dtype != self.dtype:
            found = f"{part.dtype} of {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(
                f"{self.name}: expected [:, {rows.start}:{rows.stop}] of the stored tensor to be {self.dtype} "
                f"of {expected}, got {found}"
            )
        return part


def as_source(name: str, value: object) -> Source:
    """Return the argument ``name`` as a Source.

    Raises:
        TypeError: neither a tensor nor a StoredTensor, or a stored dtype that no attention takes.
        ValueError: a tensor that does not lie in host memory.
    """
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"{name}: expected a tensor in host memory (on the CPU), got one on {value.device}")
        return Source(name, value, value.shape, value.dtype)
    if not isinstance(value, StoredTensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor on the CPU, or a stored tensor that has get_shape(), get_dtype() and "
            f"slices (as safetensors' get_slice gives), got {type(value).__name__}"
        )
    dtype = value.get_dtype()
    if dtype not in STORED_DTYPES:
        raise TypeError(f"{name}: expected a stored dtype of {list(STORED_DTYPES)}, got {dtype!r}")
    return Source(name, value, torch.Size(value.get_shape()), STORED_DTYPES[dtype])
