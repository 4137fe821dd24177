"""What a cache must know of PyTorch. Imported only where PyTorch was."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

from dilated_pattern_cache.errors import mutated

if TYPE_CHECKING:
    from torch import Tensor


def watched() -> bool:
    """Whether tensors made now are not what they seem, and must not meet other callers.

    They are where somebody watches what is made, or makes it of another kind: dispatch modes such as FakeTensorMode,
    transforms of torch.func, torch.jit.trace. Private functions alone know.
    """
    import torch

    transformed = torch._C._functorch.maybe_current_level() is not None
    return transformed or torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing()


def outside_of_autograd() -> AbstractContextManager[object]:
    """Within it tensors are made that everybody can use: with no graph behind them, and no inference tensors."""
    import torch

    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


def outside_of_modes() -> bool:
    """Whether real tensors may be given out: not within a dispatch mode."""
    import torch

    return not torch._C._len_torch_dispatch_stack()


def unreal(tensors: Sequence[Tensor]) -> bool:
    """Whether there is one without memory: a meta tensor, the fake one of a tracer, that of a transform."""
    import torch

    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(
        tensor.is_meta or type(tensor).__name__ in ("FakeTensor", "FunctionalTensor") or is_wrapped(tensor)
        for tensor in tensors
    )


def check(key: Hashable, tensors: Sequence[Tensor]) -> None:
    """See that others can use them.

    Raises:
        TypeError: one is an inference tensor, or the result of an operation that is recorded for a gradient.
    """
    for tensor in tensors:
        if tensor.is_inference():
            raise TypeError(
                f"the value of {key!r} has an inference tensor, with which nobody could train: "
                "make it outside of torch.inference_mode(), or clone it there"
            )
        if tensor.grad_fn is not None:
            raise TypeError(f"the value of {key!r} has a tensor with a graph behind it: give tensor.detach()")


def watch_versions(key: Hashable, tensors: Sequence[Tensor]) -> Callable[[], bool]:
    """A function that raises where one of the tensors, or a view of it, was changed in place.

    It returns False within a dispatch mode, where real tensors must not be given out. Autograd's version counters see
    what is done through PyTorch, but for ``tensor.data``; they see nothing of NumPy or kernels in the same memory.
    """
    import torch

    modes = torch._C._len_torch_dispatch_stack
    if len(tensors) == 1:
        (tensor,) = tensors
        version = tensor._version

        def intact() -> bool:
            if modes():
                return False
            if tensor._version != version:
                raise mutated(key)
            return True

        return intact
    versions = [(tensor, tensor._version) for tensor in tensors]

    def all_intact() -> bool:
        if modes():
            return False
        for tensor, version in versions:
            if tensor._version != version:
                raise mutated(key)
        return True

    return all_intact


def watch_contents(key: Hashable, tensors: Sequence[Tensor]) -> Callable[[], bool]:
    """The same by a copy of every tensor, compared bit by bit: slow, and sees everything."""
    import torch

    copies = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def intact() -> bool:
        if not outside_of_modes():
            return False
        with torch.no_grad():
            for tensor, copy in copies:
                if (tensor.shape, tensor.dtype) != (copy.shape, copy.dtype) or not _same_bits(tensor, copy):
                    raise mutated(key)
        return True

    return intact


def storages(tensor: Tensor) -> Iterator[tuple[Hashable, int]]:
    """(Identity, bytes) of the memory of a tensor of any layout."""
    import torch

    for part in strided_parts(tensor):
        if part.layout != torch.strided:
            yield id(part), part.numel() * part.element_size()
        elif not part.is_meta:
            storage = part.untyped_storage()
            yield (str(part.device), storage.data_ptr()), storage.nbytes()


def _same_bits(tensor: Tensor, copy: Tensor) -> bool:
    import torch

    pairs = zip(strided_parts(tensor), strided_parts(copy), strict=True)
    return all(torch.equal(_bits(one), _bits(other)) for one, other in pairs)


def _bits(part: Tensor) -> Tensor:
    import torch

    dense = part if part.layout == torch.strided else part.to_dense()
    plain = dense.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8)


def strided_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor of another layout, or a wrapper around others, consists of.

    Itself where its layout hides what it consists of, as MKL-DNN's does.
    """
    import torch

    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from strided_parts(getattr(tensor, name))
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:
        yield tensor
