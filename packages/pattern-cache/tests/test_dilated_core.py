"""The cache where it is meant to serve: as the plan store of dilated attention, alone and in training."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn import functional as F

from dilated_core import DilatedAttention, PatternStore, dilated_attention
from dilated_factory import LongNetLM
from dilated_pattern_cache import DilatedPatternCache, PatternCache


@pytest.mark.parametrize("make", [PatternCache, DilatedPatternCache])
def test_both_caches_are_pattern_stores(make: type[PatternCache]) -> None:  # type: ignore[type-arg]
    assert isinstance(make(), PatternStore)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_with_a_cache_is_bit_for_bit_attention_without(is_causal: bool) -> None:
    cache = DilatedPatternCache()
    for seq_len in (1, 37, 64, 37):
        tensors = torch.randn(4, 2, seq_len, 4, 8, generator=torch.manual_seed(seq_len))
        query, key, value = (tensor.clone().requires_grad_() for tensor in tensors[:3])
        outs = []
        for patterns in (None, cache):
            out = dilated_attention(query, key, value, [8, 16], [1, 2], is_causal=is_causal, patterns=patterns)
            outs.append([out, *torch.autograd.grad(out, (query, key, value), tensors[3])])
        for plain, cached in zip(*outs, strict=True):
            assert torch.equal(plain, cached)
    assert cache.info().creations == len(cache)
    assert cache.info().hits > 0
    assert set(cache.by_kind()) == {"dilated_core.tiles"}


def test_threads_plan_once() -> None:
    cache, start = DilatedPatternCache(), threading.Barrier(8)
    query, key, value = torch.randn(3, 1, 64, 4, 8)
    expected = dilated_attention(query, key, value, [16, 64], [1, 4])
    outs: list[torch.Tensor] = []

    def attend() -> None:
        start.wait(60)
        outs.extend(dilated_attention(query, key, value, [16, 64], [1, 4], patterns=cache) for _ in range(5))

    threads = [threading.Thread(target=attend, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len(outs) == 40
    assert all(torch.equal(out, expected) for out in outs)
    assert cache.info().creations == len(cache)


@pytest.mark.slow
def test_training_hits_always_once_it_is_warm_and_learns_the_same() -> None:
    """Three lengths in turn, as in bucketed training: nothing is planned after the first round, nothing evicted."""
    losses: dict[bool, list[float]] = {}
    for caching in (False, True):
        torch.manual_seed(0)
        model = LongNetLM(64, 32, 4, 2, [16, 64], [1, 4])
        cache = DilatedPatternCache()
        if caching:
            for module in model.modules():
                if isinstance(module, DilatedAttention):
                    module.patterns = cache
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses[caching] = []
        warm = cache.info()
        for step in range(12):
            if step == 3:
                warm = cache.info()
            tokens = torch.randint(64, (2, (48, 100, 65)[step % 3]), generator=torch.manual_seed(step % 3))
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[caching].append(loss.item())
        if caching:
            info = cache.info()
            assert warm.creations > 0
            assert (info.creations, info.misses, info.waits) == (warm.creations, warm.misses, 0)
            assert info.hits > warm.hits > 0
            assert (info.evictions, info.rejections, info.bypasses) == (0, 0, 0)
    assert losses[True] == losses[False]
    assert losses[True][-1] < losses[True][0]
