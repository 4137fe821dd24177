"""What the tests of the factory share: no profile of the user's, and an environment without the other packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from dilated_factory import profile, registry

OTHERS = ("dilated_ring", "dilated_block_sparse")


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
