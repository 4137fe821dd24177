"""Training on bytes: windows of the text, a time-boxed AdamW, and bits per byte on text never seen.

Every window starts from the same start byte, so all ``context`` bytes of it are predicted and counted, the first
without any context. May import torch and the models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from dilated_factory.demo.settings import DemoSettings
from dilated_factory.models import LongNetLM

BYTE_VALUES = 256
START_BYTE = 0
"""What stands before the first byte of a window: NUL, which no Python source contains."""

CALIBRATION_BYTES = 2048
"""Length of the windows that precisions are timed on: the cost of a window is nearly proportional to its length."""

SAMPLE_WINDOWS = 8
"""Held-out windows behind each point of the held-out curve."""


class Windows:
    """Inputs and targets, each int64 (1, length), cut from a text on ``device``."""

    def __init__(self, text: bytes, context: int, device: torch.device) -> None:
        if len(text) < context:
            raise ValueError(f"text: expected at least one window of {context} bytes, got {len(text)}")
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
        self.context = context

    def at(self, start: int, length: int | None = None) -> tuple[Tensor, Tensor]:
        """The window of ``length`` bytes (``context`` where None) that begins at this byte."""
        length = self.context if length is None else length
        targets = self.bytes[None, start : start + length].long()
        inputs = functional.pad(targets[:, :-1], (1, 0), value=START_BYTE)
        return inputs, targets

    def draw(self, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One window of ``length`` bytes at a uniformly random place."""
        start = int(torch.randint(len(self.bytes) - length + 1, (), generator=generator))
        return self.at(start, length)


@dataclass(frozen=True)
class Precision:
    """The dtype matrix products run in, and why.

    Attributes:
        name: "float32" or "bfloat16" (autocast: weights stay float32).
        seconds: measured time of one short training step in each dtype tried, the chosen one the smallest.
        device_type: torch's.
    """

    name: str
    seconds: dict[str, float]
    device_type: str

    def autocast(self) -> AbstractContextManager[object]:
        """The context to run the model in."""
        if self.name == "float32":
            return nullcontext()
        return torch.autocast(self.device_type, dtype=getattr(torch, self.name))


@dataclass(frozen=True)
class Step:
    """One optimiser step: when it ended (s of training), bytes read so far, its loss, the rate it used."""

    seconds: float
    bytes_read: int
    bits_per_byte: float
    learning_rate: float


@dataclass(frozen=True)
class HeldOutCheck:
    """Loss on a few held-out windows after so many seconds of training."""

    seconds: float
    bytes_read: int
    bits_per_byte: float


@dataclass
class TrainingRecord:
    """What happened, filled as it happens, so that an interrupted run still has it."""

    steps: list[Step] = field(default_factory=list)
    checks: list[HeldOutCheck] = field(default_factory=list)

    def recent_bits(self, steps: int = 20) -> float:
        """Mean loss of the last steps, bits per byte; NaN before the first."""
        losses = [step.bits_per_byte for step in self.steps[-steps:]]
        return math.fsum(losses) / len(losses) if losses else math.nan

    def bytes_per_second(self, steps: int = 20) -> float:
        """Speed over the last steps; NaN before there are two."""
        recent = self.steps[-steps - 1 :]
        if len(recent) < 2:
            return math.nan
        return (recent[-1].bytes_read - recent[0].bytes_read) / (recent[-1].seconds - recent[0].seconds)


def bits_per_byte(model: LongNetLM, inputs: Tensor, targets: Tensor, precision: Precision) -> Tensor:
    """Mean cross-entropy of the targets, a float32 scalar in bits, differentiable."""
    with precision.autocast():
        logits = model(inputs)
    nats = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    return nats / math.log(2.0)


def create_optimizer(model: LongNetLM, settings: DemoSettings) -> torch.optim.AdamW:
    """AdamW, decaying matrices only: norms and biases have nothing to gain from being small."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.peak_learning_rate, betas=settings.betas, fused=True)


def learning_rate(progress: float, settings: DemoSettings) -> float:
    """The rate when ``progress`` of the training time is over: linear warm-up, then a cosine to zero.

    >>> from dilated_factory.demo.settings import FULL
    >>> learning_rate(FULL.warm_up, FULL) == FULL.peak_learning_rate, learning_rate(1.0, FULL)
    (True, 0.0)
    """
    if progress < settings.warm_up:
        return settings.peak_learning_rate * progress / settings.warm_up
    fall = min(1.0, (progress - settings.warm_up) / (1.0 - settings.warm_up))
    return settings.peak_learning_rate * 0.5 * (1.0 + math.cos(math.pi * fall))


def window_length(progress: float, settings: DemoSettings) -> int:
    """Bytes in the training window when ``progress`` of the time is over: short ones first, then the whole context.

    Early on, many short steps teach more than few long ones (sequence length warm-up, arXiv 2108.06084).

    >>> from dilated_factory.demo.settings import FULL
    >>> window_length(0.0, FULL) < window_length(0.99, FULL) == FULL.context
    True
    """
    for until, length in settings.length_warm_up:
        if progress < until:
            return length
    return settings.context


def train(
    model: LongNetLM,
    training: Windows,
    held_out: Windows,
    settings: DemoSettings,
    precision: Precision,
    seconds: float,
    seed: int,
    record: TrainingRecord,
    on_step: Callable[[TrainingRecord], None],
) -> None:
    """Train for ``seconds``, one window a step, filling ``record``; ``on_step`` is called after each step.

    The order of the windows follows from ``seed``; how many of them are read, and the learning rate of each, from the
    machine's speed.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = create_optimizer(model, settings)
    model.train()
    spent, bytes_read = 0.0, 0
    started = time.perf_counter()
    while spent < seconds:
        progress = spent / seconds
        rate = learning_rate(progress, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = training.draw(window_length(progress, settings), generator)
        loss = bits_per_byte(model, inputs, targets, precision)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        bits = loss.item()
        bytes_read += targets.numel()
        spent = time.perf_counter() - started
        record.steps.append(Step(spent, bytes_read, bits, rate))
        if spent >= seconds * (len(record.checks) + 1) / settings.held_out_checks:
            bits = evaluate(model, held_out, precision, windows=SAMPLE_WINDOWS)
            record.checks.append(HeldOutCheck(spent, bytes_read, bits))
        on_step(record)


@torch.no_grad()
def evaluate(
    model: LongNetLM,
    text: Windows,
    precision: Precision,
    *,
    windows: int | None = None,
    on_window: Callable[[], None] = lambda: None,
) -> float:
    """Mean bits per byte over whole windows of a text: ``windows`` of them spread evenly, or every one."""
    available = len(text.bytes) // text.context
    count = available if windows is None else min(windows, available)
    was_training = model.training
    model.eval()
    try:
        losses = []
        for index in range(count):
            inputs, targets = text.at(available * index // count * text.context)
            losses.append(bits_per_byte(model, inputs, targets, precision).item())
            on_window()
    finally:
        model.train(was_training)
    return math.fsum(losses) / len(losses)


def choose_precision(
    create: Callable[[], LongNetLM], windows: Windows, settings: DemoSettings, device: torch.device, *, steps: int = 2
) -> tuple[Precision, float]:
    """Time a few training steps in float32 and under bfloat16 autocast, each on a model of its own.

    Returns:
        The faster precision, and about how many seconds one forward pass over the whole context takes in it.
    """
    seconds: dict[str, float] = {}
    forward: dict[str, float] = {}
    for name in ("float32", "bfloat16"):
        precision = Precision(name, {}, device.type)
        model = create()
        optimizer = create_optimizer(model, settings)
        inputs, targets = windows.at(0, CALIBRATION_BYTES)
        timings = []
        for _ in range(1 + steps):
            started = time.perf_counter()
            loss = bits_per_byte(model, inputs, targets, precision)
            loss.item()
            forward[name] = time.perf_counter() - started
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            _synchronise(device)
            timings.append(time.perf_counter() - started)
        seconds[name] = min(timings[1:])
    best = min(seconds, key=seconds.__getitem__)
    return Precision(best, seconds, device.type), forward[best] * settings.context / CALIBRATION_BYTES


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
