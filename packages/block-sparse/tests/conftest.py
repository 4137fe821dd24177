"""Settings for all tests of dilated-block-sparse."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# Without it matrix products on CUDA are refused as not deterministic, see below; cuBLAS reads it when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# No deadlines: a first call warms caches. Derandomised, so that a red run is red again.
hypothesis.settings.register_profile("dilated", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("dilated")

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
