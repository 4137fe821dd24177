"""Run by the Python of a clean environment: what is installed there is what was meant, and works. Stdlib only.

python -I inside.py '{"name": ..., "versions": {...}, "modules": [...], "apart": [...], "readme": ...}'
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any


def check(asked: dict[str, Any]) -> list[str]:
    """What went wrong, each as a line and a traceback.

    Args:
        asked: name of the distribution; versions that are expected, by distribution; modules to import; apart: modules
            below which nothing is imported, since their extra is not installed; readme: code to run, or None.
    """
    found = []
    for name, version in asked["versions"].items():
        if metadata.version(name) != version:
            found.append(f"expected {name} {version}, found {metadata.version(name)}")

    def attempt(what: str, step: Callable[[], object]) -> None:
        try:
            step()
        except (Exception, SystemExit):
            found.append(f"{what}\n{traceback.format_exc().rstrip()}")

    for module in asked["modules"]:
        attempt(f"import {module}", partial(importlib.import_module, module))
    for entry in metadata.distribution(asked["name"]).entry_points:
        if not any(f"{entry.module}.".startswith(f"{module}.") for module in asked["apart"]):
            attempt(f"entry point {entry.group}: {entry.name} = {entry.value}", entry.load)
    if asked["readme"] is not None:
        code = compile(asked["readme"], "README.md", "exec")
        attempt("the first example of README.md", lambda: exec(code, {"__name__": "__main__"}))
    return found


if __name__ == "__main__":
    wrong = check(json.loads(sys.argv[1]))
    print("\n".join(wrong))
    sys.exit(bool(wrong))
