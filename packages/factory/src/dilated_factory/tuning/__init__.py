"""``dilated tune``: measures on this machine what the policy otherwise takes from a table, and writes it down.

``rules`` turns figures into thresholds, ``budget`` fits the work into the time there is, ``cells`` takes one figure,
``pools``, ``kernels`` and ``blocks`` say of what, ``text`` and ``screen`` show it, ``command`` is the command line. The
measurement itself is ``dilated_factory.tune``. Imports torch when it measures, not before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dilated_factory.profile import Profile

if TYPE_CHECKING:
    import torch

__all__ = ["tune"]

# What is measured where nothing else is asked for, in tokens.
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
# The dtypes that kernels are chosen for where nothing else is asked for.
KERNEL_DTYPES = ("float32", "bfloat16")
# In which attention runs; each has a tolerance in ``cells``.
DTYPES = ("float64", "float32", "bfloat16", "float16")


def tune(
    device: torch.device | str | None = None,
    *,
    budget_seconds: float = 120.0,
    dtypes: Sequence[str] = KERNEL_DTYPES,
    head_dim: int = 64,
    heads: int = 8,
    lengths: Sequence[int] = LENGTHS,
    progress: Callable[[int, int, str], None] | None = None,
) -> Profile:
    """Measure pools, kernels and block sizes on this machine, and decide by ``dilated_factory.tuning.rules``.

    Nothing is written: ``Profile.save()`` does that. Every candidate's output and gradients are compared with the
    float64 definition in the same run, and one that deviates is left out of the choice. What the time does not allow is
    left out too, the largest lengths first; ``Profile.measurements`` holds every figure, and why others are missing.

    Args:
        device: the CPU or a CUDA device; None for the best there is, as ``Hardware.detect``.
        budget_seconds: time for everything. The smallest length of each part is begun in any case, unless the parts
            before it have taken far too much, and left out where one round of it shows that there is no time for all.
        dtypes: for which kernels are chosen: "float32", "bfloat16", ... . Pools are measured in the first one.
        head_dim, heads: of the attention that is measured. With 4 heads or fewer little or nothing comes from a pool.
        lengths: in tokens.
        progress: called as progress(done, total, words), counted in measurements.

    Returns:
        The profile, with the hardware's key and the versions it holds for.

    Raises:
        TypeError, ValueError: an argument is none of the above.

    >>> profile = tune("cpu", budget_seconds=0.5, dtypes=["float32"], head_dim=8, heads=1, lengths=[64])
    >>> profile.device_type, sorted({one["part"] for one in profile.measurements} - {"block_size", "setting"})
    ('cpu', ['kernels', 'pool_bytes', 'pool_tokens'])
    """
    if isinstance(budget_seconds, bool) or not isinstance(budget_seconds, (int, float)):
        raise TypeError(f"budget_seconds: expected a positive number, got {budget_seconds!r}")
    if not 0 < budget_seconds < math.inf:
        raise ValueError(f"budget_seconds: expected a positive number, got {budget_seconds}")
    if isinstance(dtypes, str) or not dtypes or not all(isinstance(name, str) for name in dtypes):
        raise TypeError(f'dtypes: expected names such as ["float32"], got {dtypes!r}')
    for name in dtypes:
        if name not in DTYPES:
            raise ValueError(f"dtypes: expected some of {DTYPES}, got {name!r}")
    if not lengths:
        raise ValueError(f"lengths: expected one or more lengths in tokens, got {lengths!r}")
    for word, values in (("head_dim", [head_dim]), ("heads", [heads]), ("lengths", lengths)):
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{word}: expected a positive int, got {value!r}")
            if value < 1:
                raise ValueError(f"{word}: expected a positive int, got {value}")
    if not (progress is None or callable(progress)):
        raise TypeError(f"progress: expected something to call, or None, got {progress!r}")
    from dilated_factory.tuning.session import measure_all

    return measure_all(
        device,
        budget_seconds,
        dtypes=tuple(dict.fromkeys(dtypes)),
        head_dim=head_dim,
        heads=heads,
        lengths=sorted(set(lengths)),
        progress=progress,
    )
