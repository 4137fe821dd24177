"""Data parallel training: on two processes that share a batch, the gradients of one process that has all of it."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from dilated_core import MultiheadDilatedAttention

pytestmark = pytest.mark.slow

PROCESSES = 2
SECONDS = 300  # for two processes to start, to compute and to end, however busy the machine is


def run_on_two(work: Callable[[int], None], folder: Path) -> None:
    """Call ``work(rank)`` in two processes that form a group; fail with the first error, or after SECONDS."""
    context = spawn(_in_group, (work, f"file://{folder}/rendezvous"), nprocs=PROCESSES, join=False)
    assert context is not None
    deadline = time.monotonic() + SECONDS
    while not context.join(timeout=max(0.1, deadline - time.monotonic())):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"the processes did not end within {SECONDS} s")


def _in_group(rank: int, work: Callable[[int], None], rendezvous: str) -> None:
    faulthandler.enable()  # should torch crash, this says where
    torch.set_num_threads(1)
    patience = timedelta(seconds=SECONDS / 2)
    distributed.init_process_group("gloo", rendezvous, patience, rank=rank, world_size=PROCESSES)
    try:
        work(rank)
        distributed.barrier()  # so that neither closes its connections while the other still reads from them
    finally:
        distributed.destroy_process_group()


def wrap(module: nn.Module, how: str) -> nn.Module:
    if how == "DDP":
        return DistributedDataParallel(module)
    fully_shard(module, mesh=init_device_mesh("cpu", (PROCESSES,)))
    return module


def gradients(module: nn.Module, sequence: Tensor, padding: Tensor | None, cotangent: Tensor) -> dict[str, Tensor]:
    """Of every parameter, whole and in float64, by its name in the unwrapped module."""
    module.zero_grad()
    out, _ = module(sequence, key_padding_mask=padding)
    (out * cotangent).sum().backward()
    found = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        found[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return found


def compare_with_one_process(rank: int) -> None:
    """Both ways in the same two processes, whose start costs more than all that they compute."""
    for how in ("DDP", "FSDP2"):
        compare(rank, how)


def compare(rank: int, how: str) -> None:
    torch.manual_seed(0)  # the same weights and the same whole batch in both
    options = {"segment_lengths": [8, 16], "dilation_rates": [1, 3], "kv_heads": 2, "dtype": torch.float64}
    alone = MultiheadDilatedAttention(32, 4, **options)  # type: ignore[arg-type]
    shared = MultiheadDilatedAttention(32, 4, **options)  # type: ignore[arg-type]
    shared.load_state_dict(alone.state_dict())
    shared = wrap(shared, how)  # type: ignore[assignment]
    sequence, cotangent = torch.randn(2, 4, 37, 32, dtype=torch.float64).unbind()
    lengths = torch.tensor([37, 20, 5, 31])
    mine = slice(2 * rank, 2 * rank + 2)
    for padding in (None, torch.arange(37) >= lengths[:, None]):
        expected = gradients(alone, sequence, padding, cotangent)
        part = None if padding is None else padding[mine]
        found = gradients(shared, sequence[mine], part, cotangent[mine])
        assert found.keys() == expected.keys()
        largest = max(gradient.abs().max() for gradient in expected.values())  # k_proj.bias has none but rounding
        for name, gradient in expected.items():
            difference = (PROCESSES * found[name] - gradient).abs().max() / largest
            assert difference < 1e-12, f"{how}, {name}: {difference}"


def test_gradients_of_ddp_and_of_fsdp2_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    run_on_two(compare_with_one_process, tmp_path)
