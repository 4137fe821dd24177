"""Weights by name: which there are, which are tied, whether they can be written, and putting others in their place.

May import torch only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes of weights, by safetensors' names."""

_DRAWS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
"""What weights are drawn by; of torch.nn.init, the functions that a TorchFunctionMode sees whole."""


class Unfilled(TorchFunctionMode):
    """Draw no initial weights: those in a file are to come in their place, and memory untouched costs nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See torch.overrides.TorchFunctionMode."""
        kwargs = kwargs or {}
        if func in _DRAWS:
            drawn = args[0] if args else kwargs["tensor"]
            if isinstance(drawn, nn.Parameter):  # what is no parameter may be in no file
                return drawn
        return func(*args, **kwargs)


def check_tensors(state: Mapping[str, object]) -> None:
    """Raise TypeError or ValueError for what cannot be written."""
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or type(tensor) is not Tensor:
            raise TypeError(
                f"{name}: expected a plain tensor, got {type(tensor).__name__}; gather a sharded model first"
            )
        if tensor.is_meta:
            raise ValueError(f"{name}: expected a weight with values, got one on the meta device")
        if tensor.dtype not in DTYPES.values():
            raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")


def dtypes_of(path: Path, parts: Mapping[str, Any]) -> list[torch.dtype]:
    """Of all weights. Raises ValueError for one that no weight has."""
    for name, part in parts.items():
        if part.get_dtype() not in DTYPES:
            raise ValueError(f"{path}: {name}: expected one of {', '.join(DTYPES)}, got {part.get_dtype()}")
    return [DTYPES[part.get_dtype()] for part in parts.values()]


def ties_of(model: nn.Module) -> dict[str, str]:
    """Name of each parameter that is another one's too -> the first name of it."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            ties[name] = known
    return ties


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the weight of that name; a parameter, such as those that are tied, as it is."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(getattr(module, attribute), nn.Parameter) and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor)
    setattr(module, attribute, tensor)


def compare(what: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError that names the missing, the unexpected and the mis-shaped weights."""
    faults = []
    if missing := [name for name in expected if name not in found]:
        faults.append(f"missing weights: {_some(missing)}")
    if unexpected := [name for name in found if name not in expected]:
        faults.append(f"unexpected weights: {_some(unexpected)}")
    shapes = [
        f"{name}: expected {shape}, got {found[name]}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if shapes:
        faults.append(f"weights of another shape: {_some(shapes)}")
    if faults:
        raise ValueError(f"{what}: {'; '.join(faults)}")


def _some(names: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
