"""What the tests of the factory share: no profile of the user's, and an environment without the other packages."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis.database import DirectoryBasedExampleDatabase

from dilated_factory import profile, registry

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
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

OTHERS = ("dilated_ring", "dilated_block_sparse")


def pytest_collection_finish() -> None:
    """What is imported stays, so the many collections that tests ask for need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """When the interpreter ends, libraries look for what they leak: what is frozen would seem to be."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_profile_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(profile.VARIABLE, "off")


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the ring and block-sparse packages were not installed; what a test puts into its folder is."""
    entry_points, find_spec = importlib.metadata.entry_points, importlib.util.find_spec

    def is_there(entry: importlib.metadata.EntryPoint) -> bool:
        distribution = entry.dist
        if distribution is None or distribution.name.replace("-", "_") not in OTHERS:
            return True
        return Path(str(distribution.locate_file(""))).is_relative_to(tmp_path)

    def found(name: str, package: str | None = None) -> ModuleSpec | None:
        spec = find_spec(name, package)
        if name not in OTHERS or spec is None:
            return spec
        return spec if spec.origin and Path(spec.origin).is_relative_to(tmp_path) else None

    def listed(**which: Any) -> Any:
        return [entry for entry in entry_points(**which) if is_there(entry)]

    monkeypatch.setattr(importlib.metadata, "entry_points", listed)
    monkeypatch.setattr(importlib.util, "find_spec", found)
    registry._read_entry_points.cache_clear()
    yield
    registry._read_entry_points.cache_clear()
