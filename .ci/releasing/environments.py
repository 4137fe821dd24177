"""A package, installed in a clean environment with one set of versions, and tried there.

Every name of this repository is pinned to a wheel that was built here, so nothing of it comes from an index or a cache.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from releasing.archives import build_wheel, uv
from releasing.repository import Release, Repository
from releasing.sets import choose, closure, extras_within

INSIDE = Path(__file__).with_name("inside.py")
_EXAMPLE = re.compile(r"^```python[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Wheels:
    """A wheel for every version that is asked for: of a candidate as it was built, of a tag built from the tag.

    Args:
        candidates: the wheels of the working tree, by distribution; what lacks is built.
        scratch: a folder for the rest.
    """

    def __init__(self, repository: Repository, candidates: dict[str, Path], scratch: Path) -> None:
        self._repository, self._scratch = repository, scratch
        self._wheels = {(name, repository.packages[name].version): wheel for name, wheel in candidates.items()}

    def of(self, release: Release) -> Path:
        """The wheel of a release; RuntimeError where it cannot be built."""
        key = (release.name, release.version)
        if key not in self._wheels:
            place = self._scratch / f"{release.name}-{release.version}"
            source = self._repository.root / release.folder
            if release.tag is not None:
                source = self._repository.unpack(release, place / "source")
            self._wheels[key] = build_wheel(source, place / "wheel")
        return self._wheels[key]


def sets_of(repository: Repository, package: Release) -> dict[str, dict[str, Release]]:
    """The sets a package is installed with, by what they are called: lowest and newest, or the one they both are.

    Raises:
        NoSetError: there is none.
    """
    asked = _asked(repository, package)
    lowest = choose(repository, package, asked, lowest=True)
    newest = choose(repository, package, asked, lowest=False)
    if lowest == newest:
        return {"lowest = newest": newest}
    return {"lowest": lowest, "newest": newest}


def _asked(repository: Repository, package: Release) -> list[Requirement]:
    """The package with every extra that brings another of this repository, and all that its README's examples need."""
    extras = sorted(extras_within(repository, package))
    whole = Requirement(f"{package.name}[{','.join(extras)}]" if extras else package.name)
    return list({str(one): one for one in [whole, *package.group("doctests")]}.values())


def try_set(
    repository: Repository, package: Release, chosen: dict[str, Release], wheels: Wheels, scratch: Path
) -> list[str]:
    """Install the package alone, then with its extras, and try it both times.

    Args:
        scratch: an empty folder: for the environment.

    Returns:
        What went wrong, each as a line and what was said.
    """
    # Absolute: uv takes a name@file only so.
    pins = [f"{name} @ {wheels.of(release).resolve().as_uri()}\n" for name, release in sorted(chosen.items())]
    general = repository.root / "constraints.txt"
    scratch.mkdir(parents=True, exist_ok=True)
    constraints = scratch / "constraints.txt"
    constraints.write_text((general.read_text() if general.exists() else "") + "".join(pins))
    python = scratch / "env" / "bin" / "python"
    uv("venv", "--quiet", f"--python={sys.executable}", str(scratch / "env"))
    asked = _asked(repository, package)
    of_package = [one for one in asked if canonicalize_name(one.name) == package.name]
    extras = package.with_own({extra for one in of_package for extra in one.extras})
    stages = {
        "alone": ([package.name], set()),
        f"with {', '.join(map(str, asked))}": ([str(one) for one in asked], extras),
    }
    for stage, (lines, installed) in stages.items():
        words = ("--quiet", f"--python={python}")
        try:
            uv("pip", "install", *words, f"--constraint={constraints}", *lines)
            uv("pip", "check", *words)
        except RuntimeError as error:
            return [f"{stage}: {error}"]
        wrong = _try(repository, package, chosen, python, installed, readme=stage != "alone")
        if wrong:
            return [f"{stage}: {wrong}"]
    return []


def _try(
    repository: Repository,
    package: Release,
    chosen: dict[str, Release],
    python: Path,
    extras: set[str],
    *,
    readme: bool,
) -> str:
    """Import, load and run in an environment; what went wrong, or an empty string."""
    apart = [room for room, extra in package.rooms.items() if extra not in extras]
    source = repository.root / package.folder / "src"
    paths = (path.relative_to(source).with_suffix("").as_posix() for path in source.rglob("*.py"))
    modules = sorted(path.replace("/", ".").removesuffix(".__init__") for path in paths)
    needed = chosen if readme else closure(repository, chosen, [Requirement(package.name)])
    asked = {
        "name": package.name,
        "versions": {name: str(chosen[name].version) for name in needed},
        "modules": [name for name in modules if not any(f"{name}.".startswith(f"{room}.") for room in apart)],
        "apart": apart,
        "readme": first_example(repository, package) if readme else None,
    }
    # -I keeps this folder, PYTHONPATH and the user's own packages off the path.
    command = [str(python), "-I", str(INSIDE), json.dumps(asked)]
    try:
        ran = subprocess.run(
            command,
            cwd=python.parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "not done after 600 seconds"
    return ran.stdout.strip() or f"exit status {ran.returncode}" if ran.returncode else ""


def first_example(repository: Repository, package: Release) -> str | None:
    """The first Python block of a package's README, or None."""
    match = _EXAMPLE.search((repository.root / package.folder / "README.md").read_text("utf-8"))
    return match[1] if match else None
