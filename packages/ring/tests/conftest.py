"""Settings for all tests of dilated-ring."""

from __future__ import annotations

import gc
import os

import hypothesis
import pytest
import torch
from hypothesis.database import DirectoryBasedExampleDatabase

# Without it matrix products on CUDA are refused as not deterministic, see below; cuBLAS reads it when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

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


def pytest_collection_finish() -> None:
    """What was imported is no garbage: collections look at what tests made, and take milliseconds."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """At its end Python may take down all that there is."""
    gc.unfreeze()


# On tensors this small a second thread only waits for the first, and where processors are shared it waits for long.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> object:
    """Fill every torch.empty with NaN, so that a place never written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
