"""Whether the packages are fit to be released. `nox -s build` calls it; it publishes, tags and pushes nothing.

    python .ci/release.py                       every package: agreement, archives into dist/, clean installations
    python .ci/release.py dilated-core ring     these packages
    python .ci/release.py --agreement           only whether version, changelog, tag and requirements agree: seconds
    python .ci/release.py --tag dilated-core    print the commands that release it, if it is ready

A package goes through three steps. Its version, its changelog, its git tags and the ranges by which packages here ask
for one another must agree. Its sdist and wheel must hold what they should, and be the same bytes when built again. It
must work in clean environments: with the lowest versions of the other packages that it allows, built from their tags,
and with the newest. At the end stands a table, in the order in which packages go out; any red one is a failure.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from releasing.agreement import commands_to_tag, disagreements, standing
from releasing.archives import build, faults
from releasing.environments import Wheels, sets_of, try_set
from releasing.repository import Release, Repository
from releasing.sets import NoSetError

ROOT = Path(__file__).resolve().parents[1]
HEADER = ("package", "version", "changelog", "tag", "sets installed", "ok")


def say(started: float, words: str) -> None:
    """A line of progress."""
    print(f"[{time.monotonic() - started:5.0f} s] {words}", flush=True)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows below HEADER, in columns."""
    everything = [HEADER, *rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in everything]
    return "\n".join(line.rstrip() for line in lines)


def row(repository: Repository, package: Release, sets: str, found: Sequence[str]) -> tuple[str, ...]:
    """One package's line of the table."""
    changelog, tag = standing(repository, package)
    return (package.name, package.project["version"], changelog, tag, sets, "no" if found else "yes")


def check_agreement(repository: Repository, packages: Sequence[Release]) -> dict[str, list[str]]:
    """What does not agree, by package; printed as it is found."""
    found = {package.name: disagreements(repository, package) for package in packages}
    for name, lines in found.items():
        for line in lines:
            print(f"{name}: {line}")
    return found


def check_archives(
    repository: Repository, packages: Sequence[Release], scratch: Path, started: float
) -> tuple[dict[str, Path], dict[str, list[str]]]:
    """Build into dist/ and look inside; the wheels and what is wrong, by package."""
    dist = repository.root / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    wheels, wrong = {}, {}
    for package in packages:
        say(started, f"{package.name} {package.project['version']}: sdist and wheel")
        place = scratch / "archives" / package.name
        date = repository.git("log", "-1", "--format=%ct", "--", package.folder).stdout.decode().strip() or "0"
        try:
            archives = build(repository.root / package.folder, place / "first", date)
            wrong[package.name] = faults(repository, package, archives, place, date)
        except RuntimeError as error:
            wrong[package.name] = [str(error)]
            continue
        finally:
            for line in wrong.get(package.name, []):
                print(f"{package.name}: {line}")
        wheels[package.name] = archives.wheel
        for archive in archives:
            shutil.copy(archive, dist)
    return wheels, wrong


def check_sets(
    repository: Repository, package: Release, wheels: Wheels, scratch: Path, started: float
) -> tuple[str, list[str]]:
    """Install and try a package's sets; their names for the table, and what went wrong."""
    try:
        sets = sets_of(repository, package)
    except NoSetError as error:
        print(f"{package.name}: {error}")
        return "none", [str(error)]
    found = []
    for name, chosen in sets.items():
        others = ", ".join(f"{one.name} {one.version}" for one in chosen.values() if one.name != package.name)
        say(started, f"{package.name} installed, {name}: {others or 'it needs none of the others'}")
        place = scratch / "sets" / f"{package.name}-{name.split()[0]}"
        try:
            wrong = try_set(repository, package, chosen, wheels, place)
        except RuntimeError as error:
            wrong = [str(error)]
        shutil.rmtree(place, ignore_errors=True)
        found += [f"set {name} ({others}), {line}" for line in wrong]
    for line in found:
        print(f"{package.name}: {line}")
    return ", ".join(sets), found


def check(repository: Repository, packages: Sequence[Release], *, agreement_only: bool) -> bool:
    """Everything about `packages`; prints what is wrong and the table; whether all is well."""
    started = time.monotonic()
    wrong = check_agreement(repository, packages)
    sets = dict.fromkeys(wrong, "not asked for" if agreement_only else "not built")
    if not agreement_only:
        with tempfile.TemporaryDirectory(prefix="release-") as folder:
            scratch = Path(folder)
            built, of_archives = check_archives(repository, packages, scratch, started)
            wheels = Wheels(repository, built, scratch / "wheels")
            for package in packages:
                wrong[package.name] += of_archives[package.name]
                if package.name in built:
                    sets[package.name], of_sets = check_sets(repository, package, wheels, scratch, started)
                    wrong[package.name] += of_sets
        say(started, "done")
    print("\n" + table([row(repository, one, sets[one.name], wrong[one.name]) for one in packages]))
    red = [name for name, lines in wrong.items() if lines]
    if red:
        print(f"\nnot fit to be released: {', '.join(red)} (what is wrong stands above)")
    return not red


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="release.py", description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="a distribution or its folder; all by default")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--agreement", action="store_true", help="build nothing: version, changelog, tag, requirements")
    mode.add_argument("--tag", action="store_true", help="print the commands that release a package, if it is ready")
    return parser.parse_args(words)


def main(words: Sequence[str], root: Path = ROOT) -> int:
    """Do what the words ask for; the exit status: 0 for good, 1 for what is wrong, 2 for what is not understood."""
    asked = parse(words)
    repository = Repository(root)
    try:
        names = {repository.find(word).name for word in asked.packages}
    except ValueError as error:
        print(error)
        return 2
    packages = [one for one in repository.in_order() if one.name in names or not names]
    if not asked.tag:
        return 0 if check(repository, packages, agreement_only=asked.agreement) else 1
    ready = True
    for package in packages:
        try:
            commands = commands_to_tag(repository, package)
        except ValueError as error:
            ready = False
            print(f"{package.name} is not ready:\n{error}\n")
        else:
            print(f"# {package.name}, after `nox -s build` is green at this commit", *commands, "", sep="\n")
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
