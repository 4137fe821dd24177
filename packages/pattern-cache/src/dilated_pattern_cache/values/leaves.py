"""What a value is made of: the tensors, arrays and buffers in it, and the memory these take.

Imports nothing but the standard library: no value can be a tensor where PyTorch was not imported.
"""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from operator import index
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

_NOTHING_INSIDE = (
    str, int, float, complex, range, slice, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, partial,
)  # fmt: skip
_BUFFERS = (bytes, bytearray, memoryview, array)


def is_tensor(item: object) -> bool:
    """Whether it is a tensor of PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(item, torch.Tensor)


def is_ndarray(item: object) -> bool:
    """Whether it is an array of NumPy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(item, numpy.ndarray)


def _is_on_a_gpu(item: object) -> bool:
    return hasattr(type(item), "__cuda_array_interface__")


def leaves(value: Any) -> list[Any]:
    """The tensors, arrays and buffers in a value, each once.

    Looked through are tuples, lists, sets, the values of mappings, and the attributes of objects; not functions,
    classes and modules.
    """
    found: list[Any] = []
    seen: dict[int, object] = {}  # they stay alive meanwhile: an identity is nobody else's
    pending = [value]
    while pending:
        item = pending.pop()
        if item is None or isinstance(item, _NOTHING_INSIDE) or id(item) in seen:
            continue
        seen[id(item)] = item
        if is_tensor(item) or is_ndarray(item) or isinstance(item, _BUFFERS) or _is_on_a_gpu(item):
            found.append(item)
        elif isinstance(item, Mapping):
            pending.extend(item.values())
        elif isinstance(item, tuple | list | set | frozenset | deque):
            pending.extend(item)
        else:
            pending.extend(_attributes(item))
    return found


def charges_of(value: Any) -> dict[Hashable, int]:
    """Bytes by the identity of the memory that the tensors, arrays and buffers in ``value`` lie in.

    Views of one storage are one piece of memory, of the storage's size. An array that shares a tensor's memory is the
    same piece. Python's own objects count nothing.
    """
    charges: dict[Hashable, int] = {}
    for leaf in leaves(value):
        charges.update((memory, nbytes) for memory, nbytes in _pieces(leaf) if nbytes)
    return charges


def measured_by(size_of: Callable[[Any], int]) -> Callable[[Any], dict[Hashable, int]]:
    """As ``charges_of``, by a function of the user's; nothing it counts is shared."""

    def charges(value: Any) -> dict[Hashable, int]:
        said = size_of(value)
        try:
            nbytes = index(said)
        except TypeError:
            nbytes = None
        if nbytes is None or isinstance(said, bool):
            raise TypeError(f"size_of: expected a function that returns bytes as an int, got one that returns {said!r}")
        if nbytes < 0:
            raise ValueError(f"size_of: expected a function that returns at least 0, got one that returns {nbytes}")
        return {object(): nbytes} if nbytes else {}

    return charges


def _attributes(item: object) -> Iterator[Any]:
    yield from getattr(item, "__dict__", {}).values()
    for kind in type(item).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                mangled = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") else name
                yield getattr(item, mangled, None)


def _pieces(leaf: Any) -> Iterator[tuple[Hashable, int]]:
    leaf = _owner(leaf)
    if is_tensor(leaf):
        from dilated_pattern_cache.values.tensors import storages

        return storages(leaf)
    if is_ndarray(leaf):
        return iter([(("cpu", leaf.__array_interface__["data"][0]), leaf.nbytes)])
    if _is_on_a_gpu(leaf):
        return iter([(("cuda", leaf.__cuda_array_interface__["data"][0]), leaf.nbytes)])
    if isinstance(leaf, memoryview):
        leaf = leaf.obj
    return iter([(id(leaf), memoryview(leaf).nbytes)])


def _owner(leaf: Any) -> Any:
    """Whose memory an array or a memoryview is a view of: the whole of it lives as long as the view."""
    while True:
        if isinstance(leaf, memoryview):
            base = leaf.obj
        elif is_ndarray(leaf):
            base = leaf.base
            if type(base).__name__ == "DummyArray":  # as_strided's
                base = base.base
        else:
            return leaf
        if not (is_tensor(base) or is_ndarray(base) or isinstance(base, _BUFFERS)):
            return leaf
        leaf = base
