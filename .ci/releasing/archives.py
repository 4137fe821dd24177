"""A package's sdist and wheel: built as they would be published, and looked into.

The wheel is built from the sdist, so that an sdist that lacks a file is found. Both are built a second time, from the
unpacked sdist and in another place, and must be the same bytes: whoever has the sources can check what was published.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from configparser import ConfigParser
from email import message_from_string, policy
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from releasing.repository import Release, Repository

# What hatchling adds to an sdist.
ADDED = {"PKG-INFO", ".gitignore"}
# Without these an sdist cannot be tested, or says too little.
EXPECTED = ("README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml")


class Archives(NamedTuple):
    """The two files of one version."""

    sdist: Path
    wheel: Path


def uv(*words: str, extra: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
    """Run uv, the program beside this Python or on PATH.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    beside = Path(sys.executable).with_name("uv")
    program = str(beside) if beside.exists() else shutil.which("uv")
    if program is None:
        raise RuntimeError("uv is neither beside this Python nor on PATH: pip install uv")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # Where a machine keeps wheels in a folder, this variable tells pip. uv has its own, with commas for spaces.
    if "PIP_FIND_LINKS" in environment:
        environment.setdefault("UV_FIND_LINKS", ",".join(environment["PIP_FIND_LINKS"].split()))
    command = [program, *words]
    ran = subprocess.run(
        command,
        env={**environment, **(extra or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    if ran.returncode:
        raise RuntimeError(f"uv {' '.join(words)}: exit status {ran.returncode}\n{ran.stdout.rstrip()}")


def build(source: Path, out: Path, date: str) -> Archives:
    """Build the sdist of `source`, and the wheel from that sdist, into `out`, which holds nothing else.

    Args:
        date: seconds since 1970, which the files in the archives carry.

    Raises:
        RuntimeError: a build failed.
    """
    uv("build", "--quiet", f"--out-dir={out}", str(source), extra={"SOURCE_DATE_EPOCH": date})
    [sdist], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    return Archives(sdist, wheel)


def build_wheel(source: Path, out: Path) -> Path:
    """Build a wheel alone, to install it; RuntimeError where that fails."""
    uv("build", "--quiet", "--wheel", f"--out-dir={out}", str(source))
    [wheel] = out.glob("*.whl")
    return wheel


def faults(repository: Repository, package: Release, archives: Archives, scratch: Path, date: str) -> list[str]:
    """All that is wrong with a package's archives, each as a line."""
    name = package.folder
    command = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *map(str, archives)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False)
    found = [f"{name}: twine check --strict says\n{ran.stdout.rstrip()}"] if ran.returncode else []
    found += [f"{archives.sdist.name}: {fault}" for fault in sdist_faults(repository, package, archives.sdist)]
    found += [f"{archives.wheel.name}: {fault}" for fault in wheel_faults(repository, package, archives.wheel)]
    return found + [f"{name}: {fault}" for fault in differences_when_rebuilt(archives, scratch, date)]


def sdist_faults(repository: Repository, package: Release, sdist: Path) -> list[str]:
    """It holds what git holds of the package, and nothing else."""
    with tarfile.open(sdist) as opened:
        inside = {member.name.partition("/")[2] for member in opened if member.isfile()}
    held = repository.files(package)
    found = [f"expected {path}, which git holds, found it missing" for path in sorted(held - inside)]
    found += [f"expected no {path}, which git does not hold" for path in sorted(inside - held - ADDED)]
    found += [f"expected {path}, found none: add it to {package.folder}" for path in EXPECTED if path not in inside]
    if not any(path.startswith("tests/") for path in inside):
        found.append(f"expected tests, found none: add them to {package.folder}")
    return found


def wheel_faults(repository: Repository, package: Release, wheel: Path) -> list[str]:
    """It holds the modules below src, the licence, and the metadata of pyproject.toml; and nothing else."""
    with zipfile.ZipFile(wheel) as opened:
        inside = {name for name in opened.namelist() if not name.endswith("/")}
        [info] = {name.partition("/")[0] for name in inside if name.partition("/")[0].endswith(".dist-info")}
        metadata = opened.read(f"{info}/METADATA").decode()
        entries = opened.read(f"{info}/entry_points.txt").decode() if f"{info}/entry_points.txt" in inside else ""
    source = {path.removeprefix("src/") for path in repository.files(package) if path.startswith("src/")}
    typed = {f"{path.partition('/')[0]}/py.typed" for path in source}
    licences = {f"{info}/licenses/{path}" for path in package.project.get("license-files", [])}
    own = {f"{info}/{path}" for path in ("METADATA", "WHEEL", "RECORD")}
    expected = source | typed | licences | own | ({f"{info}/entry_points.txt"} if _entry_points(package) else set())
    found = [f"expected {path}, found it missing" for path in sorted(expected - inside)]
    found += [f"expected no {path}: it is not below src" for path in sorted(inside - expected)]
    readme = (repository.root / package.folder / "README.md").read_text("utf-8")
    found += metadata_faults(package, metadata, readme)
    told = ConfigParser(delimiters=("=",))
    told.optionxform = str  # type: ignore[assignment,method-assign]
    told.read_string(entries)
    in_wheel = {section: dict(told[section]) for section in told.sections()}
    if in_wheel != _entry_points(package):
        found.append(f"expected the entry points {_entry_points(package)}, found {in_wheel}")
    return found


def _entry_points(package: Release) -> dict[str, dict[str, str]]:
    project = package.project
    groups = {"console_scripts": project.get("scripts", {}), "gui_scripts": project.get("gui-scripts", {})}
    return {name: dict(table) for name, table in {**groups, **project.get("entry-points", {})}.items() if table}


def metadata_faults(package: Release, metadata: str, readme: str) -> list[str]:
    """Where METADATA says another thing than pyproject.toml."""
    told = message_from_string(metadata, policy=policy.compat32)
    project = package.project
    extras = {canonicalize_name(extra) for extra in package.extras}
    pairs: dict[str, tuple[object, object]] = {
        "Name": (package.name, canonicalize_name(told["Name"])),
        "Version": (project["version"], told["Version"]),
        "Summary": (project["description"], told["Summary"]),
        "License-Expression": (project["license"], told["License-Expression"]),
        "Requires-Python": (
            SpecifierSet(project["requires-python"]),
            SpecifierSet(told["Requires-Python"] or ""),
        ),
        "Classifier": (set(project.get("classifiers", [])), set(told.get_all("Classifier", []))),
        "Keywords": (set(project.get("keywords", [])), set(filter(None, (told["Keywords"] or "").split(",")))),
        "Project-URL": (
            {f"{label}, {url}" for label, url in project.get("urls", {}).items()},
            set(told.get_all("Project-URL", [])),
        ),
        "Provides-Extra": (extras, {canonicalize_name(extra) for extra in told.get_all("Provides-Extra", [])}),
        "Requires-Dist": (
            _declared(package),
            {_spelled(Requirement(line)) for line in told.get_all("Requires-Dist", [])},
        ),
        "description": (readme.strip(), str(told.get_payload()).strip()),
    }
    found = []
    for field, (expected, got) in pairs.items():
        if expected != got:
            what = "the text of README.md, found another" if field == "description" else f"{expected}, found {got}"
            found.append(f"METADATA: expected {field} as in pyproject.toml: {what}")
    return found


def _declared(package: Release) -> set[str]:
    """Its requirements as METADATA spells them: each extra spelled out, those that name the package itself resolved."""
    lines = {_spelled(one) for one in package.requirements()}
    return lines | {_spelled(one, extra) for extra in package.extras for one in package.brought_by({extra})}


def _spelled(requirement: Requirement, extra: str | None = None) -> str:
    marker = str(requirement.marker) if requirement.marker else ""
    if extra is not None:
        own = f'extra == "{canonicalize_name(extra)}"'
        marker = f"({marker}) and {own}" if " or " in marker else f"{marker} and {own}" if marker else own
    brackets = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{canonicalize_name(requirement.name)}{brackets}{requirement.specifier}" + (
        f" ; {marker}" if marker else ""
    )


def differences_when_rebuilt(archives: Archives, scratch: Path, date: str) -> list[str]:
    """Build again from the unpacked sdist, in another folder: the same bytes, or a line for each file that differs."""
    with tarfile.open(archives.sdist) as opened:
        opened.extractall(scratch / "unpacked", filter="data")
    [source] = (scratch / "unpacked").iterdir()
    (source / "PKG-INFO").unlink()  # generated: it would go into the next sdist twice
    again = build(source, scratch / "again", date)
    pairs = zip(archives, again, strict=True)
    return [
        f"expected {one.name} to be the same bytes when it is built again from its sdist, found a difference"
        for one, other in pairs
        if one.read_bytes() != other.read_bytes()
    ]
