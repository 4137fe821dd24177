"""Every pattern against a slow definition: a set of (row, column) pairs, one block at a time."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dilated_block_sparse import patterns
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.patterns.sampling import draw

Blocks = set[tuple[int, int]]
Size = tuple[int, int]

SIZES = [(1, 1), (2, 2), (4, 4), (4, 2), (2, 4), (6, 4), (3, 5), (8, 1), (1, 8), (64, 64)]
lengths = st.integers(0, 60)
block_sizes = st.sampled_from(SIZES)
FEW = settings(max_examples=50)


# ------------------------------------------------------------------------------------------------ slow definitions


def touched(seq_len: int, size: Size, row: int) -> list[int]:
    """The column blocks of the row block's own positions."""
    positions = range(row * size[0], min((row + 1) * size[0], seq_len))
    return sorted({position // size[1] for position in positions})


def grid(seq_len: int, size: Size) -> tuple[range, range]:
    return range(math.ceil(seq_len / size[0])), range(math.ceil(seq_len / size[1]))


def between_columns(seq_len: int, size: Size, live: Callable[[int, int], bool]) -> Blocks:
    """The blocks that a rule between column blocks gives: a row block has those of each column that it touches."""
    rows, columns = grid(seq_len, size)
    return {(i, j) for i in rows for j in columns if any(live(c, j) for c in touched(seq_len, size, i))}


def visible(seq_len: int, size: Size) -> Blocks:
    """Blocks with a key that is not after every row."""
    rows, columns = grid(seq_len, size)
    return {(i, j) for i in rows for j in columns if j * size[1] <= min((i + 1) * size[0], seq_len) - 1}


def longnet_blocks(seq_len: int, size: Size, branches: Iterable[tuple[int, int]], head: int) -> Blocks:
    live = set()
    for length, rate in branches:
        chosen = [p for p in range(seq_len) if (p % length) % rate == head % rate]
        for query in chosen:
            for key in chosen:
                if query // length == key // length:
                    live.add((query // size[0], key // size[1]))
    return live


def blocks_of(drawn: tuple[Tensor, ...], seq_len: int, size: Size) -> list[Blocks]:
    """What was drawn, a set a head, once its form is found to be right."""
    indptr, indices = drawn[:2]
    rows, columns = grid(seq_len, size)
    assert indptr.dtype == torch.int64
    assert indices.dtype == torch.int32
    assert indptr.shape[1] == len(rows) + 1
    assert indptr[0, 0] == 0
    assert indptr[-1, -1] == len(indices)
    heads = []
    for pointers in indptr.tolist():
        live: Blocks = set()
        for row, (start, stop) in enumerate(pairwise(pointers)):
            own = indices[start:stop].tolist()
            assert own == sorted(set(own))
            assert all(column in columns for column in own)
            live |= {(row, column) for column in own}
        heads.append(live)
    return heads


def counts(live: Blocks, rows: int) -> list[int]:
    return [sum(row == i for row, _ in live) for i in range(rows)]


# ------------------------------------------------------------------------------------------------ patterns of numbers


@FEW
@given(lengths, block_sizes, st.integers(0, 20), st.integers(1, 3))
def test_local_is_a_band(seq_len: int, size: Size, window: int, heads: int) -> None:
    drawn = patterns.local(seq_len, window, block_size=size, heads=heads)
    expected = between_columns(seq_len, size, lambda c, j: abs(c - j) <= window)
    assert blocks_of(drawn, seq_len, size) == [expected] * heads


@FEW
@given(lengths, block_sizes, st.integers(1, 20), st.integers(1, 12), st.integers(1, 3))
def test_dilated_is_residues_of_a_segment(seq_len: int, size: Size, segment: int, rate: int, heads: int) -> None:
    drawn = patterns.dilated(seq_len, segment, rate, block_size=size, heads=heads)
    expected = between_columns(seq_len, size, lambda c, j: c // segment == j // segment and (c - j) % rate == 0)
    assert blocks_of(drawn, seq_len, size) == [expected] * heads


@FEW
@given(lengths, block_sizes, st.integers(1, 20))
def test_strided_is_a_window_and_every_stride(seq_len: int, size: Size, stride: int) -> None:
    drawn = patterns.strided(seq_len, stride, block_size=size)
    expected = between_columns(seq_len, size, lambda c, j: abs(c - j) < stride or (c - j) % stride == 0)
    assert blocks_of(drawn, seq_len, size) == [expected]


@FEW
@given(lengths, block_sizes, st.integers(1, 20), st.integers(1, 5))
def test_fixed_is_groups_and_their_last_columns(seq_len: int, size: Size, stride: int, summary: int) -> None:
    summary = min(summary, stride)
    drawn = patterns.fixed(seq_len, stride, summary=summary, block_size=size, heads=2)
    expected = between_columns(seq_len, size, lambda c, j: c // stride == j // stride or j % stride >= stride - summary)
    assert blocks_of(drawn, seq_len, size) == [expected] * 2


@FEW
@given(lengths, block_sizes, st.data())
def test_global_is_columns_and_rows(seq_len: int, size: Size, data: st.DataObject) -> None:
    rows, columns = grid(seq_len, size)
    chosen: list[set[int]] = []
    arguments: list[Any] = []
    for blocks in (columns, rows):
        if data.draw(st.booleans()):
            number = data.draw(st.integers(0, 5))
            arguments.append(number)
            chosen.append(set(range(number)))
        else:
            arguments.append(data.draw(st.lists(st.sampled_from(blocks), max_size=4)) if blocks else [])
            chosen.append(set(arguments[-1]))
    drawn = patterns.global_(seq_len, *arguments, block_size=size)
    expected = {(i, j) for i in rows for j in columns if j in chosen[0] or i in chosen[1]}
    assert blocks_of(drawn, seq_len, size) == [expected]


@FEW
@given(lengths, block_sizes, st.integers(1, 4), st.none() | st.integers(0, 4), st.integers(2, 5))
def test_hierarchical_is_its_levels(seq_len: int, size: Size, window: int, levels: int | None, branching: int) -> None:
    drawn = patterns.hierarchical(seq_len, window, levels=levels, branching=branching, block_size=size)
    # Level 7 reaches 128 blocks and more: beyond every length here.
    groups = [branching**level for level in range(8 if levels is None else levels + 1)]
    expected = between_columns(
        seq_len, size, lambda c, j: any((j + 1) % g == 0 and abs(c - j) <= window * g for g in groups)
    )
    assert blocks_of(drawn, seq_len, size) == [expected]


def test_a_hierarchy_has_few_columns_and_reaches_both_ends() -> None:
    indptr, indices = patterns.hierarchical(4096, 2, branching=2, block_size=1)
    assert int(indptr.diff().max()) <= 5 * 13
    assert 4095 in indices[: indptr[0, 1]].tolist()
    assert indices[indptr[0, -2] :].tolist()[0] == 2047


@FEW
@given(
    st.integers(0, 40), block_sizes, st.lists(st.tuples(st.integers(1, 50), st.integers(1, 6)), min_size=1, max_size=3)
)
def test_longnet_has_the_blocks_that_hold_a_pair(seq_len: int, size: Size, branches: list[tuple[int, int]]) -> None:
    branches = [(length, min(rate, length)) for length, rate in branches]
    drawn = patterns.longnet(seq_len, *zip(*branches, strict=True), block_size=size, heads=3)
    expected = [longnet_blocks(seq_len, size, branches, head) for head in range(3)]
    assert blocks_of(drawn, seq_len, size) == expected


@given(lengths, block_sizes, st.integers(1, 3))
@settings(max_examples=20)
def test_full_and_empty_are_all_and_none(seq_len: int, size: Size, heads: int) -> None:
    rows, columns = grid(seq_len, size)
    everything = {(i, j) for i in rows for j in columns}
    assert blocks_of(patterns.full(seq_len, block_size=size, heads=heads), seq_len, size) == [everything] * heads
    assert blocks_of(patterns.empty(seq_len, block_size=size, heads=heads), seq_len, size) == [set()] * heads


# ------------------------------------------------------------------------------------------------ patterns by lot


@FEW
@given(lengths, block_sizes, st.integers(0, 30), st.booleans(), st.integers(0, 1000))
def test_random_gives_each_row_its_number(seq_len: int, size: Size, per_row: int, is_causal: bool, seed: int) -> None:
    drawn = patterns.random(seq_len, per_row, seed=seed, block_size=size, heads=3, is_causal=is_causal)
    rows, columns = grid(seq_len, size)
    allowed = visible(seq_len, size) if is_causal else {(i, j) for i in rows for j in columns}
    most = counts(allowed, len(rows))
    for live in blocks_of(drawn, seq_len, size):
        assert live <= allowed
        assert counts(live, len(rows)) == [min(per_row, there) for there in most]


@FEW
@given(lengths, block_sizes, st.integers(0, 3), st.integers(0, 3), st.integers(0, 12), st.booleans())
def test_bigbird_draws_beside_what_is_live(
    seq_len: int, size: Size, window: int, anchors: int, per_row: int, is_causal: bool
) -> None:
    drawn = patterns.bigbird(seq_len, window, anchors, per_row, seed=5, block_size=size, heads=2, is_causal=is_causal)
    rows, columns = grid(seq_len, size)
    allowed = visible(seq_len, size) if is_causal else {(i, j) for i in rows for j in columns}
    base = between_columns(seq_len, size, lambda c, j: abs(c - j) <= window)
    base |= {(i, j) for i in rows for j in columns if i < anchors or j < anchors}
    base &= allowed
    free = counts(allowed - base, len(rows))
    for live in blocks_of(drawn, seq_len, size):
        assert base <= live <= allowed
        assert counts(live - base, len(rows)) == [min(per_row, there) for there in free]


RANDOM = [[0, 1, 3], [0, 1, 5], [1, 4, 7], [0, 4, 5], [1, 4, 6], [1, 4, 7], [0, 1, 6], [1, 5, 7]]
MOST = [[0, 1, 2], [1, 2, 3], [0, 2, 3], [0, 2, 3]]
BIGBIRD = [
    [[0, 1, 2, 3, 4, 5], [0, 1, 5], [0, 1, 2], [0, 2, 3], [0, 2, 4], [0, 1, 5]],
    [[0, 1, 2, 3, 4, 5], [0, 1, 3], [0, 2, 5], [0, 1, 3], [0, 2, 4], [0, 1, 5]],
]


def test_a_seed_draws_these_blocks_everywhere() -> None:
    # Written down once: another machine, another version of torch or another number of threads draws the same.
    def rows(drawn: tuple[Tensor, Tensor]) -> list[list[list[int]]]:
        indptr, indices = drawn
        return [[indices[start:stop].tolist() for start, stop in pairwise(head)] for head in indptr.tolist()]

    assert rows(patterns.random(8, 3, seed=1, block_size=1)) == [RANDOM]
    assert rows(patterns.random(4, 3, seed=1, block_size=1)) == [MOST]
    assert rows(patterns.bigbird(6, 0, 1, 1, seed=1, block_size=1, heads=2)) == BIGBIRD


def test_lots_are_their_own_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = patterns.random(400, 5, seed=2, block_size=2, heads=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = patterns.random(400, 5, seed=2, block_size=2, heads=2)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    other_seed = patterns.random(400, 5, seed=3, block_size=2, heads=2)
    assert not torch.equal(first[1], other_seed[1])


@pytest.mark.parametrize(
    "draw_heads",
    [
        lambda heads: patterns.random(400, 5, block_size=4, heads=heads),
        lambda heads: patterns.bigbird(400, 1, 1, 5, block_size=4, heads=heads),
        lambda heads: patterns.named("random", 400, 0.9, block_size=4, heads=heads),
    ],
    ids=["random", "bigbird", "named"],
)
def test_each_head_draws_its_own(draw_heads: Callable[[int], tuple[Tensor, Tensor]]) -> None:
    heads = blocks_of(draw_heads(4), 400, (4, 4))
    assert len({frozenset(live) for live in heads}) == 4


def test_lots_are_even() -> None:
    # 3 of 10 in 20,000 rows, drawn, and 7 of 10, left out: 6,000 and 14,000 expected, deviation 65.
    for wanted in (3, 7):
        _, number = draw(torch.full((20_000,), 10), torch.full((20_000,), wanted), seed=0)
        seen = torch.bincount(number, minlength=10)
        assert int(seen.sum()) == 20_000 * wanted
        assert int((seen - 2000 * wanted).abs().max()) < 5 * 65


def test_lots_mix_rows_that_draw_and_rows_that_leave_out() -> None:
    available = torch.tensor([0, 5, 9, 4, 100, 7, 1])
    wanted = torch.tensor([0, 5, 2, 3, 99, 0, 1])
    row, number = draw(available, wanted, seed=4)
    assert torch.bincount(row, minlength=7).tolist() == wanted.tolist()
    assert bool((number < available[row]).all())
    assert len(set(zip(row.tolist(), number.tolist(), strict=True))) == int(wanted.sum())


# ------------------------------------------------------------------------------------------------ by scores


def best(scores: list[float], k: int, limit: int) -> set[int]:
    order = sorted((j for j in range(min(limit, len(scores))) if scores[j] > -math.inf), key=lambda j: (-scores[j], j))
    return set(order[:k])


def score_tables(data: st.DataObject, heads: int, size: Size, seq_len: int) -> Tensor:
    rows, columns = (len(blocks) for blocks in grid(seq_len, size))
    entries = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0, 3.0])
    flat = data.draw(st.lists(entries, min_size=heads * rows * columns, max_size=heads * rows * columns))
    return torch.tensor(flat, dtype=torch.float32).reshape(heads, rows, columns)


@settings(max_examples=40)
@given(st.data(), st.integers(0, 14), st.sampled_from(SIZES[1:7]), st.integers(0, 6), st.booleans())
def test_topk_takes_the_best_and_of_equals_the_earlier(
    data: st.DataObject, seq_len: int, size: Size, k: int, is_causal: bool
) -> None:
    scores = score_tables(data, 2, size, seq_len)
    drawn = patterns.topk(scores, k, q_len=seq_len, kv_len=seq_len, block_size=size, is_causal=is_causal)
    assert drawn[2:] == (seq_len, seq_len)
    seen = visible(seq_len, size)
    for head, live in enumerate(blocks_of(drawn, seq_len, size)):
        expected = set()
        for row, own in enumerate(scores[head].tolist()):
            limit = sum(i == row for i, _ in seen) if is_causal else len(own)
            expected |= {(row, column) for column in best(own, k, limit)}
        assert live == expected


@settings(max_examples=40)
@given(st.data(), st.integers(0, 14), st.sampled_from(SIZES[1:7]), st.floats(0, 1), st.integers(0, 3), st.booleans())
def test_threshold_takes_the_fewest_that_hold_the_mass(
    data: st.DataObject, seq_len: int, size: Size, mass: float, minimum: int, is_causal: bool
) -> None:
    scores = score_tables(data, 1, size, seq_len)
    drawn = patterns.threshold(
        scores[0], mass, minimum=minimum, q_len=seq_len, kv_len=seq_len, block_size=size, is_causal=is_causal
    )
    (live,) = blocks_of(drawn, seq_len, size)
    seen = visible(seq_len, size)
    for row, own in enumerate(scores[0].tolist()):
        limit = sum(i == row for i, _ in seen) if is_causal else len(own)
        kept = {column for i, column in live if i == row}
        there = best(own, len(own), limit)
        assert kept == best(own, len(kept), limit)  # the best so many
        total = sum(math.exp(own[j]) for j in there)
        held = sum(math.exp(own[j]) for j in kept)
        assert len(kept) >= min(minimum, len(there))
        assert held >= (mass - 1e-9) * total
        if len(kept) > minimum:
            worst = min(math.exp(own[j]) for j in kept)
            assert held - worst <= (mass + 1e-9) * total


def test_the_whole_mass_is_every_column_above_minus_infinity() -> None:
    scores = torch.tensor([[0.0, -50.0, -math.inf, -800.0], [-math.inf] * 4])
    assert patterns.threshold(scores, 1).indices.tolist() == [0, 1, 3]
    assert patterns.threshold(scores, 0.0, minimum=0).indices.tolist() == []
    assert patterns.threshold(scores, 0.9).indptr.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_every_dtype_choose(dtype: torch.dtype) -> None:
    scores = torch.tensor([[1.0, 4.0, 2.0], [3.0, 3.0, 0.0]], dtype=dtype, requires_grad=True)
    chosen = patterns.topk(scores, 1, q_len=3, kv_len=5, block_size=2)
    assert (chosen.indices.tolist(), chosen.q_len, chosen.kv_len) == ([1, 0], 3, 5)
    assert patterns.threshold(scores, 0.5, block_size=2).indices.tolist() == [1, 0, 1]


# ------------------------------------------------------------------------------------------------ by sparsity ratio


@settings(max_examples=60)
@given(
    st.sampled_from(patterns.PATTERNS),
    st.integers(0, 400),
    st.sampled_from([(4, 4), (8, 8), (8, 4), (4, 8), (16, 4), (3, 5)]),
    st.floats(0.0, 0.98),
    st.booleans(),
)
def test_a_sparsity_ratio_is_met_within_one_block_a_row_or_what_came_is_said(
    pattern: str, seq_len: int, size: Size, ratio: float, is_causal: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drawn = patterns.named(pattern, seq_len, ratio, block_size=size, heads=2, seed=7, is_causal=is_causal)
    rows, columns = grid(seq_len, size)
    allowed = visible(seq_len, size) if is_causal else {(i, j) for i in rows for j in columns}
    wanted = (1 - ratio) * len(allowed)
    heads = blocks_of(drawn, seq_len, size)
    assert all(live <= allowed for live in heads)
    assert len(heads) == 2
    assert len(heads[0]) == len(heads[1])
    off = abs(len(heads[0]) - wanted)
    if caught:
        gave = 1 - len(heads[0]) / len(allowed)
        assert f"it leaves out {gave:.4g}" in str(caught[0].message)
        assert off > len(rows)
    else:
        assert off <= len(rows) + 1e-6


# 997 blocks: a strided row has about 2 * sqrt(2 * 997) = 89 of them at the fewest, so 0.9 is its limit.
MET = [
    (pattern, ratio)
    for pattern in patterns.PATTERNS
    for ratio in (0.0, 0.3, 0.5, 0.75, 0.9, 0.95)
    if pattern != "strided" or ratio <= 0.9
]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("pattern", "ratio"), MET)
def test_square_blocks_meet_the_ratio_without_a_warning(pattern: str, ratio: float, is_causal: bool) -> None:
    indptr, indices = patterns.named(pattern, 997, ratio, block_size=1, is_causal=is_causal)
    blocks = 997 * 998 // 2 if is_causal else 997 * 997
    assert abs(len(indices) - (1 - ratio) * blocks) <= 997
    assert int(indptr.diff().min()) >= 1  # no row is empty


def test_what_a_pattern_cannot_leave_out_is_said() -> None:
    with pytest.warns(UserWarning, match=r"'strided' cannot leave out 0.9 of 32 x 32 blocks .* it leaves out 0\.57"):
        BlockLayout.named("strided", 32, 0.9, block_size=1)


def test_a_named_pattern_is_of_its_kind() -> None:
    # 100 blocks, a tenth kept: 10 a row.
    def rows(pattern: str, row: int) -> list[int]:
        layout = BlockLayout.named(pattern, 100, 0.9, block_size=1)
        return layout.row(row)

    assert rows("local_window", 50) == list(range(45, 56))
    assert rows("dilated_sparse", 53) == list(range(3, 100, 10))
    assert rows("global_local", 0) == list(range(100))
    assert rows("global_local", 50)[:2] == [0, 1]
    assert rows("bigbird", 0) == list(range(100))
    assert len(rows("random", 50)) == 10


# ------------------------------------------------------------------------------------------------ BlockLayout


CONSTRUCTED = {
    "local": lambda n, **o: BlockLayout.local(n, 2, **o),
    "dilated": lambda n, **o: BlockLayout.dilated(n, 7, 3, **o),
    "global_": lambda n, **o: BlockLayout.global_(n, 2, [1], **o),
    "strided": lambda n, **o: BlockLayout.strided(n, 4, **o),
    "fixed": lambda n, **o: BlockLayout.fixed(n, 4, summary=2, **o),
    "hierarchical": lambda n, **o: BlockLayout.hierarchical(n, 1, branching=2, **o),
    "longnet": lambda n, **o: BlockLayout.longnet(n, [16, 64], [1, 5], **o),
    "random": lambda n, **o: BlockLayout.random(n, 3, seed=2, **o),
    "bigbird": lambda n, **o: BlockLayout.bigbird(n, 1, 1, 2, seed=2, **o),
    "full": BlockLayout.full,
    "empty": BlockLayout.empty,
    "named": lambda n, **o: BlockLayout.named("local_window", n, 0.5, **o),
}


@pytest.mark.parametrize("size", [(4, 4), (8, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("name", CONSTRUCTED)
def test_a_constructor_gives_the_layout_of_its_pattern(name: str, size: Size) -> None:
    layout = CONSTRUCTED[name](75, block_size=size, heads=2)
    assert isinstance(layout, BlockLayout)
    assert (layout.q_len, layout.kv_len, layout.block_size, layout.heads) == (75, 75, size, 2)
    assert layout.validate() is layout
    heads = blocks_of((layout.indptr, layout.indices), 75, size)
    seen = visible(75, size)
    causal = layout.causal()
    assert blocks_of((causal.indptr, causal.indices), 75, size) == [live & seen for live in heads]


@pytest.mark.parametrize(
    "draw_causal",
    [
        lambda **o: BlockLayout.random(75, 3, seed=2, block_size=(4, 6), heads=2, **o),
        lambda **o: BlockLayout.bigbird(75, 1, 1, 2, seed=2, block_size=(4, 6), heads=2, **o),
        lambda **o: BlockLayout.named("strided", 75, 0.3, block_size=(4, 6), heads=2, **o),
    ],
    ids=["random", "bigbird", "named"],
)
def test_what_is_drawn_causal_has_nothing_that_causal_would_drop(draw_causal: Callable[..., BlockLayout]) -> None:
    layout = draw_causal(is_causal=True)
    assert layout.causal() == layout
    assert layout != draw_causal(is_causal=False)


def test_a_causal_topk_layout_has_nothing_that_causal_would_drop() -> None:
    scores = torch.randn(3, 10, 5, generator=torch.Generator().manual_seed(1))
    for layout in (
        BlockLayout.topk(scores, 3, q_len=39, kv_len=39, block_size=(4, 8), is_causal=True),
        BlockLayout.threshold(scores, 0.8, q_len=39, kv_len=39, block_size=(4, 8), is_causal=True),
    ):
        assert layout.heads == 3
        assert layout.causal() == layout
        assert int(layout.indptr.diff().min()) >= 1


def test_a_million_tokens_take_few_bytes() -> None:
    layout = BlockLayout.local(1 << 20, 4) | BlockLayout.global_(1 << 20, 2, 1)
    assert layout.q_blocks == 8192
    assert layout.row(0)[-1] == 8191
    assert layout.row(5000) == [0, 1, *range(4996, 5005)]
    assert layout.indices.nbytes + layout.indptr.nbytes < 1 << 20


IMPORTS = """
import sys

for room in ("patterns", "layout.constructors", "layout"):
    __import__(f"dilated_block_sparse.{room}")
    for name in [name for name in sys.modules if name.startswith("dilated_block_sparse")]:
        del sys.modules[name]
"""


def test_each_room_can_be_imported_first() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_benchmark_runs_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(Path(__file__).parents[1] / "benchmarks" / "bench_layouts.py")
    options = ["--patterns", "bigbird", "--quick", "--output", str(tmp_path)]
    for device, written in (("cuda", False), ("cpu", True)):
        monkeypatch.setattr(sys, "argv", [script, *options, "--device", device])
        runpy.run_path(script, run_name="__main__")  # it measures in processes of its own
        assert ("nothing to do on cuda" in capsys.readouterr().out) != written
        assert (tmp_path / "block_sparse_layouts.json").exists() == written
    (row,) = json.loads((tmp_path / "block_sparse_layouts.json").read_text())["layouts"]
    assert (row["pattern"], row["tokens"], row["q_blocks"]) == ("bigbird", 16384, 128)
    assert row["bytes"] == 4 * row["live"] + 8 * 129
    assert (tmp_path / "block_sparse_layouts.md").read_text().count("\n| bigbird |") == 1


# ------------------------------------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: patterns.local(-1, 1), ValueError, "seq_len: expected an int of at least 0, got -1"),
        (lambda: patterns.local(8, -1), ValueError, "window: expected an int of at least 0, got -1"),
        (lambda: patterns.local(8, 1.5), TypeError, "window: expected an int of at least 0, got 1.5 of type float"),
        (lambda: patterns.local(8, 1, heads=0), ValueError, "heads: expected a positive int, got 0"),
        (lambda: patterns.full(8, block_size=0), ValueError, "block_size: expected a positive int, got 0"),
        (lambda: patterns.dilated(8, 0, 1), ValueError, "segment: expected a positive int, got 0"),
        (lambda: patterns.dilated(8, 1, 0), ValueError, "rate: expected a positive int, got 0"),
        (lambda: patterns.strided(8, 0), ValueError, "stride: expected a positive int, got 0"),
        (lambda: patterns.fixed(8, 2, summary=3), ValueError, "summary: expected at most stride = 2, got 3"),
        (lambda: patterns.global_(8, "1", 0), TypeError, "cols: expected an int or a sequence of ints, got '1'"),
        (lambda: patterns.global_(8, 0, torch.arange(2)), TypeError, "rows: .* of type Tensor"),
        (lambda: patterns.global_(8, -1, 0), ValueError, "cols: expected an int of at least 0, got -1"),
        (lambda: patterns.global_(8, 0, [0, 1]), ValueError, r"rows\[1\]: expected an int from 0 to 0, got 1"),
        (lambda: patterns.hierarchical(8, 0), ValueError, "window: expected a positive int, got 0"),
        (
            lambda: patterns.hierarchical(8, 1, branching=1),
            ValueError,
            "branching: expected an int of at least 2, got 1",
        ),
        (lambda: patterns.hierarchical(8, 1, levels=-1), ValueError, "levels: expected an int of at least 0, got -1"),
        (lambda: patterns.longnet(8, [4], [1, 2]), ValueError, "expected one rate a segment length"),
        (lambda: patterns.random(8, -1), ValueError, "blocks_per_row: expected an int of at least 0, got -1"),
        (lambda: patterns.random(8, 1, seed=-1), ValueError, "seed: expected an int of at least 0, got -1"),
        (lambda: patterns.random(8, 1, is_causal=1), TypeError, "is_causal: expected a bool, got 1 of type int"),
        (lambda: patterns.bigbird(8, 1, -1, 1), ValueError, "global_blocks: expected an int of at least 0, got -1"),
        (lambda: patterns.named("ring", 8, 0.5), ValueError, "pattern: expected one of .*'strided'.*, got 'ring'"),
        (lambda: patterns.named("random", 8, 1.0), ValueError, r"sparsity_ratio: expected .* \[0, 1\), got 1.0"),
        (lambda: patterns.topk([[1.0]], 1), TypeError, "scores: expected a floating point tensor, got list"),
        (lambda: patterns.topk(torch.ones(2, 2, dtype=torch.int64), 1), TypeError, "scores: .* got torch.int64"),
        (lambda: patterns.topk(torch.ones(2), 1), ValueError, r"scores: expected shape .*, got \(2,\)"),
        (lambda: patterns.topk(torch.ones(0, 2, 2), 1), ValueError, r"scores: .* at least one head, got \(0, 2, 2\)"),
        (lambda: patterns.topk(torch.ones(2, 2), -1), ValueError, "k: expected an int of at least 0, got -1"),
        (
            lambda: patterns.topk(torch.ones(2, 2), 1, q_len=128),
            ValueError,
            "q_len: expected a length of 2 blocks of 128",
        ),
        (lambda: patterns.topk(torch.ones(2, 2), 1, kv_len=257), ValueError, "kv_len: .* 2 blocks of 128, .* got 257"),
        (lambda: patterns.topk(torch.ones(2, 3), 1, is_causal=True), ValueError, "is_causal: expected q_len == kv_len"),
        (
            lambda: patterns.topk(torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), 1),
            ValueError,
            "scores: expected numbers, got NaN in column 0 of row 1 of head 0",
        ),
        (lambda: patterns.threshold(torch.ones(2, 2), 1.5), ValueError, "mass: .* got 1.5"),
        (lambda: patterns.threshold(torch.ones(2, 2), True), TypeError, "mass: .* got True of type bool"),
        (lambda: patterns.threshold(torch.ones(2, 2), 0.5, minimum=-1), ValueError, "minimum: .* got -1"),
        (lambda: patterns.threshold(torch.full((1, 1), math.inf), 0.5), ValueError, r"scores: .* got \+inf"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
