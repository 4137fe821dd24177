"""NumPy arrays over a pool's memory, without PyTorch.

An array keeps its block alive, and so does every view of it, so that the memory returns to the pool when the last of
them dies. ``min_bytes`` does not apply: every array is the pool's.
"""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dilated_memory_pool.pool import MemoryPool


def empty(
    pool: MemoryPool, shape: SupportsIndex | Sequence[SupportsIndex], dtype: npt.DTypeLike = float
) -> np.ndarray[Any, Any]:
    """An uninitialised, writable array in row-major order, as ``numpy.empty`` makes it.

    Args:
        pool: whose memory the host can address: of the backend "host" or "pinned".
        shape: a number or a sequence of numbers.
        dtype: of any type but objects of Python.

    Raises:
        TypeError, ValueError: ``shape`` is no shape, ``dtype`` no type that plain memory can hold, or the host cannot
            address the pool's memory.
        PoolLimitError, PoolMemoryError, RuntimeError: as ``MemoryPool.allocate``.
        ImportError: NumPy is not installed.

    >>> from dilated_memory_pool import MemoryPool
    >>> pool = MemoryPool("host")
    >>> samples = empty(pool, (1000, 3), "float32")
    >>> samples.shape, samples.flags.writeable, pool.statistics().requested_bytes
    ((1000, 3), True, 12000)
    >>> del samples
    >>> pool.statistics().requested_bytes
    0
    """
    try:
        import numpy
    except ImportError as error:
        raise ImportError('arrays need NumPy: pip install "dilated-memory-pool[numpy]"') from error
    if not pool.backend.addressable:
        raise ValueError(f"pool: expected one of memory that the host can address, got one on {pool.device}")
    kind = numpy.dtype(dtype)
    if kind.hasobject:
        raise TypeError(f"dtype: expected one that plain memory can hold, got {kind!r}")
    lengths = shape if isinstance(shape, Sequence) else (shape,)
    try:
        sizes = tuple(map(operator.index, lengths))
    except TypeError:
        raise TypeError(f"shape: expected an int or a sequence of ints, got {shape!r}") from None
    if min(sizes, default=0) < 0:
        raise ValueError(f"shape: expected no negative length, got {sizes}")
    block: Any = pool.allocate(math.prod(sizes) * kind.itemsize)
    array: np.ndarray[Any, Any] = numpy.ndarray(sizes, kind, block)
    return array


def zeros(
    pool: MemoryPool, shape: SupportsIndex | Sequence[SupportsIndex], dtype: npt.DTypeLike = float
) -> np.ndarray[Any, Any]:
    """As ``empty``, filled with zeros: those of numbers, and of strings and dates what ``numpy.zeros`` gives."""
    array = empty(pool, shape, dtype)
    ctypes.memset(array.ctypes.data, 0, array.nbytes)
    return array
