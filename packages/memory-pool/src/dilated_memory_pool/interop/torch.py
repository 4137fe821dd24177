"""PyTorch tensors over a pool's memory.

Every tensor is made anew: a tensor object used again would bring its version counter and its inference flag along,
and autograd would find changes where there are none. Nor is it a view, which autograd treats otherwise than a tensor
of its own.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dilated_memory_pool.placement.spans import Lease, Span

if TYPE_CHECKING:
    import torch

    from dilated_memory_pool.heap import Heap


class TensorMaker:
    """Makes the tensors of one pool.

    Args:
        heap: where their memory comes from.
        min_bytes: smaller tensors are left to PyTorch.

    Raises:
        ImportError: PyTorch is not installed.
    """

    def __init__(self, heap: Heap, min_bytes: int) -> None:
        import_torch()
        import torch  # once more, for its types

        self._heap = heap
        self._least = max(min_bytes, 1)
        self._itemsize: dict[torch.dtype, int] = {}
        self._device = torch.device(heap.backend.device)
        if self._device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.init()  # from now on the streams are PyTorch's
        self._addressable = heap.backend.addressable
        # What calls need of PyTorch: importing it costs more than any of these.
        #
        # Tensors are left to it while it watches what is made, or makes it of another kind: while Dynamo runs; in a
        # dispatch mode, such as FakeTensorMode or those of torch.export; in a transform of torch.func; in
        # torch.jit.trace, which would keep the memory as a constant. Of the last three private functions alone know.
        self._compiling = torch.compiler.is_dynamo_compiling
        self._modes = torch._C._len_torch_dispatch_stack
        self._transforms: Any = torch._C._functorch.maybe_current_level
        self._tracing: Any = torch._C._is_tracing
        self._torch_empty, self._torch_empty_like = torch.empty, torch.empty_like
        self._frombuffer = torch.frombuffer
        self._default_dtype, self._strided = torch.get_default_dtype, torch.strided
        self._is_deterministic = torch.are_deterministic_algorithms_enabled
        self._deterministic: Any = torch.utils.deterministic

    def empty(
        self, size: int | Sequence[int], dtype: torch.dtype | None, device: torch.device | str | None
    ) -> torch.Tensor:
        """See ``MemoryPool.empty``."""
        heap = self._heap
        if self._compiling() or self._modes() or self._transforms() or self._tracing():
            if device is not None:
                self._same_device(device)
            return self._torch_empty(size, dtype=dtype, device=self._device if device is None else device)
        if device is None:
            device = self._device
        elif device != self._device and not self._same_device(device):
            heap.bypasses += 1  # meta: there is no memory
            return self._torch_empty(size, dtype=dtype, device=device)
        if dtype is None:
            dtype = self._default_dtype()
        try:
            count = math.prod(size)  # type: ignore[arg-type]  # an int is seen to below
            nbytes = count * self._itemsize[dtype]
        except (KeyError, TypeError):
            size, count, nbytes = self._measure(size, dtype)
        try:
            if nbytes < self._least:
                # One bytecode's load and store of an int, without a call between: threads do not lose counts here.
                heap.bypasses += 1
                return self._torch_empty(size, dtype=dtype, device=device)
            if type(nbytes) is not int or nbytes > sys.maxsize:  # NumPy's integers wrap around
                size, count, nbytes = self._measure(size, dtype)
            lease = heap.lease(nbytes, hidden=True)
            if lease is None:
                return self._torch_empty(size, dtype=dtype, device=device)
            wrap = self._wrap_addressable if self._addressable else self._wrap_device
            tensor = wrap(lease, dtype, count, size)  # type: ignore[arg-type]  # an int was made a tuple by then
        except Exception:
            self._measure(size, dtype)  # if that was no shape, this says it more clearly
            raise
        if self._is_deterministic() and self._deterministic.fill_uninitialized_memory:
            tensor.copy_(self._torch_empty((), dtype=dtype, device=device))  # that one PyTorch has filled
        return tensor

    def empty_like(self, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """See ``MemoryPool.empty_like``."""
        watched = self._compiling() or self._modes() or self._transforms() or self._tracing()
        if watched or tensor.layout is not self._strided:
            self._same_device(tensor.device)
            return self._torch_empty_like(tensor, dtype=dtype)
        like = self.empty(tensor.shape, dtype or tensor.dtype, tensor.device)
        if like.stride() == tensor.stride():
            return like
        return like.as_strided_(tensor.shape, self._torch_empty_like(tensor, device="meta").stride())

    # ------------------------------------------------------------------------------------------ tensors

    def _wrap_addressable(self, lease: Any, dtype: torch.dtype, count: int, size: Sequence[int]) -> torch.Tensor:
        flat = self._frombuffer(lease, dtype=dtype, count=count, offset=lease.span.offset)
        return flat if len(size) == 1 else flat.resize_(size)  # unlike view, resize_ makes no view

    def _wrap_device(self, lease: Lease, dtype: torch.dtype, count: int, size: Sequence[int]) -> torch.Tensor:
        storage = bytes_of(lease.span, count * dtype.itemsize, lease).untyped_storage()
        return self._torch_empty(0, dtype=dtype, device=self._device).set_(storage).resize_(size)

    # ------------------------------------------------------------------------------------------ arguments

    def _measure(self, size: int | Sequence[int], dtype: Any) -> tuple[tuple[int, ...], int, int]:
        """(shape, elements, bytes) for a type not met before, or a size that is not a sequence of plain ints.

        Raises:
            TypeError, ValueError: these are no shape and type of a tensor.
        """
        import torch

        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r}")
        if dtype not in self._itemsize:
            if torch.empty(0, dtype=dtype).is_quantized:
                raise TypeError(f"dtype: expected one that is not quantized, got {dtype}")
            self._itemsize[dtype] = dtype.itemsize
        lengths = size if isinstance(size, (tuple, list)) else (size,)
        try:
            shape = None if bool in map(type, lengths) else tuple(map(operator.index, lengths))
        except TypeError:
            shape = None
        if shape is None:
            raise TypeError(f"size: expected an int or a tuple of ints, got {size!r}")
        if min(shape, default=0) < 0:
            raise ValueError(f"size: expected no negative length, got {shape}")
        count = math.prod(shape)
        nbytes = count * self._itemsize[dtype]
        if max(nbytes, *shape, 0) > sys.maxsize:
            raise ValueError(f"size: expected one that memory can have, got {shape} of {dtype}")
        return shape, count, nbytes

    def _same_device(self, device: torch.device | str) -> bool:
        """True for the pool's device by another name, False for meta; ValueError for any other."""
        import torch

        wanted: Any = torch.device(device)  # its index may be None, whatever its type says
        if wanted.type == "meta":
            return False
        own = self._device
        index = wanted.index
        if wanted.type == own.type == "cuda" and index is None:
            index = torch.cuda.current_device()
        if wanted.type == own.type and (own.index is None or index == own.index):
            return True
        raise ValueError(f"device: expected {own}, where this pool's tensors live, got {wanted}")


def bytes_of(span: Span, nbytes: int, owner: object) -> torch.Tensor:
    """A uint8 tensor over the first ``nbytes`` of a span of device memory. ``owner`` lives as long as its storage.

    A trip through DLPack gives memory a storage of its own. PyTorch keeps the Python object of a storage, with its
    attributes, as long as the storage itself, whoever else holds it: views, autograd, other libraries.
    """
    dlpack: Any = import_torch().utils.dlpack
    whole = span.arena.memory.tensor()
    tensor: torch.Tensor = dlpack.from_dlpack(dlpack.to_dlpack(whole[span.offset : span.offset + nbytes]))
    tensor.untyped_storage().dilated_memory_pool_owner = owner  # type: ignore[attr-defined]
    return tensor


def import_torch() -> Any:
    """PyTorch, or an ImportError that names the extra."""
    try:
        import torch
    except ImportError as error:
        raise ImportError('tensors need PyTorch: pip install "dilated-memory-pool[torch]"') from error
    return torch
