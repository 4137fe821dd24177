"""What there is to run on a card, and what the words of a command line ask for. Runs nothing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PARTS = ("tests", "sanitizer", "benchmarks")

# Options of a benchmark on a card, where its own defaults are meant for a processor. All take --device, and those that
# have nothing to measure there say so and end.
ON_A_CARD: dict[str, list[str]] = {
    "bench_density": ["--suites", "bfloat16", "--tokens", "16384"],
    "bench_recall": ["--seconds=20"],
    "bench_tune": ["--budget=60"],
    "bench_streaming": ["--sizes", "65536", "--dtypes", "bf16", "--threads", "8"],
}
# What is measured by a command of a package, after its scripts. RESULTS stands for the card's folder.
RESULTS = "RESULTS"
COMMANDS: dict[str, dict[str, list[str]]] = {
    "factory": {
        "bench": ["-m", "dilated_factory", "bench", "--device=cuda", "--seconds=40", f"--output={RESULTS}/bench"]
    },
}


class Sanitized(NamedTuple):
    """What runs under compute-sanitizer.

    Attributes:
        package: whose tests.
        tool: of the sanitizer.
        tests: which of those marked gpu, as pytest takes it (-k).
        uncached: whether every tensor is an allocation of CUDA's own. Torch cuts its tensors from larger pieces, in
            which memcheck cannot see one from the next.
    """

    package: str
    tool: str
    tests: str
    uncached: bool = False


# The smallest tests of each kind of device code. Races in shared memory are looked for in the programs that are ours.
# The tests fill what torch leaves uninitialised with NaN, so that initcheck has nothing to add.
SANITIZED = (
    Sanitized("dilated-core", "memcheck", "smallest or (N131 and bfloat16)", uncached=True),
    Sanitized("dilated-core", "racecheck", "triton and (smallest or N131)"),
    Sanitized("memory-pool", "memcheck", "test_gpu and (record_stream_keeps or each_stream or dlpack)"),
    Sanitized("pattern-cache", "memcheck", "test_gpu and of_all_kinds"),
    Sanitized("ring", "memcheck", "test_cuda and N13 and bfloat16", uncached=True),
)


class Checkout:
    """The packages below a folder, as they lie there: folder name -> path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.packages = {path.parent.name: path.parent for path in sorted(root.glob("packages/*/pyproject.toml"))}

    def benchmarks_of(self, package: str) -> dict[str, list[str]]:
        """Name -> what follows `python`, of a package's scripts and commands."""
        scripts = {
            path.stem: [str(path.relative_to(self.root)), "--device=cuda", *ON_A_CARD.get(path.stem, [])]
            for path in sorted(self.packages[package].glob("benchmarks/bench_*.py"))
        }
        return {**scripts, **COMMANDS.get(package, {})}

    def digest_of(self, package: str, words: Sequence[str] = ()) -> str:
        """Of all that a step depends on: the sources of every package, this one's tests and benchmarks, the words."""
        folders = [folder / "src" for folder in self.packages.values()]
        folders += [self.packages[package] / "tests", self.packages[package] / "benchmarks"]
        paths = sorted(path for folder in folders for path in folder.rglob("*.py"))
        parts = [repr(list(words)).encode()]
        for path in paths:
            parts += [path.relative_to(self.root).as_posix().encode(), path.read_bytes()]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


class Wanted(NamedTuple):
    """What the words ask for.

    Attributes:
        packages, parts, benchmarks: names; all packages and parts where none is named, no benchmark for all.
        minutes: for everything.
        resume: whether what passed before, from the same sources, is left out.
        options: for pytest, or for the one benchmark that is named.
    """

    packages: tuple[str, ...]
    parts: tuple[str, ...]
    benchmarks: tuple[str, ...]
    minutes: float
    resume: bool
    options: tuple[str, ...]


def understand(words: Sequence[str], checkout: Checkout) -> Wanted:
    """Names first, then options; --minutes=, --resume anywhere.

    Raises:
        ValueError: a name that is none, a benchmark that no named package has, options that are nobody's, or minutes
            that are no number.
    """
    minutes, resume = math.inf, False
    names: list[str] = []
    options: list[str] = []
    for word in words:
        if word == "--resume":
            resume = True
        elif word == "--minutes" or word.startswith("--minutes="):
            minutes = _minutes(word.partition("=")[2])
        elif options or word.startswith("-"):
            options.append(word)
        else:
            names.append(word)
    packages = tuple(name for name in names if name in checkout.packages)
    parts = tuple(name for name in names if name in PARTS)
    benchmarks = tuple(name for name in names if name not in (*checkout.packages, *PARTS))
    known = {name: package for package in checkout.packages for name in checkout.benchmarks_of(package)}
    if unknown := [name for name in benchmarks if name not in known]:
        raise ValueError(
            f"expected {', '.join(PARTS)}, a package ({', '.join(checkout.packages)}) or a benchmark "
            f"({', '.join(known)}), got {', '.join(unknown)}"
        )
    if packages and (apart := [name for name in benchmarks if known[name] not in packages]):
        raise ValueError(f"{apart[0]} is a benchmark of {known[apart[0]]}: name that package too, or none")
    if benchmarks and parts and "benchmarks" not in parts:
        raise ValueError(f"{benchmarks[0]} is a benchmark: name the part benchmarks too, or no part")
    parts = parts or (("benchmarks",) if benchmarks else PARTS)
    if options and not (parts == ("tests",) or (parts == ("benchmarks",) and len(benchmarks) == 1)):
        raise ValueError(f"options go to the tests alone, or to one benchmark: who is {' '.join(options)} for?")
    return Wanted(packages or tuple(checkout.packages), parts, benchmarks, minutes, resume, tuple(options))


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not minutes > 0:
        raise ValueError(f"--minutes: expected a positive number, as in --minutes=9, got {text!r}")
    return minutes
