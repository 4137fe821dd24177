"""streamed_attention by ring_size: peak memory and time against ring_size=1, each result checked.

    python bench_streaming.py                     the full table: 4k, 8k; fp32, bf16; keys as tensors and stored
    python bench_streaming.py --sizes 1024 --repeats 1 --threads 1
    python bench_streaming.py --device cuda --sizes 65536

Writes JSON and a Markdown table (default: docs/benchmarks). Ring sizes run in turns in one process; times are medians.
Before a size is timed, every ring size's output and gradients are compared with the float64 oracle in rows drawn from
the whole length. "stored" keys are copied out of memory chunk by chunk, as a file is at best; they take no gradient.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_core import measure, reference
from dilated_ring.streaming import streamed_attention

BATCH, HEADS, HEAD_DIM = 1, 8, 64
CHECKED_ROWS = 16
# A ring size whose timed runs have taken this long is not repeated further; the JSON holds every run.
ENOUGH_SECONDS = 30.0
# Largest deviation from the oracle, relative to its largest magnitude, of outputs and gradients.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STORED_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class Stored:
    """A stored tensor whose parts are copies."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        """See StoredTensor."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """See StoredTensor."""
        return STORED_NAMES[self._tensor.dtype]

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        return self._tensor[index].clone(memory_format=torch.contiguous_format)


class Problem:
    """Query and cotangent on the device, keys and values in host memory, and what is run on them."""

    def __init__(self, seq: int, dtype: torch.dtype, device: torch.device, keys: str, backward: bool) -> None:
        self.query, self.key, self.value, self.cotangent = (
            torch.randn(BATCH, seq, HEADS, HEAD_DIM).to(dtype) for _ in range(4)
        )
        self.leaves = [self.query.to(device)] + ([self.key, self.value] if keys == "tensor" else [])
        self.sources: list[Any] = [self.key, self.value] if keys == "tensor" else [Stored(self.key), Stored(self.value)]
        self.cotangent, self.backward = self.cotangent.to(device), backward
        for leaf in self.leaves:
            leaf.requires_grad_(backward)

    def run(self, ring_size: int, cotangent: Tensor) -> list[Tensor]:
        """The output and the leaves' gradients."""
        out = streamed_attention(self.leaves[0], *self.sources, ring_size=ring_size)
        return [out, *(torch.autograd.grad(out, self.leaves, cotangent) if self.backward else ())]

    def check(self, ring_size: int) -> float:
        """Largest deviation from the float64 oracle, in rows spread over the whole length; too large raises.

        The cotangent lives in these rows only, so that the oracle needs no others.
        """
        seq = self.query.shape[1]
        rows = torch.randint(seq, (CHECKED_ROWS,), generator=torch.Generator().manual_seed(0)).unique()
        cotangent = torch.zeros_like(self.cotangent)
        cotangent[:, rows] = self.cotangent[:, rows]
        found = self.run(ring_size, cotangent)
        exact_leaves = [tensor.detach().double().requires_grad_() for tensor in (self.query, self.key, self.value)]
        exact, _ = reference.dilated_attention(*exact_leaves, [seq], [1], rows=rows)
        expected = [exact, *torch.autograd.grad(exact, exact_leaves, self.cotangent[:, rows].cpu().double())]
        pairs = zip([found[0][:, rows], *found[1:]], expected, strict=False)  # of stored keys, no gradients
        deviations = [((a.cpu().double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]
        if not all(deviation <= TOLERANCE[self.query.dtype] for deviation in deviations):
            raise SystemExit(f"ring_size {ring_size} deviates from the oracle by {deviations}; nothing is reported")
        return max(deviations)

    def extra_memory(self, ring_size: int, device: torch.device) -> float | None:
        """Peak on the device beyond inputs and results, in units of the output.

        None where float32 sums of key's and value's gradients lie in host memory and the device is the CPU itself.
        """
        lse = self.query.numel() // HEAD_DIM * 4
        results = lse + self.query.nbytes * (1 + self.backward)
        if device.type == "cpu" and self.backward and len(self.leaves) > 1:
            if self.query.dtype != torch.float32:
                return None
            results += self.key.nbytes + self.value.nbytes
        return (measure.peak_memory(lambda: self.run(ring_size, self.cotangent), device) - results) / self.query.nbytes


def measure_one(
    problem: Problem, ring_sizes: list[int], device: torch.device, repeats: int, keys: str
) -> list[dict[str, Any]]:
    """The rows of the table that compare ring sizes with the first of them."""
    deviations = {ring_size: problem.check(ring_size) for ring_size in ring_sizes}
    memory = {ring_size: problem.extra_memory(ring_size, device) for ring_size in ring_sizes}
    runs: dict[str, Callable[[], object]] = {
        str(ring_size): (lambda ring_size=ring_size: problem.run(ring_size, problem.cotangent))  # type: ignore[misc]
        for ring_size in ring_sizes
    }
    # The checks have warmed all up.
    times = measure.interleaved(runs, repeats=repeats, warmup=0, enough=ENOUGH_SECONDS)
    first, first_memory = times[str(ring_sizes[0])].median, memory[ring_sizes[0]]
    return [
        {
            "seq": problem.query.shape[1],
            "dtype": str(problem.query.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "pass": "forward+backward" if problem.backward else "forward",
            "keys": keys,
            "ring_size": ring_size,
            "deviation_from_oracle": deviations[ring_size],
            "extra_memory_in_outputs": memory[ring_size],
            "memory_to_first": None if first_memory is None else memory[ring_size] / first_memory,  # type: ignore[operator]
            "seconds": times[str(ring_size)].seconds,
            "median": times[str(ring_size)].median,
            "spread": times[str(ring_size)].spread,
            "time_to_first": times[str(ring_size)].median / first,
        }
        for ring_size in ring_sizes
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| tokens | dtype | threads | pass | keys | ring_size | extra memory | to first | s (spread) | to first |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory, share = row["extra_memory_in_outputs"], row["memory_to_first"]
        lines.append(
            f"| {row['seq']} | {row['dtype']} | {row['threads']} | {row['pass']} | {row['keys']} | {row['ring_size']} "
            f"| {'-' if memory is None else f'{memory:.3f}'} | {'-' if share is None else f'{share:.3f}'} "
            f"| {row['median']:.3f} ({row['spread']:.0%}) | {row['time_to_first']:.2f} |"
        )
    return "\n".join(lines)


def report(rows: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    """The page that lands beside the JSON."""
    return (
        "# streamed_attention by ring_size\n\n"
        f"{environment['date']}, torch {environment['torch']}, {environment['processor']} "
        f"({environment['cpu_capability']}), {', '.join(environment['cuda']) or 'no GPU'}.\n"
        f"Batch {BATCH}, {HEADS} heads of {HEAD_DIM}, dense, not causal.\n\n"
        "Each row was checked against the float64 oracle in the same run before it was timed. Times are medians of "
        "interleaved repeats, the spread is the interquartile range over the median. *Keys*: tensors in host memory, "
        "read in place on a CPU, all gradients; or stored, copied chunk by chunk, the query's gradient. *Extra memory* "
        "is the device's peak beyond inputs, output, lse and gradients, in units of the output; none is given for "
        "gradients of half precision keys on a CPU, whose float32 sums lie in host memory. *To first*: over the "
        f"figure of the first ring_size.\n\n{table(rows)}\n"
        f"\nRaw data: [ring_streaming.json](ring_streaming.json). Command, from the repository's root: "
        f"`python packages/ring/benchmarks/{environment['command']}`.\n"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:index] (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--ring-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--keys", choices=["stored", "tensor"], nargs="+", default=["stored", "tensor"])
    parser.add_argument("--passes", choices=["forward", "backward"], nargs="+", default=["forward", "backward"])
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="threads of PyTorch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    environment = measure.environment()
    folder = measure.results_folder(arguments.output, device)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    print(table([]))
    for name in arguments.passes:
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for dtype in arguments.dtypes:
                for keys in arguments.keys:
                    for seq in arguments.sizes:
                        problem = Problem(seq, DTYPES[dtype], device, keys, name == "backward")
                        found = measure_one(problem, arguments.ring_sizes, device, arguments.repeats, keys)
                        rows += found
                        print("\n".join(table(found).splitlines()[2:]), flush=True)
                        # After every size, so that a run cut short keeps what it measured.
                        results = {"environment": environment, "rows": rows}
                        (folder / "ring_streaming.json").write_text(json.dumps(results, indent=1) + "\n")
                        (folder / "ring_streaming.md").write_text(report(rows, environment))


if __name__ == "__main__":
    main()
