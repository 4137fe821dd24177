"""Copies on other devices: which device is meant, and the same value with its tensors there."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from dilated_pattern_cache.values.leaves import is_tensor, leaves
from dilated_pattern_cache.values.streams import Arrival, refuse_capture, streams_of
from dilated_pattern_cache.values.tensors import outside_of_autograd

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Not in it: accelerators without an index, of which the current one is meant.
_known: dict[object, torch.device] = {}
_UNDERWAY = object()


def canonical(device: torch.device | str) -> torch.device:
    """The device as its tensors name it: of an accelerator with an index, which is the current one by default.

    Raises:
        TypeError: it is no device and no name.
        ValueError: there is no device of that name, or it is "meta", which has no memory.
        RuntimeError: it is not there.
        ImportError: PyTorch is not installed.
    """
    try:
        place = _known.get(device)
    except TypeError:  # it cannot be hashed
        place = None
    return _looked_up(device) if place is None else place


def moved(value: Any, device: torch.device) -> Any:
    """The same value with every tensor on ``device``; itself where they are.

    Tuples, sets, lists, mappings, dataclasses, modules and objects with a method ``to(device)`` are made anew around
    what is moved. Parts without tensors stay as they are. What is one object stays one object; different views of one
    memory may become tensors with a memory each.

    Raises:
        TypeError: there are tensors in an object that cannot be made anew.
    """
    import torch

    move = _TracedMove if torch.compiler.is_compiling() else _Move
    return move(device, lambda tensor: tensor.to(device))(value)


def check_copying(device: torch.device) -> None:
    """See that a copy can be made now.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    streams = streams_of(device)
    if streams is not None:
        refuse_capture(streams)


def copied(value: Any, device: torch.device) -> tuple[Any, Arrival | None]:
    """As ``moved``, with no gradient recorded; and what makes the copy ready for the stream that is current later.

    A copy on a CUDA device is not waited for, and ready for the caller's current stream. All others are there, and
    None stands for nothing to do.

    Raises:
        TypeError: there are tensors in an object that cannot be made anew.
    """
    streams = streams_of(device)
    with outside_of_autograd():
        if streams is None:
            return moved(value, device), None
        here = {id(leaf) for leaf in leaves(value)}
        result = _Move(device, streams.send)(value)
        made = [leaf for leaf in leaves(result) if is_tensor(leaf) and id(leaf) not in here]
        return result, Arrival(streams, made)


class _Move:
    """One value on its way: called with a part of it, returns the part on the device.

    Args:
        device: where to.
        send: a tensor of elsewhere to its copy there.
    """

    def __init__(self, device: torch.device, send: Callable[[Tensor], Tensor]) -> None:
        self._device, self._send = device, send
        # By identity: the part, which so stays alive, and what became of it.
        self._done: dict[int, tuple[object, Any]] = {}

    def __call__(self, item: Any) -> Any:
        _, result = self._done.get(id(item), (None, None))
        if result is _UNDERWAY:
            raise TypeError(f"a {_name(item)} that contains itself cannot be moved to another device")
        if result is None:
            if not self._has_tensors_elsewhere(item):
                return item
            self._done[id(item)] = item, _UNDERWAY
            result = self._send(item) if is_tensor(item) else self._rebuilt(item)
            self._done[id(item)] = item, result
        return result

    def _has_tensors_elsewhere(self, item: Any) -> bool:
        if is_tensor(item):
            return bool(item.device != self._device)
        return any(is_tensor(leaf) and leaf.device != self._device for leaf in leaves(item))

    def _rebuilt(self, item: Any) -> Any:
        if callable(getattr(type(item), "to", None)):
            return self._moved_by_itself(item)
        if isinstance(item, tuple) and hasattr(item, "_make"):
            return item._make([self(part) for part in item])
        if isinstance(item, tuple | set | frozenset) or type(item) is list:
            return _made_like(item, [self(part) for part in item])
        if isinstance(item, list | deque):
            return _filled(copy.copy(item), enumerate([self(part) for part in item]))
        if isinstance(item, Mapping):
            parts = {name: self(part) for name, part in item.items()}
            is_plain = type(item) is dict or not isinstance(item, MutableMapping)
            return _made_like(item, parts) if is_plain else _filled(copy.copy(item), parts.items())
        if is_dataclass(item):
            return self._rebuilt_dataclass(item)
        raise _unmovable(item)

    def _rebuilt_dataclass(self, item: Any) -> Any:
        names = [*getattr(item, "__dict__", ()), *(field.name for field in fields(item))]  # some lack the one or other
        parts = {name: self(getattr(item, name)) for name in names if hasattr(item, name)}
        twin = copy.copy(item)
        for name, part in parts.items():
            object.__setattr__(twin, name, part)  # frozen ones, too
        return twin

    def _moved_by_itself(self, item: Any) -> Any:
        """By its method, on a twin: some, such as modules, change themselves. What stays behind does so on purpose."""
        import torch

        if isinstance(item, torch.nn.Module):
            item = copy.deepcopy(item)
        elif not isinstance(item, tuple):
            item = copy.copy(item)
        return item.to(self._device)


class _TracedMove(_Move):
    """In a graph, where tracers know neither identities nor copies: an object met twice becomes two, which the graph
    makes one again; an opaque one stays where it is, since nothing can look for tensors in it; and a dataclass is
    initialised anew.
    """

    def __call__(self, item: Any) -> Any:
        if is_tensor(item):
            return self._send(item)
        if item is None or isinstance(item, str | int | float):  # or older tracers give up
            return item
        has_parts = isinstance(item, tuple | list | deque | set | frozenset | Mapping) or is_dataclass(item)
        return self._rebuilt(item) if has_parts or callable(getattr(type(item), "to", None)) else item

    def _rebuilt_dataclass(self, item: Any) -> Any:
        return type(item)(**{field.name: self(getattr(item, field.name)) for field in fields(item) if field.init})

    def _moved_by_itself(self, item: Any) -> Any:
        return item.to(self._device)  # it was made in this graph, for nobody else


def _made_like(item: Any, parts: object) -> Any:
    try:
        return type(item)(parts)
    except TypeError as error:
        raise _unmovable(item) from error


def _filled(container: Any, parts: Iterable[tuple[Any, Any]]) -> Any:
    for name, part in parts:
        container[name] = part
    return container


def _unmovable(item: object) -> TypeError:
    return TypeError(
        f"there are tensors in a {_name(item)}, which cannot be moved to another device: "
        "give it a method to(device) that returns the moved object, or make it a dataclass"
    )


def _name(item: object) -> str:
    return f"{type(item).__module__}.{type(item).__qualname__}"


def _looked_up(device: object) -> torch.device:
    try:
        import torch
    except ImportError as error:
        raise ImportError('device= needs PyTorch: pip install "dilated-pattern-cache[torch]"') from error

    if not isinstance(device, torch.device | str):
        raise TypeError(f"device: expected a torch.device or the name of one, got {device!r}")
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected the name of one, got {device!r}") from error
    if named.type == "meta":
        raise ValueError("device: expected one with memory, got 'meta'")
    is_cpu = named.type == "cpu"
    place = torch.device("cpu") if is_cpu else torch.device(named.type, _index(named))
    if is_cpu or place == named:
        _known[device] = place
    return place


def _index(device: torch.device) -> int:
    """The index it has or stands for, of those that there are."""
    import torch

    try:
        backend = torch.get_device_module(device.type)
    except RuntimeError:  # this build knows its name alone
        count, current = 0, 0
    else:
        count = backend.device_count()
        current = backend.current_device() if count and hasattr(backend, "current_device") else 0
    index = current if device.index is None else device.index
    if index >= count:
        raise RuntimeError(f"the device {str(device)!r} is not available: PyTorch sees {count} of its kind")
    return index
