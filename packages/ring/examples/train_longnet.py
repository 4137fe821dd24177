r"""Train a byte-level LongNetLM on sequences that lie over many processes, with FSDP2 beside; stop it, and go on.

    python train_longnet.py                                                one process
    torchrun --standalone --nproc-per-node 8 train_longnet.py --shards 2   8 processes: sequences over 4, FSDP2 over 2
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_longnet.py \
        --shards 8 --sequences 8                                           on each of 4 machines: sequences over 4

    ... --dtype float64 --compare                   beside it, the same training in one process; the losses must agree
    ... --checkpoints runs --every 100              keep checkpoints, in a folder that all machines see
    ... --checkpoints runs --every 100 --resume     go on from the last complete one, on any number of processes
    ... --device cuda --dtype bfloat16              a GPU for each process, NCCL (not yet measured on a GPU)

Ranks form a mesh ("sequence", "shard"). Ranks of one "shard" group split the parameters (FSDP2) and the batch; they are
neighbours, since parameters are what travels most. Ranks of one "sequence" group hold one stretch each of the same
sequences, and send each other only the rows that the dilated pattern needs.

Each rank's loss is the sum over its own tokens, divided by the tokens of all. FSDP2 sums gradients over both groups.
When a process dies, every other one ends with a PeerError that says what it was waiting for.
Needs `pip install dilated-ring dilated-factory numpy`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from dilated_factory.models import LongNetLM
from dilated_ring import PeerError
from dilated_ring.comm import Purpose
from dilated_ring.plan import even_bounds

BYTE_VALUES = 256

XPOS_SCALE_BASE = 512
"""Tokens over which XPOS's scores decay: its own, which reaches 36,260 tokens. For longer contexts it is to grow."""

CLIP = 1.0
"""Largest norm of all gradients together."""

TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 5e-2}
"""Largest relative difference of a loss or norm from the single process's: rounding, as it grows over the steps."""


class Batch(NamedTuple):
    """Token ids and what is to follow each of them, both int64 (sequences, context)."""

    inputs: Tensor
    targets: Tensor


class Text:
    """Sequences cut from a file, one after the other, from its start again when it is used up."""

    def __init__(self, path: Path, context: int) -> None:
        self.bytes = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        self.context = context
        if len(self.bytes) <= context:
            raise ValueError(f"text: expected more than {context} bytes in {path}, got {len(self.bytes)}")

    def at(self, position: int, sequences: int) -> Batch:
        """The sequences that start at this byte. Targets are cut before sequences are: what follows a shard's last
        token is the next shard's first.
        """
        last = len(self.bytes) - self.context
        starts = [(position + number * self.context) % last for number in range(sequences)]
        windows = torch.stack([self.bytes[start : start + self.context + 1] for start in starts]).long()
        return Batch(windows[:, :-1], windows[:, 1:])


class Training(Stateful):
    """What a checkpoint holds: model, optimizer, steps done, and the position in the text."""

    def __init__(self, model: LongNetLM, learning_rate: float) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        self.steps = self.position = 0

    def step(self, batch: Batch, tokens: int) -> tuple[Tensor, Tensor]:
        """One step of the optimizer.

        Returns:
            This rank's share of the mean loss over ``tokens`` tokens, and the norm of all gradients before clipping.
        """
        logits = self.model(batch.inputs)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum") / tokens
        loss.backward()
        norm = clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), norm.full_tensor() if isinstance(norm, DTensor) else norm

    def state_dict(self) -> dict[str, Any]:
        """See Stateful."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "steps": self.steps, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See Stateful."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        self.steps, self.position = state_dict["steps"], state_dict["position"]


def make_model(arguments: argparse.Namespace, **options: object) -> LongNetLM:
    """The model, with the same weights on every rank: FSDP2 keeps each rank's part of them as it finds them."""
    torch.manual_seed(arguments.seed)
    return LongNetLM(
        BYTE_VALUES,
        arguments.embed_dim,
        arguments.heads,
        arguments.layers,
        arguments.segment_lengths,
        arguments.dilation_rates,
        xpos_scale_base=max(XPOS_SCALE_BASE, arguments.context / 64),
        device=arguments.device,
        # With bfloat16, FSDP2 computes in it from float32 parameters.
        dtype=torch.float64 if arguments.dtype == "float64" else torch.float32,
        **options,
    )


def shard_model(model: LongNetLM, mesh: DeviceMesh, dtype: str) -> None:
    """Split the parameters over the mesh's "shard" dimension, in place; they are replicated over "sequence"."""
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = mixed if dtype == "bfloat16" else MixedPrecisionPolicy()
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        # Sums instead of FSDP2's means: each loss is a share of the whole already. Divided by 1 after the sum, as gloo
        # has no reduction that multiplies.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


@contextmanager
def peers(step: int) -> Iterator[None]:
    """Raise what the network says of a lost peer as PeerError, as dilated_ring's own exchanges do."""
    try:
        yield
    except PeerError:
        raise
    except RuntimeError as error:
        # Gloo raises plain RuntimeErrors that begin with a file of its own.
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        purpose = Purpose("parameters, gradients or losses", f"step {step}")
        raise PeerError(distributed.get_rank(), distributed.get_world_size(), purpose, error) from error


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, as rank 0 sees it; None for none."""
    # The metadata is written last, when every rank has written its part.
    found = sorted(path.parent for path in folder.glob("step-*/.metadata"))
    chosen = [found[-1] if found else None]
    distributed.broadcast_object_list(chosen)
    return chosen[0]


def train(arguments: argparse.Namespace, mesh: DeviceMesh) -> None:
    """All steps, from the first or from a checkpoint, on this rank."""
    text = Text(arguments.text, arguments.context)
    tokens = arguments.sequences * arguments.context
    sequence, shard = mesh["sequence"], mesh["shard"]
    bounds = even_bounds(arguments.context, sequence.size())
    model = make_model(arguments, attention_type="ring", group=sequence, bounds=bounds)
    shard_model(model, mesh, arguments.dtype)
    training = Training(model, arguments.learning_rate)
    path = last_complete(arguments.checkpoints) if arguments.checkpoints else None
    if path is not None and not arguments.resume:
        # Later, --resume would take the older run's last checkpoint, or one of which it is half.
        raise SystemExit(f"--checkpoints: expected a folder without any, got {path} (--resume goes on from it)")
    if arguments.resume:
        if path is not None:
            checkpoint.load({"training": training}, checkpoint_id=path)
        say(f"resumed from {path}, {training.steps} steps done" if path else "no complete checkpoint: a new start")
    alone = None
    if arguments.compare and distributed.get_rank() == 0:
        alone = Training(make_model(arguments, attention_type="improved"), arguments.learning_rate)

    # This rank's part of a batch: some sequences, and a stretch of each.
    first, stop = even_bounds(arguments.sequences, shard.size())[shard.get_local_rank() :][:2]
    low, high = bounds[sequence.get_local_rank() :][:2]
    while training.steps < arguments.steps:
        batch = text.at(training.position, arguments.sequences)
        with peers(training.steps + 1):
            own = Batch(*(each[first:stop, low:high].to(arguments.device) for each in batch))
            loss, norm = training.step(own, tokens)
            distributed.all_reduce(loss)
            found = loss.item(), norm.item()
        training.steps += 1
        training.position += tokens
        line = f"step {training.steps}: loss {found[0]:.15g}, gradient norm {found[1]:.15g}"
        if alone is not None:
            whole = Batch(*(each.to(arguments.device) for each in batch))
            expected = [each.item() for each in alone.step(whole, tokens)]
            line += f"; in one process {expected[0]:.15g}, {expected[1]:.15g}"
            differences = [abs(ours - its) / its for ours, its in zip(found, expected, strict=True)]
            if not max(differences) <= TOLERANCE[arguments.dtype]:
                raise SystemExit(f"{line}: they differ")
        say(line)
        if arguments.checkpoints and training.steps % arguments.every == 0:
            with peers(training.steps):
                path = arguments.checkpoints / f"step-{training.steps:08}"
                checkpoint.save({"training": training}, checkpoint_id=path)


def say(line: str) -> None:
    """Print it once."""
    if distributed.get_rank() == 0:
        print(line, flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(__file__), help="what to learn; this script by default")
    parser.add_argument("--context", type=int, default=1024, help="tokens in a sequence; ranks need no equal shares")
    parser.add_argument("--sequences", type=int, default=2, help="in a step, of all ranks together")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shards", type=int, default=1, help="ranks that split parameters and batch (FSDP2)")
    parser.add_argument("--embed-dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--segment-lengths", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--dilation-rates", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--checkpoints", type=Path, help="folder for them")
    parser.add_argument("--every", type=int, default=5, help="steps from one checkpoint to the next")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint")
    parser.add_argument("--compare", action="store_true", help="train in one process too (rank 0) and compare losses")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for a rank that stalls")
    arguments = parser.parse_args()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.shards < 1 or world_size % arguments.shards:
        parser.error(f"--shards: expected a divisor of the {world_size} ranks, got {arguments.shards}")
    if arguments.resume and not arguments.checkpoints:
        parser.error("--resume: expected --checkpoints beside it")
    if arguments.resume and arguments.compare:
        parser.error("--compare: expected no --resume beside it, the other process has no checkpoints")
    return arguments


def main() -> None:
    """Join the other ranks and train."""
    arguments = parse()
    if arguments.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    options: dict[str, Any] = (
        {} if "RANK" in os.environ else {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    )
    backend = "cpu:gloo,cuda:nccl" if arguments.device == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=arguments.timeout), **options)
    shape = distributed.get_world_size() // arguments.shards, arguments.shards
    train(arguments, init_device_mesh(arguments.device, shape, mesh_dim_names=("sequence", "shard")))
    # Not after an error: then the process ends, and with it its connections.
    distributed.barrier()  # a rank that ends while another still reads from it would be taken for dead
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
