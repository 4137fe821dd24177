"""The search for block sizes on the card at hand: every candidate is checked, timed in turns, and the fastest kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core.kernels.triton import launch
from dilated_core.kernels.triton.blocks import Blocks, Pass, Tuned, choose_blocks, keep_tuned
from dilated_core.kernels.triton.launch import Work
from dilated_core.kernels.triton.schedule import Branches, make_tables

PASSES: tuple[Pass, ...] = ("forward", "grad_query", "grad_key_value")
# LongNet's own pattern (arXiv 2307.02486, section 4.1), in heads of every phase.
PATTERN = ((2048, 1), (4096, 2), (8192, 4), (16384, 6), (32768, 12))
HEADS = 12
SEQ_LEN = 32_768
# Block sizes, warps and stages that are tried; the compiler says which fit.
ROWS, OTHERS, WARPS, STAGES = (32, 64, 128), (32, 64, 128), (4, 8), (2, 3)
REPEATS = 5
# Results of two block sizes differ by rounding alone: by less than this share of the largest number.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Trial(NamedTuple):
    """One choice of block sizes, as timed.

    Attributes:
        which: the program.
        head_dim, dtype: what it was timed for.
        blocks: the choice.
        seconds: the median; None where the blocks do not fit.
        why: they do not.
    """

    which: Pass
    head_dim: int
    dtype: torch.dtype
    blocks: Blocks
    seconds: float | None
    why: str = ""


def tune(
    device: torch.device | str = "cuda",
    *,
    head_dims: Sequence[int] = (64, 128),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    passes: Sequence[Pass] = PASSES,
    candidates: Sequence[Blocks] | None = None,
    seq_len: int = SEQ_LEN,
) -> list[Trial]:
    """Time block sizes on this card, keep the fastest for all later processes, and return all trials.

    Nearly all the time is Triton's compiler: some seconds a candidate. The results of later calls may change in their
    last bits, once, as sums then run over other blocks.

    Args:
        device: a CUDA device, or "cpu" in Triton's interpreter.
        head_dims, dtypes: what to tune for.
        passes: "forward", "grad_query", "grad_key_value".
        candidates: block sizes to try beside today's choice; a grid by default.
        seq_len: tokens of the problem that is timed, in LongNet's pattern.

    Raises:
        RuntimeError: results of two block sizes differ by more than rounding: nothing is kept.
    """
    device = torch.device(device)
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    trials: list[Trial] = []
    for head_dim, dtype, which in product(head_dims, dtypes, passes):
        trials += _tune_one(which, head_dim, dtype, device, candidates, seq_len)
    fastest: Tuned = {}
    for trial in sorted((trial for trial in trials if trial.seconds is not None), key=lambda trial: trial.seconds or 0):
        fastest.setdefault((trial.which, trial.head_dim, trial.dtype), trial.blocks)
    keep_tuned(device, fastest)
    return trials


def _tune_one(
    which: Pass,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    candidates: Sequence[Blocks] | None,
    seq_len: int,
) -> Iterator[Trial]:
    from triton.errors import TritonError

    from dilated_core.measure import interleaved

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    today = choose_blocks(which, capability, head_dim, dtype)
    grid = [Blocks(*numbers) for numbers in product(ROWS, OTHERS, WARPS, STAGES)]
    tried = dict.fromkeys([today, *(grid if candidates is None else candidates)])
    run = _problem(which, head_dim, dtype, device, seq_len)
    expected: list[Tensor] | None = None
    fitting: dict[str, Callable[[], object]] = {}
    blocks_of: dict[str, Blocks] = {}
    for blocks in tried:
        try:
            found = run(blocks)
        except TritonError as error:  # too large for the card, or for the compiler
            yield Trial(which, head_dim, dtype, blocks, None, str(error))
            continue
        expected = expected or [result.clone() for result in found]
        for one, other in zip(found, expected, strict=True):
            if not (one - other).abs().max() <= TOLERANCE[dtype] * other.abs().max():
                raise RuntimeError(f"{which} with {blocks} and {today} differ by more than rounding; nothing is kept")
        name = str(blocks)
        blocks_of[name], fitting[name] = blocks, partial(run, blocks)
    for name, timing in interleaved(fitting, repeats=REPEATS).items():
        yield Trial(which, head_dim, dtype, blocks_of[name], timing.median)


def _problem(
    which: Pass, head_dim: int, dtype: torch.dtype, device: torch.device, seq_len: int
) -> Callable[[Blocks], list[Tensor]]:
    """Run one pass with given blocks, for its results."""
    query, key, value, grad_out = (
        torch.randn(1, seq_len, HEADS, head_dim, device=device, dtype=dtype) for _ in range(4)
    )
    phases = tuple(tuple(head % rate for head in range(HEADS)) for _, rate in PATTERN)
    tables = make_tables(Branches(PATTERN, phases), [(0, seq_len)], device)
    work = Work(query, key, value, None, tables, is_causal=False, scale=head_dim**-0.5)
    out, lse = torch.empty_like(query), torch.empty(1, HEADS, seq_len, device=device)
    grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
    launch.forward(work, out, lse)
    cotangents = launch.Cotangents(grad_out, launch.row_stats(work, grad_out, None, out, lse))

    def run(blocks: Blocks) -> list[Tensor]:
        tried = work._replace(blocks={which: blocks})
        if which == "forward":
            launch.forward(tried, out, lse)
            return [out, lse]
        if which == "grad_query":
            launch.grad_query(tried, cotangents, grads[0])
            return grads[:1]
        launch.grad_key_value(tried, cotangents, grads[1], grads[2])
        return grads[1:]

    return run
