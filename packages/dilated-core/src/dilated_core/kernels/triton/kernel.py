"""The kernel "triton": a whole dilated attention in one launch, or one tile like any other kernel."""

from __future__ import annotations

import os
from collections.abc import Hashable
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core.kernels.needs import NO_DROPOUT, Needs
from dilated_core.kernels.problem import Problem
from dilated_core.kernels.triton import launch
from dilated_core.kernels.triton.launch import Work
from dilated_core.kernels.triton.schedule import INT32_MAX, Branches, Tables, make_tables
from dilated_core.partial import merge_stack
from dilated_core.resources import PatternStore

MAX_HEAD_DIM = 256
# Positions are 32-bit numbers, with room for one above them all.
MAX_TOKENS = (1 << 30) - 1
# Compute capability that the programs are compiled and checked for: Ampere, and later.
AMPERE = (8, 0)
# A launch of fewer programs than the card has processors is cut into shares of the keys, of so many blocks at least.
FEWEST_BLOCKS = 4
# Processors that Triton's interpreter pretends to have: so few that short tests need splits.
INTERPRETED_PROCESSORS = 4


class Attention(NamedTuple):
    """A whole dilated attention.

    Attributes:
        query: (batch, seq, heads, head_dim), last stride 1, not empty.
        key, value: (batch, seq, kv_heads, head_dim), the same.
        real: (batch, seq), bool, True where a key is no padding; None for all.
        branches: the pattern and its heads.
        bounds: (start, stop) of every packed sequence, none of them empty.
        is_causal: whether a row sees only keys at or before it.
        scale: factor on the scores, above 0.
        torchscale: whether zero keys are met and mixing weights take no gradient, as in torchscale.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    real: Tensor | None
    branches: Branches
    bounds: tuple[tuple[int, int], ...]
    is_causal: bool
    scale: float
    torchscale: bool


class Triton:
    """Every branch of a tile of rows in one program: keys are read in place, and one online softmax runs over all.

    So there are no gathered copies, no partial results and no merges in device memory. float32 products are exact, or
    tf32 where ``torch.backends.cuda.matmul.fp32_precision`` says so. Deterministic, forward and backward.
    """

    name = "triton"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs) -> str | None:
        """Why it cannot run here: device, dtype, head_dim, compute capability, or no Triton."""
        if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return (
                f"it runs on CUDA (on the CPU in Triton's interpreter, with TRITON_INTERPRET=1), not on {device.type}"
            )
        if device.type == "cuda" and not torch.cuda.is_available():
            return "CUDA is not available here"
        if dtype == torch.float64:
            return "it takes float32, float16 and bfloat16, not torch.float64"
        if head_dim > MAX_HEAD_DIM:
            return f"it takes a head_dim up to {MAX_HEAD_DIM}, not {head_dim}"
        if needs.dropout:
            return NO_DROPOUT
        if not _installed():
            return 'Triton is not installed (pip install "dilated-core[triton]")'
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < AMPERE:
            major, minor = torch.cuda.get_device_capability(device)
            return f"it needs compute capability 8.0, the device has {major}.{minor}"
        return None

    def recommended(self) -> bool:
        """Never, until it has been measured on a card."""
        return False

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of the tile."""
        work = _tile_work(problem)
        query = work.query
        batch_size, rows, heads, head_dim = query.shape
        lse_shape = (batch_size, heads, rows)
        splits = launch.useful_splits(work, _processors(query.device), FEWEST_BLOCKS)
        if splits == 1:
            out = query.new_empty(query.shape)
            lse = query.new_empty(lse_shape, dtype=torch.float32)
            launch.forward(work, out, lse)
        else:
            outs = query.new_empty(splits, batch_size, heads, rows, head_dim, dtype=torch.float32)
            lses = query.new_empty(splits, *lse_shape, dtype=torch.float32)
            launch.forward_in_splits(work, outs.transpose(2, 3), lses)
            lse = lses.logsumexp(0)
            out = merge_stack(outs, lses.clamp_(min=torch.finfo(lses.dtype).min)).to(query.dtype).transpose(1, 2)
        return out.transpose(1, 2), lse

    def backward(self, problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value."""
        work = _tile_work(problem)
        grads = tuple(tensor.new_empty(tensor.shape) for tensor in work[:3])
        grad_out, out = (rows.transpose(1, 2) for rows in (grad_out, out))
        launch.backward(work, grad_out, None, out, lse, grads)
        grad_query, grad_key, grad_value = (grad.transpose(1, 2) for grad in grads)
        return grad_query, grad_key, grad_value

    def attend(self, attention: Attention, store: PatternStore | None, out: Tensor, lse: Tensor) -> None:
        """Write the whole attention's out, like query, and lse, (batch, heads, seq) float32."""
        launch.forward(_whole_work(attention, store), out, lse)

    def differentiate(
        self,
        attention: Attention,
        store: PatternStore | None,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Write the gradients of the whole attention's query, key and value.

        Args:
            grad_out, out: like query, last stride 1; grad_lse, lse: (batch, heads, seq).
            grads: where to; float32 for key and value where heads share them.
        """
        launch.backward(_whole_work(attention, store), grad_out, grad_lse, out, lse, grads)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _check_length(tokens: int) -> None:
    if tokens > MAX_TOKENS:
        raise ValueError(f'query: expected at most {MAX_TOKENS} tokens for kernel="triton", got {tokens}')


def _tile_work(problem: Problem) -> Work:
    """A tile as an attention of one branch that holds all rows. Made by device operations alone: they are captured."""
    query, key, value = (tensor.transpose(1, 2) for tensor in problem[:3])
    _check_length(max(query.shape[1], key.shape[1]))
    device, heads = query.device, query.shape[2]
    branches = torch.ones(1, 2, dtype=torch.int32, device=device)
    branches[:, 0].fill_(INT32_MAX)
    tables = Tables(branches, torch.zeros(1, heads, dtype=torch.int32, device=device))
    return Work(query, key, value, problem.real, tables, problem.is_causal, problem.scale)


def _whole_work(attention: Attention, store: PatternStore | None) -> Work:
    query, key, value, real, branches, bounds, is_causal, scale, torchscale = attention
    _check_length(query.shape[1])
    if real is not None:
        real = real.unsqueeze(1).expand(-1, key.shape[2], -1)
    return Work(
        query, key, value, real, _tables(branches, bounds, query.device, store), is_causal, scale,
        bounds if len(bounds) > 1 else None, torchscale,
    )  # fmt: skip


def _tables(
    branches: Branches, bounds: tuple[tuple[int, int], ...], device: torch.device, store: PatternStore | None
) -> Tables:
    """Tables from the store, or else those of the latest few calls."""
    if store is None:
        tables = _recent_tables(branches, bounds, device)
    else:
        key = ("dilated_core.triton", branches, bounds, device)
        tables = store.get_or_create(key, lambda: make_tables(branches, bounds, device))
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        if stream.cuda_stream != tables.stream:  # should they be evicted, their memory waits for this stream too
            for table in tables.tensors():
                table.record_stream(stream)
        if torch.cuda.is_current_stream_capturing():
            _CAPTURED[branches, bounds, device] = tables
    return tables


@lru_cache(maxsize=8)
def _recent_tables(branches: Branches, bounds: tuple[tuple[int, int], ...], device: torch.device) -> Tables:
    return make_tables(branches, bounds, device)


# What captured graphs read at every replay, until nobody knows when. Never more than one for each size and pattern.
_CAPTURED: dict[Hashable, Tables] = {}
