"""Values and keys as JSON and tensors, and back.

JSON's own null, true, numbers, strings and lists stand for themselves. All else is an object of one member, whose name
says what it is: {"tuple": [...]}, {"tensor": "3"}, {"type": ["module.Name", [...]]}. Nothing refers to anything but
tensors, so a text can describe trees alone.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from dilated_pattern_cache.persistence.classes import Types, build, field_names, lost_attributes
from dilated_pattern_cache.persistence.errors import CacheFileError
from dilated_pattern_cache.values.leaves import is_ndarray, is_tensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_DEPTH = 64  # of values within values: far from what Python's stack and JSON readers bear
_EXACT = 2**53  # integers below this are the same in every reader of JSON


class _Place(NamedTuple):
    """Where an item is, for errors. Attributes: form, name: the last step of the way; parent: the steps before it."""

    parent: _Place | None
    form: str
    name: Any
    depth: int

    def inner(self, form: str, name: Any) -> _Place:
        return _Place(self, form, name, self.depth + 1)

    def refuse(self, why: str) -> NoReturn:
        """Raise the TypeError that names the key, the way to the item, and what is wrong with it."""
        steps, place = [], self
        while place.parent is not None:
            steps.append(place.form.format(place.name))
            place = place.parent
        subject = "".join(reversed(steps)) or "it"
        raise TypeError(f"{place.form.format(place.name)} cannot be saved: {subject} {why}")


class Encoder:
    """Turns keys and values into what ``json.dumps`` takes.

    Attributes:
        tensors: copies of the tensors and arrays met so far, by the names that stand for them.
        fields: the names of the fields of the classes met so far.
    """

    def __init__(self, types: Types) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.fields: dict[str, list[str]] = {}
        self._types = types
        self._names: dict[int, str] = {}
        self._met: list[object] = []  # they stay alive meanwhile: an identity is nobody else's

    def key(self, key: Hashable) -> Any:
        """The node of a key.

        Raises:
            TypeError: it has a part that a file cannot hold.
        """
        return self._node(key, _Place(None, "the key {!r}", key, 0), plain=True)

    def value(self, key: Hashable, value: Any) -> Any:
        """The node of the value of ``key``.

        Raises:
            TypeError: it has a part that a file cannot hold.
        """
        return self._node(value, _Place(None, "the value of {!r}", key, 0), plain=False)

    def _node(self, item: Any, place: _Place, plain: bool) -> Any:
        """``plain``: whether only what is equal to its copy will do."""
        kind = type(item)
        if item is None or kind is bool or kind is str:
            return item
        if kind is int:
            return item if abs(item) < _EXACT else {"int": hex(item)}
        if kind is float:
            return item if math.isfinite(item) else {"float": _not_finite(item)}
        if place.depth >= MAX_DEPTH:
            place.refuse(f"is a {kind.__qualname__} more than {MAX_DEPTH} deep, or within itself")
        if plain and (kind in (list, dict, set) or is_tensor(item) or is_ndarray(item)):
            place.refuse(
                f"is a {kind.__qualname__}, which no key of a cache, key of a dict or member of a set may hold"
            )
        if kind is complex:
            return {"complex": self._nodes((item.real, item.imag), place, plain)}
        if kind is bytes:
            return {"bytes": b64encode(item).decode()}
        if kind is tuple:
            return {"tuple": self._nodes(item, place, plain)}
        if kind is list:
            return self._nodes(item, place, plain)
        if kind is dict:
            return {"dict": [self._pair(name, inner, place) for name, inner in item.items()]}
        if kind is set or kind is frozenset:
            members = [self._node(member, place.inner("{{{!r}}}", member), plain=True) for member in item]
            return {kind.__name__: sorted(members, key=json.dumps)}  # a set's own order differs between processes
        if kind is range:
            return {"range": self._nodes((item.start, item.stop, item.step), place, plain)}
        if kind is slice:
            return {"slice": self._nodes((item.start, item.stop, item.step), place, plain)}
        name = self._types.name_of(kind)
        if name is not None:
            return {"type": [name, self._attributes(name, item, place, plain)]}
        if is_tensor(item):
            return {"tensor": self._tensor(item, place)}
        if is_ndarray(item):
            return {"array": self._array(item, place)}
        return self._of_torch(item, place, plain)

    def _nodes(self, items: Iterable[Any], place: _Place, plain: bool) -> list[Any]:
        return [self._node(item, place.inner("[{!r}]", index), plain) for index, item in enumerate(items)]

    def _pair(self, key: Any, value: Any, place: _Place) -> list[Any]:
        within = place.inner("[{!r}]", key)
        return [self._node(key, within, plain=True), self._node(value, within, plain=False)]

    def _attributes(self, name: str, item: Any, place: _Place, plain: bool) -> list[Any]:
        lost = lost_attributes(item)
        if lost:
            place.refuse(f"is a {name} with attributes that are no fields: {', '.join(lost)}")
        names = self.fields.setdefault(name, field_names(type(item)))
        for field in names:
            if not hasattr(item, field):
                place.refuse(f"is a {name} whose field {field} is not set")
        return [self._node(getattr(item, field), place.inner(".{}", field), plain) for field in names]

    def _tensor(self, tensor: Tensor, place: _Place) -> str:
        why = _unfit(tensor)
        if why is not None:
            place.refuse(why)
        import torch

        with torch.no_grad():
            plain = tensor.resolve_conj().resolve_neg()
            return self._name(tensor, lambda: plain.clone(memory_format=torch.contiguous_format))

    def _array(self, array: Any, place: _Place) -> str:
        import torch

        numpy: Any = sys.modules["numpy"]  # there are no arrays where it was not imported

        if type(array) is not numpy.ndarray:
            place.refuse(f"is a {type(array).__qualname__}, a kind of its own: give numpy.asarray(it)")
        if not array.dtype.isnative:
            place.refuse(f"is an array of foreign byte order: give it.astype({array.dtype.newbyteorder('=').str!r})")
        try:
            tensor = torch.from_numpy(numpy.array(array, order="C"))
        except TypeError:
            tensor = None
        if tensor is None or not _storable(tensor.dtype):
            place.refuse(f"is an array of {array.dtype}, which safetensors cannot store")
        return self._name(array, lambda: tensor)

    def _name(self, item: object, copy: Callable[[], Tensor]) -> str:
        """The name that stands for the tensor or array; the same one whenever it is met."""
        name = self._names.get(id(item))
        if name is None:
            name = self._names[id(item)] = str(len(self._met))
            self._met.append(item)
            self.tensors[name] = copy()
        return name

    def _of_torch(self, item: Any, place: _Place, plain: bool) -> Any:
        import torch

        if type(item) is torch.Size:
            return {"size": self._nodes(item, place, plain)}
        if type(item) is torch.dtype:
            return {"dtype": _dtype_name(item)}
        return self._refuse(item, place)

    def _refuse(self, item: Any, place: _Place) -> NoReturn:
        kind = f"{type(item).__module__}.{type(item).__qualname__}".removeprefix("builtins.")
        place.refuse(f"is a {kind}: neither plain data nor of a class in types")


class Decoder:
    """The way back, from nodes that anyone may have written.

    Args:
        types: the classes that nodes may name.
        fields: the fields of the classes as they were when the nodes were made, by the names of the classes.
        tensors: by name.

    Raises:
        CacheFileError: the classes are others now.
    """

    def __init__(self, types: Types, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self._unused = tensors, set(tensors)
        self._kinds: dict[str, tuple[type, int]] = {}
        self._arrays: dict[str, Any] = {}
        for name, names in fields.items():
            kind = types.find(name)
            if kind is None:
                raise CacheFileError(f"it has objects of the class {name}: give the class in types")
            now = field_names(kind)
            if names != now:
                raise CacheFileError(f"its objects of {name} have the fields {names}, the class has {now}")
            self._kinds[name] = kind, len(now)
        self._hashable: dict[str, Callable[[Any, int], Any]] = {
            "int": lambda text, _: int(text, 16),
            "float": lambda text, _: _from_text(text),
            "complex": lambda nodes, depth: complex(*self._numbers(nodes, depth, float, 2)),
            "bytes": lambda text, _: b64decode(text, validate=True),
            "range": lambda nodes, depth: range(*self._numbers(nodes, depth, int, 3)),
            "slice": lambda nodes, depth: slice(*self._nodes(nodes, depth, plain=True)),
            "size": lambda nodes, depth: self._size(nodes, depth),
            "dtype": lambda name, _: _dtypes()[name],
            "tuple": lambda nodes, depth: tuple(self._nodes(nodes, depth, plain=True)),
            "frozenset": lambda nodes, depth: frozenset(self._members(nodes, depth)),
            "type": lambda body, depth: self._object(body, depth, plain=True),
        }
        self._any = self._hashable | {
            "tuple": lambda nodes, depth: tuple(self._nodes(nodes, depth, plain=False)),
            "slice": lambda nodes, depth: slice(*self._nodes(nodes, depth, plain=False)),
            "type": lambda body, depth: self._object(body, depth, plain=False),
            "set": lambda nodes, depth: self._members(nodes, depth),
            "dict": lambda pairs, depth: self._dict(pairs, depth),
            "tensor": lambda name, _: self._tensor(name),
            "array": lambda name, _: self._array(name),
        }

    def key(self, node: Any) -> Hashable:
        """What ``Encoder.key`` turned into the node.

        Raises:
            Exception: nobody did.
        """
        key: Hashable = self._item(node, 0, plain=True)
        return key

    def value(self, node: Any) -> Any:
        """What ``Encoder.value`` turned into the node.

        Raises:
            Exception: nobody did.
        """
        return self._item(node, 0, plain=False)

    def finish(self) -> None:
        """Called when all nodes are decoded.

        Raises:
            CacheFileError: there are tensors that belong to none.
        """
        if self._unused:
            raise CacheFileError(f"no entry has its tensors {sorted(self._unused)}")

    def _item(self, node: Any, depth: int, plain: bool) -> Any:
        if node is None or isinstance(node, bool | int | str):
            return node
        if isinstance(node, float):
            if not math.isfinite(node):
                raise CacheFileError("it has a number beyond the range of floats")
            return node
        if depth >= MAX_DEPTH:
            raise CacheFileError(f"its values are more than {MAX_DEPTH} deep")
        if isinstance(node, list) and not plain:
            return self._nodes(node, depth, plain)
        if not isinstance(node, dict) or len(node) != 1:
            raise CacheFileError(f"there is a {type(node).__name__} where no such value can be")
        ((tag, body),) = node.items()
        read = (self._hashable if plain else self._any).get(tag)
        if read is None:
            raise CacheFileError(f"there is a {tag!r} where no such value can be")
        return read(body, depth)

    def _nodes(self, nodes: Any, depth: int, plain: bool) -> list[Any]:
        return [self._item(node, depth + 1, plain) for node in _list(nodes)]

    def _numbers(self, nodes: Any, depth: int, kind: type, count: int) -> list[Any]:
        numbers = self._nodes(nodes, depth, plain=True)
        if len(numbers) != count or any(type(number) is not kind for number in numbers):
            raise CacheFileError(f"there are no {count} numbers of type {kind.__name__} where they must be")
        return numbers

    def _size(self, nodes: Any, depth: int) -> torch.Size:
        import torch

        return torch.Size(self._numbers(nodes, depth, int, len(_list(nodes))))

    def _members(self, nodes: Any, depth: int) -> set[Any]:
        members = set(self._nodes(nodes, depth, plain=True))
        if len(members) != len(nodes):
            raise CacheFileError("a set has a member twice")
        return members

    def _dict(self, pairs: Any, depth: int) -> dict[Any, Any]:
        made = {}
        for key, value in _list(pairs):
            made[self._item(key, depth + 1, plain=True)] = self._item(value, depth + 1, plain=False)
        if len(made) != len(pairs):
            raise CacheFileError("a dict has a key twice")
        return made

    def _object(self, body: Any, depth: int, plain: bool) -> Any:
        name, nodes = _list(body)
        kind, count = self._kinds[name]
        values = self._nodes(nodes, depth, plain)
        if len(values) != count:
            raise CacheFileError(f"an object of {name} has {len(values)} fields, not {count}")
        return build(kind, values)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CacheFileError(f"it has no tensor {name!r}, which an entry needs")
        self._unused.discard(name)
        return self._tensors[name]

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            array = self._tensor(name).numpy()
            array.flags.writeable = False
            self._arrays[name] = array
        return self._arrays[name]


def _list(node: Any) -> list[Any]:
    if not isinstance(node, list):
        raise CacheFileError(f"there is a {type(node).__name__} where a list must be")
    return node


def _not_finite(number: float) -> str:
    """Text of an infinity, or the bits of a NaN, of which there are many."""
    return str(number) if math.isinf(number) else struct.pack(">d", number).hex()


def _from_text(text: str) -> float:
    if text in ("inf", "-inf"):
        return float(text)
    (number,) = struct.unpack(">d", bytes.fromhex(text))
    if not math.isnan(number):
        raise CacheFileError(f"{text!r} is neither an infinity nor NaN")
    return float(number)


def _unfit(tensor: Tensor) -> str | None:
    """Why a file cannot hold the tensor, and what to do; None where it can."""
    import torch

    if tensor.is_meta:
        return "is a tensor on the meta device, which has no content"
    if type(tensor) is not torch.Tensor:
        return f"is a {type(tensor).__qualname__}, a tensor of a kind of its own: give a plain torch.Tensor"
    if tensor.is_nested or tensor.layout != torch.strided:
        return "is a tensor of another layout than strided: give its parts, or it.to_dense()"
    if tensor.device.type != "cpu":
        return f"is a tensor on {tensor.device}: give it.cpu(); the cache makes copies on devices itself"
    if tensor.requires_grad:
        return "is a tensor that requires a gradient: give it.detach()"
    if any(getattr(tensor, "names", ())):  # which newer versions of PyTorch do not have
        return "is a tensor with named dimensions: give it.rename(None)"
    if tensor.is_quantized or not _storable(tensor.dtype):
        return f"is a tensor of {tensor.dtype}, which safetensors cannot store"
    return None


@cache
def _storable(dtype: torch.dtype) -> bool:
    """Whether the installed safetensors stores tensors of this type and brings them back."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    try:
        back = load(save({"": torch.empty(1, dtype=dtype, device="cpu")}))[""]
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError):
        return False
    return back.dtype == dtype and back.shape == (1,)


@cache
def _dtypes() -> dict[str, torch.dtype]:
    """PyTorch's types by their names: a name of a file is looked up here, and never in a module."""
    import torch

    return {_dtype_name(item): item for item in vars(torch).values() if isinstance(item, torch.dtype)}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
