"""The packages of this repository, as the working tree has them and as their tags do. Reads; changes nothing.

A package's released versions are its git tags, `<distribution>-v<version>`: dilated-core-v0.1.0. The version in the
working tree is the candidate for the next one.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Release:
    """One package at one version: what its pyproject.toml says, in the working tree or at a tag.

    Attributes:
        folder: relative to the repository's root.
        metadata: the whole of pyproject.toml.
        tag: None for the working tree.
    """

    folder: str
    metadata: dict[str, Any]
    tag: str | None = None

    @property
    def project(self) -> dict[str, Any]:
        """The table [project]."""
        table: dict[str, Any] = self.metadata["project"]
        return table

    @property
    def name(self) -> str:
        """The distribution's name, in its one canonical spelling."""
        return canonicalize_name(self.project["name"])

    @property
    def version(self) -> Version:
        """As a version, which orders."""
        return Version(self.project["version"])

    @property
    def extras(self) -> dict[str, list[str]]:
        """Extra -> requirements, as they are written."""
        table: dict[str, list[str]] = self.project.get("optional-dependencies", {})
        return table

    @property
    def rooms(self) -> dict[str, str]:
        """Modules that need an extra to be imported, with that extra: [tool.house.rooms]."""
        table: dict[str, str] = self.metadata.get("tool", {}).get("house", {}).get("rooms", {})
        return table

    def group(self, name: str) -> list[Requirement]:
        """A dependency group, without what it includes from elsewhere."""
        lines = self.metadata.get("dependency-groups", {}).get(name, [])
        return [Requirement(line) for line in lines if isinstance(line, str)]

    def with_own(self, extras: AbstractSet[str]) -> set[str]:
        """`extras`, and those that they name of the package itself: all = ["dilated-factory[ring]"]."""
        found: set[str] = set()
        pending = list(extras)
        while pending:
            extra = pending.pop()
            if extra not in found:
                found.add(extra)
                lines = [Requirement(line) for line in self.extras.get(extra, [])]
                pending += [own for line in lines if canonicalize_name(line.name) == self.name for own in line.extras]
        return found

    def requirements(self, extras: AbstractSet[str] = frozenset()) -> list[Requirement]:
        """What it asks for with these extras, of other packages; names are canonical."""
        return [*self._read(self.project.get("dependencies", [])), *self.brought_by(extras)]

    def brought_by(self, extras: AbstractSet[str]) -> list[Requirement]:
        """What these extras add."""
        return self._read([line for extra in sorted(self.with_own(extras)) for line in self.extras.get(extra, [])])

    def _read(self, lines: list[str]) -> list[Requirement]:
        found = [Requirement(line) for line in lines]
        for one in found:
            one.name = canonicalize_name(one.name)
        return [one for one in found if one.name != self.name]


class Repository:
    """The packages below `root`, a git checkout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        paths = sorted(root.glob("packages/*/pyproject.toml"))
        found = [Release(str(path.parent.relative_to(root)), tomllib.loads(path.read_text("utf-8"))) for path in paths]
        self.packages = {one.name: one for one in found}

    def git(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """Run git in the checkout.

        Raises:
            RuntimeError: it failed, unless not `check`; with what it said.
        """
        # These would point git elsewhere where a hook of another checkout runs this.
        elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
        env = {name: value for name, value in os.environ.items() if name not in elsewhere}
        command = ["git", "-C", str(self.root), *words]
        ran = subprocess.run(command, env=env, capture_output=True, check=False, timeout=120)
        if check and ran.returncode:
            said = (ran.stderr + ran.stdout).decode().rstrip()
            raise RuntimeError(f"git {' '.join(words)}: exit status {ran.returncode}\n{said}")
        return ran

    def find(self, word: str) -> Release:
        """A package by the name of its distribution or of its folder.

        Raises:
            ValueError: there is none.
        """
        for one in self.packages.values():
            if canonicalize_name(word) in (one.name, Path(one.folder).name):
                return one
        raise ValueError(f"expected one of {', '.join(self.packages)}, got {word!r}")

    @cached_property
    def _tags(self) -> list[str]:
        return self.git("tag", "--list").stdout.decode().split()

    def tags(self, name: str) -> dict[str, str]:
        """What follows `<name>-v` in the tags of a package -> the tag."""
        return {tag.removeprefix(f"{name}-v"): tag for tag in self._tags if tag.startswith(f"{name}-v")}

    def released(self, name: str) -> dict[Version, Release]:
        """Every tagged version of a package, but for tags that are no version or whose tree lacks the package."""
        found = {}
        for text, tag in self.tags(name).items():
            at_tag = self.at(tag, f"{self.packages[name].folder}/pyproject.toml")
            if at_tag is not None:
                try:
                    found[Version(text)] = Release(self.packages[name].folder, tomllib.loads(at_tag), tag)
                except InvalidVersion:
                    continue
        return found

    def versions(self, name: str) -> dict[Version, Release]:
        """The tagged versions and the candidate, which takes the place of a tag of the same version."""
        candidate = self.packages[name]
        return {**self.released(name), candidate.version: candidate}

    def at(self, tag: str, path: str) -> str | None:
        """A file's text at a tag; None where the tag has no such file."""
        ran = self.git("show", f"{tag}:{path}", check=False)
        return None if ran.returncode else ran.stdout.decode()

    def is_behind(self, tag: str) -> bool:
        """Whether the working tree descends from a tag's commit."""
        return self.git("merge-base", "--is-ancestor", tag, "HEAD", check=False).returncode == 0

    def changed_since(self, tag: str, *paths: str) -> bool:
        """Whether the working tree differs from a tag's, below these paths."""
        return self.git("diff", "--quiet", tag, "--", *paths, check=False).returncode != 0

    def unpack(self, release: Release, folder: Path) -> Path:
        """Lay a tagged package's files below `folder`; return where its pyproject.toml lies."""
        archive = self.git("archive", "--format=tar", str(release.tag), release.folder).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
            opened.extractall(folder, filter="data")
        return folder / release.folder

    def files(self, release: Release) -> set[str]:
        """What git holds of a package, or would hold: relative to its folder, without what is ignored."""
        listing = ("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", release.folder)
        folder = self.root / release.folder
        paths = [self.root / name for name in self.git(*listing).stdout.decode().split("\0") if name]
        return {path.relative_to(folder).as_posix() for path in paths if path.exists()}

    def in_order(self) -> list[Release]:
        """The packages in the order in which they go out: each after those that it asks for."""
        order: dict[str, Release] = {}

        def add(one: Release) -> None:
            for need in one.requirements(set(one.extras)):
                if need.name in self.packages and need.name not in order:
                    add(self.packages[need.name])
            order[one.name] = one

        for name in sorted(self.packages):
            if name not in order:
                add(self.packages[name])
        return list(order.values())
