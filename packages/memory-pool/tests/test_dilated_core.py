"""A pool, and a manager's kind, as the allocator of dilated-core: the same bits, forward, backward and decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dilated_core import Allocator, DilatedKVCache, decode_step, dilated_attention
from dilated_memory_pool import MemoryPool
from dilated_memory_pool.attention import AttentionBufferManager

LENGTHS, RATES = [32, 64], [1, 2]

MAKERS: dict[str, Callable[[], Any]] = {
    "lightweight": lambda: MemoryPool("host", min_bytes=0),
    "full": lambda: MemoryPool("host", min_bytes=0, mode="full"),
    "manager": lambda: AttentionBufferManager("host"),
    "scores": lambda: AttentionBufferManager("host").allocator("scores"),
}


@pytest.fixture(params=MAKERS)
def allocator(request: pytest.FixtureRequest) -> Any:
    return MAKERS[request.param]()


def attend(allocator: Allocator | None, dtype: torch.dtype, is_causal: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value, cotangent = (torch.randn(2, 193, 4, 16, generator=generator).to(dtype) for _ in range(4))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = dilated_attention(*inputs, LENGTHS, RATES, is_causal=is_causal, allocator=allocator)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


def test_it_is_an_allocator(allocator: Any) -> None:
    assert isinstance(allocator, Allocator)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention_and_its_gradients_have_the_same_bits(allocator: Any, dtype: torch.dtype, is_causal: bool) -> None:
    plain = attend(None, dtype, is_causal)
    for _ in range(3):  # the second time in memory that was used
        assert all(map(torch.equal, attend(allocator, dtype, is_causal), plain))


def test_all_memory_of_attention_comes_back() -> None:
    pool = MemoryPool("host", min_bytes=0, mode="full")
    results = attend(pool, torch.float32, is_causal=True)
    assert pool.statistics().hits > 0
    del results
    assert pool.statistics().allocated_bytes == 0


def test_decoding_in_pooled_memory_is_the_causal_call(allocator: Any) -> None:
    query, key, value = torch.randn(3, 1, 150, 4, 16, dtype=torch.float64).unbind()
    cache = DilatedKVCache(
        LENGTHS, RATES, batch_size=1, num_heads=4, head_dim=16, dtype=torch.float64, allocator=allocator
    )
    steps = [decode_step(query[:, t : t + 1], key[:, t : t + 1], value[:, t : t + 1], cache) for t in range(150)]
    whole = dilated_attention(query, key, value, LENGTHS, RATES, is_causal=True)
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-12
