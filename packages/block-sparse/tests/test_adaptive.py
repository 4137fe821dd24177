"""Adaptive sparsity: scores, selection, both gradients, the scorer, recall, against dense definitions in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_block_sparse import reference
from dilated_block_sparse.adaptive import (
    BlockScorer,
    BlockSparseAdaptiveAttention,
    attend_layout,
    attention_recall,
    block_masses,
    block_scores,
    distillation_loss,
    select_blocks,
    select_layout,
)
from dilated_block_sparse.layout import BlockLayout

TOLERANCE = 1e-12
SIZES = [(64, 64, (16, 16)), (53, 53, (16, 8)), (53, 53, (8, 16)), (37, 61, (16, 8)), (5, 5, (8, 8))]
CAUSAL_SIZES = [size for size in SIZES if size[0] == size[1]]


def tensors(
    q_len: int, kv_len: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, q_len, heads, head_dim), *[(batch, kv_len, kv_heads, head_dim)] * 2]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def padding(batch: int, kv_len: int, seed: int = 0) -> Tensor:
    lengths = torch.randint(1, kv_len + 1, (batch, 1), generator=torch.Generator().manual_seed(seed))
    return torch.arange(kv_len) < lengths


def deviation(result: Tensor, expected: Tensor) -> float:
    difference = (result - expected).abs().max().item()
    return difference / max(expected.abs().max().item(), 1e-300) if difference == difference else math.inf


def pair_scores(query: Tensor, key: Tensor) -> Tensor:
    key = key.repeat_interleave(query.shape[2] // key.shape[2], 2)
    return torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(query.shape[-1])


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
) -> Tensor:
    outs = []
    heads = query.shape[2]
    layouts = [
        BlockLayout.stack([layout.head(row * heads + head) for head in range(heads)]) for row in range(len(query))
    ]
    biases = [None] * len(query) if bias is None else bias.split([part.live for part in layouts])
    for row, part in enumerate(layouts):
        own = slice(row, row + 1)
        result = reference.block_sparse_attention(
            query[own],
            key[own],
            value[own],
            part,
            is_causal=causal,
            key_padding_mask=None if mask is None else mask[own],
            block_bias=biases[row],
        )
        outs.append(result.out)
    return torch.cat(outs)


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len", "size"), SIZES)
def test_a_score_is_the_mean_of_the_scores_of_the_real_pairs_of_its_block(
    q_len: int, kv_len: int, size: tuple[int, int], masked: bool
) -> None:
    query, key, _ = tensors(q_len, kv_len)
    mask = padding(2, kv_len) if masked else torch.ones(2, kv_len, dtype=torch.bool)
    pairs = pair_scores(query, key)
    scores = block_scores(
        query,
        key.masked_fill(~mask[:, :, None, None], math.nan),
        block_size=size,
        enable_gqa=True,
        key_padding_mask=mask if masked else None,
        pool="mean",
    )
    for row, i in enumerate(range(0, q_len, size[0])):
        for column, j in enumerate(range(0, kv_len, size[1])):
            for batch in range(2):
                block = pairs[batch, :, i : i + size[0], j : j + size[1]][..., mask[batch, j : j + size[1]]]
                if block.numel() == 0:
                    assert (scores[batch, :, row, column] == -math.inf).all()
                else:
                    assert deviation(scores[batch, :, row, column], block.mean((1, 2))) <= TOLERANCE


@pytest.mark.parametrize("pool", ["mean", "moments", "bound"])
def test_with_blocks_of_one_token_every_pool_is_the_score_itself(pool: str) -> None:
    query, key, _ = tensors(13, 17)
    scores = block_scores(query, key, block_size=1, enable_gqa=True, pool=pool)
    assert deviation(scores, pair_scores(query, key)) <= TOLERANCE


def test_moments_are_the_log_of_the_mean_weight_where_scores_are_small() -> None:
    query, key, _ = tensors(64, 64, head_dim=32)
    query = 0.1 * query
    weights = pair_scores(query, key).exp().unflatten(-1, (2, 32)).unflatten(-3, (2, 32)).mean((3, 5)).log()
    plain = block_scores(query, key, block_size=32, enable_gqa=True, pool="mean")
    moments = block_scores(query, key, block_size=32, enable_gqa=True, pool="moments")
    assert (moments - weights).abs().max() < 0.5 * (plain - weights).abs().max()


def test_bound_is_at_least_what_the_mean_query_scores_with_any_key() -> None:
    query, key, _ = tensors(48, 48)
    bound = block_scores(query, key, block_size=16, enable_gqa=True, pool="bound")
    means = query.unflatten(1, (3, 16)).mean(2)
    best = pair_scores(means, key).unflatten(-1, (3, 16)).amax(-1)
    assert (bound >= best - 1e-12).all()


def test_rows_that_are_padding_have_no_say() -> None:
    query, key, _ = tensors(40, 40)
    real = padding(2, 40, seed=1)
    noisy = query.masked_fill(~real[:, :, None, None], math.nan)
    quiet = query.masked_fill(~real[:, :, None, None], 5.0)
    options = {"block_size": 16, "enable_gqa": True, "query_padding_mask": real}
    assert torch.equal(block_scores(noisy, key, **options), block_scores(quiet, key, **options))


# ------------------------------------------------------------------------------------------------ selection


@st.composite
def selections(draw: st.DrawFn) -> dict[str, object]:
    by_mass = draw(st.booleans())
    share = st.floats(0.01, 1.0)
    return {
        "block_size": (draw(st.integers(1, 20)), draw(st.integers(1, 20))),
        "keep": None if by_mass else draw(st.one_of(st.integers(1, 9), share)),
        "mass": draw(share) if by_mass else None,
        "sink": draw(st.integers(0, 2)),
        "window": draw(st.one_of(st.none(), st.integers(0, 2))),
    }


@settings(max_examples=50)
@given(st.integers(1, 70), selections(), st.sampled_from(["mean", "first"]), st.booleans(), st.integers(0, 99))
def test_the_future_is_never_kept_and_no_row_is_empty(
    length: int, selection: dict[str, object], query_pool: str, learned: bool, seed: int
) -> None:
    query, key, value = tensors(length, length, seed=seed)
    rows, columns = selection["block_size"]
    options = (
        {"scorer": BlockScorer(4, 8, kv_heads=2, query_pool=query_pool)} if learned else {"query_pool": query_pool}
    )
    attention = BlockSparseAdaptiveAttention(**selection, **options, is_causal=True, enable_gqa=True)
    out, layout = attention(query, key, value, return_layout=True)
    for head in range(layout.heads):
        for block in range(layout.q_blocks):
            kept = layout.row(block, head)
            assert all(column * columns <= min((block + 1) * rows, length) - 1 for column in kept)
            assert (block * rows) // columns in kept
    # Values after a place do not reach the rows before it. Not NaN: in one dense tile 0 * NaN is NaN.
    place = seed % length
    poisoned = value.clone()
    poisoned[:, place:] = 1e100
    assert torch.equal(attention(query, key, poisoned)[:, :place], out[:, :place])


@settings(max_examples=30)
@given(
    st.integers(2, 60), selections(), st.booleans(), st.sampled_from(["mean", "moments", "bound"]), st.integers(0, 99)
)
def test_chosen_by_the_first_row_nothing_after_a_row_changes_it(
    length: int, selection: dict[str, object], learned: bool, pool: str, seed: int
) -> None:
    options: dict[str, object] = {"pool": pool, "query_pool": "first"}
    if learned:
        options = {"scorer": BlockScorer(4, 8, kv_heads=2, **options)}
    attention = BlockSparseAdaptiveAttention(**selection, **options, is_causal=True, enable_gqa=True)
    now, later = tensors(length, length, seed=seed), tensors(length, length, seed=seed + 1)
    place = 1 + seed % (length - 1)
    changed = [torch.cat([a[:, :place], 3.0 * b[:, place:]], 1) for a, b in zip(now, later, strict=True)]
    assert deviation(attention(*changed)[:, :place], attention(*now)[:, :place]) <= TOLERANCE


@pytest.mark.parametrize("block_size", [(16, 16), (32, 16), (16, 32), (24, 16)])
@pytest.mark.parametrize("choice", [{"keep": 2}, {"keep": 0.4}, {"mass": 0.7}], ids=str)
def test_chosen_by_the_first_row_a_prefix_gives_what_the_whole_gives(
    block_size: tuple[int, int], choice: dict[str, Any]
) -> None:
    query, key, value = tensors(96, 96, batch=1)
    options = {"query_pool": "first", "is_causal": True, "sink": 0, "window": None, "enable_gqa": True}
    attention = BlockSparseAdaptiveAttention(block_size, **choice, **options)
    whole = attention(query, key, value)
    for tokens in (1, 17, 40, 64, 81):
        prefix = attention(query[:, :tokens], key[:, :tokens], value[:, :tokens])
        assert deviation(prefix, whole[:, :tokens]) < TOLERANCE
    mask = torch.arange(96).unsqueeze(0) < 40
    masked = attention(query, key, value, key_padding_mask=mask)
    assert deviation(masked[:, :40], whole[:, :40]) < TOLERANCE


def test_the_first_row_that_is_no_padding_has_the_say() -> None:
    query, key, _ = tensors(32, 32)
    rows = (torch.arange(32) >= 5).expand(2, -1)
    padded = query.masked_fill(~rows[..., None, None], math.nan)
    options = {"block_size": 16, "query_pool": "first", "enable_gqa": True}
    scores = block_scores(padded, key, query_padding_mask=rows, **options)
    assert torch.equal(scores[:, :, 1], block_scores(query, key, **options)[:, :, 1])
    assert torch.equal(scores[:, :, 0], block_scores(query.roll(-5, 1), key, **options)[:, :, 0])


def test_a_mask_that_does_not_fit_a_folded_layout_is_refused() -> None:
    query, key, value = tensors(32, 32)
    with pytest.raises(ValueError, match="key_padding_mask"):
        attend_layout(
            query, key, value, BlockLayout.full(32, heads=8), enable_gqa=True, key_padding_mask=padding(3, 32)
        )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("keep", [1, 3, 7, 100])
def test_top_k_keeps_exactly_k_or_all_there_are(keep: int, is_causal: bool) -> None:
    query, key, _ = tensors(97, 97)
    scores = block_scores(query, key, block_size=8, enable_gqa=True, is_causal=is_causal)
    kept = select_blocks(scores, 97, 97, block_size=8, keep=keep, sink=0, window=None, is_causal=is_causal)
    there = torch.arange(1, 14) if is_causal else torch.full((13,), 13)
    assert torch.equal(kept.sum(-1), there.clamp(max=keep).expand(2, 4, -1))
    if not is_causal:
        # No block that was left scores more than one that was kept.
        assert (scores.masked_fill(~kept, math.inf).amin(-1) >= scores.masked_fill(kept, -math.inf).amax(-1)).all()


def test_what_is_always_kept_counts_towards_k() -> None:
    scores = torch.randn(1, 2, 12, 12)
    kept = select_blocks(scores, 96, 96, block_size=8, keep=6, sink=2, window=1)
    assert kept[..., :2].all()
    assert all(kept[..., row, max(0, row - 1) : row + 2].all() for row in range(12))
    assert (kept.sum(-1) == 6).all()
    assert (select_blocks(scores, 96, 96, block_size=8, keep=1, sink=2, window=1).sum(-1) >= 2).all()


@pytest.mark.parametrize(("share", "blocks"), [(0.1, 3), (0.25, 8), (1.0, 30), (0.001, 1)])
def test_a_share_is_rounded_up(share: float, blocks: int) -> None:
    kept = select_blocks(torch.randn(1, 1, 30, 30), 30, 30, block_size=1, keep=share, sink=0, window=None)
    assert (kept.sum(-1) == blocks).all()


def test_a_share_of_a_causal_row_is_of_what_it_sees() -> None:
    kept = select_blocks(torch.randn(1, 1, 16, 16), 16, 16, block_size=1, keep=0.25, sink=0, window=0, is_causal=True)
    assert kept.sum(-1).flatten().tolist() == [math.ceil(seen / 4) for seen in range(1, 17)]


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.01, 1.0), st.integers(0, 99))
def test_a_mass_takes_the_fewest_blocks_that_hold_it(rows: int, columns: int, mass: float, seed: int) -> None:
    scores = 3 * torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = select_blocks(scores, rows, columns, block_size=1, mass=mass, sink=0, window=None)
    predicted = scores.softmax(-1)
    held = predicted.masked_fill(~kept, 0.0)
    assert (held.sum(-1) >= mass - 1e-12).all()
    least = held.masked_fill(~kept, math.inf).amin(-1)
    assert (held.sum(-1) - least < mass).all()
    assert (predicted.masked_fill(~kept, math.inf).amin(-1) >= predicted.masked_fill(kept, 0.0).amax(-1)).all()


def test_all_of_the_mass_is_all_blocks() -> None:
    scores = 50 * torch.randn(1, 1, 9, 9)
    assert select_blocks(scores, 9, 9, block_size=1, mass=1.0).all()


def test_a_layout_holds_the_blocks_of_the_table_in_its_order() -> None:
    scores = torch.randn(2, 3, 7, 5)
    kept = select_blocks(scores, 50, 40, block_size=8, keep=2)
    layout = select_layout(scores, 50, 40, block_size=8, keep=2)
    assert torch.equal(layout.to_blocks().unflatten(0, (2, 3)), kept)
    rows = [layout.row(block, head) for head in range(6) for block in range(7)]
    assert torch.equal(layout.indices.long(), torch.tensor([column for row in rows for column in row]))
    assert torch.equal(kept.nonzero()[:, -1], layout.indices.long())


def test_with_nothing_kept_always_it_is_the_layouts_own_top_k_and_threshold() -> None:
    scores = torch.randn(1, 3, 7, 5)
    sizes, plain = {"block_size": 8}, {"sink": 0, "window": None}
    top = BlockLayout.topk(scores[0], 2, q_len=50, kv_len=40, **sizes)
    assert select_layout(scores, 50, 40, keep=2, **sizes, **plain) == top
    above = BlockLayout.threshold(scores[0], 0.8, q_len=50, kv_len=40, **sizes)
    assert select_layout(scores, 50, 40, mass=0.8, **sizes, **plain) == above


@settings(max_examples=30)
@given(st.integers(0, 999), selections(), st.booleans())
def test_blocks_of_padding_are_never_kept_and_padding_has_no_influence(
    seed: int, selection: dict[str, object], is_causal: bool
) -> None:
    query, key, value = tensors(45, 45, seed=seed)
    mask = padding(2, 45, seed)
    attention = BlockSparseAdaptiveAttention(**selection, is_causal=is_causal, enable_gqa=True)
    out, layout = attention(query, key, value, key_padding_mask=mask, return_layout=True)
    columns = selection["block_size"][1]
    for head in range(8):
        length = int(mask[head // 4].sum())
        assert all(column * columns < length for block in range(layout.q_blocks) for column in layout.row(block, head))
    poison = (tensor.masked_fill(~mask[:, :, None, None], math.nan) for tensor in (key, value))
    assert torch.equal(attention(query, *poison, key_padding_mask=mask), out)


def test_all_keys_padding_gives_zero_and_no_gradient() -> None:
    leaves = [tensor.requires_grad_() for tensor in tensors(20, 20)]
    mask = torch.zeros(2, 20, dtype=torch.bool)
    attention = BlockSparseAdaptiveAttention(8, 2, gradient="straight_through", enable_gqa=True)
    out = attention(*leaves, key_padding_mask=mask)
    assert (out == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(out, leaves, torch.randn_like(out)))


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (16, 8), (8, 16)])
def test_the_exact_gradient_is_that_of_attention_over_the_kept_blocks(
    size: tuple[int, int], is_causal: bool, masked: bool
) -> None:
    leaves = [tensor.requires_grad_() for tensor in tensors(53, 53)]
    mask = padding(2, 53) if masked else None
    attention = BlockSparseAdaptiveAttention(size, 0.5, is_causal=is_causal, enable_gqa=True)
    out, layout = attention(*leaves, key_padding_mask=mask, return_layout=True)
    expected = oracle(*leaves, layout, mask, None, is_causal)
    cotangent = torch.randn_like(out)
    assert deviation(out, expected) <= TOLERANCE
    grads = zip(
        torch.autograd.grad(out, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    )
    for name, (grad, exact) in zip("qkv", grads, strict=True):
        assert deviation(grad, exact) <= TOLERANCE, name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("budget", [{"keep": 3}, {"mass": 0.7}])
def test_straight_through_gives_a_score_the_gradient_of_a_bias_on_its_block(
    budget: dict[str, float], learned: bool, is_causal: bool, masked: bool
) -> None:
    leaves = [tensor.requires_grad_() for tensor in tensors(53, 53)]
    mask = padding(2, 53) if masked else None
    scorer = BlockScorer(4, 8, kv_heads=2, dtype=torch.float64) if learned else None
    options = {"scorer": scorer, "is_causal": is_causal, "enable_gqa": True}
    attention = BlockSparseAdaptiveAttention(8, **budget, gradient="straight_through", **options)
    out, layout = attention(*leaves, key_padding_mask=mask, return_layout=True)
    plain = BlockSparseAdaptiveAttention(8, **budget, **options)(*leaves, key_padding_mask=mask)
    scores = attention.scores(*leaves[:2], key_padding_mask=mask)
    chosen = scores[layout.to_blocks().unflatten(0, (2, 4))]
    expected = oracle(*leaves, layout, mask, chosen - chosen.detach(), is_causal)
    cotangent = torch.randn_like(out)
    assert deviation(out, plain) <= TOLERANCE
    assert deviation(out, expected) <= TOLERANCE
    learnt = [] if scorer is None else list(scorer.parameters())
    grads = torch.autograd.grad(out, [*leaves, *learnt], cotangent)
    for grad, exact in zip(grads, torch.autograd.grad(expected, [*leaves, *learnt], cotangent), strict=True):
        assert deviation(grad, exact) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("query_pool", ["mean", "first"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_parameter_of_a_scorer_learns_in_every_head(is_causal: bool, query_pool: str, dtype: torch.dtype) -> None:
    query, key, value = (tensor.to(dtype) for tensor in tensors(64, 64))
    scorer = BlockScorer(4, 8, kv_heads=2, rank=3, query_pool=query_pool)
    attention = BlockSparseAdaptiveAttention(
        8, 4, scorer=scorer, gradient="straight_through", is_causal=is_causal, enable_gqa=True
    )
    out = attention(query, key, value)
    out.backward(torch.randn_like(out))
    for name, parameter in scorer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad[:, None]).any(-1).all(), name


def test_with_the_exact_gradient_a_scorer_gets_none() -> None:
    scorer = BlockScorer(4, 8, kv_heads=2)
    leaves = [tensor.requires_grad_() for tensor in tensors(32, 32)]
    BlockSparseAdaptiveAttention(8, 2, scorer=scorer, enable_gqa=True)(*leaves).sum().backward()
    assert all(parameter.grad is None for parameter in scorer.parameters())


def test_a_scorer_begins_near_the_pooled_dot_product_and_leaves_closed_blocks_out() -> None:
    query, key, _ = tensors(64, 64)
    scorer = BlockScorer(4, 8, kv_heads=2, dtype=torch.float64)
    plain = block_scores(query, key, block_size=8, enable_gqa=True, is_causal=True)
    scores = scorer(query, key, block_size=8, is_causal=True)
    seen = plain > -math.inf
    assert torch.equal(scores > -math.inf, seen)
    assert torch.corrcoef(torch.stack([plain[seen], scores[seen].detach()]))[0, 1] > 0.8


# ------------------------------------------------------------------------------------------------ true masses


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len", "size"), SIZES)
def test_block_masses_are_those_of_the_dense_softmax(
    q_len: int, kv_len: int, size: tuple[int, int], is_causal: bool
) -> None:
    if is_causal and q_len != kv_len:
        kv_len = q_len
    query, key, _ = tensors(q_len, kv_len)
    mask = padding(2, kv_len)
    masses = block_masses(query, key, block_size=size, is_causal=is_causal, enable_gqa=True, key_padding_mask=mask)
    pairs = pair_scores(query, key).masked_fill(~mask[:, None, None], -math.inf)
    if is_causal:
        pairs = pairs.masked_fill(torch.ones(q_len, kv_len, dtype=torch.bool).triu(1), -math.inf)
    weights = pairs.softmax(-1)
    for row, i in enumerate(range(0, q_len, size[0])):
        for column, j in enumerate(range(0, kv_len, size[1])):
            expected = weights[:, :, i : i + size[0], j : j + size[1]].sum(-1).mean(-1)
            assert (masses[..., row, column] - expected).abs().max() <= TOLERANCE


def test_the_distillation_loss_is_zero_at_the_truth_and_has_its_gradient() -> None:
    query, key, _ = tensors(40, 40)
    masses = block_masses(query, key, block_size=8, is_causal=True, enable_gqa=True)
    assert abs(distillation_loss(masses.log(), masses)) < 1e-12
    scores = block_scores(query, key, block_size=8, is_causal=True, enable_gqa=True)
    free = scores.masked_fill(scores == -math.inf, 0.0).requires_grad_()
    closed = scores == -math.inf
    loss = distillation_loss(free.masked_fill(closed, -math.inf), masses)
    (grad,) = torch.autograd.grad(loss, free)
    # d KL / d score = predicted - true, over the number of rows.
    assert deviation(grad, (scores.softmax(-1) - masses) / (2 * 4 * 5)) <= TOLERANCE
    assert loss > 0


def test_rows_without_mass_are_left_out_of_the_distillation_loss() -> None:
    scores = torch.tensor([[0.0, 1.0], [-math.inf, -math.inf]], requires_grad=True)
    masses = torch.tensor([[0.3, 0.7], [0.0, 0.0]])
    loss = distillation_loss(scores, masses)
    assert torch.equal(loss, distillation_loss(scores[:1], masses[:1]))
    assert torch.autograd.grad(loss, scores)[0].isfinite().all()


def test_a_distilled_scorer_recalls_more_than_the_pooled_dot_product() -> None:
    # Keys of heavy blocks alternate in sign, as queries do, so that their mean says nothing; a flag in another channel,
    # which the plain dot product multiplies with 0, tells them. The scorer can learn to read the flag.
    query, key, _ = (0.3 * tensor.float() for tensor in tensors(128, 128, batch=1, heads=2, kv_heads=2))
    heavy = (torch.arange(16) % 3 == 0).repeat_interleave(8)[None, :, None].float()
    sign = torch.tensor([1.0, -1.0]).repeat(64)[None, :, None]
    query[..., 0], key[..., 0] = 0.0, heavy
    query[..., 1], key[..., 1] = 3 * sign, 3 * sign * heavy
    query[..., 2] = 1.0
    masses = block_masses(query, key, block_size=8)
    scorer = BlockScorer(2, 8, pool="mean")
    plain = block_scores(query, key, block_size=8, pool="mean")
    optimizer = torch.optim.Adam(scorer.parameters(), lr=0.05)
    for _ in range(40):
        loss = distillation_loss(scorer(query, key, block_size=8), masses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * distillation_loss(plain, masses)
    recalls = [
        attention_recall(query, key, select_layout(scores, 128, 128, block_size=8, keep=6, sink=0, window=None)).mean
        for scores in (scorer(query, key, block_size=8), plain)
    ]
    assert (recalls[0] > recalls[1] + 0.2).all()


# ------------------------------------------------------------------------------------------------ recall


def test_a_full_layout_recalls_everything() -> None:
    query, key, _ = tensors(50, 50)
    layout = BlockLayout.from_blocks(torch.ones(4, 4, dtype=torch.bool), 50, 50, block_size=16)
    for is_causal in (False, True):
        recall = attention_recall(query, key, layout, is_causal=is_causal, enable_gqa=True)
        assert (recall.rows - 1).abs().max() <= TOLERANCE
        assert recall.mean.shape == recall.minimum.shape == recall.quantile(0.1).shape == (4,)


@pytest.mark.parametrize("masked", [False, True])
def test_recall_is_the_share_of_the_dense_softmax_on_kept_keys(masked: bool) -> None:
    query, key, _ = tensors(53, 53)
    mask = padding(2, 53) if masked else torch.ones(2, 53, dtype=torch.bool)
    attention = BlockSparseAdaptiveAttention(8, 2, is_causal=True, enable_gqa=True)
    layout = attention.layout(query, key, key_padding_mask=mask)
    recall = attention_recall(query, key, layout, is_causal=True, enable_gqa=True, key_padding_mask=mask)
    hidden = torch.ones(53, 53, dtype=torch.bool).triu(1) | ~mask[:, None, None]
    weights = pair_scores(query, key).masked_fill(hidden, -math.inf).softmax(-1)
    expected = (weights * layout.to_dense().unflatten(0, (2, 4))).sum(-1)
    assert deviation(recall.rows, expected) <= TOLERANCE
    by_head = expected.transpose(0, 1).flatten(1)
    assert deviation(recall.mean, by_head.mean(-1)) <= TOLERANCE
    assert deviation(recall.minimum, by_head.amin(-1)) <= TOLERANCE
    assert deviation(recall.quantile(0.25), by_head.sort(-1).values[:, int(0.25 * 105)]) <= TOLERANCE


def test_rows_without_any_key_have_no_recall_and_do_not_count() -> None:
    query, key, _ = tensors(20, 20)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1] = False
    layout = BlockLayout.from_blocks(torch.ones(3, 3, dtype=torch.bool), 20, 20, block_size=8)
    recall = attention_recall(query, key, layout, enable_gqa=True, key_padding_mask=mask)
    assert recall.rows[1].isnan().all()
    for share in (recall.mean, recall.minimum, recall.quantile(0.5)):
        assert (share - 1).abs().max() <= TOLERANCE


def test_the_truly_heaviest_blocks_recall_most_of_all_choices_of_as_many() -> None:
    query, key, _ = tensors(96, 96)
    masses = block_masses(query, key, block_size=8, enable_gqa=True)
    options = {"block_size": 8, "keep": 3, "sink": 0, "window": None}
    best = attention_recall(query, key, select_layout(masses.log(), 96, 96, **options), enable_gqa=True)
    for scores in (block_scores(query, key, block_size=8, enable_gqa=True), torch.randn_like(masses)):
        other = attention_recall(query, key, select_layout(scores, 96, 96, **options), enable_gqa=True)
        assert (best.mean >= other.mean).all()


# ------------------------------------------------------------------------------------------------ the module


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("masked", [False, True])
def test_batch_rows_are_independent(gradient: str, masked: bool) -> None:
    leaves = [tensor.requires_grad_() for tensor in tensors(45, 45, batch=3)]
    mask = padding(3, 45) if masked else None
    attention = BlockSparseAdaptiveAttention(8, 0.4, gradient=gradient, is_causal=True, enable_gqa=True)
    cotangent = torch.randn_like(leaves[0])
    out = attention(*leaves, key_padding_mask=mask)
    grads = torch.autograd.grad(out, leaves, cotangent)
    for row in range(3):
        own = [tensor[row : row + 1].detach().requires_grad_() for tensor in leaves]
        alone = attention(*own, key_padding_mask=None if mask is None else mask[row : row + 1])
        assert deviation(out[row : row + 1], alone) <= TOLERANCE
        for grad, single in zip(grads, torch.autograd.grad(alone, own, cotangent[row : row + 1]), strict=True):
            assert deviation(grad[row : row + 1], single) <= TOLERANCE


def test_a_folded_layout_gives_what_batch_rows_give_one_by_one() -> None:
    query, key, value = tensors(45, 45)
    layout = BlockSparseAdaptiveAttention(8, 2, enable_gqa=True).layout(query, key)
    folded, folded_lse = attend_layout(query, key, value, layout, enable_gqa=True)
    mask = torch.ones(2, 45, dtype=torch.bool)
    out, lse = attend_layout(query, key, value, layout, enable_gqa=True, key_padding_mask=mask)
    assert deviation(folded, out) <= TOLERANCE
    assert deviation(folded_lse, lse) <= TOLERANCE


def test_keeping_everything_is_dense_attention() -> None:
    query, key, value = tensors(45, 45)
    out = BlockSparseAdaptiveAttention(8, 1.0, enable_gqa=True)(query, key, value)
    expected = torch.einsum("bhij,bjhd->bihd", pair_scores(query, key).softmax(-1), value.repeat_interleave(2, 2))
    assert deviation(out, expected) <= TOLERANCE


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("masked", [False, True])
def test_autocast_attends_in_its_dtype_and_scores_in_float32(gradient: str, masked: bool) -> None:
    leaves = [tensor.float().requires_grad_() for tensor in tensors(45, 45)]
    scorer = BlockScorer(4, 8, kv_heads=2)
    attention = BlockSparseAdaptiveAttention(8, 3, scorer=scorer, gradient=gradient, is_causal=True, enable_gqa=True)
    mask = padding(2, 45) if masked else None
    expected, layout = attention(*leaves, key_padding_mask=mask, return_layout=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, same = attention(*leaves, key_padding_mask=mask, return_layout=True)
        scores = attention.scores(*leaves[:2])
    assert (out.dtype, scores.dtype, same) == (torch.bfloat16, torch.float32, layout)
    assert deviation(out.float(), expected) < 3e-2
    out.backward(torch.randn_like(out))
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_through(dtype: torch.dtype) -> None:
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors(45, 45)]
    attention = BlockSparseAdaptiveAttention(8, 3, gradient="straight_through", is_causal=True, enable_gqa=True)
    out, layout = attention(*leaves, return_layout=True)
    expected = oracle(*(leaf.double() for leaf in leaves), layout, None, None, True)
    assert deviation(out.double(), expected) < 3e-2
    out.backward(torch.randn_like(out))
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.slow
def test_compile_runs_it_between_two_graphs() -> None:
    attention = BlockSparseAdaptiveAttention(8, 2, is_causal=True, enable_gqa=True)

    def around(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return 2 * attention(query + 1, key, value)

    inputs = tensors(45, 45)
    assert deviation(torch.compile(around, backend="eager")(*inputs), around(*inputs)) <= TOLERANCE


@pytest.mark.parametrize("shape", [(0, 20), (2, 0), (2, 1)])
def test_nothing_and_one_token_work(shape: tuple[int, int]) -> None:
    batch, length = shape
    query, key, value = tensors(length, length, batch=batch)
    attention = BlockSparseAdaptiveAttention(8, 2, is_causal=True, enable_gqa=True)
    assert attention(query, key, value).shape == query.shape


def test_dropout_drops_in_training_only() -> None:
    query, key, value = tensors(40, 40)
    attention = BlockSparseAdaptiveAttention(8, 3, attention_dropout=0.5, enable_gqa=True)
    dropped = attention(query, key, value)
    whole = attention.eval()(query, key, value)
    assert not torch.equal(dropped, whole)
    assert torch.equal(attention(query, key, value), whole)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 2, "mass": 0.5}, ValueError, "keep, mass: expected exactly one"),
        ({"keep": 0}, ValueError, "keep: expected a positive int, got 0"),
        ({"keep": 1.5}, ValueError, "keep: expected a number of blocks or a share"),
        ({"keep": True}, TypeError, "keep: expected a number of blocks or a share"),
        ({"mass": 0.0}, ValueError, "mass: expected a share"),
        ({"mass": "most"}, TypeError, "mass: expected a share"),
        ({"gradient": "none"}, ValueError, "gradient: expected one of"),
        ({"scorer": torch.nn.Linear(2, 2)}, TypeError, "scorer: expected a BlockScorer or None, got Linear"),
        ({"scorer": BlockScorer(2, 4), "pool": "bound"}, ValueError, "expected none beside a scorer"),
        ({"pool": "sum"}, ValueError, "pool: expected one of"),
        ({"query_pool": "last"}, ValueError, "query_pool: expected one of"),
        ({"sink": -1}, ValueError, "sink: expected an int of at least 0"),
        ({"window": 0.5}, TypeError, "window: expected an int of at least 0"),
        ({"block_size": 0}, ValueError, "block_size: expected a positive int, got 0"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
    ],
)
def test_a_bad_option_is_refused_by_name(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BlockSparseAdaptiveAttention(**options)


def test_bad_tensors_are_refused_by_name() -> None:
    query, key, value = tensors(20, 20)
    attention = BlockSparseAdaptiveAttention(8, 2, is_causal=True, enable_gqa=True)
    with pytest.raises(ValueError, match="key: expected the seq of query, 20, got 12"):
        attention(query, key[:, :12], value[:, :12])
    with pytest.raises(ValueError, match="grouped heads need enable_gqa"):
        block_scores(query, key)
    with pytest.raises(TypeError, match="key_padding_mask: expected a bool tensor"):
        attention(query, key, value, key_padding_mask=torch.ones(2, 20))
    with pytest.raises(ValueError, match="query_padding_mask: expected shape"):
        attention(query, key, value, query_padding_mask=torch.ones(2, 19, dtype=torch.bool))
    with pytest.raises(ValueError, match="scores: expected numbers or -inf, got NaN"):
        attention(query * math.nan, key, value)
    with pytest.raises(ValueError, match="scores: expected shape"):
        select_blocks(torch.randn(3, 3), 20, 30, block_size=8, keep=1)
    with pytest.raises(ValueError, match="query: expected shape"):
        BlockScorer(3, 8)(query, key, block_size=8)
    with pytest.raises(ValueError, match="masses: expected the shape of scores"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(3, 2))
