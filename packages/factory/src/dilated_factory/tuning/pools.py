"""Memory pools on this machine: by bytes of a tensor, and by tokens of an attention.

Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dilated_factory.resources.shared import MIN_BYTES, SharedResources
from dilated_factory.tuning.budget import Budget, OutOfTime
from dilated_factory.tuning.cells import FORWARD, TRAINING, recorded, time_in_turns
from dilated_factory.tuning.probe import Probe
from dilated_factory.tuning.rules import Figure

BYTES = tuple(2**power for power in range(16, 29))  # 64 KiB to 256 MiB
# A loop writes at least so much, so that small tensors are not lost in the clock's own time.
BYTES_OF_A_LOOP = 4 * 2**20


def pool_by_bytes(probe: Probe, budget: Budget) -> dict[int, dict[str, Figure]]:
    """Get a tensor, write it once and drop it: bytes -> "torch", "lightweight", "full" -> seconds."""
    part, found = "pool_bytes", {}
    resources = SharedResources(min_bytes=1)

    def fill(empty: Callable[..., Tensor], nbytes: int) -> Tensor:
        return empty((nbytes,), dtype=torch.uint8, device=probe.device).fill_(1)

    def again_and_again(empty: Callable[..., Tensor], nbytes: int, loops: int) -> None:
        for _ in range(loops):
            fill(empty, nbytes)

    for nbytes in BYTES:
        words = f"pool: {nbytes // 2**10:,} KiB a tensor"
        left_out = probe.too_large(2 * nbytes) or budget.refusal(part, max(nbytes, BYTES_OF_A_LOOP))
        if left_out is not None:
            probe.record(part, words, bytes=nbytes, left_out=left_out)
            continue
        loops = max(1, BYTES_OF_A_LOOP // nbytes)
        getters = {"torch": torch.empty} | {
            mode: resources.pool(probe.device, mode).empty for mode in ("lightweight", "full")
        }
        dropped = {}
        for name in list(getters):
            first = fill(getters[name], nbytes)
            if first.shape != (nbytes,) or not bool((first == 1).all()):
                dropped[name] = "wrong: what was written is not what is read"
                del getters[name]
            del first
        runs = {name: partial(again_and_again, empty, nbytes, loops) for name, empty in getters.items()}
        try:
            timed = time_in_turns(budget, runs, loops)
        except OutOfTime as late:
            probe.record(part, words, bytes=nbytes, left_out=str(late))
            continue
        finally:
            resources.trim()
        budget.note(part, max(nbytes, BYTES_OF_A_LOOP), timed.seconds)
        found[nbytes] = timed.figures
        probe.record(part, words, bytes=nbytes, dropped=dropped, **recorded(timed))
    return found


def pool_by_tokens(
    probe: Probe, budget: Budget, lengths: Sequence[int], dtype: str, min_bytes: int | None
) -> dict[int, dict[str, dict[str, Figure]]]:
    """The improved attention without a pool and with each mode: tokens -> pass -> mode -> seconds."""
    part, found = "pool_tokens", {}
    resources = SharedResources(min_bytes=min_bytes or MIN_BYTES)
    modes: dict[str, dict[str, Any]] = {
        "off": {"enable_memory_pool": False},
        "lightweight": {"enable_memory_pool": True, "lightweight_pool": True},
        "full": {"enable_memory_pool": True, "lightweight_pool": False},
    }
    kind = getattr(torch, dtype)
    for length in lengths:
        words = f"pool: {length:,} tokens"
        left_out = probe.too_large(probe.working_set(length, kind)) or budget.refusal(part, length)
        if left_out is not None:
            probe.record(part, words, dtype=dtype, tokens=length, left_out=left_out)
            continue
        candidates = {mode: probe.attention(length, resources, **options) for mode, options in modes.items()}
        before = _served(resources)
        try:
            passes, deviations, dropped = probe.both_passes(
                budget,
                part,
                length,
                kind,
                candidates,
                (FORWARD, TRAINING),
                worth_timing=lambda before=before: _served(resources) > before,  # type: ignore[misc]
            )
        except OutOfTime as late:
            probe.record(part, words, dtype=dtype, tokens=length, left_out=str(late))
            continue
        finally:
            resources.trim()
        # Where a pool serves no tensor, any difference is noise, and no mode wins.
        found[length] = {name: timed.figures for name, timed in passes.items()}
        if not passes:
            why = {} if dropped else {"left_out": "no tensor is large enough for a pool to serve it"}
            probe.measurements.append({"part": part, "dtype": dtype, "tokens": length, "dropped": dropped, **why})
        for name, timed in passes.items():
            probe.measurements.append(
                {"part": part, "dtype": dtype, "tokens": length, "pass": name, "deviations": deviations}
                | {"dropped": dropped, **recorded(timed)}
            )
        probe.step(words)
    return found


def _served(resources: SharedResources) -> int:
    """How many tensors all pools have served."""
    return sum(one.hits + one.misses for one in resources.statistics().values())
