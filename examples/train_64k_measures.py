"""What train_64k.py measures beside the training: rightness, time and memory of a step, and the use of far text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dilated_core import measure, reference
from dilated_factory import LongNetLM
from dilated_factory.demo.training import Precision, Windows, bits_per_byte

CHECKED_ROWS = 16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest difference from the float64 definition over its largest magnitude, by the dtype that attends."""


@torch.no_grad()
def deviations(model: LongNetLM, inputs: Tensor, precision: Precision) -> list[dict[str, Any]]:
    """Of each layer's attention over the inputs, at rows from its whole length, from the definition in float64."""
    found: list[dict[str, Any]] = []

    def compare(attention: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        query, key, value = arguments[:3]
        rows = torch.linspace(0, query.shape[1] - 1, CHECKED_ROWS).round().long().unique().to(query.device)
        pattern = attention.pattern
        lengths, rates = pattern.segment_lengths, pattern.dilation_rates
        exact, _ = reference.dilated_attention(
            query.double(), key.double(), value.double(), lengths, rates, is_causal=True, rows=rows
        )
        deviation = ((output[:, rows].double() - exact).abs().max() / exact.abs().max()).item()
        tolerance = TOLERANCE[query.dtype]
        found.append({"deviation": deviation, "tolerance": tolerance, "dtype": str(query.dtype).removeprefix("torch.")})

    hooks = [layer.self_attn.attention.register_forward_hook(compare) for layer in model.layers]
    try:
        with precision.autocast():
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def weigh(model: LongNetLM, text: Windows, precision: Precision, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds and peak bytes of forward and backward over the whole context, activations kept and recomputed."""
    inputs, targets = text.at(0)

    def differentiate(recompute: bool) -> Callable[[], None]:
        def run() -> None:
            model.checkpoint_activations = recompute
            bits_per_byte(model, inputs, targets, precision).backward()
            model.zero_grad()

        return run

    chosen = model.checkpoint_activations
    model.train()
    candidates = {"kept": differentiate(False), "recomputed": differentiate(True)}
    peaks = {name: measure.peak_memory(run, device) for name, run in candidates.items()}
    timings = measure.interleaved(candidates, repeats=2, warmup=0)
    model.checkpoint_activations = chosen
    return {name: {"seconds": timings[name].median, "peak_bytes": peaks[name]} for name in candidates}


@torch.no_grad()
def bits_by_context(model: LongNetLM, text: Windows, precision: Precision, lengths: Sequence[int]) -> list[list[float]]:
    """(bytes given, bits per byte) of the same last bytes of every held-out window, given more and more before them.

    Those scored are as many as the first of the lengths, which rise. A model that uses what is far away needs fewer
    bits the more it is given.
    """
    model.eval()
    scored = lengths[0]
    rows = []
    for given in lengths:
        bits = []
        for end in range(text.context, len(text.bytes) + 1, text.context):
            inputs, targets = text.at(end - given, given)
            with precision.autocast():
                logits = model(inputs)[:, -scored:]
            loss = functional.cross_entropy(logits.float().flatten(0, 1), targets[:, -scored:].flatten())
            bits.append(loss.item() / math.log(2.0))
        rows.append([given, math.fsum(bits) / len(bits)])
    return rows
