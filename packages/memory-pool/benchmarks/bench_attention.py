"""dilated_attention with and without a pool: single lengths, training, and lengths that change from call to call.

    python bench_attention.py                   everything, about twelve minutes on two cores
    python bench_attention.py --quick
    python bench_attention.py --device cuda

Writes JSON and a Markdown page (default: docs/benchmarks). Needs dilated-core. Every timed call's results are compared
bit for bit, off the clock, with those of the call without a pool, and these, at single lengths, with the float64 oracle
in rows drawn from the whole length. Variants take turns in one process; the environment variables that are glibc's own
answer are read when a process starts, so another process runs them and takes its turn.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import recording
import torch
import traces
from contenders import KINDS, makers
from recording import (
    ALTERNATIVES,
    KEEP_FREED,
    Record,
    Sample,
    Worker,
    interleaved,
    ratio,
    require,
    show,
    summary,
    timed,
)
from torch import Tensor

from dilated_core import DilatedPattern, dilated_attention, reference
from dilated_memory_pool import MemoryPool, PoolEvent

HEADS, HEAD_DIM = traces.HEADS, traces.HEAD_DIM
PATTERN = DilatedPattern.longnet()
LENGTHS, RATES = PATTERN.segment_lengths, PATTERN.dilation_rates
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKED_ROWS = 16
# Largest deviation from the oracle, relative to its largest magnitude.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
# Of gradients with and without a pool, on a GPU, where the stock kernels add in no fixed order.
GPU_GRADIENT_TOLERANCE = 2e-2
PLAIN = "no pool"
GOAL, GOAL_TOKENS = 1.2, 65536
DYNAMIC_GOAL = 1.3
# Other environments: those that keep freed memory in the process, as a pool does. bench_first_write has more.
VARIABLES = {name: variables for name, variables in ALTERNATIVES.items() if variables == KEEP_FREED}

Results = tuple[Tensor, ...]


# ------------------------------------------------------------------------------------------------ calls


def dtypes(device: torch.device) -> list[str]:
    """What is attended in: on a GPU in half precision alone, which is what its flash kernels take."""
    return ["bf16"] if device.type == "cuda" else list(DTYPES)


@lru_cache(maxsize=1)
def inputs(length: int, dtype: str, device: str) -> list[Tensor]:
    """Query, key, value and a cotangent, the same in every process."""
    generator = torch.Generator().manual_seed(length)
    drawn = (torch.randn(1, length, HEADS, HEAD_DIM, generator=generator) for _ in range(4))
    return [tensor.to(device, DTYPES[dtype]) for tensor in drawn]


def call(tensors: Sequence[Tensor], backward: bool, pool: MemoryPool | None) -> Results:
    """(out,), or (out, dq, dk, dv)."""
    query, key, value = (tensor.detach().requires_grad_(backward) for tensor in tensors[:3])
    out = dilated_attention(query, key, value, LENGTHS, RATES, allocator=pool)
    if not backward:
        return (out,)
    return out.detach(), *torch.autograd.grad(out, [query, key, value], tensors[3])


def digest(results: Results) -> str:
    """Of every bit of the results; SystemExit where one is not finite."""
    total = hashlib.sha256()
    for result in results:
        require(bool(result.isfinite().all()), "all results are finite")
        held = result.cpu().contiguous()
        total.update((ctypes.c_char * held.nbytes).from_address(held.data_ptr()))
    return total.hexdigest()


class Same:
    """Looks at the results of one call with every variant: they must be those of the first, bit for bit.

    Args:
        what: for the message.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._expected: str | None = None
        self._close: Results | None = None

    def exactly(self, results: Results) -> None:
        """SystemExit where a bit differs."""
        self.is_digest(digest(results))

    def is_digest(self, found: str) -> None:
        """The same, for results of another process."""
        self._expected = self._expected or found
        require(found == self._expected, f"{self._what} has the same bits in every variant")

    def closely(self, results: Results) -> None:
        """SystemExit where the output differs in a bit, or a gradient by more than the order of additions explains."""
        self.exactly(results[:1])
        if self._close is None:
            self._close = tuple(result.clone() for result in results)
        for found, expected in zip(results, self._close, strict=True):
            deviation = ((found - expected).abs().max() / expected.abs().max()).item()
            require(deviation <= GPU_GRADIENT_TOLERANCE, f"{self._what} deviates by {deviation:.1e}")


def deviation_from_oracle(tensors: Sequence[Tensor]) -> float:
    """Of the output without a pool, in rows drawn from the whole length; SystemExit where it is too large."""
    rows = torch.randint(tensors[0].shape[1], (CHECKED_ROWS,), generator=torch.Generator().manual_seed(0)).unique()
    query, key, value = (tensor.cpu().double() for tensor in tensors[:3])
    exact, _ = reference.dilated_attention(query, key, value, LENGTHS, RATES, rows=rows)
    [out] = call(tensors, False, None)
    deviation = ((out[:, rows.to(out.device)].cpu().double() - exact).abs().max() / exact.abs().max()).item()
    require(deviation <= TOLERANCE[out.dtype], f"the output without a pool deviates from the oracle by {deviation:.1e}")
    return deviation


# ------------------------------------------------------------------------------------------------ other processes


def answer(task: str, **question: Any) -> dict[str, Any]:
    """What another process does when it is asked."""
    return answer_one(**question) if task == "one" else answer_peak(**question)


def answer_one(longest: int, length: int, dtype: str, backward: bool) -> dict[str, Any]:
    """One call without a pool: a sample, and a digest of its results."""
    found: list[str] = []
    tensors = [tensor[:, :length] for tensor in inputs(longest, dtype, "cpu")]
    sample = timed(lambda: call(tensors, backward, None), lambda results: found.append(digest(results)))
    return {**sample._asdict(), "digest": found[0]}


def answer_peak(variant: str, lengths: Sequence[int], dtype: str) -> dict[str, Any]:
    """Rise of the resident memory of this process over one pass, from after its inputs were made to its peak."""
    make = makers(torch.device("cpu")).get(variant)
    tensors = inputs(max(lengths), dtype, "cpu")
    call([tensor[:, : min(lengths)] for tensor in tensors], False, None)  # starts threads, loads what is loaded once
    pool = make() if make is not None else None
    before = resident("VmRSS")
    with suppress(OSError):  # where it is not allowed, the peak is the highest since the process started
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    faults = recording.page_faults()
    for length in lengths:
        call([tensor[:, :length] for tensor in tensors], False, pool)
    reserved = pool.statistics().peak_reserved_bytes if pool is not None else 0
    return {
        "rise_bytes": resident("VmHWM") - before,
        "page_faults": recording.page_faults() - faults,
        "pool_peak_reserved_bytes": reserved,
    }


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [kibibytes] = [line.split()[1] for line in lines if line.startswith(field)]
    return int(kibibytes) * 1024


# ------------------------------------------------------------------------------------------------ single lengths


def variants(device: torch.device) -> dict[str, MemoryPool | None]:
    """No pool, and new pools."""
    return {PLAIN: None, **{name: make() for name, make in makers(device).items()}}


def ask(worker: Worker, same: Same, **question: Any) -> Sample:
    """One call in another process, its results compared."""
    reply = worker.ask(task="one", **question)
    same.is_digest(reply["digest"])
    return Sample(reply["seconds"], reply["faults"])


def time_lengths(
    record: Record,
    device: torch.device,
    workers: Mapping[str, Worker],
    lengths: Sequence[int],
    rounds: int,
    backward: bool,
) -> None:
    """The same call again and again."""
    names = [*makers(device), *workers]
    exact = device.type == "cpu" or not backward
    section = record.section(
        "training" if backward else "forward",
        "Forward and backward" if backward else "Forward",
        f"Batch 1, {HEADS} heads of {HEAD_DIM}, segments {list(LENGTHS)}, rates {list(RATES)}; the same length "
        "again and again. How many times faster than without a pool, with the spread; then page faults a call."
        + ("" if backward else f" The goal is {GOAL} at {GOAL_TOKENS:,} tokens."),
        (
            "all results of every timed call have the same bits with and without a pool"
            if exact
            else f"outputs have the same bits, gradients agree to {GPU_GRADIENT_TOLERANCE}"
        )
        + "; the output lies within rounding of the float64 oracle; timed calls mapped no memory",
        ["tokens", "dtype", "no pool, s (spread); faults", *(f"{name}: ratio (spread); faults" for name in names)],
    )
    for dtype in dtypes(device):
        for length in lengths:
            tensors = inputs(length, dtype, str(device))
            deviation = deviation_from_oracle(tensors)
            same = Same(f"a call of {length} tokens")
            look = same.exactly if exact else same.closely
            pools = variants(device)
            candidates: dict[str, Callable[[], Sample]] = {
                name: partial(timed, partial(call, tensors, backward, pool), look) for name, pool in pools.items()
            }
            question = {"longest": length, "length": length, "dtype": dtype, "backward": backward}
            candidates |= {name: partial(ask, worker, same, **question) for name, worker in workers.items()}
            row: dict[str, Any] = {"tokens": length, "dtype": dtype, "threads": torch.get_num_threads()}
            row |= {"deviation_from_oracle": deviation, **summary(interleaved(candidates, rounds=rounds))}
            row["ratio"] = {name: row["median"][PLAIN] / row["median"][name] for name in candidates}
            row["pools"] = {name: counters(pool) for name, pool in pools.items() if pool is not None}
            for name, seen in row["pools"].items():
                served = (seen["hits"] + seen["misses"]) / (1 + rounds)
                require(seen["misses"] <= served, f"{name} maps memory in the first of {1 + rounds} calls: {seen}")
            if not backward and length == GOAL_TOKENS:
                row["goal_met"] = {name: row["ratio"][name] >= GOAL for name in row["pools"]}
            section.add(row, length, dtype, *cells(row, names))


def counters(pool: MemoryPool) -> dict[str, float]:
    """What a pool did."""
    seen = pool.statistics()
    return {
        "hits": seen.hits,
        "misses": seen.misses,
        "bypasses": seen.bypasses,
        "peak_requested_bytes": seen.peak_requested_bytes,
        "peak_reserved_bytes": seen.peak_reserved_bytes,
    }


def cells(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Time without a pool, ratios of the others, page faults of all."""
    faults = row["page_faults"]
    plain = f"{row['median'][PLAIN]:.3f} ({row['spread'][PLAIN]:.0%}); {faults[PLAIN]:.0f}"
    return [plain, *(f"{ratio(row, name, PLAIN)}; {faults[name]:.0f}" for name in names)]


# ------------------------------------------------------------------------------------------------ changing lengths


def time_dynamic(
    record: Record, device: torch.device, workers: Mapping[str, Worker], lengths: Sequence[int], passes: int
) -> None:
    """A new length at every call."""
    names = [*makers(device), *workers]
    section = record.section(
        "dynamic",
        "Lengths that change from call to call",
        f"Forward; {len(lengths)} calls of {min(lengths):,} to {max(lengths):,} tokens, evenly over the logarithm, "
        "always in the same order; the time is that of all calls, variants in turns at every call. *First pass*: with "
        f"new pools, which grow meanwhile; *later*: {passes} more. The goal is {DYNAMIC_GOAL}. *Memory*: how far a "
        "variant's first pass raises the memory of a fresh process (of the device on a GPU), as a multiple of that "
        "without a pool.",
        "the results of every timed call have the same bits with and without a pool",
        [
            "dtype",
            "pass",
            "no pool, s (spread); faults",
            *(f"{name}: ratio (spread); faults" for name in names),
            "memory without a pool",
            *(f"{name}: memory" for name in names),
        ],
    )
    for dtype in dtypes(device):
        tensors = inputs(max(lengths), dtype, str(device))
        pools = variants(device)
        memory = peaks(device, lengths, dtype)
        taken: dict[str, list[Sample]] = {name: [] for name in (*pools, *workers)}
        for _ in range(1 + passes):
            for name, sample in one_pass(tensors, pools, workers, lengths, dtype).items():
                taken[name].append(sample)
        for label, chosen in (("first", slice(0, 1)), ("later", slice(1, None))):
            row: dict[str, Any] = {"dtype": dtype, "pass": label, "calls": len(lengths), "lengths": list(lengths)}
            row |= summary({name: samples[chosen] for name, samples in taken.items()})
            row["ratio"] = {name: row["median"][PLAIN] / row["median"][name] for name in taken}
            row["memory"] = memory
            row["pools"] = {name: counters(pool) for name, pool in pools.items() if pool is not None}
            row |= {
                "goal": DYNAMIC_GOAL,
                "goal_met": {name: row["ratio"][name] >= DYNAMIC_GOAL for name in row["pools"]},
            }
            plain = memory[PLAIN]["rise_bytes"]
            rises = [f"{memory[name]['rise_bytes'] / plain:.2f}" for name in names]
            section.add(row, dtype, label, *cells(row, names), show(plain), *rises)


def one_pass(
    tensors: Sequence[Tensor],
    pools: Mapping[str, MemoryPool | None],
    workers: Mapping[str, Worker],
    lengths: Sequence[int],
    dtype: str,
) -> dict[str, Sample]:
    """name -> seconds and page faults of all calls."""
    totals = dict.fromkeys((*pools, *workers), Sample(0.0, 0.0))
    for length in lengths:
        part = [tensor[:, :length] for tensor in tensors]
        same = Same(f"a call of {length} tokens")
        samples = {name: timed(partial(call, part, False, pool), same.exactly) for name, pool in pools.items()}
        question = {"longest": max(lengths), "length": length, "dtype": dtype, "backward": False}
        samples |= {name: ask(worker, same, **question) for name, worker in workers.items()}
        for name, (seconds, faults) in samples.items():
            totals[name] = Sample(totals[name].seconds + seconds, totals[name].faults + faults)
    return totals


def peaks(device: torch.device, lengths: Sequence[int], dtype: str) -> dict[str, dict[str, Any]]:
    """name -> rise of the peak memory of a process, or of the device, over a first pass."""
    if device.type == "cuda":
        return {name: gpu_peak(device, pool, lengths, dtype) for name, pool in variants(device).items()}
    found: dict[str, dict[str, Any]] = {}
    for name in (*variants(device), *VARIABLES):
        with Worker(__file__, VARIABLES.get(name)) as worker:
            found[name] = worker.ask(task="peak", variant=name, lengths=list(lengths), dtype=dtype)
    return found


def gpu_peak(device: torch.device, pool: MemoryPool | None, lengths: Sequence[int], dtype: str) -> dict[str, Any]:
    """What PyTorch reserves at its peak beyond what it had; and the pool, where PyTorch does not count it."""
    tensors = inputs(max(lengths), dtype, str(device))
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    for length in lengths:
        call([tensor[:, :length] for tensor in tensors], False, pool)
    torch.cuda.synchronize(device)
    reserved = pool.statistics().peak_reserved_bytes if pool is not None else 0
    uncounted = reserved if pool is not None and pool.backend.name != "torch" else 0
    rise = torch.cuda.max_memory_reserved(device) - before + uncounted
    return {"rise_bytes": rise, "pool_peak_reserved_bytes": reserved}


# ------------------------------------------------------------------------------------------------ size classes


def replay_requests(record: Record, lengths: Sequence[int]) -> None:
    """What the attention really asked for, on every kind of pool: so that the default can be judged."""
    section = record.section(
        "classes",
        "Size classes on these requests",
        f"What the forward calls of the {len(lengths)} lengths asked a pool for (1 MiB and more), recorded by an "
        "observer and replayed on the host without the attention.",
        "recorded requests agree with the recording pool's counters; nothing is held at last",
        [
            "pool",
            "dtype",
            "requests",
            "hits in the first pass, in a second",
            "reserved over asked for",
            "waste at the peak",
        ],
    )
    for dtype in DTYPES:
        trace = record_requests(lengths, dtype)
        requests, peak = traces.requests(trace), traces.peak_bytes(trace)
        for name, arguments in KINDS.items():
            pool = MemoryPool("host", **arguments)
            traces.replay(trace, pool.allocate)
            first = pool.statistics()
            traces.replay(trace, pool.allocate)
            second = pool.statistics()
            require(second.allocated_bytes == 0 and second.hits + second.misses == 2 * requests, f"{name}: {second}")
            row = {
                "pool": name,
                "dtype": dtype,
                "requests": requests,
                "hit_rate": first.hit_rate,
                "second_hit_rate": (second.hits - first.hits) / requests,
                "reserved_over_requested": second.peak_reserved_bytes / peak,
                "waste": 1 - second.peak_requested_bytes / second.peak_allocated_bytes,
            }
            section.add(
                row,
                name,
                dtype,
                requests,
                f"{row['hit_rate']:.0%}, {row['second_hit_rate']:.0%}",
                f"{row['reserved_over_requested']:.2f}",
                f"{row['waste']:.1%}",
            )


def record_requests(lengths: Sequence[int], dtype: str) -> list[traces.Event]:
    """The requests of one pass, on the host: a GPU's allocations are other ones."""
    events: list[PoolEvent] = []
    pool = MemoryPool("host", mode="full", observers=[events.append])
    tensors = inputs(max(lengths), dtype, "cpu")
    for length in lengths:
        call([tensor[:, :length] for tensor in tensors], False, pool)
    seen = pool.statistics()
    trace = traces.recorded(events)
    require(traces.requests(trace) == seen.hits + seen.misses > 0, "every request was recorded")
    return trace


def main() -> None:
    """Measure, print and write."""
    arguments = recording.parse(__doc__)
    device = arguments.device
    record = Record("attention", "Dilated attention with a pool", arguments)
    lengths, trained, rounds = [4096, 16384, 65536], [16384], 5
    changing, passes = traces.lengths(12), 2
    if arguments.quick:
        lengths, trained, rounds = [512, 1024], [512], 1
        changing, passes = traces.lengths(3, shortest=512, longest=1024), 1
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(__file__, variables))
            for name, variables in VARIABLES.items()
            if device.type == "cpu"
        }
        time_lengths(record, device, workers, lengths, rounds, backward=False)
        time_lengths(record, device, workers, trained, rounds, backward=True)
        time_dynamic(record, device, workers, changing, passes)
    if device.type == "cpu":
        replay_requests(record, changing)


if __name__ == "__main__":
    if recording.SERVE in sys.argv:
        recording.serve(answer)
    else:
        main()
