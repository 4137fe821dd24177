"""What the factory itself costs: microseconds that it adds to a call, its import, and `dilated info`.

    python bench_overhead.py                  about a minute on two idle cores
    python bench_overhead.py --quick          seconds, to see that it runs; its figures are noise

A call of 32 tokens is short, so that what the factory adds shows; it runs on one thread, since waiting for a second one
would be most of it. Each module that the factory made is compared with one that the type's own builder made, of the
same options and weights: their outputs must be equal, bit by bit, or nothing is reported. Candidates take turns, call
by call; the figure is the difference of the medians of their calls. A second direct module is timed as if it were a
candidate: its difference is the noise. Import times and the command line are measured in processes of their own, in
turns. Writes JSON and a Markdown page (default: docs/benchmarks).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dilated_core import measure
from dilated_factory import Policy, create_dilated_attention, create_multihead_dilated_attention, registry

# Not "standard", which takes no pool and no cache: nothing is added to its calls.
TYPES = ("improved", "block_sparse")
SIZES = {"segment_lengths": [16, 32], "dilation_rates": [1, 2]}
HEADS, HEAD_DIM = 4, 16
TOKENS = 32
# A call of this many tokens is of another class than one of TOKENS, under the policy of the candidate "changing".
OTHER_TOKENS = 48
CHANGES = replace(Policy(), pool_lightweight_from=TOKENS + 1, pool_full_from=2**20, pool_always=())
CANDIDATES: dict[str, dict[str, object]] = {
    "pool off, no pattern cache": {"enable_memory_pool": False, "enable_pattern_cache": False},
    "pool off": {"enable_memory_pool": False},
    "pool lightweight": {"lightweight_pool": True},
    "pool full": {"enable_memory_pool": True, "lightweight_pool": False},
    "pool by length": {},
}
CHANGING = "another class of length each call"
NOISE = "a second direct module"
DIRECT, CHANGING_DIRECT = "direct", "direct, two lengths"
# What the issue asks for: microseconds a call, milliseconds beyond torch, seconds.
GOALS = {"call": 15.0, "import": 60.0, "info": 0.2}

IMPORTS = {
    "import dilated_factory": "import dilated_factory",
    "from dilated_factory import create_dilated_attention": "from dilated_factory import create_dilated_attention",
}
INFO, EMPTY = "dilated info", "python -c pass"
IMPORT = """
import time, torch
start = time.perf_counter()
{statement}
print(time.perf_counter() - start)
"""


def make(form: str, name: str, **options: object) -> nn.Module:
    """A module of the factory."""
    if form == "single":
        return create_dilated_attention(name, **SIZES, profile=None, **options)
    multihead = {"embed_dim": HEADS * HEAD_DIM, "num_heads": HEADS}
    return create_multihead_dilated_attention(name, **multihead, **SIZES, profile=None, **options)


def direct(form: str, name: str) -> nn.Module:
    """The same module by the type's own builder, with nothing of the factory."""
    builders = registry.load(registry.installed()[name])
    if form == "single":
        return builders.attention(**SIZES)
    return builders.multihead(embed_dim=HEADS * HEAD_DIM, num_heads=HEADS, **SIZES)


def inputs(form: str, tokens: int) -> tuple[Tensor, ...]:
    """What one call takes."""
    if form == "single":
        return torch.randn(3, 1, tokens, HEADS, HEAD_DIM).unbind()
    return (torch.randn(1, tokens, HEADS * HEAD_DIM),) * 3


def check(made: nn.Module, own: nn.Module, calls: list[tuple[Tensor, ...]], what: str) -> None:
    """Twice each call, so that what was pooled or cached at the first is used; another output raises."""
    for call in calls + calls:
        found, wanted = made(*call), own(*call)
        pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
        if not all(a is b is None or torch.equal(a, b) for a, b in pairs):
            raise SystemExit(f"{what}: not the output of the direct module; nothing is reported")


def once(module: nn.Module, calls: list[tuple[Tensor, ...]]) -> Callable[[], None]:
    """One call of each input."""

    def run() -> None:
        for call in calls:
            module(*call)

    return run


@torch.no_grad()
def calls_of(form: str, name: str, repeats: int) -> dict[str, dict[str, float]]:
    """candidate -> its median in microseconds a call, and by how much that is more than the direct module's."""
    torch.manual_seed(0)
    same, both = [inputs(form, TOKENS)], [inputs(form, TOKENS), inputs(form, OTHER_TOKENS)]
    own = direct(form, name).eval()
    modules = {key: make(form, name, **options) for key, options in CANDIDATES.items()}
    modules[CHANGING] = make(form, name, policy=CHANGES)
    modules[NOISE] = direct(form, name)
    for key, module in modules.items():
        module.load_state_dict(own.state_dict())
        check(module.eval(), own, both if key == CHANGING else same, f"{name}, {form}, {key}")
    runs = {key: once(module, both if key == CHANGING else same) for key, module in modules.items()}
    runs[DIRECT], runs[CHANGING_DIRECT] = once(own, same), once(own, both)

    timings = measure.interleaved(runs, repeats=repeats, warmup=10)
    result: dict[str, dict[str, float]] = {}
    for key, timing in timings.items():
        calls = len(both) if key in (CHANGING, CHANGING_DIRECT) else 1
        base = timings[CHANGING_DIRECT if calls > 1 else DIRECT]
        result[key] = {
            "microseconds": timing.median / calls * 1e6,
            "spread": timing.spread,
            "added": (timing.median - base.median) / calls * 1e6,
        }
    return result


def processes(runs: int) -> dict[str, list[float]]:
    """Seconds: of imports, inside a process that has torch; of the command line and of an empty Python, as seen."""
    programs = {name: [sys.executable, "-c", IMPORT.format(statement=text)] for name, text in IMPORTS.items()}
    whole = {
        EMPTY: [sys.executable, "-c", "pass"],
        INFO: [sys.executable, "-m", "dilated_factory", "info"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*programs, *whole)}
    for turn in range(runs + 1):  # the first turn writes bytecode and fills the file cache, and is not counted
        for name, command in {**programs, **whole}.items():
            start = time.perf_counter()
            ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            taken = time.perf_counter() - start
            if name == INFO and not ("Attention types" in ran.stdout and torch.__version__ in ran.stdout):
                raise SystemExit("dilated info does not say what it should; nothing is reported")
            if turn:
                seconds[name].append(float(ran.stdout) if name in programs else taken)
    return seconds


def report(result: dict[str, object], environment: dict[str, object]) -> str:
    """The page that lands beside the JSON."""
    lines = ["| module | candidate | us a call | spread | added, us |", "|---|---|---|---|---|"]
    for module, rows in result["calls"].items():
        for key in (DIRECT, NOISE, *CANDIDATES, CHANGING_DIRECT, CHANGING):
            row = rows[key]
            added = "" if key in (DIRECT, CHANGING_DIRECT) else f"{row['added']:+.1f}"
            lines.append(f"| {module} | {key} | {row['microseconds']:.1f} | {row['spread']:.0%} | {added} |")
            module = ""
    everything = [(key, row["added"]) for rows in result["calls"].values() for key, row in rows.items()]
    most = max(added for key, added in everything if key != NOISE)
    noise = max(abs(added) for key, added in everything if key == NOISE)
    seconds = {name: statistics.median(taken) for name, taken in result["seconds"].items()}
    imports = [
        f"| `{name}`, after torch | {seconds[name] * 1e3:.1f} ms | {GOALS['import']:.0f} ms |" for name in IMPORTS
    ]
    command = f"python packages/factory/benchmarks/{environment['command']}"
    return f"""# What the factory costs

{environment["date"]}, torch {environment["torch"]}, {environment["processor"]}, {environment["threads"]} thread.

One call of 1 x {TOKENS} tokens, {HEADS} heads of {HEAD_DIM}, float32, without gradients; outputs equal to the direct
module's bit by bit. Medians of {result["repeats"]:,} calls, candidates in turns; spread is the interquartile range over
the median. "{CHANGING}" goes from {TOKENS} to {OTHER_TOKENS} tokens and back, and so from no pool to a lightweight one.

{chr(10).join(lines)}

The most that is added is **{most:+.1f} us**, where a second direct module differs by up to {noise:.1f} us. The goal is
at most {GOALS["call"]:.0f} us.

In processes of their own, medians of {len(result["seconds"][INFO])}:

| what | measured | goal |
|---|---|---|
{chr(10).join(imports)}
| `{INFO}` | {seconds[INFO]:.3f} s | {GOALS["info"]:.1f} s |
| Python's own start, part of it | {seconds[EMPTY]:.3f} s | |

Raw data: [overhead.json](overhead.json). Command, from the repository's root: `{command}`.
"""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu; what the factory adds happens there")
    parser.add_argument("--quick", action="store_true", help="few and short rounds")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        print(f"a measurement on the CPU; nothing to do on {arguments.device}")
        return
    repeats, runs = (20, 1) if arguments.quick else (2000, 10)
    torch.set_num_threads(1)
    usable = registry.installed()
    calls = {
        f"{name}, {form}": calls_of(form, name, repeats)
        for name in TYPES
        if name in usable
        for form in ("single", "multihead")
    }
    result = {"repeats": repeats, "goals": GOALS, "calls": calls, "seconds": processes(runs)}
    environment = measure.environment()
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "overhead.json").write_text(json.dumps({"environment": environment, **result}, indent=1) + "\n")
    (arguments.output / "overhead.md").write_text(report(result, environment))
    print(report(result, environment))


if __name__ == "__main__":
    main()
