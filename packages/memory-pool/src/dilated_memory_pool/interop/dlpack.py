"""DLPack both ways: what other libraries hold, copied into a pool; and a block's memory, shared with others.

A capsule is made by a library that makes them in C: its deleter may be called in any thread, with an exception on its
way, at the end of the interpreter, and none of that is for Python code. Tensors of a pool are exporters themselves.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dilated_memory_pool.interop.torch import bytes_of, import_torch

if TYPE_CHECKING:
    import torch

    from dilated_memory_pool.blocks import Block
    from dilated_memory_pool.pool import MemoryPool


def take_in(pool: MemoryPool, exporter: Any) -> torch.Tensor:
    """A contiguous tensor on the pool's device with a copy of what ``exporter`` holds.

    The memory is ``pool.empty``'s: a copy of fewer than ``min_bytes`` is an ordinary tensor. A copy that comes from
    another device than the host is queued to the current stream, as PyTorch's copies are.

    Args:
        pool: where the copy goes.
        exporter: has ``__dlpack__`` and ``__dlpack_device__``.

    Raises:
        TypeError: ``exporter`` does not export DLPack.
        BufferError: it does not export what it holds, such as a type that DLPack does not know; or has negative
            strides, which PyTorch does not know.
        PoolLimitError, PoolMemoryError, RuntimeError, ImportError: as ``MemoryPool.empty``.

    >>> from dilated_memory_pool import MemoryPool
    >>> pool = MemoryPool("host")
    >>> block = pool.allocate(3)
    >>> memoryview(block).cast("B")[:] = b"abc"
    >>> take_in(pool, block)
    tensor([97, 98, 99], dtype=torch.uint8)
    """
    torch = import_torch()
    if isinstance(exporter, torch.Tensor):
        source = exporter.detach()
    elif hasattr(exporter, "__dlpack__") and hasattr(exporter, "__dlpack_device__"):
        if min(getattr(exporter, "strides", None) or (), default=0) < 0:  # PyTorch ends the process at these
            raise BufferError(f"exporter: expected no negative strides, got {exporter.strides}: copy it first")
        source = torch.from_dlpack(exporter)
    else:
        raise TypeError(f"exporter: expected __dlpack__ and __dlpack_device__, got {type(exporter).__name__}")
    return pool.empty(source.shape, dtype=source.dtype).copy_(source)


def capsule(block: Block, max_version: tuple[int, int] | None) -> object:
    """A capsule over a block, ordered behind no stream's work. ``max_version`` as in ``Block.__dlpack__``.

    Raises:
        BufferError: no library is installed that makes one.
    """
    array = _exporter(block)
    options: dict[str, Any] = {} if max_version is None else {"max_version": max_version}
    if not block.addressable:
        options["stream"] = -1  # or CuPy's current stream is waited for, whatever it is
    with _device_of(array):
        try:
            return array.__dlpack__(**options)
        except TypeError:  # a library from before there were versions
            options.pop("max_version", None)
            return array.__dlpack__(**options)


def _device_of(array: Any) -> AbstractContextManager[object]:
    """The context in which it can be exported: PyTorch exports no tensor of a device that is not the current one."""
    if getattr(array, "is_cuda", False):  # a tensor: CuPy's arrays have no such attribute
        import torch

        return torch.cuda.device(array.device)
    return nullcontext()


def _exporter(block: Block) -> Any:
    """An array of unsigned bytes over a block, of a library that is here: NumPy or CuPy, else PyTorch."""
    if block.addressable:
        if find_spec("numpy") is not None:
            import numpy

            view = memoryview(block).cast("B")
            return numpy.frombuffer(view, numpy.uint8) if block.nbytes else numpy.empty(0, numpy.uint8)
        if find_spec("torch") is not None:
            import torch

            return torch.frombuffer(block, dtype=torch.uint8) if block.nbytes else torch.empty(0, dtype=torch.uint8)
        raise BufferError("DLPack needs NumPy or PyTorch to make the capsule; as a buffer, a block needs neither")
    if block.device != "cpu" and find_spec("cupy") is not None:
        from dilated_memory_pool.interop.cupy import array_over

        return array_over(block)
    return bytes_of(block.span, block.nbytes, block)
