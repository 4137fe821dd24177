"""Settings of all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from hypothesis.database import DirectoryBasedExampleDatabase

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


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """What exists before a file's first test is no business of the collector: torch alone is very much of it."""
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
    """The garbage collector runs at every opportunity, inside the cache's own code too."""
    threshold = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(1)
    yield
    gc.set_threshold(*threshold)
