"""What a device shows of the rectangles, of layouts made there, and of rings: against the definition, on CPU and CUDA.

FlexAttention's part is in test_flex.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_cases import Case, Results, assert_close, oracle
from torch import Tensor, distributed

from dilated_block_sparse import (
    BlockLayout,
    BlockSparseAdaptiveAttention,
    BlockSparseMultiheadAttention,
    block_sparse_attention,
    reference,
)
from dilated_block_sparse.ring import BlockSparseRingAttention
from dilated_core import AuxRequest

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PLACES = [
    *(pytest.param("cpu", dtype, id=f"cpu-{dtype}") for dtype in (torch.float64, torch.bfloat16)),
    *(pytest.param("cuda", dtype, id=f"cuda-{dtype}", marks=pytest.mark.gpu) for dtype in DTYPES),
]
# A card's matrix units make a float32 product of several shorter ones, and sum in another order.
SLACK = {torch.float64: 10.0, torch.float32: 10.0, torch.bfloat16: 2.0, torch.float16: 2.0}

CASES = [
    Case(2, 301, 4, 32, (64, 64), ("random", "local")),
    Case(1, 301, 8, 64, (32, 32), ("local", "global"), is_causal=True, kv_heads=2, share="key"),
    Case(2, 201, 4, 16, (32, 16), ("strided",), kv_len=150, mask="random", share="query"),
    Case(2, 201, 4, 16, (32, 32), ("random", "local"), is_causal=True, mask="right", kv_heads=2),
    Case(1, 201, 4, 32, (32, 32), ("random", "local"), has_bias=True),
]


def run(case: Case, dtype: torch.dtype, device: str, **options: Any) -> Results:
    """block_sparse_attention and its gradients on the device, under random cotangents; the results on the CPU."""
    leaves = [tensor.to(device).requires_grad_() for tensor in case.problem(dtype)]
    real = case.key_padding_mask()
    out, aux = block_sparse_attention(
        *leaves[:3],
        case.layout(),
        is_causal=case.is_causal,
        key_padding_mask=None if real is None else real.to(device),
        block_bias=leaves[3] if case.has_bias else None,
        enable_gqa=case.kv_heads is not None,
        return_aux=AuxRequest(lse=True),
        **options,
    )
    assert out.device.type == device
    of_out, of_lse = (cotangent.to(device) for cotangent in case.cotangents(dtype))
    grads = torch.autograd.grad([out, aux.lse], leaves, [of_out, of_lse.to(aux.lse)])
    found = (out.detach(), aux.lse.detach(), *grads)
    return Results(*(tensor.cpu() for tensor in found), *[None] * (not case.has_bias))


def slack(device: str, dtype: torch.dtype) -> float:
    return 1.0 if device == "cpu" else SLACK[dtype]


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rectangles_are_the_definition(case: Case, device: str, dtype: torch.dtype) -> None:
    found = run(case, dtype, device, backend="tiles")
    assert_close(case, dtype, found, oracle(case, dtype), slack=slack(device, dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [case for case in CASES if case.mask == "none"], ids=str)
def test_two_runs_give_the_same_bits(case: Case, device: str) -> None:
    """By default, not only where torch is told to: keys that several rectangles meet are summed in one order."""
    torch.use_deterministic_algorithms(False)
    first = run(case, torch.float32, device, backend="tiles", kernel="math")
    assert all(run(case, torch.float32, device, backend="tiles", kernel="math").equal(first) for _ in range(3))


# ------------------------------------------------------------------------------------------------ layouts made there


@pytest.mark.parametrize("device", DEVICES)
def test_layouts_by_scores_on_a_device_are_those_of_the_cpu(device: str) -> None:
    scores = torch.randn(3, 10, 10, dtype=torch.float64)
    for is_causal in (False, True):
        sizes = {"block_size": 16, "is_causal": is_causal}
        assert BlockLayout.topk(scores.to(device), 3, **sizes) == BlockLayout.topk(scores, 3, **sizes)
        assert BlockLayout.threshold(scores.to(device), 0.8, **sizes) == BlockLayout.threshold(scores, 0.8, **sizes)


@pytest.mark.parametrize("device", DEVICES)
def test_a_block_mask_on_a_device_is_the_layout_again(device: str) -> None:
    layout = BlockLayout.bigbird(1000, 1, 1, 2, block_size=128)
    for is_causal in (False, True):
        mask = layout.to_block_mask(is_causal=is_causal, device=device)
        assert mask.kv_indices.device.type == device
        assert BlockLayout.from_block_mask(mask) == (layout.causal() if is_causal else layout)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("budget", [{"keep": 3}, {"keep": 0.3}, {"mass": 0.8}], ids=str)
def test_adaptive_attention_attends_what_it_chose(budget: dict[str, Any], device: str) -> None:
    options = {"block_size": 16, "is_causal": True, "enable_gqa": True, "gradient": "straight_through"}
    module = BlockSparseAdaptiveAttention(**options, **budget, backend="tiles")
    query, key, value = (torch.randn(2, 150, heads, 16, device=device, requires_grad=True) for heads in (4, 2, 2))
    out, layout = module(query, key, value, return_layout=True)
    for row in range(2):
        heads = BlockLayout.stack([layout.head(4 * row + head) for head in range(4)])
        rows = (tensor[row : row + 1].detach().double().cpu() for tensor in (query, key, value))
        expected = reference.block_sparse_attention(*rows, heads, is_causal=True).out
        torch.testing.assert_close(out[row : row + 1].double().cpu(), expected, rtol=0, atol=1e-4)
    for grad in torch.autograd.grad(out, (query, key, value), torch.randn_like(out)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_multihead_module_is_that_of_the_cpu(device: str) -> None:
    layout = BlockLayout.local(150, 1, block_size=16)
    here = BlockSparseMultiheadAttention(64, 4, layout, is_causal=True, backend="tiles")
    there = BlockSparseMultiheadAttention(64, 4, layout, is_causal=True, backend="tiles", device=device)
    there.load_state_dict(here.state_dict())
    hidden = torch.randn(2, 150, 64)
    found = there(hidden.to(device), hidden.to(device), hidden.to(device))[0]
    torch.testing.assert_close(found.cpu(), here(hidden, hidden, hidden)[0], rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ a ring of one rank


@pytest.fixture
def group(device: str, tmp_path: Path) -> Iterator[None]:
    """The default group, of this process alone: NCCL's on CUDA, gloo's on the CPU."""
    place: dict[str, Any] = {"device_id": torch.device("cuda", 0)} if device == "cuda" else {}
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{tmp_path}/store",
        timeout=timedelta(seconds=60),
        rank=0,
        world_size=1,
        **place,
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_a_ring_of_one_rank_is_the_definition(device: str, dtype: torch.dtype) -> None:
    case = replace(CASES[0], is_causal=True, through="out")
    *inputs, cotangent = (tensor.to(device) for tensor in (*case.problem(dtype), case.cotangents(dtype)[0]))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = BlockSparseRingAttention(case.layout(), is_causal=True)(*leaves)
    grads = torch.autograd.grad(out, leaves, cotangent)
    wanted = oracle(case, dtype)
    lse: Tensor = wanted.lse.to(torch.float64 if dtype == torch.float64 else torch.float32)
    found = Results(out.detach().cpu(), lse, *(grad.cpu() for grad in grads), None)
    assert not (lse == -math.inf).any()
    assert_close(case, dtype, found, wanted, slack=slack(device, dtype))
