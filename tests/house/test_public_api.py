"""The interface of each package is the one listed in public_api/, so that a change of it is deliberate."""

from __future__ import annotations

import importlib
from difflib import unified_diff
from pathlib import Path

import pytest
from public_api import FOLDERS, REFERENCE, describe, documented, import_names, public_names

LISTS = Path(__file__).parent / "public_api"


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_interface_is_the_one_that_is_listed(folder: str, request: pytest.FixtureRequest) -> None:
    listed = LISTS / f"{folder}.txt"
    found = describe(folder)
    if request.config.getoption("--write-public-api"):
        listed.write_text(found)
    before = listed.read_text()
    changes = "\n".join(unified_diff(before.splitlines(), found.splitlines(), "listed", "found", lineterm="", n=1))
    assert found == before, (
        f"the interface of {folder} is not the one listed; if that is meant, say so in its CHANGELOG and run\n"
        f"nox -s house -- --write-public-api\n{changes}"
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_reference_documents_all_that_the_package_offers(folder: str) -> None:
    public = documented(folder)
    for top in import_names(folder):
        offered = public_names(importlib.import_module(top))
        names = {name for module, names in public.items() if module.startswith(top) for name in names}
        assert offered <= names, f"docs/reference/{folder}.md lacks {', '.join(sorted(offered - names))}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_documented_exists(folder: str) -> None:
    for module, names in documented(folder).items():
        lacking = [name for name in sorted(names) if not hasattr(importlib.import_module(module), name)]
        assert not lacking, f"docs/reference/{folder}.md names {module}.{', '.join(lacking)}"


def test_every_package_has_a_list_and_a_reference() -> None:
    assert sorted(path.stem for path in LISTS.glob("*.txt")) == FOLDERS
    assert sorted(path.stem for path in REFERENCE.glob("*.md")) == FOLDERS
