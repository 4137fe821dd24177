"""attention_map: the weights of the definition, which appear when the values are the identity."""

from __future__ import annotations

import threading

import pytest
import torch
from core_cases import Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_core import attention_map, dilated_attention, reference
from dilated_core.plan import SEMANTICS


@settings(max_examples=60)
@given(case=cases(), semantics=st.sampled_from(SEMANTICS), masked=st.booleans())
def test_weights_are_those_of_the_definition(case: Case, semantics: str, masked: bool) -> None:
    lengths, rates = case.segment_lengths, case.dilation_rates
    if semantics == "torchscale":
        lengths = tuple(r * -(-w // r) for w, r in zip(lengths, rates, strict=True))
    query, key = case.tensors(2, torch.float64)
    options = {"is_causal": case.is_causal, "semantics": semantics}
    if masked:
        options["key_padding_mask"] = torch.rand(case.batch, case.seq) < 0.7
    rows = sorted({0, case.seq // 3, case.seq - 1, case.seed % case.seq})
    found = attention_map(query, key, lengths, rates, rows=rows, **options)
    # Values that are the identity make the output the weights.
    identity = torch.eye(case.seq, dtype=torch.float64).expand(case.batch, case.heads, -1, -1).transpose(1, 2)
    expected, lse = reference.dilated_attention(
        query, key, identity, lengths, rates, rows=torch.tensor(rows), **options
    )
    expected = expected.transpose(1, 2) * (len(rates) if semantics == "grouped" else 1)
    weights = found.per_head.to_dense()
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    has_key = (lse > -torch.inf).double()
    torch.testing.assert_close(weights.sum(-1) + found.zero_key_share, has_key, rtol=0, atol=1e-12)
    if semantics != "torchscale":
        assert not found.zero_key_share.any()
    mean = weights.sum(1) / has_key.sum(1).clamp(min=1)[..., None]
    torch.testing.assert_close(found.merged.to_dense(), mean, rtol=0, atol=1e-12)


def test_weights_times_values_is_the_output() -> None:
    query = torch.randn(2, 61, 6, 8)
    key, value = torch.randn(2, 2, 61, 2, 8).unbind()
    pattern = ([16, 61], [1, 3])
    weights = attention_map(query, key, *pattern, rows=range(61), enable_gqa=True).per_head.to_dense()
    out = torch.einsum("bhqk,bkhd->bqhd", weights, value.repeat_interleave(3, dim=2))
    torch.testing.assert_close(out, dilated_attention(query, key, value, *pattern, enable_gqa=True))


def test_costs_what_the_rows_reach() -> None:
    query, key = torch.randn(2, 1, 100_000, 4, 8).unbind()
    found = attention_map(query, key, [1000, 100_000], [1, 100], rows=torch.tensor([0, 99_999]))
    assert found.per_head._nnz() < 2 * 4 * 2000


@pytest.mark.parametrize("shape", [(0, 7, 2, 8), (1, 0, 2, 8), (2, 7, 0, 8)], ids=str)
def test_nothing_to_show(shape: tuple[int, ...]) -> None:
    query = torch.randn(shape)
    rows = range(min(1, shape[1]))
    found = attention_map(query, query, [4], [1], rows=rows)
    assert found.per_head.shape == (shape[0], shape[2], len(rows), shape[1])
    assert found.per_head.to_dense().sum() == 0


@pytest.mark.parametrize(
    ("rows", "error", "match"),
    [
        (3, TypeError, "rows: expected a sequence"),
        (torch.tensor([0.5]), TypeError, "rows: expected a 1-D integer tensor"),
        ([7], ValueError, r"rows\[0\]: expected a position below seq = 7, got 7"),
        ([-1], ValueError, r"rows\[0\]"),
    ],
)
def test_bad_rows(rows: object, error: type[Exception], match: str) -> None:
    query, key = torch.randn(2, 1, 7, 2, 8).unbind()
    with pytest.raises(error, match=match):
        attention_map(query, key, [4], [1], rows=rows)  # type: ignore[arg-type]


def test_threads_leave_torchs_switch_for_sparse_checks_as_it_was() -> None:
    query, key = torch.randn(2, 1, 64, 2, 8).unbind()

    def look() -> None:
        for _ in range(15):
            assert attention_map(query, key, [16, 32], [1, 2], rows=[3, 20]).merged.is_coalesced()

    for _ in range(3):
        threads = [threading.Thread(target=look, daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert not any(thread.is_alive() for thread in threads)
        assert not torch.sparse.check_sparse_tensor_invariants.is_enabled()
