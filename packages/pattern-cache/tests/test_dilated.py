from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_core import reference
from dilated_pattern_cache import BlockLayoutKey, DilatedIndexKey, DilatedPatternCache
from dilated_pattern_cache.indices import dilated_indices

LENGTHS = st.integers(0, 40)
BRANCHES = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=3)


@given(LENGTHS, BRANCHES, st.integers(1, 5))
def test_indices_are_the_positions_of_the_definition(n: int, branches: list[tuple[int, int]], heads: int) -> None:
    lengths, rates = zip(*branches, strict=True)
    indices = dilated_indices(DilatedIndexKey(n, lengths, rates, heads))
    assert len(indices) == len(branches)
    for (w, r), of_branch in zip(branches, indices, strict=True):
        assert len(of_branch) == min(r, heads)
        for head in range(heads):
            expected = [p for p in range(n) if (p - p // w * w) % r == head % r]
            index = of_branch[head % r]
            assert index.tolist() == expected
            assert index.dtype == torch.int64


@pytest.mark.parametrize(("n", "lengths", "rates"), [(37, (8, 16), (1, 4)), (64, (16, 64), (2, 8)), (5, (8,), (3,))])
def test_attention_over_the_indices_is_dilated_attention(n: int, lengths: Any, rates: Any) -> None:
    heads, dim = 4, 8
    rates = tuple(min(rate, length) for rate, length in zip(rates, lengths, strict=True))
    query, key, value = torch.randn(3, 1, n, heads, dim, dtype=torch.float64, generator=torch.manual_seed(0))
    cache = DilatedPatternCache()
    numerator, denominator = torch.zeros(n, heads, dim).double(), torch.zeros(n, heads, 1).double()
    for w, of_branch in zip(lengths, cache.dilated_indices(n, lengths, rates, heads), strict=True):
        for head in range(heads):
            index = of_branch[head % len(of_branch)]
            same_segment = (index[:, None] // w) == (index[None, :] // w)
            scores = query[0, index, head] @ key[0, index, head].T / dim**0.5
            weights = scores.exp() * same_segment
            numerator[index, head] += weights @ value[0, index, head]
            denominator[index, head] += weights.sum(-1, keepdim=True)
    out = torch.where(denominator > 0, numerator / denominator, 0.0)
    expected, _ = reference.dilated_attention(query, key, value, lengths, rates)
    torch.testing.assert_close(out[None], expected, atol=1e-12, rtol=0)


def test_the_cache_makes_indices_once() -> None:
    cache = DilatedPatternCache()
    first = cache.dilated_indices(64, [16, 32], [1, 4], heads=4)
    assert cache.dilated_indices(64, (16, 32), (1, 4), heads=4) is first
    assert cache.dilated_indices(64, (16, 32), (1, 4), heads=2) is not first
    assert (cache.info().hits, cache.info().misses, cache.info().creations) == (1, 2, 2)
    assert DilatedIndexKey(64, (16, 32), (1, 4), 4) in cache
    assert cache.nbytes == 8 * (64 + 64) + 8 * (64 + 32)


def test_indices_of_other_semantics_are_refused() -> None:
    with pytest.raises(ValueError, match=r"semantics: expected 'paper', .* got 'torchscale'"):
        dilated_indices(DilatedIndexKey(8, (4,), (1,), semantics="torchscale"))


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize(
    "key",
    [
        DilatedIndexKey(8, (4,), (1,)),
        ("dilated_core.tiles", (2, 4), (1, 2), 8, 4, "paper", True, range(4)),
        ("kind", None, 1.5, b"bytes", frozenset({1}), torch.float16, torch.device("cpu"), torch.Size([1]), Colour.RED),
        ("kind", BlockLayoutKey(8, "local")),
    ],
    ids=["typed", "core", "plain", "nested"],
)
def test_keys_that_can_be_found_again_are_taken(key: Any) -> None:
    cache = DilatedPatternCache()
    assert cache.get_or_create(key, lambda: 1) == 1
    cache[key] = 2
    assert cache[key] == 2


BAD_KEYS: dict[str, tuple[Any, type[Exception], str]] = {
    "text": ("text", TypeError, "key: expected a PatternKey or a tuple that begins with its kind, got 'text'"),
    "empty": ((), TypeError, "begins with its kind"),
    "unnamed": ((1, 2), TypeError, "begins with its kind"),
    "tensor": (("kind", torch.ones(())), TypeError, "expected no Tensor in it, which is equal to nothing but itself"),
    "deep": (("kind", (1, (torch.ones(()),))), TypeError, "expected no Tensor in it"),
    "function": (("kind", lambda: 1), TypeError, "expected no function in it"),
    "object": (("kind", object()), TypeError, "expected no object in it"),
    "nan": (("kind", float("nan")), ValueError, "key: expected one that equals itself, without NaN"),
}


@pytest.mark.parametrize(("key", "error", "message"), BAD_KEYS.values(), ids=BAD_KEYS)
@pytest.mark.parametrize("store", ["get_or_create", "put", "set"])
def test_keys_that_are_never_found_again_are_refused_before_any_work(
    key: Any, error: type[Exception], message: str, store: str
) -> None:
    def create() -> int:
        raise AssertionError("work")

    cache = DilatedPatternCache()
    ways: dict[str, Callable[[], object]] = {
        "get_or_create": lambda: cache.get_or_create(key, create),
        "put": lambda: cache.put(key, 1),
        "set": lambda: cache.update({key: 1}),
    }
    with pytest.raises(error) as caught:
        ways[store]()
    assert message in str(caught.value)
    assert len(cache) == 0


def test_statistics_by_kind_add_up() -> None:
    cache = DilatedPatternCache()
    for seq_len in (16, 32):
        for _ in range(3):
            cache.dilated_indices(seq_len, [8], [1])
    cache.put(("dilated_core.tiles", 1), torch.zeros(4), seconds=2.0)
    assert cache["dilated_core.tiles", 1] is not None
    kinds = cache.by_kind()
    assert set(kinds) == {"dilated", "dilated_core.tiles"}
    assert (kinds["dilated"].entries, kinds["dilated"].nbytes, kinds["dilated"].hits) == (2, 8 * 48, 4)
    tiles = kinds["dilated_core.tiles"]
    assert (tiles.nbytes, tiles.hits, tiles.seconds, tiles.seconds_saved) == (16, 1, 2.0, 2.0)
    assert sum(kind.seconds_saved for kind in kinds.values()) == pytest.approx(cache.info().seconds_saved)
