"""The interface of a package as text, a line for each name with its parameters: what a change of it changes.

It has two readers. Users rely on what docs/reference documents. The other packages of this repository, each with a
version of its own, rely on what they import; that is listed too, though it is promised to nobody else.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
# Of a directive that documents something: its kind, what it names, and the members of a module ("" for all of them).
DIRECTIVE = re.compile(r"^\.\. (auto\w+|currentmodule|py:data):: ([\w.]+)$(?:\n +:members:(.*)$)?", re.MULTILINE)
FOLDERS = sorted(pyproject.parent.name for pyproject in ROOT.glob("packages/*/pyproject.toml"))


def describe(folder: str) -> str:
    """The interface of the package in packages/FOLDER: what is documented, then what its sisters import besides."""
    public = documented(folder)
    blocks = [_block(module, names) for module, names in sorted(public.items())]
    inside = {
        module: names - public.get(module, set()) - _offered(folder) for module, names in imported(folder).items()
    }
    blocks += [_block(f"{module} (for the other packages)", names) for module, names in sorted(inside.items()) if names]
    return "\n".join(blocks)


def documented(folder: str) -> dict[str, set[str]]:
    """The names that a package's reference page documents, by module.

    Where ``automodule`` has ``:members:`` without a list, these are all that the module offers.
    """
    page = (REFERENCE / f"{folder}.md").read_text()
    names: dict[str, set[str]] = defaultdict(set)
    here = ""
    for directive, named, members in DIRECTIVE.findall(page):
        if directive == "currentmodule":
            here = named
        elif directive == "automodule":
            here = named
            names[here] |= set(re.findall(r"\w+", members)) or public_names(importlib.import_module(here))
        else:
            module, _, name = named.rpartition(".")
            names[module or here].add(name)
    return dict(names)


def public_names(module: ModuleType) -> set[str]:
    """What a module offers: ``__all__``, or what it defines under names without an underscore."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__]
    return {name for name in names if not name.startswith("_") and not inspect.ismodule(getattr(module, name))}


def import_names(folder: str) -> list[str]:
    """The import packages of packages/FOLDER."""
    return sorted(path.parent.name for path in (ROOT / "packages" / folder / "src").glob("*/__init__.py"))


def imported(folder: str) -> dict[str, set[str]]:
    """What the other packages' sources import of this one, by module."""
    names: dict[str, set[str]] = defaultdict(set)
    for other in FOLDERS:
        paths = (ROOT / "packages" / other / "src").rglob("*.py") if other != folder else []
        for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in import_names(folder):
                module = importlib.import_module(str(node.module))
                found = {alias.name for alias in node.names}
                names[module.__name__] |= {name for name in found if not inspect.ismodule(getattr(module, name, None))}
    return dict(names)


def _offered(folder: str) -> set[str]:
    """Every name that the top of the package offers, from wherever its sisters import it."""
    return {name for top in import_names(folder) for name in public_names(importlib.import_module(top))}


def _block(title: str, names: set[str]) -> str:
    """A module and its names, indented."""
    module = importlib.import_module(title.split(" ")[0])
    lines = [line for name in sorted(names) for line in _describe(name, getattr(module, name))]
    return "\n".join([f"{title}:", *(f"    {line}" for line in lines)]) + "\n"


def _describe(name: str, thing: Any) -> Iterator[str]:
    """One public thing: a line, and for a class one for each public member that is its own."""
    if inspect.isclass(thing):
        bases = [base.__name__ for base in thing.__bases__ if base is not object]
        yield f"class {name}({', '.join(bases)})" if bases else f"class {name}"
        if issubclass(thing, enum.Enum):
            yield from (f"    {member.name}" for member in thing)
        elif not getattr(thing, "_is_protocol", False):
            yield f"    __init__{_parameters(thing)}"
        yield from (f"    {line}" for line in _members(thing))
    elif get_origin(thing) is not None:
        yield f"{name} = {re.sub(r'[a-z_]+[.]', '', str(thing))}"
    elif callable(thing):
        yield f"{name}{_parameters(thing)}"
    else:
        yield f"{name}: {type(thing).__name__}"


def _members(owner: type) -> Iterator[str]:
    """Public methods and properties that ``owner`` has from this repository, not from Python or torch."""
    mine = [cls for cls in reversed(owner.__mro__) if cls.__module__.startswith("dilated_")]
    found = {name: member for cls in mine for name, member in vars(cls).items() if not name.startswith("_")}
    for name in sorted(found):
        member = found[name]
        if isinstance(member, (classmethod, staticmethod)):
            yield f"{type(member).__name__} {name}{_parameters(getattr(owner, name))}"
        elif inspect.isfunction(member):
            yield f"{name}{_parameters(member)}"
        elif isinstance(member, property) or hasattr(member, "__get__"):
            yield name


def _parameters(thing: Any) -> str:
    """Names, kinds and defaults, as in a call; types are the type checker's concern."""
    try:
        signature = inspect.signature(thing)
    except ValueError:  # a builtin's: whatever its base takes
        return "(...)"
    empty = inspect.Parameter.empty
    bare = [parameter.replace(annotation=empty) for parameter in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text)
