"""Train a language model on 65,536 bytes of context, on the CPU or GPU of one machine; stop it, and go on.

    python examples/train_64k.py                                 10 minutes, on this machine's own Python sources
    python examples/train_64k.py --minutes 60 --embed-dim 256    a larger model, for longer
    python examples/train_64k.py --resume --minutes 30           go on from the last checkpoint, until 30 minutes
    python examples/train_64k.py --context 4096 --steps 200      a quick look

The model is dilated_factory.LongNetLM over bytes: four branches whose segments grow from a 64th of the context to
all of it, XPOS positions, AdamW. Windows begin short and grow to the whole context. Before training the attention of
every layer is compared with the definition in float64 at the full context, and a step is weighed with its activations
kept and recomputed. After it the model is scored on text it has never seen, given more and more of the bytes before,
and continues a long prompt.

Writes into --output: checkpoint.pt, what --resume reads; model/, what LongNetLM.from_pretrained reads; train_64k.json
and train_64k.md, the record of the run. The exit status is 1 where the attention deviates from the definition.
Needs `pip install "dilated-factory[safetensors]"`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from train_64k_measures import CHECKED_ROWS, bits_by_context, deviations, weigh
from train_64k_page import page

from dilated_core import measure
from dilated_factory import LongNetLM
from dilated_factory.demo.baselines import measure_baselines
from dilated_factory.demo.corpus import HELD_OUT_ONE_IN, Corpus, load_corpus
from dilated_factory.demo.settings import FULL, DemoSettings
from dilated_factory.demo.training import (
    BYTE_VALUES,
    START_BYTE,
    Precision,
    Windows,
    bits_per_byte,
    choose_precision,
    create_optimizer,
    evaluate,
    learning_rate,
    window_length,
)

BRANCHES = 4
GROWTH = 4
"""From one branch to the next the segment grows by it, and so does the rate: all have equally many keys a segment."""

LEAST_CONTEXT = GROWTH ** (BRANCHES - 1)
"""What the context is a multiple of, so that segments are whole."""

XPOS_SCALE_BASE = 512
"""XPOS's own, which reaches 36,260 tokens in float32."""

HELD_OUT_WINDOWS = 8
CURVE_WINDOWS = 2
CURVE_POINTS = 10
"""Windows behind the last held-out loss and behind those during training, and how many of the latter."""

SAMPLE = {"temperature": 0.7, "top_k": 40}
SAMPLE_PROMPT = b"\n\ndef read_lines(path):\n"
"""What the prompt ends with; before it stands held-out text."""


def make_settings(arguments: argparse.Namespace) -> DemoSettings:
    """The demo's recipe of AdamW, at this context: segments of a 64th, a 16th, a 4th of it and all, rates 1 to 64."""
    context = arguments.context
    lengths = [context // GROWTH**power for power in range(BRANCHES - 1, -1, -1)]
    return replace(
        FULL,
        context=context,
        embed_dim=arguments.embed_dim,
        num_heads=arguments.heads,
        num_layers=arguments.layers,
        segment_lengths=tuple(lengths),
        dilation_rates=tuple(GROWTH**power for power in range(BRANCHES)),
        peak_learning_rate=arguments.learning_rate,
        # Most of what a small model learns is near by, and short windows teach it in more and quicker steps.
        length_warm_up=tuple(zip((0.3, 0.5, 0.7), lengths[:-1], strict=True)),
    )


def make_model(settings: DemoSettings, device: torch.device, *, seed: int, recompute: bool) -> LongNetLM:
    """LongNetLM; XPOS decays over a distance that grows with the context, so that its scales stay within float32."""
    torch.manual_seed(seed)
    return LongNetLM(
        BYTE_VALUES,
        settings.embed_dim,
        settings.num_heads,
        settings.num_layers,
        settings.segment_lengths,
        settings.dilation_rates,
        positions="xpos",
        xpos_scale_base=max(XPOS_SCALE_BASE, settings.context / 64),
        checkpoint_activations=recompute,
        sequence_length=settings.context,
        device=device,
    )


def read_text(path: Path | None) -> Corpus:
    """The .py files below a folder, this Python's own by default; or a file, of which the end is held out."""
    if path is None or path.is_dir():
        return load_corpus(path)
    text = path.read_bytes()
    cut = len(text) - len(text) // HELD_OUT_ONE_IN
    return Corpus(path.parent, text[:cut], text[cut:], (path.name,), (path.name,))


class Training:
    """Model, optimizer, random state and what happened so far: all that a checkpoint holds."""

    def __init__(self, model: LongNetLM, settings: DemoSettings, seed: int) -> None:
        self.model = model
        self.settings = settings
        self.optimizer = create_optimizer(model, settings)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps: list[list[float]] = []  # bytes of the window, seconds, bits per byte
        self.curve: list[list[float]] = []  # steps, seconds, bits per byte of held-out text

    @property
    def seconds(self) -> float:
        """Spent in steps."""
        return math.fsum(seconds for _, seconds, _ in self.steps)

    def step(self, text: Windows, precision: Precision, progress: float) -> None:
        """One window, at the length and learning rate that are due at this share of the training."""
        started = time.perf_counter()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(progress, self.settings)
        inputs, targets = text.draw(window_length(progress, self.settings), self.generator)
        loss = bits_per_byte(self.model, inputs, targets, precision)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        bits = loss.item()  # waits for a GPU
        self.steps.append([targets.shape[1], time.perf_counter() - started, bits])

    def save(self, path: Path) -> None:
        """Write it beside the old one, which it then replaces: what is there is always whole."""
        parts = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "curve": self.curve,
        }
        temporary = path.with_suffix(".writing")
        torch.save(parts, temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Go on from there.

        Raises:
            ValueError: it was saved with other settings; the first that differs is named.
        """
        parts = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in asdict(self.settings).items():
            if value != parts["settings"][name]:
                raise ValueError(f"{path}: {name}: saved with {parts['settings'][name]}, asked for {value}")
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.generator.set_state(parts["generator"])
        self.steps, self.curve = parts["steps"], parts["curve"]


def continue_text(model: LongNetLM, prompt: bytes, count: int, device: torch.device, seed: int) -> bytes:
    """So many bytes more. The prompt is read once; each new byte then costs what its row attends."""
    tokens = torch.tensor([[START_BYTE, *prompt]], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return bytes(model.generate(tokens, count, generator=generator, **SAMPLE)[0, tokens.shape[1] :].tolist())


def train(
    training: Training, text: Windows, held_out: Windows, precision: Precision, arguments: argparse.Namespace
) -> None:
    """Steps until the time or the number of them is reached, with a checkpoint and a held-out loss now and then."""

    def progress() -> float:
        shares = [
            len(training.steps) / arguments.steps if arguments.steps else 0.0,
            training.seconds / (60 * arguments.minutes) if arguments.minutes else 0.0,
        ]
        return max(shares)

    saved = time.perf_counter()
    while progress() < 1.0:
        training.step(text, precision, progress())
        done = progress()
        if done >= min(1.0, (len(training.curve) + 1) / CURVE_POINTS):
            bits = evaluate(training.model, held_out, precision, windows=CURVE_WINDOWS)
            training.curve.append([len(training.steps), training.seconds, bits])
            length, seconds, own = training.steps[-1]
            print(
                f"{min(done, 1.0):4.0%}: step {len(training.steps)}, {training.seconds:.0f} s, windows of {length:,}, "
                f"{length / seconds:,.0f} bytes/s, {own:.2f} bits a byte, held out {bits:.2f}",
                flush=True,
            )
        if time.perf_counter() - saved > 60 * arguments.save_every:
            training.save(arguments.output / "checkpoint.pt")
            saved = time.perf_counter()
    training.save(arguments.output / "checkpoint.pt")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole of it; returns the record."""
    device, settings = torch.device(arguments.device), make_settings(arguments)
    corpus = read_text(arguments.text)
    text = Windows(corpus.training, settings.context, device)
    windows = min(HELD_OUT_WINDOWS, len(corpus.held_out) // settings.context)
    if windows == 0:
        raise SystemExit(f"--context: expected at most the {len(corpus.held_out)} bytes of held-out text")
    unseen = corpus.held_out[: windows * settings.context]
    held_out = Windows(unseen, settings.context, device)

    def create() -> LongNetLM:
        return make_model(settings, device, seed=arguments.seed, recompute=arguments.recompute)

    training = Training(create(), settings, arguments.seed)
    model, checkpoint = training.model, arguments.output / "checkpoint.pt"
    if arguments.resume and not checkpoint.exists():
        raise SystemExit(f"--resume: expected a checkpoint, found no {checkpoint}")
    if arguments.resume:
        training.load(checkpoint)
        print(f"resumed after {len(training.steps)} steps, {training.seconds:.0f} s")
    elif checkpoint.exists():
        raise SystemExit(f"--output: expected a folder without a run, found {checkpoint} (--resume goes on from it)")
    precision, _ = choose_precision(create, text, settings, device)
    record: dict[str, Any] = {
        "environment": measure.environment(),
        "settings": {
            **asdict(settings),
            **{name: getattr(arguments, name) for name in ("minutes", "steps", "recompute", "seed")},
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "decision": model.layers[0].self_attn.decision.summary(),
        "precision": precision.name,
        "text": {"training_bytes": len(corpus.training), "held_out_bytes": len(corpus.held_out), "scored": len(unseen)},
        "checked_rows": CHECKED_ROWS,
    }
    print(f"{record['parameters']:,} parameters, {settings.context:,} bytes of context, {precision.name}, {device}")
    record["checks"] = deviations(model, held_out.at(0)[0], precision)
    worst = max(record["checks"], key=lambda check: check["deviation"] / check["tolerance"])
    print(f"attention from the definition, of {len(record['checks'])} layers: {worst['deviation']:.1e} at most")
    if not worst["deviation"] <= worst["tolerance"]:
        raise SystemExit(f"the attention deviates by more than {worst['tolerance']}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    record["activations"] = weigh(model, text, precision, device)
    for name, of in record["activations"].items():
        print(f"activations {name}: {of['seconds']:.1f} s, {of['peak_bytes'] / 2**20:,.0f} MiB a window")

    train(training, text, held_out, precision, arguments)

    record["steps"] = [[length, round(seconds, 4), round(bits, 4)] for length, seconds, bits in training.steps]
    record["curve"] = training.curve
    record["held_out"] = evaluate(model, held_out, precision)
    record["by_context"] = bits_by_context(model, held_out, precision, settings.segment_lengths)
    record["baselines"] = asdict(measure_baselines(corpus.training, unseen, primed_bytes=0))
    prompt = unseen[: settings.context // 2] + SAMPLE_PROMPT
    started = time.perf_counter()
    written = continue_text(model, prompt, arguments.sample, device, arguments.seed)
    record["sample"] = {
        **SAMPLE,
        "prompt_bytes": len(prompt),
        "prompt_end": SAMPLE_PROMPT.decode(),
        "text": written.decode(errors="replace"),
        "seconds": time.perf_counter() - started,
    }
    model.save_pretrained(arguments.output / "model")
    (arguments.output / "train_64k.json").write_text(json.dumps(record) + "\n")
    (arguments.output / "train_64k.md").write_text(page(record))
    return record


def parse(command: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=65536, help=f"bytes in a window, a multiple of {LEAST_CONTEXT}")
    parser.add_argument("--steps", type=int, help="stop after so many; no limit by default")
    parser.add_argument("--minutes", type=float, help="stop after so many of training; 10 where --steps is not given")
    parser.add_argument("--text", type=Path, help="a file, or a folder of .py files; this Python's library by default")
    parser.add_argument("--output", type=Path, default=Path("train-64k"), help="folder for all that is written")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    parser.add_argument("--save-every", type=float, default=2.0, help="minutes from one checkpoint to the next")
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its peak")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing: less memory, more time")
    parser.add_argument("--sample", type=int, default=400, help="bytes to generate at the end")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(command)
    if arguments.context < LEAST_CONTEXT or arguments.context % LEAST_CONTEXT:
        parser.error(f"--context: expected a multiple of {LEAST_CONTEXT}, got {arguments.context}")
    for option, limit in (("--steps", arguments.steps), ("--minutes", arguments.minutes)):
        if limit is not None and not limit > 0:
            parser.error(f"{option}: expected a positive number, got {limit}")
    if arguments.steps is None and arguments.minutes is None:
        arguments.minutes = 10.0
    return arguments


if __name__ == "__main__":
    try:
        run(parse())
    except KeyboardInterrupt:
        raise SystemExit("stopped; --resume goes on from the last checkpoint") from None
