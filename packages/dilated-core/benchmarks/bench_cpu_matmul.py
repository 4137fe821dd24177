"""The bfloat16 kernel of matrix products against PyTorch's flash operator, tile by tile, each result checked.

    python bench_cpu_matmul.py
    python bench_cpu_matmul.py --rows 256 --threads 1 --repeats 2

Writes JSON and a Markdown table (default: docs/benchmarks). Before a tile is timed, out, lse and the gradients of both
kernels are compared with the math kernel in float64. Candidates run in turns in one process; figures are medians.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from dilated_core import kernels, measure
from dilated_core.kernels import Problem
from dilated_core.kernels.cpu_flash import CPUFlash
from dilated_core.kernels.cpu_matmul import CPUMatmul
from dilated_core.kernels.math import Math

HEADS, HEAD_DIM = 8, 64
# Scores a tile: as many rows of as many segments as this allows, so that every tile has the same work.
SCORES = 1 << 26
NAMES = ("out", "lse", "dq", "dk", "dv")
KERNELS = {"cpu_flash": CPUFlash(), "cpu_matmul": CPUMatmul()}


def deviations(problem: Problem, grad_out: torch.Tensor) -> dict[str, dict[str, float]]:
    """Of each kernel's results from the math kernel's in float64, relative to the largest magnitude; large raises."""
    # Two batch rows of the tile: float64 scores of all would not fit.
    query, key, value, go = (tensor[:2] for tensor in (*problem[:3], grad_out))
    small = problem._replace(query=query, key=key, value=value)
    wide = problem._replace(query=query.double(), key=key.double(), value=value.double())
    out, lse = Math().forward(wide)
    exact = (out, lse, *Math().backward(wide, go.double(), out, lse))
    found = {}
    for name, kernel in KERNELS.items():
        results = (*kernel.forward(small), *kernel.backward(small, go, out.to(go.dtype), lse.float()))
        found[name] = {
            what: ((a.double() - b).abs().max() / b.abs().max()).item()
            for what, a, b in zip(NAMES, results, exact, strict=True)
        }
        if not max(found[name].values()) < 2e-2:
            raise SystemExit(f"{name} deviates from float64 by {found[name]}; nothing is reported")
    return found


def measure_one(rows: int, is_causal: bool, scores: int, repeats: int) -> dict[str, object]:
    """One row of the table."""
    batch = max(2, scores // (HEADS * rows * rows))
    *qkv, go = (torch.randn(batch, HEADS, rows, HEAD_DIM).bfloat16() for _ in range(4))
    problem = Problem(*qkv, is_causal, HEAD_DIM**-0.5)
    deviation = deviations(problem, go)
    out, lse = KERNELS["cpu_flash"].forward(problem)
    runs = {}
    for name, kernel in KERNELS.items():
        runs[f"{name} forward"] = lambda kernel=kernel: kernel.forward(problem)
        runs[f"{name} backward"] = lambda kernel=kernel: kernel.backward(problem, go, out, lse)
    times = measure.interleaved(runs, repeats=repeats)
    flops = 4 * batch * HEADS * HEAD_DIM * (rows * (rows + 1) // 2 if is_causal else rows**2)
    return {
        "rows": rows,
        "batch": batch,
        "is_causal": is_causal,
        "threads": torch.get_num_threads(),
        "deviation_from_float64": deviation,
        "seconds": {name: timing.seconds for name, timing in times.items()},
        "median": {name: timing.median for name, timing in times.items()},
        "spread": {name: timing.spread for name, timing in times.items()},
        "gflops_per_second": {
            name: (2.5 if "backward" in name else 1.0) * flops / timing.median / 1e9 for name, timing in times.items()
        },
    }


def line(row: dict[str, object]) -> str:
    """A row as Markdown."""
    rate, median, spread, deviation = (
        row[name] for name in ("gflops_per_second", "median", "spread", "deviation_from_float64")
    )
    cells = [str(row["rows"]), "yes" if row["is_causal"] else "no", str(row["threads"])]
    for way in ("forward", "backward"):
        flash, ours = f"cpu_flash {way}", f"cpu_matmul {way}"
        cells += [
            f"{rate[flash]:.0f}",
            f"{rate[ours]:.0f} ({spread[ours]:.0%})",
            f"**{median[flash] / median[ours]:.2f}**",
        ]
    worst = {name: max(values[what] for what in NAMES) for name, values in deviation.items()}
    cells += [f"{worst['cpu_flash']:.1e}", f"{worst['cpu_matmul']:.1e}"]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| rows | causal | threads | forward: flash, GFLOP/s | products (spread) | ratio "
    "| backward: flash, GFLOP/s | products (spread) | ratio | largest deviation: flash | products |\n"
    + "|---" * 11
    + "|"
)


def report(rows: list[dict[str, object]], environment: dict[str, object], scores: int) -> str:
    """The page that lands beside the JSON."""
    table = "\n".join([HEADER, *map(line, rows)])
    return (
        "# bfloat16 by matrix products against PyTorch's flash operator\n\n"
        f"{environment['date']}, torch {environment['torch']}, {environment['processor']} "
        f"({environment['cpu_capability']}). Tiles of {HEADS} heads of {HEAD_DIM}, about {scores:,} scores each.\n\n"
        "Out, lse and gradients of both kernels were checked against float64 before they were timed. Medians of "
        "interleaved repeats; the spread is the interquartile range over the median; the ratio is flash's time over "
        f"that of the products.\n\n{table}\n"
        f"\nRaw data: [cpu_matmul.json](cpu_matmul.json). Command, from the repository's root: "
        f"`python packages/dilated-core/benchmarks/{environment['command']}`.\n"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu; elsewhere there is nothing to measure")
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 2731, 4096])
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[2, 1], help="threads of PyTorch (default: %(default)s)"
    )
    parser.add_argument("--scores", type=int, default=SCORES, help="scores a tile, about: sets the batch")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    if torch.device(arguments.device).type != "cpu":
        print(f"this measures a kernel of the CPU; nothing to do on {arguments.device}")
        return
    refusal = kernels.survey(torch.device("cpu"), torch.bfloat16, HEAD_DIM)["cpu_matmul"]
    if refusal is not None:
        raise SystemExit(f"cpu_matmul cannot run here: {refusal}")
    torch.manual_seed(0)
    environment = measure.environment()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    print(HEADER)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for length in arguments.rows:
            for is_causal in (False, True):
                rows.append(measure_one(length, is_causal, arguments.scores, arguments.repeats))
                print(line(rows[-1]), flush=True)
                results = {"environment": environment, "rows": rows}
                (arguments.output / "cpu_matmul.json").write_text(json.dumps(results, indent=1) + "\n")
                (arguments.output / "cpu_matmul.md").write_text(report(rows, environment, arguments.scores))


if __name__ == "__main__":
    main()
