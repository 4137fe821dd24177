"""dilated_ring_attention over processes: CPU time of all ranks against one process's, and bytes against a ring's.

    python bench_ranks.py                                     2 and 4 processes on gloo, two patterns, causal and not
    python bench_ranks.py --ranks 2 --tokens 4096 --repeats 1 --output results

Figures are CPU time, not wall time, as there may be fewer processors than ranks: process_time of every rank, with one
thread for the operations, and that of the threads of gloo. One process, alone and all ranks side by side each with the
whole sequence, is measured in the same processes and in turns with the ranks: what two busy processors take from each
other shows in the second of these, and is no cost of sharding. Before anything is timed, outputs and gradients of every
candidate are compared with the float64 oracle in rows drawn from the whole length. Where ring-attention-pytorch is
installed, its forward of dense attention is timed beside ours.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing import spawn
from torch.nn.functional import scaled_dot_product_attention

from dilated_core import dilated_attention, measure, reference
from dilated_ring import dilated_ring_attention, make_plan
from dilated_ring.comm import ProcessGroupComm, RecordingComm
from dilated_ring.plan import even_bounds

BATCH, HEADS, HEAD_DIM = 1, 8, 64
CHECKED_ROWS = 16
TOLERANCE = 2e-5  # largest deviation from the oracle, relative to its largest magnitude
PATIENCE = timedelta(minutes=10)  # of ranks that wait for each other
# Of PATTERN_TOKENS tokens, so that at 2 and at 4 ranks branches cross bounds; other lengths scale them.
PATTERN_TOKENS = 16384
PATTERNS = {
    # The paper's rates, its segments over the same six octaves, cut to this length.
    "paper": ((512, 2048, 4096, 8192, 16384), (1, 2, 4, 6, 12)),
    # Prov-GigaPath's: from a small segment to the whole slide, evenly in the exponent, not dividing each other.
    "gigapath": ((512, 1217, 2896, 6888, 16384), (1, 2, 4, 8, 16)),
}
EXCHANGES = ("gather", "heads")
PEER = "ring-attention-pytorch"
PEER_BUCKETS = (512, 1024, 2048)  # it runs with each, and is compared by its best

Pass = tuple[float, float]
"""CPU seconds of a forward and of its backward."""


@dataclass(frozen=True)
class Problem:
    """One row of the table."""

    pattern: str
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    is_causal: bool
    tokens: int
    ranks: int
    repeats: int

    def tensors(self) -> list[Tensor]:
        """query, key, value and a cotangent of the whole sequence, the same on every rank."""
        generator = torch.Generator().manual_seed(0)
        shape = (4, BATCH, self.tokens, HEADS, HEAD_DIM)
        return list(torch.randn(shape, generator=generator).unbind())


# ------------------------------------------------------------------------------------------------ on every rank


def cpu_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of this process in ``run``, all its threads together, and its result; all ranks start together."""
    distributed.barrier()
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def timed_pass(attention: Callable[..., Tensor], qkv: list[Tensor], cotangent: Tensor) -> Pass:
    """One forward, and one backward."""
    leaves = [tensor.clone().requires_grad_() for tensor in qkv]
    forward, out = cpu_seconds(lambda: attention(*leaves))
    backward, _ = cpu_seconds(lambda: torch.autograd.grad(out, leaves, cotangent))
    return forward, backward


def measure_rank(rank: int, problem: Problem, group: distributed.ProcessGroup) -> dict[str, Any]:
    """This rank's share of one row: its deviations, bytes and times."""
    *whole, cotangent = problem.tensors()
    bounds = even_bounds(problem.tokens, problem.ranks)
    shard = slice(bounds[rank], bounds[rank + 1])
    own = [tensor[:, shard].contiguous() for tensor in whole]
    own_cotangent = cotangent[:, shard].contiguous()
    pattern = problem.segment_lengths, problem.dilation_rates

    def single(*qkv: Tensor) -> Tensor:
        return dilated_attention(*qkv, *pattern, is_causal=problem.is_causal)

    def sharded(exchange: str, comm: Any = group) -> Callable[..., Tensor]:
        return lambda *qkv: dilated_ring_attention(
            *qkv, *pattern, group=comm, is_causal=problem.is_causal, exchange=exchange
        )

    deviations = {"single": check(single, whole, whole, problem, slice(None))}
    received: dict[str, dict[str, int]] = {}
    for exchange in EXCHANGES:
        recording = RecordingComm(ProcessGroupComm(group))
        deviations[exchange] = check(sharded(exchange, recording), own, whole, problem, shard)
        received[exchange] = {phase: recording.received_bytes(phase) for phase in ("forward", "backward", "agreement")}

    seconds: dict[str, list[Pass]] = {name: [] for name in ("single", "side by side", *EXCHANGES)}
    for round_ in range(problem.repeats):
        for name in seconds:
            if name == "single":  # the others wait, asleep
                found = timed_pass(single, whole, cotangent) if rank == 0 else timed_pass(nothing, own, own_cotangent)
            elif name == "side by side":
                if round_ > 0:  # it takes as long as all others together, and shows the machine's share, not ours
                    continue
                found = timed_pass(single, whole, cotangent)
            else:
                found = timed_pass(sharded(name), own, own_cotangent)
            seconds[name].append(found)
    return {"deviations": deviations, "received": received, "seconds": seconds}


def nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What a rank does while another is timed."""
    return query + key + value


def check(
    attention: Callable[..., Tensor], qkv: list[Tensor], whole: list[Tensor], problem: Problem, shard: slice
) -> float:
    """Largest deviation of ``attention`` from the float64 oracle, output and gradients; too large raises.

    The cotangent lives in rows spread over the whole length, so that the oracle needs no others.
    """
    rows = torch.randint(problem.tokens, (CHECKED_ROWS,), generator=torch.Generator().manual_seed(1)).unique()
    some = torch.randn(BATCH, len(rows), HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    cotangent = torch.zeros_like(whole[0])
    cotangent[:, rows] = some
    leaves = [tensor.clone().requires_grad_() for tensor in qkv]
    out = attention(*leaves)
    grads = torch.autograd.grad(out, leaves, cotangent[:, shard])
    exact_leaves = [tensor.double().requires_grad_() for tensor in whole]
    exact, _ = reference.dilated_attention(
        *exact_leaves, problem.segment_lengths, problem.dilation_rates, is_causal=problem.is_causal, rows=rows
    )
    exact_grads = torch.autograd.grad(exact, exact_leaves, some.double())
    exact_out = torch.zeros(whole[0].shape, dtype=torch.float64).index_copy_(1, rows, exact.detach())
    mine = torch.zeros(problem.tokens, dtype=torch.bool).index_fill_(0, rows, True)[shard]
    pairs = [(out.detach()[:, mine], exact_out[:, shard][:, mine], exact_out)]
    pairs += [(a, b[:, shard], b) for a, b in zip(grads, exact_grads, strict=True)]
    # Of the whole result's largest magnitude: a shard may have none of the rows.
    deviations = [((a - b).abs().max() / all_.abs().max()).item() if a.numel() else 0.0 for a, b, all_ in pairs]
    if not all(deviation <= TOLERANCE for deviation in deviations):
        raise SystemExit(f"{problem}: deviates from the oracle by {deviations}; nothing is reported")
    return max(deviations)


def measure_peer_rank(rank: int, problem: Problem, group: distributed.ProcessGroup) -> dict[str, Any]:
    """This rank's share of the comparison with ring-attention-pytorch: dense attention, forward only."""
    from ring_attention_pytorch import ring_flash_attn

    query, key, value, _ = problem.tensors()
    bounds = even_bounds(problem.tokens, problem.ranks)
    shard = slice(bounds[rank], bounds[rank + 1])
    own = [tensor[:, shard].contiguous() for tensor in (query, key, value)]
    dense = scaled_dot_product_attention(
        *(tensor.double().transpose(1, 2) for tensor in (query, key, value)), is_causal=problem.is_causal
    ).transpose(1, 2)

    def ours(exchange: str) -> Callable[..., Tensor]:
        return lambda *qkv: dilated_ring_attention(
            *qkv, [problem.tokens], [1], group=group, is_causal=problem.is_causal, exchange=exchange
        )

    def theirs(bucket_size: int) -> Callable[..., Tensor]:
        return lambda *qkv: ring_flash_attn(
            *qkv, causal=problem.is_causal, bucket_size=bucket_size, ring_reduce_col=True
        )

    candidates = {exchange: ours(exchange) for exchange in EXCHANGES}
    candidates |= {f"{PEER}, buckets of {size}": theirs(size) for size in PEER_BUCKETS if size <= len(own[0][0])}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    deviations = {}
    with torch.no_grad():
        for name, run in candidates.items():
            deviations[name] = ((run(*own) - dense[:, shard]).abs().max() / dense.abs().max()).item()
            if not deviations[name] <= TOLERANCE:
                raise SystemExit(f"{name} deviates from dense attention by {deviations[name]}; nothing is reported")
        for _ in range(problem.repeats):
            for name, run in candidates.items():
                seconds[name].append(cpu_seconds(lambda run=run: run(*own))[0])
    return {"deviations": deviations, "seconds": seconds}


# ------------------------------------------------------------------------------------------------ from outside


def on_processes(work: Callable[..., dict[str, Any]], problems: list[Problem]) -> list[list[dict[str, Any]]]:
    """What every rank measured, for each problem; all problems have as many ranks."""
    ranks = problems[0].ranks
    with tempfile.TemporaryDirectory() as folder:
        spawn(_in_group, (work, problems, folder), nprocs=ranks)
        by_rank = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    return [list(each) for each in zip(*by_rank, strict=True)]


def _in_group(rank: int, work: Callable[..., dict[str, Any]], problems: list[Problem], folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", rendezvous, PATIENCE, rank=rank, world_size=problems[0].ranks)
    try:
        group = distributed.group.WORLD
        measured = [work(rank, problem, group) for problem in problems]
        Path(folder, f"{rank}.json").write_text(json.dumps(measured))
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def summed(ranks: list[dict[str, Any]], name: str) -> list[Pass]:
    """CPU seconds of all ranks together, forward and backward, for each repeat."""
    columns = zip(*(rank["seconds"][name] for rank in ranks), strict=True)
    return [(sum(forward for forward, _ in each), sum(backward for _, backward in each)) for each in columns]


def totals(passes: list[Pass], what: str) -> list[float]:
    """Of each repeat."""
    return [forward + backward * (what == "forward+backward") for forward, backward in passes]


def spread(seconds: list[float]) -> float:
    """Interquartile range over the median; 0 with fewer than two repeats."""
    return measure.Timing(tuple(seconds)).spread


def rows_of(problem: Problem, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's rows of one problem: each exchange, forward and forward+backward."""
    single = [tuple(passes) for passes in ranks[0]["seconds"]["single"]]
    # Of all ranks, one whole sequence each: their mean is one process among busy others.
    beside = [(forward / len(ranks), backward / len(ranks)) for forward, backward in summed(ranks, "side by side")]
    chosen = make_plan(
        problem.tokens,
        problem.segment_lengths,
        problem.dilation_rates,
        HEADS,
        problem.ranks,
        is_causal=problem.is_causal,
    ).exchanges
    # A ring moves every other rank's keys and values forward; backward these again, and gradients of both.
    ring = (problem.ranks - 1) * (problem.tokens // problem.ranks) * HEADS * HEAD_DIM * 4 * 2 * BATCH
    rows = []
    for exchange in EXCHANGES:
        for what in ("forward", "forward+backward"):
            ours = totals(summed(ranks, exchange), what)
            alone, copies = totals(single, what), totals(beside, what)
            median = statistics.median(ours)
            phases = ["forward"] if what == "forward" else ["forward", "backward"]
            bytes_received = max(sum(rank["received"][exchange][phase] for phase in phases) for rank in ranks)
            rows.append(
                {
                    **asdict(problem),
                    "exchange": exchange,
                    "auto": chosen,
                    "pass": what,
                    "deviation_from_oracle": max(max(rank["deviations"].values()) for rank in ranks),
                    "cpu_seconds": {"ranks": ours, "single": alone, "single_side_by_side": copies},
                    "median": {
                        "ranks": median,
                        "single": statistics.median(alone),
                        "single_side_by_side": statistics.median(copies),
                    },
                    "spread": spread(ours),
                    "busiest_rank": statistics.median(
                        max(totals([each], what)[0] for each in passes)
                        for passes in zip(*(rank["seconds"][exchange] for rank in ranks), strict=True)
                    ),
                    "ratio_to_single": median / statistics.median(alone),
                    "ratio_to_single_side_by_side": median / statistics.median(copies),
                    "bytes_received_by_busiest_rank": bytes_received,
                    "ring_bytes": ring * (1 if what == "forward" else 3),
                }
            )
    return rows


def peer_row(problem: Problem, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Dense forwards: all ranks' CPU time, theirs at its best bucket size over ours at each exchange."""
    together = {
        name: [sum(each) for each in zip(*(rank["seconds"][name] for rank in ranks), strict=True)]
        for name in ranks[0]["seconds"]
    }
    medians = {name: statistics.median(seconds) for name, seconds in together.items()}
    best = min((name for name in medians if name.startswith(PEER)), key=medians.__getitem__)
    return {
        **asdict(problem),
        "peer": f"{PEER} {importlib.metadata.version(PEER)}",
        "deviation_from_dense": max(max(rank["deviations"].values()) for rank in ranks),
        "cpu_seconds": together,
        "median": medians,
        "spread": {name: spread(seconds) for name, seconds in together.items()},
        "best_peer": best,
        "times_less": {exchange: medians[best] / medians[exchange] for exchange in EXCHANGES},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        (
            "| pattern | tokens | ranks | exchange | pass | deviation | all ranks, CPU s (spread) "
            "| one process, CPU s | ratio | ratio to one beside copies of itself | received, MiB | a ring's, MiB |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        causal = ", causal" if row["is_causal"] else ""
        lines.append(
            f"| {row['pattern']}{causal} | {row['tokens']} | {row['ranks']} | {row['exchange']} | {row['pass']} "
            f"| {row['deviation_from_oracle']:.1e} | {row['median']['ranks']:.3f} ({row['spread']:.0%}) "
            f"| {row['median']['single']:.3f} | {row['ratio_to_single']:.2f} "
            f"| {row['ratio_to_single_side_by_side']:.2f} "
            f"| {row['bytes_received_by_busiest_rank'] / 2**20:.1f} | {row['ring_bytes'] / 2**20:.1f} |"
        )
    return "\n".join(lines)


def peer_table(rows: list[dict[str, Any]]) -> str:
    """The comparison with ring-attention-pytorch as Markdown."""
    lines = [
        (
            "| dense | tokens | ranks | deviation | ours by gather, by heads, CPU s "
            "| theirs, best buckets, CPU s | times less by gather, by heads |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, less = row["median"], row["times_less"]
        lines.append(
            f"| {'causal' if row['is_causal'] else 'full'} | {row['tokens']} | {row['ranks']} "
            f"| {row['deviation_from_dense']:.1e} | {ours['gather']:.3f}, {ours['heads']:.3f} "
            f"| {ours[row['best_peer']]:.3f} ({row['best_peer'].rsplit(' ', 1)[1]}) "
            f"| {less['gather']:.1f}, {less['heads']:.1f} |"
        )
    return "\n".join(lines)


def report(results: dict[str, Any]) -> str:
    """The page that lands beside the JSON."""
    environment, rows = results["environment"], results["rows"]
    patterns = "; ".join(f"{name}: segments {list(w)}, rates {list(r)}" for name, (w, r) in PATTERNS.items())
    peer = peer_table(results["peer"]) if isinstance(results["peer"], list) else f"Left out: {results['peer']}"
    return (
        "# dilated_ring_attention over processes\n\n"
        f"{environment['date']}, torch {environment['torch']}, {environment['processor']} "
        f"({environment['cpu_capability']}), {environment['cores']} processors.\n"
        f"Batch {BATCH}, {HEADS} heads of {HEAD_DIM}, float32, gloo on one machine, one thread a rank. "
        f"At {PATTERN_TOKENS} tokens, {patterns}.\n\n"
        "Each row was checked against the float64 oracle in the same run before it was timed. *All ranks*: their CPU "
        "time together, median of repeats, and interquartile range over it. *Ratio*: over one process that attends the "
        "whole sequence alone; beside it the same with as many such processes at once as there are ranks, which tells "
        "what busy processors and a shared cache take. *Received*: by the busiest rank, counted around gloo, without "
        "the agreement; *a ring's*: every key and value of all other ranks, three times that with the backward.\n\n"
        f"{table(rows)}\n\n## Against {PEER}\n\nForward of dense attention, checked against the definition.\n\n{peer}\n"
        f"\nRaw data: [ring_ranks.json](ring_ranks.json). Command, from the repository's root: "
        f"`python packages/ring/benchmarks/{environment['command']}`.\n"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=PATTERN_TOKENS)
    parser.add_argument("--dense-tokens", type=int, default=4096, help="of the comparison with the peer")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--patterns", choices=PATTERNS, nargs="+", default=list(PATTERNS))
    parser.add_argument("--causal", choices=["no", "yes"], nargs="+", default=["no", "yes"])
    parser.add_argument("--repeats", type=int, default=2, help="timed rounds (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu; elsewhere there is nothing to measure")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        print("ranks: this measures processes on a CPU")
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the ranks, from their first import on
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": measure.environment(), "rows": [], "peer": []}

    def write() -> None:
        """After every row, so that a run cut short keeps what it measured."""
        (arguments.output / "ring_ranks.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.output / "ring_ranks.md").write_text(report(results))

    def problem(name: str, causal: str, tokens: int, ranks: int) -> Problem:
        lengths, rates = PATTERNS.get(name, ((tokens,), (1,)))
        if name in PATTERNS:
            lengths = tuple(max(r, w * tokens // PATTERN_TOKENS) for w, r in zip(lengths, rates, strict=True))
        return Problem(name, lengths, rates, causal == "yes", tokens, ranks, arguments.repeats)

    print(table([]))
    for ranks in arguments.ranks:
        for name in arguments.patterns:
            for causal in arguments.causal:
                problems = [problem(name, causal, arguments.tokens, ranks)]
                rows = rows_of(problems[0], on_processes(measure_rank, problems)[0])
                results["rows"] += rows
                print("\n".join(table(rows).splitlines()[2:]), flush=True)
                write()
    try:
        importlib.metadata.version(PEER)
    except importlib.metadata.PackageNotFoundError:
        results["peer"] = f"{PEER} is not installed (pip install {PEER})."
        print(results["peer"])
    else:
        for ranks in arguments.ranks:
            problems = [problem("dense", causal, arguments.dense_tokens, ranks) for causal in arguments.causal]
            found = zip(problems, on_processes(measure_peer_rank, problems), strict=True)
            results["peer"] += [peer_row(each, measured) for each, measured in found]
        print(peer_table(results["peer"]), flush=True)
    write()


if __name__ == "__main__":
    main()
