"""The plan: every place of every branch in exactly one tile, for whole tensors and for slices of heads."""

from __future__ import annotations

from collections import Counter

import torch
from core_cases import Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_core.plan import SEMANTICS, head_phases, make_tiles


@settings(max_examples=150)
@given(
    case=cases(),
    semantics=st.sampled_from(SEMANTICS),
    first=st.integers(0, 8),
    step=st.integers(1, 4),
    branch=st.integers(0, 3),
)
def test_tiles_hold_each_place_of_each_branch_once(
    case: Case, semantics: str, first: int, step: int, branch: int
) -> None:
    """Write every tile's places through its own view, and count them against the definition."""
    lengths, rates = case.segment_lengths, case.dilation_rates
    chosen = range(first % case.heads, case.heads, step)
    if semantics == "torchscale":
        lengths = tuple(r * -(-w // r) for w, r in zip(lengths, rates, strict=True))
    count = torch.zeros(1, case.seq, len(chosen), dtype=torch.int64)
    for tile in make_tiles(lengths, rates, case.seq, case.heads, semantics=semantics, chosen=chosen):
        tile.view(count).add_(1)
    expected = torch.zeros_like(count)
    for index, (w, r) in enumerate(zip(lengths, rates, strict=True)):
        for at, head in enumerate(chosen):
            phase = head_phases(semantics, index, len(rates), r, case.heads)[head]
            if phase is not None:
                expected[0, :, at] += (torch.arange(case.seq) % w) % r == phase
    assert torch.equal(count, expected)


def test_head_phases_by_hand() -> None:
    assert head_phases("paper", 1, 2, 4, 6) == (0, 1, 2, 3, 0, 1)
    assert head_phases("torchscale", 1, 2, 4, 6) == (0, 0, 1, 1, 2, 2)
    assert head_phases("grouped", 0, 4, 2, 6) == (0, 0, None, None, None, None)
    assert head_phases("grouped", 1, 4, 2, 6) == (None, None, 1, 1, None, None)
    assert head_phases("grouped", 2, 4, 2, 6) == (None, None, None, None, 0, None)


def test_torchscale_counts_its_zero_keys() -> None:
    """11 tokens in segments of 8 at rate 4: padded to 16, so every row meets 2 keys, and the last ones 1 or 2 zeros."""
    tiles = make_tiles((8,), (4,), seq_len=11, heads=4, semantics="torchscale")
    assert [(tile.start, tile.rows, tile.phases, tile.phantoms) for tile in tiles] == [(0, 2, 4, 0), (8, 1, 3, 1)]
    causal = make_tiles((8,), (4,), seq_len=11, heads=4, semantics="torchscale", is_causal=True)
    assert {tile.phantoms for tile in causal} == {0}


@settings(max_examples=60)
@given(case=cases())
def test_rows_of_a_tile_share_segment_head_and_phase(case: Case) -> None:
    position = torch.arange(case.seq)[None, :, None].expand(1, case.seq, case.heads).contiguous()
    head = torch.arange(case.heads).expand(1, case.seq, case.heads).contiguous()
    for w, r in zip(case.segment_lengths, case.dilation_rates, strict=True):
        for tile in make_tiles((w,), (r,), case.seq, case.heads):
            for view in (tile.view(position) // w, tile.view(head), (tile.view(position) % w) % r):
                assert (view == view[..., :1]).all()
            assert (tile.view(position).diff(dim=-1) == r).all()


def test_few_tiles_however_long() -> None:
    """A plan's size depends on the pattern, not on the length."""
    pattern = ((1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16))
    sizes = Counter(len(make_tiles(*pattern, seq_len=n, heads=16)) for n in (10_000, 100_000, 1_000_003))
    assert max(sizes) <= 20


def test_part_cuts_along_segments() -> None:
    (tile,) = make_tiles((4,), (2,), seq_len=16, heads=2)
    tensor = torch.arange(32).view(1, 16, 2)
    assert torch.equal(tile.part(1, 3).view(tensor), tile.view(tensor)[:, 1:3])
