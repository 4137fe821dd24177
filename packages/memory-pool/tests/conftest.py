"""Settings and fixtures of all tests: a pool over every backend in both modes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, Literal, TypeAlias

import hypothesis
import pytest
import torch
from fake_device import FakeBackend, FakeDevice
from hypothesis.database import DirectoryBasedExampleDatabase

from dilated_memory_pool import MemoryPool
from dilated_memory_pool.backends import Backend, HostBackend

# Nothing about time: a first call warms caches, and machines are busy. Derandomised, so that a red run is red again.
hypothesis.settings.register_profile(
    "dilated",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=True,
    print_blob=True,
)
hypothesis.settings.load_profile("dilated")
# Of tests marked fuzz: new examples at every run, and first those of old failures.
hypothesis.settings.register_profile(
    "fuzz",
    hypothesis.settings.get_profile("dilated"),
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "2000")),
    derandomize=False,
    database=DirectoryBasedExampleDatabase(".hypothesis/examples"),
)

# On tensors this small a second thread only waits for the first, and where processors are shared it waits for long.
torch.set_num_threads(1)

Mode: TypeAlias = Literal["lightweight", "full"]
MakePool: TypeAlias = Callable[..., MemoryPool]

MODES: tuple[Mode, ...] = ("lightweight", "full")
BACKENDS: dict[str, Callable[[], str | Backend]] = {
    "host": HostBackend,
    "addressable": lambda: FakeBackend(FakeDevice()),
    "opaque": lambda: FakeBackend(FakeDevice(), addressable=False),
    "pinned": lambda: "pinned",
    "cupy": lambda: "cupy",
    "torch": lambda: "torch",
}
ON_A_GPU = ("pinned", "cupy", "torch")
SMALL_ARENA = "256KiB"  # so that full mode needs more than one


def make_pool(make_backend: Callable[[], str | Backend], mode: Mode, /, **options: Any) -> MemoryPool:
    """A pool that takes tensors of any size. ``options`` are those of ``MemoryPool``, ``backend`` included."""
    if mode == "full":
        options.setdefault("arena_bytes", SMALL_ARENA)
    options.setdefault("min_bytes", 0)
    return MemoryPool(options.pop("backend", None) or make_backend(), mode=mode, **options)


def on_every_backend() -> list[Any]:
    """Parameters (backend, mode), named like host-full."""
    return [
        pytest.param((BACKENDS[name], mode), id=f"{name}-{mode}", marks=[pytest.mark.gpu] if name in ON_A_GPU else [])
        for name, mode in product(BACKENDS, MODES)
    ]


@pytest.fixture(params=on_every_backend())
def make(request: pytest.FixtureRequest) -> MakePool:
    """Makes pools over one backend in one mode; takes the options of ``MemoryPool``."""
    backend, mode = request.param
    if request.node.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        if "cupy" in request.node.callspec.id:
            pytest.importorskip("cupy")
    return partial(make_pool, backend, mode)


@pytest.fixture
def pool(make: MakePool) -> MemoryPool:
    """A pool over one backend in one mode."""
    return make()


@pytest.fixture(params=MODES)
def make_on_host(request: pytest.FixtureRequest) -> MakePool:
    """As ``make``, on the host alone: for what does not depend on the backend."""
    return partial(make_pool, HostBackend, request.param)


@pytest.fixture(params=["cupy", "torch"])
def make_on_gpu(request: pytest.FixtureRequest) -> Iterator[MakePool]:
    """Makes pools of a real device's memory. For tests marked gpu."""
    if request.param == "cupy":
        pytest.importorskip("cupy")
    torch.cuda.init()
    yield lambda **options: MemoryPool(request.param, min_bytes=0, **options)
    torch.cuda.synchronize()


@pytest.fixture
def pinned() -> Iterator[MemoryPool]:
    """A pool of page-locked memory. For tests marked gpu."""
    yield MemoryPool("pinned", min_bytes=0)
    torch.cuda.synchronize()


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """What exists before a file's first test is no business of the collector: torch alone is some hundred thousand
    objects, and a pool that is full collects before it refuses.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """When the interpreter ends, libraries look for what they leak: what is frozen would seem to be."""
    gc.unfreeze()


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Nothing is collected but by ``gc.collect()``, which is quick: what exists now it need not walk."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def eager_gc() -> Iterator[None]:
    """The garbage collector runs at every opportunity, inside the pool's own code too."""
    threshold = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(1)
    yield
    gc.set_threshold(*threshold)
