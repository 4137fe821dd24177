"""decode_step with a DilatedKVCache against a dense KV cache: time of one token and bytes kept, up to a million tokens.

    python bench_decode.py                                             the full table: 1k to 1M tokens
    python bench_decode.py --lengths 1024 4096 --repeats 3 --threads 1
    python bench_decode.py --device cuda                               bfloat16 there

Writes JSON and a Markdown table (default: docs/benchmarks). One cache sees all tokens, random ones in chunks; before
each length single tokens are timed, the last that the open segments take: the dearest. The dense step is SDPA of one
query over all keys. Candidates run in turns; the figures are medians. At each length the outputs of both are compared
with the definition in float64 before anything is reported.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dilated_core import DilatedPattern, kernels, measure, reference
from dilated_core.decode import DilatedKVCache, decode_step
from dilated_core.decode.lanes import plan_lanes
from dilated_core.kernels import Problem

BATCH, HEADS, HEAD_DIM = 1, 8, 64
PATTERN = DilatedPattern.longnet()
LENGTHS = [1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20]
CHUNK = 1 << 16
# Tokens a timed run: every phase of every branch once.
TOKENS = math.lcm(*PATTERN.dilation_rates)
# Largest deviation from the definition, relative to its largest magnitude.
# The mean of a million random values is small beside float32's rounding of their sum: dense attention needs more.
TOLERANCE = {
    torch.float32: {"ours": 2e-5, "dense": 1e-4},
    torch.bfloat16: {"ours": 2e-2, "dense": 2e-2},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 1 << 20


class Stream:
    """Random tokens, decoded as they come; all keys and values are kept beside: the dense cache, and for the check."""

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.cache = DilatedKVCache(
            PATTERN.segment_lengths,
            PATTERN.dilation_rates,
            batch_size=BATCH,
            num_heads=HEADS,
            head_dim=HEAD_DIM,
            dtype=dtype,
            device=device,
        )
        # As SDPA reads it best: (batch, heads, tokens, head_dim).
        self.key, self.value = (
            torch.empty(BATCH, HEADS, length, HEAD_DIM, dtype=dtype, device=device) for _ in range(2)
        )
        self.query = self.key.new_empty(BATCH, 0, HEADS, HEAD_DIM)  # of the latest tokens
        self.out = self.query

    @property
    def seen(self) -> int:
        """Tokens so far."""
        return self.cache.lengths[0]

    def advance(self, length: int) -> None:
        """Decode random tokens up to ``length``, in chunks."""
        while self.seen < length:
            decode_step(*self._draw(min(CHUNK, length - self.seen)), self.cache)

    def single_tokens(self) -> Callable[[], None]:
        """The next TOKENS tokens, one by one, as something to time."""

        def run() -> None:
            query, key, value = self._draw(TOKENS)
            outs = [
                decode_step(*(tensor[:, row : row + 1] for tensor in (query, key, value)), self.cache)
                for row in range(TOKENS)
            ]
            self.query, self.out = query, torch.cat(outs, 1)

        return run

    def dense(self) -> Tensor:
        """The latest token over all keys."""
        query = self.query[:, -1:].transpose(1, 2)
        return scaled_dot_product_attention(query, self.key[:, :, : self.seen], self.value[:, :, : self.seen])

    def _draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        size = (3, BATCH, count, HEADS, HEAD_DIM)
        query, key, value = torch.randn(size, dtype=self.key.dtype, device=self.key.device).unbind()
        for kept, new in ((self.key, key), (self.value, value)):
            kept[:, :, self.seen : self.seen + count] = new.transpose(1, 2)
        return query, key, value


def problems(positions: range, like: Tensor) -> list[Problem]:
    """The kernel calls of these tokens, on tensors of the same shapes and strides: the least their steps can cost.

    ``like`` has their dtype and device.
    """
    calls = []
    for plan in plan_lanes(PATTERN.segment_lengths, PATTERN.dilation_rates, "paper", HEADS, HEADS):
        size = (2, BATCH, plan.lanes, plan.rows, HEAD_DIM)
        key, value = torch.randn(size, dtype=like.dtype, device=like.device).unbind()
        for position in positions:
            row, phase = divmod(position % plan.segment_length, plan.rate)
            for bundle in plan.bundles.get(phase, ()):
                live = (tensor[:, bundle.lanes, : row + 1] for tensor in (key, value))
                query = torch.randn(BATCH, len(bundle.heads), 1, HEAD_DIM, dtype=like.dtype, device=like.device)
                calls.append((position, Problem(query, *live, is_causal=False, scale=HEAD_DIM**-0.5)))
    return [call for _, call in sorted(calls, key=lambda pair: pair[0])]  # token by token, as steps make them


def check(stream: Stream) -> dict[str, float]:
    """Largest deviations of the latest tokens from the definition; too large raises."""
    # The longest segment, of which the others are divisors, is as far back as anything reaches.
    longest = max(PATTERN.segment_lengths)
    if any(longest % length for length in PATTERN.segment_lengths):
        raise SystemExit("the check needs segment lengths that divide the longest")
    first = max(0, stream.seen - len(stream.query[0])) // longest * longest
    key, value = (kept[:, :, first : stream.seen].transpose(1, 2).double() for kept in (stream.key, stream.value))
    query = torch.zeros_like(key)
    query[:, -TOKENS:] = stream.query
    rows = torch.arange(query.shape[1] - TOKENS, query.shape[1])
    exact, _ = reference.dilated_attention(
        query, key, value, PATTERN.segment_lengths, PATTERN.dilation_rates, is_causal=True, rows=rows
    )
    deviations = {"ours": _deviation(stream.out, exact)}
    found = stream.dense()[0, :, 0]
    heads = []
    for head, row in enumerate(stream.query[0, -1].double()):  # head by head: float64 takes twice the memory
        keys, values = (kept[0, head, : stream.seen].double() for kept in (stream.key, stream.value))
        heads.append(torch.softmax(keys @ row / HEAD_DIM**0.5, 0) @ values)
    deviations["dense"] = _deviation(found, torch.stack(heads))
    if not all(deviation <= TOLERANCE[stream.key.dtype][name] for name, deviation in deviations.items()):
        raise SystemExit(f"deviations from the definition at {stream.seen} tokens: {deviations}; nothing is reported")
    return deviations


def _deviation(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def measure_one(stream: Stream, length: int, repeats: int) -> dict[str, object]:
    """One row of the table: the tokens just before the ``length``-th, where segments are fullest."""
    timed = (1 + repeats) * TOKENS
    stream.advance(length - 1 - timed)
    kernel = kernels.choose("auto", stream.key.device, stream.key.dtype, HEAD_DIM)
    calls = problems(range(length - 1 - TOKENS, length - 1), stream.key)
    times = measure.interleaved(
        {
            "ours": stream.single_tokens(),
            "kernels": lambda: [kernel.forward(call) for call in calls],
            "dense": stream.dense,
        },
        repeats=repeats,
    )
    deviations = check(stream)
    tokens = {"ours": TOKENS, "kernels": TOKENS, "dense": 1}
    median = {name: timing.median / tokens[name] for name, timing in times.items()}
    row_bytes = 2 * HEAD_DIM * stream.key.element_size()
    return {
        "tokens": length,
        "dtype": str(stream.key.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "kernel": kernel.name,
        "deviation_from_definition": deviations,
        "seconds": {name: [taken / tokens[name] for taken in timing.seconds] for name, timing in times.items()},
        "median": median,
        "spread": {name: timing.spread for name, timing in times.items()},
        "speedup_over_dense": median["dense"] / median["ours"],
        "keys_attended": sum(call.query.shape[1] * call.key.shape[2] for call in calls) / TOKENS,
        "keys_attended_by_dense": HEADS * (length - 1),
        "bytes_live": stream.cache.live_rows * row_bytes,
        "bytes_allocated": stream.cache.nbytes,
        "bytes_at_most": stream.cache.max_nbytes,
        "bytes_of_dense": BATCH * HEADS * (length - 1) * row_bytes,
    }


def table(rows: list[dict[str, object]]) -> str:
    """The rows as Markdown."""
    lines = [
        (
            "| tokens | ours, ms a token (spread) | its kernel calls, ms | dense, ms (spread) | over dense "
            "| keys attended: ours, dense | MiB kept: live, allocated | MiB of dense |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        median = {name: seconds * 1e3 for name, seconds in row["median"].items()}
        spread = row["spread"]
        lines.append(
            f"| {row['tokens']} | {median['ours']:.3f} ({spread['ours']:.0%}) | {median['kernels']:.3f} "
            f"| {median['dense']:.3f} ({spread['dense']:.0%}) | {row['speedup_over_dense']:.2f} "
            f"| {row['keys_attended']:.0f}, {row['keys_attended_by_dense']} "
            f"| {row['bytes_live'] / MIB:.1f}, {row['bytes_allocated'] / MIB:.1f} | {row['bytes_of_dense'] / MIB:.1f} |"
        )
    return "\n".join(lines)


def report(rows: list[dict[str, object]], environment: dict[str, object]) -> str:
    """The page that lands beside the JSON."""
    return (
        "# One token with a dilated KV cache against a dense one\n\n"
        f"{environment['date']}, torch {environment['torch']}, {environment['processor']} "
        f"({environment['cpu_capability']}), {rows[0]['threads']} threads, "
        f"{', '.join(environment['cuda']) or 'no GPU'}.\n"
        f"Batch {BATCH}, {HEADS} heads of {HEAD_DIM}, {rows[0]['dtype']}, segments {list(PATTERN.segment_lengths)}, "
        f"rates {list(PATTERN.dilation_rates)}. The cache never takes more than "
        f"{rows[0]['bytes_at_most'] / MIB:.1f} MiB.\n\n"
        "Each row was checked against the float64 definition in the same run before it was reported. Times are medians "
        f"of interleaved repeats, ours the mean of {TOKENS} tokens in a row (every phase of every branch once), just "
        "before the length given, where the open segments are fullest and a step is dearest; the spread is the "
        "interquartile range over the median. *Its kernel calls* are those of a step by themselves, on tensors of "
        "the same shapes. *Dense* is SDPA of one query over all keys, which computes another function: the paper's "
        "pattern attends fewer. *Keys attended* are summed over the heads.\n\n"
        f"{table(rows)}\n"
        f"\nRaw data: [decode.json](decode.json). Command, from the repository's root: "
        f"`python packages/dilated-core/benchmarks/{environment['command']}`.\n"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:index] (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: fp32 on a CPU, bf16 on a GPU)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    timed = (1 + arguments.repeats) * TOKENS
    previous = 0
    for length in arguments.lengths:
        if length - 1 - timed < previous:
            parser.error(f"--lengths: expected to rise by more than the {timed} tokens that are timed, got {length}")
        previous = length
    device = torch.device(arguments.device)
    dtype = DTYPES[arguments.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    environment = measure.environment()
    folder = measure.results_folder(arguments.output, device)
    folder.mkdir(parents=True, exist_ok=True)
    stream = Stream(max(arguments.lengths), dtype, device)
    rows: list[dict[str, object]] = []
    print(table([]))
    with torch.inference_mode():
        for length in arguments.lengths:
            rows.append(measure_one(stream, length, arguments.repeats))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            # After every row, so that a run cut short keeps what it measured.
            results = {"environment": environment, "rows": rows}
            (folder / "decode.json").write_text(json.dumps(results, indent=1) + "\n")
            (folder / "decode.md").write_text(report(rows, environment))


if __name__ == "__main__":
    main()
