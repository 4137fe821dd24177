"""How bench_card measures: the device's ceilings, and the candidates of one row, each checked before it is timed."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from card_cases import TOLERANCE, Attention, Case, candidates, check
from torch import Tensor

from dilated_core import kernels, measure

# A timed run takes at least this long, in seconds: shorter calls are repeated in a row.
SHORTEST = 0.01
# What the ceilings are measured with, by device: sides (rows, inner, columns) of products, and bytes of a copy.
PRODUCTS = {
    "cuda": [(4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 8192), (16384, 16384, 16384)],
    "cpu": [(256, 256, 256)],
}
COPIED = {"cuda": 1 << 31, "cpu": 1 << 24}
CEILING_REPEATS = 7


class DeviceLostError(RuntimeError):
    """The device answers no more; nothing that follows could be measured."""


class Ceilings(NamedTuple):
    """Attributes: flops: a second, in the best product; shape: its sides; bandwidth: bytes a second, of a copy."""

    flops: float
    shape: tuple[int, int, int]
    bandwidth: float


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """What the device reaches here and now: a matrix product of random numbers, and a copy (read and written bytes)."""
    rates = {}
    for rows, inner, columns in PRODUCTS[device.type]:
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(inner, columns, device=device, dtype=dtype)
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        rates[rows, inner, columns] = 2 * rows * inner * columns / _median(partial(torch.mm, left, right, out=out))
    source = torch.randn(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    shape = max(rates, key=lambda one: rates[one])
    return Ceilings(rates[shape], shape, 2 * source.nbytes / _median(partial(target.copy_, source)))


def _median(run: Callable[[], object]) -> float:
    [timing] = measure.interleaved({"": run}, repeats=CEILING_REPEATS, warmup=2, shortest=SHORTEST).values()
    return timing.median


def measure_case(
    case: Case,
    device: torch.device,
    ceiling: Ceilings,
    *,
    names: list[str] | None = None,
    longest_dense: int,
    repeats: int,
    enough: float,
) -> dict[str, Any]:
    """One row: every candidate that can run it, checked, weighed and timed in turns. JSON-ready.

    Raises:
        DeviceLostError: an error that no later work on the device survives.
    """
    found, left_out = candidates(case, device, names, longest_dense)
    tensors = case.inputs(device)
    results: dict[str, dict[str, Any]] = {}
    for name, run in found.items():
        results[name] = attempt(device, partial(look_at, case, name, run, tensors, device))
    right = {name: found[name] for name, result in results.items() if "why" not in result}
    timed = attempt(device, partial(_times, case, right, tensors, repeats, enough))
    for name in right:
        results[name] |= timed if "why" in timed else _figures(case, name, timed[name], ceiling)
    return {
        **case.key,
        "auto": kernels.choose("auto", device, case.dtype, case.head_dim).name,
        "input_bytes": sum(tensor.nbytes for tensor in tensors[: 4 if case.backward else 3]),
        "fewest_bytes": case.fewest_bytes,
        "left_out": left_out,
        "candidates": results,
    }


def look_at(case: Case, name: str, run: Attention, tensors: list[Tensor], device: torch.device) -> dict[str, Any]:
    """Deviation and peak memory of a candidate; "why" where it deviates."""
    found = check(case, name, run, tensors)
    result: dict[str, Any] = {"deviation": found if math.isfinite(found) else None}
    if not found <= TOLERANCE[case.dtype]:
        return {**result, "why": f"it deviates from the definition by {found:.1e}, allowed are {TOLERANCE[case.dtype]}"}
    *qkv, cotangent = tensors
    leaves = [tensor.detach().requires_grad_(case.backward) for tensor in qkv]

    def once() -> object:
        out = run(*leaves)
        return (out, *torch.autograd.grad(out, leaves, cotangent)) if case.backward else out

    # Of a backward, with the forward that it belongs to; the results themselves are not counted.
    results = case.tensor_bytes * (4 if case.backward else 1)
    return {**result, "extra_bytes": measure.peak_memory(once, device) - results}


def _times(
    case: Case, right: dict[str, Attention], tensors: list[Tensor], repeats: int, enough: float
) -> dict[str, measure.Timing]:
    """Times of a forward, or of a backward alone, whose forward ran before."""
    *qkv, cotangent = tensors
    runs: dict[str, Callable[[], object]] = {}
    for name, run in right.items():
        if case.backward:
            leaves = [tensor.detach().requires_grad_() for tensor in qkv]
            runs[name] = _backward(run(*leaves), leaves, cotangent)
        else:
            runs[name] = partial(run, *qkv)
    return measure.interleaved(runs, repeats=repeats, enough=enough, shortest=SHORTEST)


def _backward(out: Tensor, leaves: list[Tensor], cotangent: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)


def _figures(case: Case, name: str, timing: measure.Timing, ceiling: Ceilings) -> dict[str, Any]:
    flops = case.flops(name)
    roofline = max(flops / ceiling.flops, case.fewest_bytes / ceiling.bandwidth)
    return {
        "flops": flops,
        "seconds": timing.seconds,
        "median": timing.median,
        "spread": timing.spread,
        "flops_per_second": flops / timing.median,
        "of_ceiling": flops / timing.median / ceiling.flops,
        "roofline_seconds": roofline,
        "over_roofline": timing.median / roofline,
    }


def attempt(device: torch.device, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` returns, or as "why" what it raised: out of memory and the like are its row's affair alone."""
    why = ""
    found: dict[str, Any] = {}
    try:
        found = work()
    except Exception as error:
        [first, *_] = str(error).splitlines() or [""]
        why = f"{type(error).__name__}: {first}"
    gc.collect()  # what a traceback or a graph held
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except Exception as error:
            raise DeviceLostError(f"{why or 'no error until now'}; and then: {error}") from error
    return {"why": why} if why else found
