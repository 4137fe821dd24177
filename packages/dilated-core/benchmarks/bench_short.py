"""Short sequences: what a call costs beyond its arithmetic, with and without a store of plans.

    python bench_short.py
    python bench_short.py --sizes 64 --threads 1 --repeats 20
    python bench_short.py --device cuda

The yardstick is one dense SDPA call of the same FLOPs. The goal: never more than its time at 0.9 of its rate, plus 300
microseconds. Each size is checked against the float64 oracle before it is timed; candidates run in turns.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from dilated_core import DilatedPattern, dilated_attention, measure, reference

BATCH, HEADS, HEAD_DIM = 1, 8, 64
PATTERN = DilatedPattern.longnet()
ALLOWANCE = 300e-6  # seconds
RATE = 0.9
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Plans(dict):
    """The plainest PatternStore."""

    def get_or_create(self, key, create):
        """Return what is kept under ``key``, or keep and return ``create()``."""
        found = self.get(key)
        if found is None:
            found = self[key] = create()
        return found


def measure_one(seq: int, dtype: torch.dtype, device: torch.device, repeats: int) -> dict[str, object]:
    """One row of the table."""
    query, key, value = torch.randn(3, BATCH, seq, HEADS, HEAD_DIM, device=device).to(dtype).unbind()
    pattern = (PATTERN.segment_lengths, PATTERN.dilation_rates)
    exact, _ = reference.dilated_attention(query.double(), key.double(), value.double(), *pattern)
    deviation = (
        (dilated_attention(query, key, value, *pattern).double() - exact).abs().max() / exact.abs().max()
    ).item()
    if not deviation <= TOLERANCE[dtype]:
        raise SystemExit(f"deviates from the oracle by {deviation} at {seq} tokens; nothing is reported")
    # Dense attention over so many tokens has the pattern's FLOPs.
    dense_seq = max(1, round((PATTERN.pairs(seq, HEADS) / HEADS) ** 0.5))
    dense = torch.randn(3, BATCH, HEADS, dense_seq, HEAD_DIM, device=device).to(dtype).unbind()
    plans = Plans()
    runs = {
        "ours": lambda: dilated_attention(query, key, value, *pattern),
        "ours, plans kept": lambda: dilated_attention(query, key, value, *pattern, patterns=plans),
        "dense": lambda: scaled_dot_product_attention(*dense),
    }
    times = measure.interleaved(runs, repeats=repeats, warmup=3)
    allowed = times["dense"].median / RATE + ALLOWANCE
    return {
        "seq": seq,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "dense_seq": dense_seq,
        "deviation_from_oracle": deviation,
        "median": {name: timing.median for name, timing in times.items()},
        "spread": {name: timing.spread for name, timing in times.items()},
        "allowed": allowed,
        "seconds": {name: timing.seconds for name, timing in times.items()},
    }


HEADER = (
    "| tokens | dtype | threads | ours, us (spread) | plans kept | dense of the same FLOPs | allowed | within |\n"
    + ("|---" * 8 + "|")
)


def line(row: dict[str, object]) -> str:
    """A row as Markdown."""
    micro = {name: seconds * 1e6 for name, seconds in row["median"].items()}
    return (
        f"| {row['seq']} | {row['dtype']} | {row['threads']} | {micro['ours']:.0f} ({row['spread']['ours']:.0%}) "
        f"| {micro['ours, plans kept']:.0f} | {micro['dense']:.0f} | {row['allowed'] * 1e6:.0f} "
        f"| {'yes' if row['median']['ours'] <= row['allowed'] else 'no'} |"
    )


def report(rows: list[dict[str, object]], environment: dict[str, object]) -> str:
    """The page that lands beside the JSON."""
    return (
        "# Short sequences\n\n"
        f"{environment['date']}, torch {environment['torch']}, {environment['processor']} "
        f"({environment['cpu_capability']}), {', '.join(environment['cuda']) or 'no GPU'}. "
        f"Batch {BATCH}, {HEADS} heads of {HEAD_DIM}, forward, the paper's pattern: "
        "below 2,048 tokens all five branches have one segment.\n\n"
        "Each size was checked against the float64 oracle. *Allowed* is the time of one dense SDPA call of the same "
        "FLOPs at 0.9 of its rate, plus 300 microseconds. Medians of interleaved repeats; the spread is the "
        "interquartile range over the median. *Plans kept*: with `patterns=`.\n\n"
        + "\n".join([HEADER, *map(line, rows)])
        + "\n\nRaw data: [short.json](short.json). Command, from the repository's root: "
        f"`python packages/dilated-core/benchmarks/{environment['command']}`.\n"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:index] (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2047])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", help="(default: both on a CPU, bf16 on a GPU)")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="on a CPU")
    parser.add_argument("--repeats", type=int, default=60, help="timed rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtypes = arguments.dtypes or (list(DTYPES) if device.type == "cpu" else ["bf16"])
    torch.manual_seed(0)
    environment = measure.environment()
    folder = measure.results_folder(arguments.output, device)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    print(HEADER)
    for threads in arguments.threads if device.type == "cpu" else arguments.threads[:1]:
        torch.set_num_threads(threads)
        for dtype in dtypes:
            for seq in arguments.sizes:
                rows.append(measure_one(seq, DTYPES[dtype], device, arguments.repeats))
                print(line(rows[-1]), flush=True)
                results = {"environment": environment, "rows": rows}
                (folder / "short.json").write_text(json.dumps(results, indent=1) + "\n")
                (folder / "short.md").write_text(report(rows, environment))


if __name__ == "__main__":
    main()
