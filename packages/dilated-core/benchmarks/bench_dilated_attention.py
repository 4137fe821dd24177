"""dilated_attention against dense SDPA and the torchscale formula: time, FLOP rate and memory, each result checked.

    python bench_dilated_attention.py                     the full table: 8k, 16k, 32k; fp32, bf16; 1 and 2 threads
    python bench_dilated_attention.py --sizes 4096 --repeats 1 --threads 2
    python bench_dilated_attention.py --device cuda

Writes JSON and a Markdown table (default: docs/benchmarks). Candidates run in turns in one process; the figures are
medians. Before a size is timed, ours (output, or output and gradients) and dense SDPA are compared with the float64
oracle in rows drawn from the whole length, and the torchscale formula with its own definition at a small size.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torchscale_formula import phase_of_head, torchscale_attention

from dilated_core import DilatedPattern, dilated_attention, kernels, measure, reference

BATCH, HEADS, HEAD_DIM = 1, 8, 64
PATTERN = DilatedPattern.longnet()
CHECKED_ROWS = 16
# A candidate whose timed runs have taken this long is not repeated further; the JSON holds every run.
ENOUGH_SECONDS = 30.0
# Largest deviation from the oracle, relative to its largest magnitude, of outputs and gradients.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense SDPA in our layout."""
    return scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2)


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """dilated_attention with the paper's pattern."""
    return dilated_attention(query, key, value, PATTERN.segment_lengths, PATTERN.dilation_rates)


def torchscale(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The torchscale formula with the paper's pattern."""
    return torchscale_attention(query, key, value, PATTERN.segment_lengths, PATTERN.dilation_rates)


def check(name: str, run: Callable[..., Tensor], qkv: list[Tensor], pattern: DilatedPattern, gradients: bool) -> float:
    """Largest deviation of ``run`` from the float64 oracle, in rows spread over the whole length; too large raises.

    With ``gradients``, of dq, dk and dv under a cotangent that lives in these rows only, so that the oracle needs
    no others.
    """
    seq = qkv[0].shape[1]
    rows = torch.randint(seq, (CHECKED_ROWS,), generator=torch.Generator().manual_seed(0)).unique()
    cotangent = torch.randn(BATCH, len(rows), HEADS, HEAD_DIM).to(qkv[0].dtype)
    leaves = [tensor.clone().requires_grad_(gradients) for tensor in qkv]
    exact_leaves = [tensor.cpu().double().requires_grad_(gradients) for tensor in qkv]
    out = run(*leaves)[:, rows.to(qkv[0].device)]
    exact, _ = reference.dilated_attention(*exact_leaves, pattern.segment_lengths, pattern.dilation_rates, rows=rows)
    pairs = [(out, exact)]
    if gradients:
        found = torch.autograd.grad(out, leaves, cotangent.to(out.device))
        pairs += zip(found, torch.autograd.grad(exact, exact_leaves, cotangent.double()), strict=True)
    deviations = [((a.cpu().double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]
    if not all(deviation <= TOLERANCE[out.dtype] for deviation in deviations):
        raise SystemExit(f"{name} deviates from the oracle by {deviations} at {seq} tokens; nothing is reported")
    return max(deviations)


def check_torchscale_formula() -> float:
    """The comparison formula against its own definition, at a size where nothing is padded (raises if wrong)."""
    lengths, rates = (32, 64, 128), (1, 2, 4)
    query, key, value = torch.randn(3, 1, 256, HEADS, HEAD_DIM, dtype=torch.float64).unbind()
    position, head = torch.arange(256), torch.arange(HEADS)
    count = torch.zeros(HEADS, 256, 256, dtype=torch.float64)
    for w, r in zip(lengths, rates, strict=True):
        kept = (position % w % r)[None] == phase_of_head(head, HEADS, r)[:, None]
        count += kept[:, :, None] & kept[:, None, :] & (position[:, None] // w == position // w)
    scores = torch.einsum("qhd,khd->hqk", query[0], key[0]) / HEAD_DIM**0.5
    exact = torch.einsum("hqk,khd->qhd", torch.softmax(scores + torch.log(count), -1), value[0])
    deviation = (torchscale_attention(query, key, value, lengths, rates)[0] - exact).abs().max().item()
    if not deviation < 1e-12:
        raise SystemExit(f"the torchscale formula deviates by {deviation:.1e}; nothing is reported")
    return deviation


def training(run: Callable[..., Tensor], qkv: list[Tensor], cotangent: Tensor) -> Callable[[], object]:
    """Forward and backward of ``run``."""
    leaves = [tensor.clone().requires_grad_() for tensor in qkv]
    return lambda: torch.autograd.grad(run(*leaves), leaves, cotangent)


def kernel_share(run: Callable[[], object], kernel: kernels.Kernel) -> float:
    """Share of one run's wall time that is spent inside the kernel's calls: what no plan and no merge can improve."""
    inside = 0.0

    def timed(method: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal inside
            started = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                inside += time.perf_counter() - started

        return call

    own = type(kernel)
    methods = {name: getattr(own, name) for name in ("forward", "backward")}
    try:
        for name, method in methods.items():
            setattr(own, name, timed(method))
        started = time.perf_counter()
        run()
        return inside / (time.perf_counter() - started)
    finally:
        for name, method in methods.items():
            setattr(own, name, method)


def measure_one(seq: int, dtype: torch.dtype, device: torch.device, repeats: int, backward: bool) -> dict[str, object]:
    """One row of the table."""
    *qkv, cotangent = (torch.randn(BATCH, seq, HEADS, HEAD_DIM, device=device).to(dtype) for _ in range(4))
    candidates = {"ours": ours, "dense": dense}
    if device.type == "cpu":
        candidates["torchscale"] = torchscale
    deviations = {"ours": check("ours", ours, qkv, PATTERN, backward)}
    if not backward:
        deviations["dense"] = check("dense", dense, qkv, DilatedPattern([seq], [1]), gradients=False)
    if backward:
        runs = {name: training(run, qkv, cotangent) for name, run in candidates.items()}
    else:
        runs = {name: (lambda run=run: run(*qkv)) for name, run in candidates.items()}
    # What the result itself takes: the output, or output and three gradients.
    result = qkv[0].nbytes * (4 if backward else 1)
    memory = {
        name: (measure.peak_memory(run, device) - result) / qkv[0].nbytes
        for name, run in runs.items()
        if name != "dense"
    }
    kernel = kernels.choose("auto", device, dtype, HEAD_DIM)
    share = kernel_share(runs["ours"], kernel) if device.type == "cpu" else None
    # The checks have warmed all up. One dense run at 32k takes up to two minutes.
    times = measure.interleaved(runs, repeats=repeats, warmup=0, enough=ENOUGH_SECONDS)
    passes = 3.5 if backward else 1.0  # backward: five matrix products where forward has two
    flops = {
        "ours": passes * PATTERN.flops(seq, HEADS, HEAD_DIM) * BATCH,
        "dense": passes * 4 * seq * seq * HEADS * HEAD_DIM * BATCH,
    }
    rate = {name: flops[name] / times[name].median / 1e9 for name in flops}
    return {
        "seq": seq,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "pass": "forward+backward" if backward else "forward",
        "kernel": kernel.name,
        "kernel_share": share,
        "deviation_from_oracle": deviations,
        "seconds": {name: timing.seconds for name, timing in times.items()},
        "median": {name: timing.median for name, timing in times.items()},
        "spread": {name: timing.spread for name, timing in times.items()},
        "gflops_per_second": rate,
        "flop_rate_to_dense": rate["ours"] / rate["dense"],
        "speedup_over_dense": times["dense"].median / times["ours"].median,
        "flop_ratio_to_dense": flops["dense"] / flops["ours"],
        "speedup_over_torchscale": (
            times["torchscale"].median / times["ours"].median if "torchscale" in times else None
        ),
        "extra_memory_in_outputs": memory,
    }


def table(rows: list[dict[str, object]]) -> str:
    """The rows as Markdown."""
    lines = [
        (
            "| tokens | dtype | threads | pass | ours, s (spread) | kernel (share of time) | dense, s "
            "| rate to dense's | over dense (FLOP ratio) | over torchscale | extra memory: ours, torchscale |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        median, spread, memory = row["median"], row["spread"], row["extra_memory_in_outputs"]
        over = row["speedup_over_torchscale"]
        share = "-" if row["kernel_share"] is None else f"{row['kernel_share']:.0%}"
        lines.append(
            f"| {row['seq']} | {row['dtype']} | {row['threads']} | {row['pass']} "
            f"| {median['ours']:.3f} ({spread['ours']:.0%}) | {row['kernel']} ({share}) "
            f"| {median['dense']:.3f} | {row['flop_rate_to_dense']:.2f} "
            f"| {row['speedup_over_dense']:.2f} ({row['flop_ratio_to_dense']:.2f}) "
            f"| {'-' if over is None else f'{over:.2f}'} "
            f"| {memory['ours']:.2f}, {'-' if over is None else format(memory['torchscale'], '.2f')} |"
        )
    return "\n".join(lines)


def report(rows: list[dict[str, object]], environment: dict[str, object]) -> str:
    """The page that lands beside the JSON."""
    return (
        "# dilated_attention against dense SDPA and the torchscale formula\n\n"
        f"{environment['date']}, torch {environment['torch']}, {environment['processor']} "
        f"({environment['cpu_capability']}), {', '.join(environment['cuda']) or 'no GPU'}.\n"
        f"Batch {BATCH}, {HEADS} heads of {HEAD_DIM}, not causal, segments {list(PATTERN.segment_lengths)}, "
        f"rates {list(PATTERN.dilation_rates)}.\n\n"
        "Each row was checked against the float64 oracle in the same run before it was timed. Times are medians of "
        "interleaved repeats (fewer where one run takes over ten seconds), the spread is the interquartile range over "
        "the median. *Kernel*: which one attends the tiles, and its share of one run's time. *Rate to dense's* is "
        "FLOP/s of ours over FLOP/s of dense SDPA. *Extra memory* is the peak beyond "
        "inputs and results, in units of the output; for forward+backward the results are the output and three "
        f"gradients.\n\n{table(rows)}\n"
        f"\nRaw data: [dilated_attention.json](dilated_attention.json). Command, from the repository's root: "
        f"`python packages/dilated-core/benchmarks/{environment['command']}`.\n"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:index] (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[2, 1], help="threads of PyTorch (default: %(default)s)"
    )
    parser.add_argument("--passes", choices=["forward", "backward"], nargs="+", default=["forward", "backward"])
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    check_torchscale_formula()
    environment = measure.environment()
    folder = measure.results_folder(arguments.output, device)
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = [DTYPES[name] for name in arguments.dtypes]
    if device.type == "cuda":
        dtypes = [torch.bfloat16]
    rows: list[dict[str, object]] = []
    print("\n".join(table([]).splitlines()))
    for name in arguments.passes:
        for threads in arguments.threads if device.type == "cpu" else [torch.get_num_threads()]:
            torch.set_num_threads(threads)
            for dtype in dtypes:
                for seq in arguments.sizes:
                    rows.append(measure_one(seq, dtype, device, arguments.repeats, name == "backward"))
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
                    # After every row, so that a run cut short keeps what it measured.
                    results = {"environment": environment, "rows": rows}
                    (folder / "dilated_attention.json").write_text(json.dumps(results, indent=1) + "\n")
                    (folder / "dilated_attention.md").write_text(report(rows, environment))


if __name__ == "__main__":
    main()
