"""Whether version, changelog, tag and requirements agree. Cheap: it reads files and asks git, and builds nothing.

The first heading of a package's CHANGELOG.md names the candidate: `## 0.2.0 (unreleased)` until its release is decided,
`## 0.2.0 (2030-01-31)` from then on. Every heading below it has a tag.
"""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from releasing.repository import Release, Repository

FORM = "## <version> (unreleased) or ## <version> (YYYY-MM-DD)"
_HEADING = re.compile(r"## (?P<version>\S+) \((?P<date>unreleased|\d{4}-\d{2}-\d{2})\)")


class Heading(NamedTuple):
    """One version of a changelog; date is None while it is not released."""

    version: Version
    date: date | None


def headings(text: str) -> list[Heading]:
    """The versions of a changelog, from its first line to its last.

    Raises:
        ValueError: a heading of another form, or none at all.
    """
    found = []
    for line in text.splitlines():
        if line.startswith("## "):
            match = _HEADING.fullmatch(line.rstrip())
            if match is None:
                raise ValueError(f"expected {FORM}, found {line.rstrip()!r}")
            day = None if match["date"] == "unreleased" else date.fromisoformat(match["date"])
            found.append(Heading(version_of(match["version"]), day))
    if not found:
        raise ValueError(f"expected {FORM}, found no heading")
    return found


def version_of(text: str) -> Version:
    """A version in the one spelling that PEP 440 calls normal.

    Raises:
        ValueError: it is no version, or spelled another way.
    """
    try:
        version = Version(text)
    except InvalidVersion:
        raise ValueError(f"expected a version of PEP 440, such as 0.2.0, found {text!r}") from None
    if str(version) != text:
        raise ValueError(f"expected the version {version}, found it spelled {text!r}")
    return version


def changelog(repository: Repository, package: Release) -> list[Heading]:
    """The versions of a package's CHANGELOG.md; ValueError where it cannot be read."""
    path = repository.root / package.folder / "CHANGELOG.md"
    if not path.exists():
        raise ValueError(f"expected {package.folder}/CHANGELOG.md, found none")
    return headings(path.read_text("utf-8"))


def disagreements(repository: Repository, package: Release) -> list[str]:
    """What does not fit, each as a line: what was expected, what is there, what to do."""
    try:
        version = version_of(package.project["version"])
    except ValueError as error:
        return [f"{package.folder}/pyproject.toml: {error}"]
    try:
        first, *older = changelog(repository, package)
    except ValueError as error:
        return [f"{package.folder}/CHANGELOG.md: {error}"]
    found = _of_candidate(repository, package, version, first)
    found += _of_older(repository, package, first, older)
    found += _of_requirements(repository, package)
    found += _of_modules(repository, package)
    return found + _of_changes(repository, package, version)


def standing(repository: Repository, package: Release) -> tuple[str, str]:
    """For a table: the first heading's date, and the tag or what is to become of it."""
    try:
        first = changelog(repository, package)[0]
    except ValueError:
        return "unreadable", "-"
    tag = repository.tags(package.name).get(str(first.version))
    if first.date is None:
        return "unreleased", tag or "not yet"
    return first.date.isoformat(), tag or "to be tagged"


def _of_candidate(repository: Repository, package: Release, version: Version, first: Heading) -> list[str]:
    found = []
    if first.version != version:
        found.append(
            f"{package.folder}/CHANGELOG.md: expected {version} in its first heading, as in pyproject.toml, found "
            f"{first.version}: bring the two together"
        )
    tag = repository.tags(package.name).get(str(first.version))
    if first.date is None and tag is not None:
        found.append(
            f"{package.folder}/CHANGELOG.md: expected no tag for the unreleased {first.version}, found {tag}: it is "
            "released, so give the heading its date, or begin the next version with a heading of its own"
        )
    if first.date is not None and tag is not None:
        found += _of_tag(repository, package, tag, first.version)
    return found


def _of_tag(repository: Repository, package: Release, tag: str, version: Version) -> list[str]:
    at_tag = repository.released(package.name).get(version)
    if at_tag is None:
        return [
            f"{tag}: expected {package.folder}/pyproject.toml at its commit, found none: the tag is on a wrong commit"
        ]
    if at_tag.project["version"] != str(version):
        fault = (
            f"{tag}: expected version {version} at its commit, found {at_tag.project['version']}: the tag is on a "
            "wrong commit; if nothing was published from it, delete it and tag the right one"
        )
        return [fault]
    return []


def _of_older(repository: Repository, package: Release, first: Heading, older: list[Heading]) -> list[str]:
    found, tags = [], repository.tags(package.name)
    path = f"{package.folder}/CHANGELOG.md"
    for above, below in zip([first, *older], older, strict=False):
        if not below.version < above.version:
            found.append(
                f"{path}: expected falling versions, found {below.version} below {above.version}: reorder them"
            )
        if below.date is None:
            found.append(f"{path}: expected a date for {below.version}, below {above.version}, found 'unreleased'")
        elif above.date is not None and above.date < below.date:
            found.append(f"{path}: expected falling dates, found {below.date} below {above.date}")
        tag = tags.get(str(below.version))
        if tag is None:
            found.append(
                f"{path}: expected the tag {package.name}-v{below.version}, as it has that heading, found none: "
                "fetch tags (git fetch --tags), or remove the heading of what was never released"
            )
        else:
            found += _of_tag(repository, package, tag, below.version)
    known = {str(heading.version) for heading in [first, *older]}
    for text, tag in tags.items():
        if text not in known and repository.is_behind(tag):
            found.append(f"{path}: expected a heading for the tag {tag}, found none: add it, or delete the tag")
    return found


def _of_requirements(repository: Repository, package: Release) -> list[str]:
    """Whether the candidates of this repository can be installed together."""
    lines = [*package.project.get("dependencies", []), *(one for lines in package.extras.values() for one in lines)]
    groups = package.metadata.get("dependency-groups", {})
    lines += [one for lines in groups.values() for one in lines if isinstance(one, str)]
    found = []
    for line in dict.fromkeys(lines):
        requirement = Requirement(line)
        other = repository.packages.get(canonicalize_name(requirement.name))
        if other is not None and not requirement.specifier.contains(other.project["version"], prereleases=True):
            found.append(
                f"{package.folder}/pyproject.toml: expected {line!r} to allow {other.name} "
                f"{other.project['version']}, the version in this repository: widen the range, or raise its lower end"
            )
    return found


def _of_modules(repository: Repository, package: Release) -> list[str]:
    """Where an import package tells its version, it tells this one."""
    found = []
    for path in sorted((repository.root / package.folder / "src").glob("*/__init__.py")):
        told = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", path.read_text("utf-8"), re.MULTILINE)
        if told is not None and told[1] != package.project["version"]:
            where = Path(path).relative_to(repository.root).as_posix()
            found.append(f"{where}: expected __version__ {package.project['version']}, found {told[1]}")
    return found


def _of_changes(repository: Repository, package: Release, version: Version) -> list[str]:
    tagged = {at: one.tag for at, one in repository.released(package.name).items() if one.tag is not None}
    behind = {at: tag for at, tag in tagged.items() if repository.is_behind(tag)}
    if not behind:
        return []
    last = max(behind)
    paths = (f"{package.folder}/src", f"{package.folder}/pyproject.toml")
    if version <= last and repository.changed_since(behind[last], *paths):
        fault = (
            f"{package.folder}/pyproject.toml: expected a version above {last}, since {package.folder} changed after "
            f"{behind[last]}, found {version}: raise it and begin its heading, '(unreleased)', in CHANGELOG.md"
        )
        return [fault]
    return []


def commands_to_tag(repository: Repository, package: Release) -> list[str]:
    """The commands that release a package, for a person to run.

    Raises:
        ValueError: it is not ready, with every reason.
    """
    reasons = disagreements(repository, package)
    if not reasons:
        first = changelog(repository, package)[0]
        if first.date is None:
            reasons.append(f"{package.folder}/CHANGELOG.md: expected a date for {first.version}, found 'unreleased'")
        elif str(first.version) in repository.tags(package.name):
            reasons.append(f"{package.name} {first.version} is tagged already: there is nothing to release")
    if not reasons:
        for need in package.requirements(set(package.extras)):
            if need.name in repository.packages:
                released = repository.released(need.name)
                if not any(need.specifier.contains(version, prereleases=True) for version in released):
                    reasons.append(f"{need.name} has no tag that {str(need)!r} allows: release it first")
        if changed := repository.git("status", "--porcelain", "--", package.folder).stdout.decode().rstrip():
            reasons.append(f"expected a clean {package.folder}, found changes: commit them first\n{changed}")
    if reasons:
        raise ValueError("\n".join(reasons))
    name, version = package.name, package.project["version"]
    tag, stem = f"{name}-v{version}", name.replace("-", "_")
    return [
        f'git tag --annotate {tag} --message "{name} {version}"',
        f"git push origin {tag}",
        f"uv publish dist/{stem}-{version}.tar.gz dist/{stem}-{version}-py3-none-any.whl",
    ]
