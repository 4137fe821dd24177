"""All parts in order, within the budget, and the profile that comes of them. Imports torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone

import torch

from dilated_factory.hardware import Hardware
from dilated_factory.hardware.device import usable_device
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
    """See ``dilated_factory.tune``, which has checked all of it but the device."""
    start = time.monotonic()
    place = usable_device(device)
    hardware = Hardware.detect(place)
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
