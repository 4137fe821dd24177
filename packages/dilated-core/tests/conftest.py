"""Settings for all tests of dilated-core."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch
from hypothesis.database import DirectoryBasedExampleDatabase

# Without a card, Triton's programs are interpreted. It is decided when they are imported, so before any test.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Some matrix products on a card are deterministic only with this, which is read when the first of them starts.
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
