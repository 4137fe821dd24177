"""Which backend serves a pool, and why."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from dilated_memory_pool.backends.base import Backend
from dilated_memory_pool.backends.host import HostBackend


def choose(backend: str | Backend, device: int | None) -> tuple[Backend, str]:
    """The backend, and a sentence that says why it is this one.

    Args:
        backend: "auto", a name, or a backend, which is returned as it is.
        device: index of a CUDA device; None for the current one. Only for backends given by a name of a device's.

    Raises:
        ValueError: the name is unknown, or ``device`` does not go with it.
        ImportError: what the named backend needs is not installed.
        RuntimeError: it is installed and finds no device.
    """
    if not isinstance(backend, str):
        if device is not None:
            raise ValueError(f"device: expected None beside a backend object, got {device} beside {backend!r}")
        return backend, f"backend: {backend.name}, as given"
    makers: dict[str, Callable[[], Backend]] = {
        "host": HostBackend,
        "pinned": lambda: _pinned(device),
        "cupy": lambda: _cupy(device),
        "torch": lambda: _torch(device),
    }
    if backend == "auto":
        name, why = _best()
        return (makers[name]() if name != "host" or device is None else _refuse_device(device)), (
            f"backend: {name}, because {why}"
        )
    if backend not in makers:
        raise ValueError(f"backend: expected one of {['auto', *makers]} or a backend object, got {backend!r}")
    if backend == "host" and device is not None:
        _refuse_device(device)
    return makers[backend](), f"backend: {backend}, as asked"


def _refuse_device(device: int) -> Backend:
    raise ValueError(f"device: expected None for memory of the host, got {device}")


def _best() -> tuple[str, str]:
    """(name, why) of what "auto" stands for: CuPy's device memory, else PyTorch's, else the host's."""
    if find_spec("cupy") is None:
        no_cupy = "CuPy is not installed"
    else:
        import cupy

        if cupy.is_available():
            return "cupy", "CuPy is installed and finds a CUDA device"
        no_cupy = "CuPy finds no CUDA device"
    if find_spec("torch") is None:
        return "host", f"{no_cupy} and PyTorch is not installed"
    import torch

    if torch.cuda.is_available():
        return "torch", f"{no_cupy} and PyTorch finds a CUDA device"
    return "host", f"{no_cupy} and PyTorch finds no CUDA device"


def _pinned(device: int | None) -> Backend:
    from dilated_memory_pool.backends.pinned import PinnedBackend

    return PinnedBackend(device)


def _cupy(device: int | None) -> Backend:
    from dilated_memory_pool.backends.cupy import CupyBackend

    return CupyBackend(device)


def _torch(device: int | None) -> Backend:
    from dilated_memory_pool.backends.torch import TorchBackend

    return TorchBackend(device)
