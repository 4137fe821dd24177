"""A model in a folder: its constructor's arguments as config.json, its weights as model.safetensors.

Nothing is pickled, and nothing of a file is run. May import torch, the factory's hardware and this package's weights;
safetensors inside functions, as it is optional.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import math
import os
import secrets
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from dilated_factory.hardware import Hardware
from dilated_factory.models.weights import DTYPES, Unfilled, assign, check_tensors, compare, dtypes_of, ties_of

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

FORMAT = "dilated-factory model"
FORMAT_VERSION = 1

FIELDS = ("format", "format_version", "class", "dilated_factory", "save_id", "arguments")

MACHINE_MATTERS = frozenset(
    {
        "allocator",
        "buffer_manager",
        "device",
        "dtype",
        "enable_memory_pool",
        "enable_pattern_cache",
        "fp32_precision",
        "group",
        "hardware",
        "kernel",
        "lightweight_pool",
        "patterns",
        "policy",
        "profile",
        "resources",
    }
)
"""Arguments that say how a machine computes, not what: left out, and given again where a model is loaded."""

Model = TypeVar("Model", bound="Pretrained")


class Pretrained(nn.Module):
    """``save_pretrained`` and ``from_pretrained``, for a model that keeps its constructor's arguments."""

    arguments: dict[str, Any]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors into ``folder``, which is made where it is not there.

        Each file is written under another name and then put in its place, so a save that fails leaves the old ones.
        The config holds every argument of the constructor but those that are the machine's affair: device, dtype
        (which is the weights'), kernel, policy, hardware, group, and all about pools and caches. Weights that are tied
        are written once.

        Raises:
            ImportError: safetensors is not installed.
            TypeError: an argument that JSON has no word for, such as a module, or a weight that is no plain tensor.
            ValueError: the weights are not those that the constructor makes from the arguments.
        """
        from_safetensors("torch")
        arguments = {name: _plain(name, value) for name, value in self.arguments.items() if name not in MACHINE_MATTERS}
        save_id = secrets.token_hex(8)
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "class": type(self).__name__,
            "dilated_factory": _version(),
            "save_id": save_id,
            "arguments": arguments,
        }
        check_tensors(state := self.state_dict())
        made = type(self)(**arguments, device="meta", hardware=Hardware("meta"), profile=None)
        self._check_made_like(made)
        ties = ties_of(self)
        weights = {name: tensor.cpu().contiguous() for name, tensor in state.items() if name not in ties}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)

        def write_weights(path: Path) -> None:
            metadata = {"format": "pt", "save_id": save_id}
            from_safetensors("torch").save_file(weights, path, metadata=metadata)

        def write_config(path: Path) -> None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

        _replace({folder / WEIGHTS_FILE: write_weights, folder / CONFIG_FILE: write_config}, save_id)

    @classmethod
    def from_pretrained(  # noqa: PYI019  typing.Self is Python 3.11's
        cls: type[Model],
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> Model:
        """The model that ``save_pretrained`` wrote into ``folder``, in eval mode.

        Weights go to the device one by one, so there is never a second copy of them all; no random number is drawn. The
        attention's kernel, pools and caches are decided for that device as in a model made anew.

        Args:
            folder: holds config.json and model.safetensors.
            device: of the weights; torch's default where None.
            dtype: of the weights; as they were saved where None.
            arguments: of the constructor, in place of the saved ones: dropout=, checkpoint_activations=, policy=, ...

        Raises:
            ImportError: safetensors is not installed.
            FileNotFoundError: one of the files is not there.
            TypeError, ValueError: the files are of another class or version, or do not fit together; the message says
                which field or weight.
        """
        from_safetensors("safe_open")
        if dtype is not None and dtype not in DTYPES.values():
            raise TypeError(f"dtype: expected float64, float32, bfloat16, float16 or None, got {dtype!r}")
        device = torch.empty(0, device=device).device  # with its index, and refused here if there is none
        config_path, path = (Path(folder) / name for name in (CONFIG_FILE, WEIGHTS_FILE))
        config = _read_config(config_path, cls.__name__)
        with _opened(path, config["save_id"]) as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
            dtypes = dtypes_of(path, parts)
            made_in = max(dtypes, key=dtypes.count, default=None) if dtype is None else dtype
            try:
                with Unfilled():
                    model = cls(**{**config["arguments"], **arguments}, device=device, dtype=made_in)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{config_path}: arguments: {error}") from error
            ties = ties_of(model)
            compare(
                str(path),
                {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in ties},
                {name: tuple(part.get_shape()) for name, part in parts.items()},
            )
            for name in parts:
                tensor = file.get_tensor(name)
                # A copy: the file's own tensors lie in the file, which may be written over.
                assign(model, name, tensor.to(device, tensor.dtype if dtype is None else dtype, copy=True))
        for name, first in ties.items():
            assign(model, name, model.get_parameter(first))
        return model.eval()

    def _check_made_like(self, made: nn.Module) -> None:
        """Raise ValueError where the weights are not named, shaped and tied as those of ``made``."""
        compare(
            f"{type(self).__name__}: this model is not what its arguments make",
            {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()},
            {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()},
        )
        if ties_of(self) != ties_of(made):
            raise ValueError(
                f"{type(self).__name__}: expected its weights to be tied as its arguments say, "
                f"{ties_of(made) or 'none'}, got {ties_of(self) or 'none'}"
            )


def defaults_of(made: Callable[..., object], *, leaving_out: Collection[str] = ()) -> dict[str, Any]:
    """The keyword arguments of a constructor that have a default, but for those left out and machine matters.

    >>> defaults_of(lambda size, *, eps=1e-5, device=None: None)
    {'eps': 1e-05}
    """
    left_out = {*leaving_out, *MACHINE_MATTERS}
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(made).parameters.values()
        if parameter.default is not parameter.empty and parameter.name not in left_out
    }


def from_safetensors(name: str) -> Any:
    """``safetensors.<name>``. Raises ImportError, with the extra that brings it, where it cannot be had."""
    try:
        if name == "torch":
            import safetensors.torch as found

            return found
        import safetensors
    except ImportError as error:
        raise ImportError(
            f'models in folders need safetensors ({error}): pip install "dilated-factory[safetensors]"'
        ) from error
    return getattr(safetensors, name)


def _read_config(path: Path, name: str) -> dict[str, Any]:
    """The config of a model of the class ``name``. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the config that save_pretrained writes, found no such file")
    try:
        config: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = repr(config.get("format")) if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: format: expected {FORMAT!r}, got {found}")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version: expected {FORMAT_VERSION}, got {config.get('format_version')!r} "
            f"(written by dilated-factory {config.get('dilated_factory')})"
        )
    for field in FIELDS:
        if field not in config:
            raise ValueError(f"{path}: {field}: expected this field, found none")
    for field in config:
        if field not in FIELDS:
            raise ValueError(f"{path}: {field}: expected one of {', '.join(FIELDS)}")
    if config["class"] != name:
        raise ValueError(f"{path}: class: expected {name}, got {config['class']!r}; call from_pretrained of that class")
    if not isinstance(config["arguments"], dict):
        raise ValueError(f"{path}: arguments: expected an object, got {type(config['arguments']).__name__}")
    for argument in config["arguments"]:
        if argument in MACHINE_MATTERS:
            raise ValueError(f"{path}: arguments: {argument}: expected it to be given to from_pretrained, not saved")
    return config


def _opened(path: Path, save_id: object) -> Any:
    """The file of weights, a context. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the weights that save_pretrained writes, found no such file")
    try:
        file = from_safetensors("safe_open")(path, framework="pt")
    except from_safetensors("SafetensorError") as error:
        raise ValueError(f"{path}: expected a safetensors file: {error}") from error
    found = (file.metadata() or {}).get("save_id")
    if found != save_id:
        raise ValueError(
            f"{path}: save_id: expected {save_id!r}, {CONFIG_FILE}'s, got {found!r}: they were not saved together"
        )
    return file


def _plain(name: str, value: object) -> Any:
    """The value as JSON has it. Raises TypeError or ValueError, with the argument's name."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, to be saved in {CONFIG_FILE}, got {value}")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(f"{name}[{index}]", one) for index, one in enumerate(value)]
    raise TypeError(
        f"{name}: expected None, a bool, a number, a str or a sequence of them, to be saved in {CONFIG_FILE}, "
        f"got {type(value).__name__}"
    )


def _replace(files: Mapping[Path, Callable[[Path], None]], token: str) -> None:
    """Write all files under other names, and only then puts each in its place."""
    written = {path: path.with_name(f".{path.name}.{token}") for path in files}
    try:
        for path, write in files.items():
            write(written[path])
        for path, temporary in written.items():
            os.replace(temporary, path)
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def _version() -> str | None:
    """Of this distribution; None in a source tree that is not installed."""
    try:
        return importlib.metadata.version("dilated-factory")
    except importlib.metadata.PackageNotFoundError:
        return None
