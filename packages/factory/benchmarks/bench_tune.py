"""Where the profile of `dilated tune` wins over the policy's fixed thresholds, on the machine at hand.

    python bench_tune.py                                  tunes for ten minutes, then compares to 65,536 tokens
    python bench_tune.py --quick                          seconds, at small lengths
    python bench_tune.py --device cuda:0

Tunes into a temporary profile; then runs attentions that the factory makes by the policy alone, and by the profile, in
turns: a second measurement of what the first has decided. Where both decide alike the ratio is noise, and shows how
much of it there is. Output and gradients of both are compared with the float64 definition before anything is timed.
Writes JSON and a Markdown page (default: docs/benchmarks).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from dilated_core import measure
from dilated_factory import Hardware, Policy, Profile, SharedResources, create_dilated_attention
from dilated_factory.profile import load
from dilated_factory.resources.shared import MIN_BYTES
from dilated_factory.tuning import LENGTHS, text, tune
from dilated_factory.tuning.cells import FORWARD, TRAINING
from dilated_factory.tuning.probe import PATTERN, Probe
from dilated_factory.tuning.rules import Figure, gains

HEADS, HEAD_DIM = 8, 64
ROUNDS = 9


def compare(profile: Profile, device: torch.device, dtype: str, length: int, rounds: int) -> list[dict[str, object]]:
    """One row for each pass: what each decided, and its seconds."""
    probe = Probe(device, Hardware.detect(device), HEADS, HEAD_DIM, lambda words: None)
    example = probe.example(length, getattr(torch, dtype))
    resources = {
        "policy": SharedResources(min_bytes=MIN_BYTES),
        "profile": SharedResources(min_bytes=profile.pool_min_bytes or MIN_BYTES),
    }
    modules = {
        name: create_dilated_attention(
            "improved",
            PATTERN.segment_lengths,
            PATTERN.dilation_rates,
            sequence_length=length,
            profile=profile if name == "profile" else None,
            resources=resources[name],
        )
        for name in resources
    }
    right, dropped = example.check(modules)
    if dropped:
        raise SystemExit(f"{dropped}; nothing is reported")
    rows = []
    for kind in (FORWARD, TRAINING):
        runs = {name: example.runs(module, kind) for name, module in modules.items()}
        timings = measure.interleaved(runs, repeats=rounds)
        figures = {name: Figure(timing.median, timing.spread) for name, timing in timings.items()}
        policy, tuned = figures["policy"], figures["profile"]
        verdict = "wins" if gains(tuned, policy) else "loses" if gains(policy, tuned) else "within the spread"
        rows.append(
            {
                "dtype": dtype,
                "tokens": length,
                "pass": kind,
                "pool": {name: module.decision.pool_mode for name, module in modules.items()},
                "kernel": {name: module.decision.kernel for name, module in modules.items()},
                "seconds": {name: timing.seconds for name, timing in timings.items()},
                "median": {name: figure.seconds for name, figure in figures.items()},
                "spread": {name: figure.spread for name, figure in figures.items()},
                "ratio": policy.seconds / tuned.seconds,
                "verdict": verdict,
                "deviation": right,
            }
        )
    for one in resources.values():
        one.trim()
    return rows


def report(profile: Profile, rows: Sequence[dict[str, object]], environment: dict[str, object]) -> str:
    """The page that lands beside the JSON."""
    lines = [
        "| dtype | tokens | pass | policy | profile | policy, ms | profile, ms | times as fast | the profile |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        decided = [f"{row['pool'][name]}, {row['kernel'][name]}" for name in ("policy", "profile")]
        times = [f"{row['median'][name] * 1e3:,.2f} ({row['spread'][name]:.0%})" for name in ("policy", "profile")]
        verdict = "decides alike" if decided[0] == decided[1] else row["verdict"]
        lines.append(
            f"| {row['dtype']} | {row['tokens']:,} | {row['pass']} | {' | '.join(decided)} | {' | '.join(times)} | "
            f"{row['ratio']:.2f} | {verdict} |"
        )
    largest = max(deviation for row in rows for deviation in row["deviation"].values())
    return (
        "# Where a tuned profile wins over fixed thresholds\n\n"
        f"{environment['date']}, torch {environment['torch']}, measured on {profile.hardware}.\n"
        f"Improved attention, {HEADS} heads of {HEAD_DIM}, segments {list(PATTERN.segment_lengths)}, rates "
        f"{list(PATTERN.dilation_rates)}. The policy has its own thresholds, the profile those that `dilated tune` "
        "measured a minute before: pool and kernel of each, and medians of calls in turns with their spread. Where "
        "both decide alike, the ratio shows the noise.\n\n"
        + "\n".join(lines)
        + f"\n\nLargest deviation of output and gradients from the definition, in the same run: {largest:.1e}.\n\n"
        f"## What was tuned\n\n```\n{text.render(profile, Policy())}\n```\n"
        f"\nRaw data: [tune.json](tune.json). Command, from the repository's root: "
        f"`python packages/factory/benchmarks/{environment['command']}`.\n"
    )


def main() -> None:
    """Tune, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:index] (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds to tune (default: %(default)g)")
    parser.add_argument("--quick", action="store_true", help="small lengths and a budget of two seconds")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    arguments.output = measure.results_folder(arguments.output, device)
    lengths, dtypes = (LENGTHS, ("float32", "bfloat16")) if not arguments.quick else ((128, 256), ("float32",))
    tuned = tune(
        device,
        budget_seconds=2.0 if arguments.quick else arguments.budget,
        dtypes=dtypes,
        heads=HEADS,
        head_dim=HEAD_DIM,
        lengths=lengths,
        progress=lambda done, total, words: print(f"{done}/{total} {words}", flush=True),
    )
    with tempfile.TemporaryDirectory() as folder:
        profile = load(tuned.save(Path(folder) / "profile.json"))
    rows = []
    for dtype in dtypes:
        for length in lengths:
            rows += compare(profile, device, dtype, length, 3 if arguments.quick else ROUNDS)
            print(f"compared {dtype} at {length:,} tokens", flush=True)
    environment = measure.environment()
    page = report(profile, rows, environment)
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment, "rows": rows, "profile": profile.content()}
    (arguments.output / "tune.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "tune.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
