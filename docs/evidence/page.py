"""docs/performance.md, from the claims and the records. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from evidence.claim import Claim
from evidence.goals import goals
from evidence.records import command, load, names

PAGE = "docs/performance.md"

HEAD = """\
# Performance

The measured figures that these pages and the READMEs quote, each with the recorded run it comes from, the raw data and
the command that made it. This page is written by `python docs/evidence` from the records under `docs/benchmarks`.
Where a page quotes another number than its record gives, `nox -s house` fails.

## How it is measured

- **Checked first.** In the same run, before anything is timed, each result is compared with a definition in float64 or
  with an independent model. A result that is wrong has no figure.
- **In turns.** The candidates of a comparison take turns: all once, then all again. So a machine that slows down slows
  all of them. What is compared is a ratio of medians, and its page gives the spread beside it: the interquartile range
  over the median. A single training run has no repeats, and its page shows every stage of it.
- **Memory** is what tensors take at the peak, from the allocator's own events, or, where a page says so, the process.
- **Counted or computed** figures are no measurements, and say so: bytes between ranks come from plans, the work of the
  Triton kernel is a count, registers are the compiler's.

All times are of one machine: two cores of a server with AMD EPYC processors and AVX-512, without a GPU. Another
machine gives other times, and ratios move with caches, memory and the number of cores. Measure yours:

```console
nox -s "bench(dilated-core)" -- --output=my-benchmarks
```

This runs every script of a package, one after the other, in an environment of its own, and writes pages and JSON like
the recorded ones into a folder. Without `--output` they go to `docs/benchmarks`, in place of the recorded ones. The
other packages go by the name of their folder. The commands in the tables are single scripts, with the options that the
recorded run had; `--help` says what each takes.

**Nothing here is measured on a GPU.** What was written for one is listed in [the guide](guides/gpu.md), with the
command that measures it there.
"""

PACKAGES = {
    "dilated-core": "Dilated attention",
    "ring": "Many ranks, and keys in host memory",
    "block-sparse": "Block-sparse attention",
    "memory-pool": "Memory pools",
    "pattern-cache": "The pattern cache",
    "factory": "Models, the factory and its commands",
}

PICTURES = {
    "ring": ("ring_traffic.png", "Bytes that the busiest rank receives against ranks and tokens, and weak scaling"),
    "block-sparse": ("block_sparse_density.png", "Times faster than dense attention against density"),
    "factory": ("demo/comparison.png", "Time and memory of dense and dilated attention against length"),
}

# Cases of a missed goal that are told one by one.
SHOWN = 4

GOALS = """\
## Goals, met and missed

Before a part was written, it was said what it should reach. A run that missed a goal is kept like any other.
"""

RECORDS = """\
## The recorded runs

All of them, also those that no sentence above quotes. *Threads* are those of PyTorch when the run began; a benchmark
may set others, and its page says so.
"""


def page(claims: Sequence[Claim]) -> str:
    """All of it."""
    parts = [HEAD]
    for package, title in PACKAGES.items():
        parts.append(f"## {title}\n")
        rows = (
            (claim.text(), _link(claim.record), _raw(claim.record), f"`{command(claim.record)}`")
            for claim in claims
            if claim.package == package
        )
        parts.append(_table(("what was found", "recorded run", "raw data", "command"), rows))
        if package in PICTURES:
            picture, words = PICTURES[package]
            parts.append(f"![{words}](benchmarks/{picture})\n")
    judged = ((goal.aim, str(goal.met), _listed(goal.missed), _link(goal.record)) for goal in goals())
    parts += [GOALS, _table(("goal", "cases that met it", "cases that missed it", "recorded run"), judged)]
    parts += [RECORDS, _table(("recorded run", "raw data", "date (UTC)", "machine", "threads", "versions"), _runs())]
    return "\n".join(parts)


def _runs() -> Iterable[tuple[str, ...]]:
    for name in names():
        where = load(name)["environment"]
        vector = f", {where['cpu_capability']}" if "cpu_capability" in where else ""
        machine = f"{', '.join([where['processor'], *where['cuda']])}{vector}, {where['cores']} cores"
        extra = f", triton {where['triton']}" if "triton" in where else ""
        versions = f"Python {where['python']}, torch {where['torch']}{extra}"
        date = where["date"].removesuffix("+00:00").replace("T", " ")
        yield _link(name), _raw(name), date, machine, str(where["threads"]), versions


def _listed(missed: Sequence[str]) -> str:
    if not missed:
        return "none"
    more = f"; and {len(missed) - SHOWN} more on its page" if len(missed) > SHOWN else ""
    return f"{len(missed)}: {'; '.join(missed[:SHOWN])}{more}"


def _link(record: str) -> str:
    return f"[{record}](benchmarks/{record}.md)"


def _raw(record: str) -> str:
    return f"[JSON](benchmarks/{record}.json)"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
