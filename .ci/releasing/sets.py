"""Which versions of this repository's packages a package is installed with: the lowest it allows, and the newest.

A pure function of the tags and the working tree. What other projects provide is constraints.txt's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from releasing.repository import Release, Repository

_Seen = frozenset[tuple[str, frozenset[str]]]


class NoSetError(ValueError):
    """No versions of this repository's packages satisfy all requirements at once."""


def extras_within(repository: Repository, package: Release) -> set[str]:
    """The extras that ask for another package of this repository, and for nothing else."""
    found = set()
    for extra, lines in package.extras.items():
        names = {canonicalize_name(Requirement(line).name) for line in lines}
        if names and names <= repository.packages.keys() - {package.name}:
            found.add(extra)
    return found


def choose(
    repository: Repository, package: Release, asked: Iterable[Requirement], *, lowest: bool
) -> dict[str, Release]:
    """A version of `package`'s candidate and of every package of this repository that it needs, however indirectly.

    Args:
        asked: what is installed: the package itself, with its extras, and what its examples need.
        lowest: the lowest that all requirements allow, instead of the newest. A package that is asked for first, as a
            direct dependency is, has its choice before the ones it brings.

    Raises:
        NoSetError: there is none.
    """
    found = _extend(repository, {package.name: package}, _within(repository, asked), frozenset(), lowest=lowest)
    if found is None:
        wanted = ", ".join(f"{one.name}{one.specifier}" for one in _within(repository, package.requirements()))
        have = "; ".join(
            f"{name} {', '.join(map(str, sorted(repository.versions(name))))}"
            for name in repository.packages
            if name != package.name
        )
        raise NoSetError(
            f"{package.folder}: expected versions that satisfy {wanted} and what those ask for, found none among "
            f"{have}: widen a range, here or in a new release of what is in the way"
        )
    return found


def _within(repository: Repository, lines: Iterable[Requirement]) -> list[Requirement]:
    applying = [one for one in lines if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [one for one in applying if canonicalize_name(one.name) in repository.packages]


def closure(repository: Repository, chosen: Mapping[str, Release], asked: Iterable[Requirement]) -> set[str]:
    """The packages of this repository that `asked` brings, by the versions that are chosen; none further."""
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    pending = _within(repository, asked)
    while pending:
        one = pending.pop()
        name, extras = canonicalize_name(one.name), frozenset(one.extras)
        found.add(name)
        if name in chosen and (name, extras) not in seen:
            seen.add((name, extras))
            pending += _within(repository, chosen[name].requirements(extras))
    return found


def _extend(
    repository: Repository, chosen: dict[str, Release], pending: list[Requirement], seen: _Seen, *, lowest: bool
) -> dict[str, Release] | None:
    """Choose for the first pending requirement, then for the rest; go back where the rest cannot be met."""
    if not pending:
        return chosen
    first, rest = pending[0], pending[1:]
    name, extras = canonicalize_name(first.name), frozenset(first.extras)
    versions = {chosen[name].version: chosen[name]} if name in chosen else repository.versions(name)
    for version in sorted(versions, reverse=not lowest):
        if first.specifier.contains(version, prereleases=True):
            one = versions[version]
            brings = [] if (name, extras) in seen else _within(repository, one.requirements(extras))
            further = (repository, {**chosen, name: one}, [*rest, *brings], seen | {(name, extras)})
            found = _extend(*further, lowest=lowest)
            if found is not None:
                return found
    return None
