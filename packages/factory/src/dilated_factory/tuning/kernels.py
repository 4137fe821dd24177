"""Kernels on this machine, by length and dtype. Imports torch and dilated_core."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dilated_core import kernels
from dilated_factory.profile import AUTO
from dilated_factory.resources.shared import SharedResources
from dilated_factory.tuning.budget import Budget, OutOfTime
from dilated_factory.tuning.cells import TRAINING, bytes_of_scores, recorded
from dilated_factory.tuning.probe import PATTERN, Probe
from dilated_factory.tuning.rules import Figure

# A kernel so many times slower than the fastest at one length is left out from the next on.
FAR_BEHIND = 3.0


def kernels_by_length(
    probe: Probe, budget: Budget, lengths: Sequence[int], dtypes: Sequence[str]
) -> dict[str, dict[int, tuple[str, dict[str, Figure]]]]:
    """Forward and backward with every kernel that can run: dtype -> tokens -> (auto's choice, kernel -> seconds)."""
    part = "kernels"
    found: dict[str, dict[int, tuple[str, dict[str, Figure]]]] = {dtype: {} for dtype in dtypes}
    behind: dict[str, dict[str, str]] = {dtype: {} for dtype in dtypes}
    resources = SharedResources()
    for length in lengths:
        for dtype in dtypes:
            kind = getattr(torch, dtype)
            words = f"kernels: {length:,} tokens in {dtype}"
            usual = kernels.choose(AUTO, probe.device, kind, probe.head_dim).name
            usable = [name for name, no in kernels.survey(probe.device, kind, probe.head_dim).items() if no is None]
            dropped = dict(behind[dtype])
            scores = probe.too_large(bytes_of_scores(PATTERN.pairs(length, probe.heads), kind))
            if scores is not None and "math" in usable and usual != "math":
                dropped.setdefault("math", scores)
            names = [name for name in usable if name not in dropped]
            left_out = probe.too_large(probe.working_set(length, kind)) or budget.refusal(f"{part} {dtype}", length)
            if dtype == "bfloat16" and not probe.hardware.bf16:
                left_out = "the device has no bfloat16"
            elif len(names) < 2:
                left_out = left_out or f"{names[0]} alone is left"
            if left_out is not None:
                probe.record(part, words, dtype=dtype, tokens=length, left_out=left_out, dropped=dropped)
                continue
            candidates = {
                name: probe.attention(length, resources, kernel=name, enable_memory_pool=False) for name in names
            }
            series = f"{part} {dtype}"
            try:
                passes, deviations, wrong = probe.both_passes(budget, series, length, kind, candidates, (TRAINING,))
            except OutOfTime as late:
                probe.record(part, words, dtype=dtype, tokens=length, left_out=str(late), dropped=dropped)
                continue
            if TRAINING not in passes:
                probe.record(part, words, dtype=dtype, tokens=length, auto=usual, dropped=dropped | wrong)
                continue
            timed = passes[TRAINING]
            found[dtype][length] = usual, timed.figures
            fastest = min(timed.figures, key=lambda name: timed.figures[name].seconds)
            for name, figure in timed.figures.items():
                times = figure.seconds / timed.figures[fastest].seconds
                if times > FAR_BEHIND and name != usual:
                    behind[dtype][name] = f"{times:.1f} times slower than {fastest} at {length:,} tokens"
            what = {"auto": usual, "deviations": deviations, "dropped": dropped | wrong, **recorded(timed)}
            probe.record(part, words, dtype=dtype, tokens=length, **{"pass": TRAINING}, **what)
    return found
