"""All parts in order, within the budget, and the profile that comes of them. Imports torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone

import torch

from dilated_factory.hardware import Hardware
from dilated_factory.policy import Policy
from dilated_factory.profile import MEASURED_WITH, NEVER_BYTES, Profile, installed_version
from dilated_factory.tuning import blocks, kernels, pools, rules
from dilated_factory.tuning.budget import Budget
from dilated_factory.tuning.probe import PATTERN, Probe

# Of the time that is left when a part begins. What a part does not need goes to those after it.
SHARES = {"pool_bytes": 0.15, "pool_tokens": 0.5, "kernels": 0.8, "block_size": 1.0}
# What else figures may be traced back to; only MEASURED_WITH makes a profile stale.
ALSO_WITH = ("dilated-factory", "dilated-block-sparse")


def measure_all(
    device: torch.device | str | None,
    seconds: float,
    *,
    dtypes: Sequence[str],
    head_dim: int,
    heads: int,
    lengths: Sequence[int],
    progress: Callable[[int, int, str], None] | None,
) -> Profile:
    """See `dilated_factory.tune`, which has checked all of it but the device."""
    start = time.monotonic()
    hardware, place = _place(device)
    total = len(pools.BYTES) + len(lengths) * (1 + len(dtypes)) + len(blocks.SIZES)
    done = 0

    def step(words: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, words)

    def part(name: str) -> Budget:
        return Budget((start + seconds - time.monotonic()) * SHARES[name])

    probe = Probe(place, hardware, heads, head_dim, step)
    by_bytes = pools.pool_by_bytes(probe, part("pool_bytes"))
    min_bytes = rules.pool_min_bytes(by_bytes)
    served = None if min_bytes == NEVER_BYTES else min_bytes
    by_tokens = pools.pool_by_tokens(probe, part("pool_tokens"), lengths, dtypes[0], served)
    thresholds = rules.pool_thresholds(by_tokens, Policy())
    if min_bytes == NEVER_BYTES and thresholds is not None and any(thresholds):
        # Attention gains from a pool that single tensors do not gain from: it is the better witness.
        min_bytes = None
    by_length = kernels.kernels_by_length(probe, part("kernels"), lengths, dtypes)
    by_size = blocks.block_sizes(probe, part("block_size"), lengths, dtypes[0])
    setting = {
        "part": "setting",
        "heads": heads,
        "head_dim": head_dim,
        "segment_lengths": list(PATTERN.segment_lengths),
        "dilation_rates": list(PATTERN.dilation_rates),
        "budget_seconds": seconds,
        "seconds": round(time.monotonic() - start, 1),
    }
    return Profile(
        hardware.key(),
        hardware.device_type,
        versions={name: version for name in (*MEASURED_WITH, *ALSO_WITH) if (version := installed_version(name))},
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        pool_min_bytes=min_bytes,
        pool_thresholds=thresholds,
        kernels=rules.kernel_rules(by_length),
        block_size=rules.fastest_block_size(by_size),
        measurements=(setting, *probe.measurements),
    )


def _place(device: torch.device | str | None) -> tuple[Hardware, torch.device]:
    """What is measured on. Raises TypeError or ValueError for no device, or one without pools and kernels."""
    if not isinstance(device, (str, torch.device, type(None))):
        raise TypeError(f'device: expected "cpu", "cuda:0" or None, got {device!r}')
    try:
        place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu or cuda, got {device!r}") from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {device!r}")
    return Hardware.detect(place), place
