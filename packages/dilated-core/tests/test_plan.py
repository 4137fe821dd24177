"""The plan: every place of every branch in exactly one tile, for whole tensors and for slices of heads."""

from __future__ import annotations

from collections import Counter

import torch
from core_cases import Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_core.plan import make_tiles


@settings(max_examples=150)
@given(case=cases(), first_head=st.integers(0, 20))
def test_tiles_hold_each_place_of_each_branch_once(case: Case, first_head: int) -> None:
    """Write every tile's places through its own view, and count them against the definition."""
    for w, r in zip(case.segment_lengths, case.dilation_rates, strict=True):
        count = torch.zeros(1, case.seq, case.heads, dtype=torch.int64)
        for tile in make_tiles((w,), (r,), case.seq, case.heads, first_head):
            tile.view(count).add_(1)
        position, head = torch.arange(case.seq)[:, None], torch.arange(case.heads)[None, :]
        expected = (position % w) % r == (head + first_head) % r
        assert torch.equal(count[0], expected.long())


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
