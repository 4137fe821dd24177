"""Which attention types exist: those this project knows, and those that installed distributions register.

A distribution registers a type with an entry point of the group "dilated.attention", whose target is an
object with the two builders of ``dilated_factory.types.AttentionType``. Nothing is imported until a type is
asked for. Imports the standard library only.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from dilated_factory.types import AttentionType

GROUP = "dilated.attention"
AUTO = "auto"
_FACTORY = "dilated-factory"


@dataclass(frozen=True)
class KnownType:
    """A type of this project: the distribution that provides it, and the factory's extra that brings that.

    ``beside`` is a distribution that the type needs and its own does not always bring.
    """

    distribution: str
    extra: str = ""
    beside: str = ""


KNOWN = {
    "standard": KnownType(_FACTORY),
    "improved": KnownType(_FACTORY),
    "ring": KnownType("dilated-ring", "ring"),
    "distributed": KnownType("dilated-ring", "ring"),
    "block_sparse": KnownType("dilated-block-sparse", "block-sparse"),
    "block_sparse_ring": KnownType("dilated-block-sparse", "block-sparse,ring", beside="dilated-ring"),
}


def _module(distribution: str) -> str:
    """The import package of one of this project's distributions."""
    return distribution.replace("-", "_")


# What the project's own metadata registers, for source trees on PYTHONPATH, which have no metadata.
_SOURCE_TREES = tuple(
    (EntryPoint(name, f"{_module(known.distribution)}.types:{name}", GROUP), known.distribution)
    for name, known in KNOWN.items()
)


class NotInstalledError(ImportError):
    """What was asked for by name needs a distribution that cannot be used here; the message says which."""


@dataclass(frozen=True)
class Registration:
    """One usable type: its entry point's target, who registered it, and who else did and lost."""

    name: str
    target: str
    distribution: str
    version: str | None
    outvoted: tuple[str, ...] = ()


def install_command(name: str) -> str:
    """Return the command that installs a known type.

    >>> install_command("ring")
    'pip install "dilated-factory[ring]"'
    """
    extra = KNOWN[name].extra
    return f'pip install "{_FACTORY}[{extra}]"' if extra else f"pip install {_FACTORY}"


def installed() -> dict[str, Registration]:
    """Return the usable types by name, the project's own first; only metadata is read, nothing is imported.

    Where several distributions register one name, the one this project names as its provider wins, otherwise the first
    in alphabetical order; a UserWarning says so, and another that a registration of "auto" is ignored. A type of this
    project that needs a distribution which is missing is left out.

    >>> list(installed())[:2]
    ['standard', 'improved']
    """
    candidates: dict[str, list[Registration]] = {}
    for entry, distribution, version in _entry_points():
        if entry.name in KNOWN and distribution == KNOWN[entry.name].distribution and _missing(entry.name):
            continue
        candidates.setdefault(entry.name, []).append(Registration(entry.name, entry.value, distribution, version))

    found = {name: _elect(name, candidates[name]) for name in _ordered(candidates) if name != AUTO}
    for registration in found.values():
        if registration.outvoted:
            warnings.warn(
                f'attention type "{registration.name}" is registered by {registration.distribution} and by '
                f"{' and '.join(registration.outvoted)}; {registration.distribution} wins",
                stacklevel=2,
            )
    for registration in candidates.get(AUTO, ()):
        warnings.warn(
            f'attention type "{AUTO}" is registered by {registration.distribution}, which is ignored: '
            "the name is the factory's own",
            stacklevel=2,
        )
    return found


def check_name(name: object, usable: dict[str, Registration]) -> None:
    """Raise unless ``name`` is "auto" or one of the ``usable`` types.

    Raises:
        TypeError: it is no str.
        NotInstalledError: a known type that is not installed.
        ValueError: any other; the message lists the names, and says which is the nearest.
    """
    if not isinstance(name, str):
        raise TypeError(f"attention_type: expected a str, got {name!r} of type {type(name).__name__}")
    if name == AUTO or name in usable:
        return
    if name in KNOWN:
        registered = any(entry.name == name for entry, _, _ in _entry_points())
        lacking = f"needs {_missing(name)}" if registered else f"is provided by {KNOWN[name].distribution}"
        raise NotInstalledError(f'attention_type: "{name}" {lacking}, which is not installed: {install_command(name)}')
    names = [AUTO, *KNOWN, *(extra for extra in usable if extra not in KNOWN)]
    word = name.lower().replace("-", "_")
    # A slip of the hand first; then "ring_attention", which means ring; then whatever is like it.
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.8)
    near = near or sorted((one for one in names if one in word), key=len)[-1:]
    near = near or difflib.get_close_matches(word, names, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    raise ValueError(f"attention_type: expected one of {names}, got {name!r}{hint}")


def load(registration: Registration) -> AttentionType:
    """Import one registered type.

    Raises:
        ImportError: its target cannot be imported; the message names who registered it.
        TypeError: it lacks a builder; the same.

    >>> load(installed()["improved"]).multihead.func.__name__
    'MultiheadDilatedAttention'
    """
    who = f'attention type "{registration.name}" of {registration.distribution} ({registration.target})'
    try:
        loaded = EntryPoint(registration.name, registration.target, GROUP).load()
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{who} cannot be imported: {error}") from error
    for builder in ("attention", "multihead"):
        if not callable(getattr(loaded, builder, None)):
            raise TypeError(f"{who}: expected callables attention and multihead, {builder} is none")
    return cast("AttentionType", loaded)


def _missing(name: str) -> str:
    """The distribution beside its own that a known type needs and that is not here; "" where there is none."""
    beside = KNOWN[name].beside
    return beside if beside and importlib.util.find_spec(_module(beside)) is None else ""


def _entry_points() -> tuple[tuple[EntryPoint, str, str | None], ...]:
    """Every entry point of the group with its distribution's name and version."""
    # Reading all metadata takes milliseconds, and a model asks once a layer. Installing anything changes the
    # time of a folder on the path, so nothing is missed.
    return _read_entry_points(tuple((folder, _changed(folder)) for folder in sys.path))


def _changed(folder: str) -> int | None:
    try:
        return os.stat(folder or os.curdir).st_mtime_ns
    except OSError:
        return None


@lru_cache(maxsize=1)
def _read_entry_points(
    path: tuple[tuple[str, int | None], ...],
) -> tuple[tuple[EntryPoint, str, str | None], ...]:
    rows: list[tuple[EntryPoint, str, str | None]] = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        distribution = entry.dist
        name = re.sub(r"[-_.]+", "-", distribution.name).lower() if distribution else "(unnamed)"
        rows.append((entry, name, distribution.version if distribution else None))
    with_metadata = {name for _, name, _ in rows}
    for source_tree, provider in _SOURCE_TREES:
        if provider not in with_metadata and importlib.util.find_spec(_module(provider)) is not None:
            rows.append((source_tree, provider, None))
    return tuple(rows)


def _ordered(names: dict[str, list[Registration]]) -> list[str]:
    known = [name for name in KNOWN if name in names]
    return known + sorted(name for name in names if name not in KNOWN)


def _elect(name: str, candidates: list[Registration]) -> Registration:
    provider = KNOWN[name].distribution if name in KNOWN else ""
    first, *rest = sorted(candidates, key=lambda one: (one.distribution != provider, one.distribution, one.target))
    outvoted = tuple(other.distribution for other in rest)
    return Registration(name, first.target, first.distribution, first.version, outvoted)
