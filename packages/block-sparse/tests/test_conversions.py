"""Layouts from and to other forms: each way round gives the same layout, and what cannot be one is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_algebra import Sizes, layout_of, layouts
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.layout.block_mask import BLOCK_MASK_LIMIT, BYTES_A_BLOCK, BlockTable

RAGGED = Sizes(20, 30, (4, 7))


@settings(max_examples=60)
@given(layouts())
def test_every_way_round_gives_the_layout_back(one: tuple[BlockLayout]) -> None:
    (layout,) = one
    sizes: dict[str, Any] = {"block_size": layout.block_size}
    lengths = (layout.q_len, layout.kv_len)
    rows = [[layout.row(block, head)[::-1] for block in range(layout.q_blocks)] for head in range(layout.heads)]
    assert BlockLayout.from_rows(rows, *lengths, **sizes) == layout
    assert BlockLayout.from_dense(layout.to_dense(), **sizes) == layout
    assert BlockLayout.from_blocks(layout.to_blocks(), *lengths, **sizes) == layout
    assert BlockLayout.from_lists(*layout.to_lists(), *lengths, **sizes) == layout
    whole = layout.head(0).kv_slice(0, layout.kv_len // layout.block_size[1] * layout.block_size[1])
    assert BlockLayout.from_bsr(*whole.to_bsr(), whole.q_len, whole.kv_len, **sizes) == whole


# ------------------------------------------------------------------------------------------------ rows and bool tables


def test_rows_come_in_any_order_and_kind() -> None:
    expected = BlockLayout.from_rows([[0, 3], [1, 2], []], 12, 30, block_size=(4, 7))
    others: list[Any] = [
        [{3, 0}, range(1, 3), iter(())],
        [(3, 0), (column for column in (2, 1)), []],
        [torch.tensor([3, 0]), [torch.tensor(2), torch.tensor(1)], torch.tensor([], dtype=torch.int64)],
        [[[3, 0], [2, 1], []]],
        [(torch.tensor([3, 0]), [2, 1], [])],
    ]
    for rows in others:
        assert BlockLayout.from_rows(rows, 12, 30, block_size=(4, 7)) == expected


def test_rows_of_several_heads() -> None:
    layout = BlockLayout.from_rows([[[0], []], [[], [1]]], 8, 8, block_size=4)
    assert torch.equal(layout.to_blocks().int(), torch.tensor([[[1, 0], [0, 0]], [[0, 0], [0, 1]]], dtype=torch.int32))
    assert BlockLayout.from_rows([[], []], 0, 8, block_size=4).heads == 2


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([[0], [1]], ValueError, "rows: expected 3 rows of blocks in head 0, got 2"),
        ([[[0], [1], []], [[0]]], ValueError, "rows: expected 3 rows of blocks in head 1, got 1"),
        ([[0], [2, 2], []], ValueError, "row 1 of head 0: expected columns that rise, got 2 before 2"),
        ([[0], [], [5]], ValueError, "row 2 of head 0: expected columns from 0 to 4, got 5"),
        ([[0], [], [-1]], ValueError, "row 2 of head 0: expected columns from 0 to 4, got -1"),
        ([0, 1, 2], TypeError, "rows: expected an iterable of columns, got 0 of type int"),
        ([[0], ["1"], []], TypeError, "rows: row 1 of head 0: expected an int as column, got '1'"),
        ([[0], [1.0], []], TypeError, "rows: row 1 of head 0: expected an int as column, got 1.0"),
    ],
)
def test_bad_rows_are_refused(rows: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        BlockLayout.from_rows(rows, 12, 30, block_size=(4, 7))


def test_the_token_mask_repeats_the_blocks() -> None:
    layout = layout_of(RAGGED, 2, 0.5, 0)
    blocks, dense = layout.to_blocks(), layout.to_dense()
    assert dense.shape == (2, 20, 30)
    for query in range(20):
        for key in range(30):
            assert torch.equal(dense[:, query, key], blocks[:, query // 4, key // 7])


def test_a_table_without_heads_is_one_that_all_share() -> None:
    layout = layout_of(RAGGED, 1, 0.5, 0)
    assert BlockLayout.from_dense(layout.to_dense()[0], block_size=(4, 7)) == layout
    assert BlockLayout.from_dense(layout.to_dense().transpose(1, 2)[0], block_size=(7, 4)) == layout.T
    assert BlockLayout.from_blocks(layout.to_blocks()[0], 20, 30, block_size=(4, 7)) == layout


def test_a_token_mask_with_a_block_live_in_part_is_refused() -> None:
    dense = layout_of(RAGGED, 2, 0.5, 0).to_dense()
    dense[1, 17, 29] ^= True  # in the last block of columns, two tokens wide
    with pytest.raises(ValueError, match=r"mask: .* got both in block \(4, 4\) of head 1"):
        BlockLayout.from_dense(dense, block_size=(4, 7))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: BlockLayout.from_dense(torch.ones(4, 4)),
            TypeError,
            "mask: expected a bool tensor, got torch.float32",
        ),
        (lambda: BlockLayout.from_dense([[True]]), TypeError, "mask: expected a bool tensor, got list"),
        (lambda: BlockLayout.from_dense(torch.ones(4) > 0), ValueError, r"mask: expected shape \(q_len, kv_len\) or"),
        (lambda: BlockLayout.from_blocks(torch.ones(0, 2, 2) > 0, 8, 8), ValueError, r"blocks: .* got \(0, 2, 2\)"),
        (
            lambda: BlockLayout.from_blocks(torch.ones(2, 2) > 0, 9, 8, block_size=4),
            ValueError,
            r"blocks: expected \(q_blocks, kv_blocks\) = \(3, 2\) for q_len=9, .* got \(2, 2\)",
        ),
    ],
)
def test_bad_tables_are_refused(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


# ------------------------------------------------------------------------------------------------ FlexAttention


def masked_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """(batch, heads, seq, head_dim) as FlexAttention's, in float64; a row that sees nothing gives 0."""
    scores = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.nan_to_num(0.0) @ value.double()


def flex_equals_dense(attention: Any, layout: BlockLayout, is_causal: bool) -> None:
    heads = max(layout.heads, 2)
    query = torch.randn(2, heads, layout.q_len, 16)
    key, value = torch.randn(2, 2, heads, layout.kv_len, 16).unbind()
    mask = layout.to_dense()
    if is_causal:
        mask = mask & torch.ones_like(mask).tril()
    out = attention(query, key, value, block_mask=layout.to_block_mask(is_causal=is_causal))
    torch.testing.assert_close(out.double(), masked_dense(query, key, value, mask), rtol=1e-5, atol=1e-5)


FLEX = {
    "ragged": (Sizes(37, 50, (8, 16)), 2, False),
    "causal": (Sizes(48, 48, (16, 16)), 1, True),
    "causal ragged rectangular": (Sizes(45, 45, (8, 16)), 3, True),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", FLEX)
def test_eager_flex_attention_over_the_block_mask_equals_masked_dense(name: str) -> None:
    sizes, heads, is_causal = FLEX[name]
    layout = layout_of(sizes, heads, 0.4, 3)
    assert (~layout.to_dense().any(2)).any()  # rows that see nothing are among them
    flex_equals_dense(flex_attention, layout, is_causal)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_flex_attention_over_the_block_mask_equals_masked_dense_and_compiles_once() -> None:
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            flex_equals_dense(compiled, layout_of(Sizes(300, 300, (128, 64)), 2, 0.5, seed), True)


@settings(max_examples=30)
@given(layouts(square=True), st.booleans())
def test_the_block_mask_is_what_create_block_mask_makes_of_its_function(
    one: tuple[BlockLayout], is_causal: bool
) -> None:
    (layout,) = one
    if not layout.q_len:
        return
    mask = layout.to_block_mask(is_causal=is_causal)
    made = create_block_mask(
        mask.mask_mod, 1, layout.heads, layout.q_len, layout.kv_len, device="cpu", BLOCK_SIZE=layout.block_size
    )
    assert mask.seq_lengths == made.seq_lengths
    assert torch.equal(mask.to_dense(), made.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(made, name)), name
    assert mask.kv_indices.shape == mask.full_kv_indices.shape
    assert mask.kv_indices.stride() == mask.full_kv_indices.stride()


@settings(max_examples=30)
@given(layouts(square=True))
def test_block_masks_of_ours_give_the_layout_back(one: tuple[BlockLayout]) -> None:
    (layout,) = one
    assert BlockLayout.from_block_mask(layout.to_block_mask()) == layout
    assert BlockLayout.from_block_mask(layout.to_block_mask(is_causal=True)) == layout.causal()


def test_a_foreign_block_mask_of_full_blocks_is_read_and_one_with_partial_blocks_refused() -> None:
    whole = create_block_mask(lambda b, h, q, k: (q // 16) >= (k // 16), 1, 3, 64, 48, device="cpu", BLOCK_SIZE=16)
    layout = BlockLayout.from_block_mask(whole)
    assert (layout.q_len, layout.kv_len, layout.block_size, layout.heads) == (64, 48, (16, 16), 3)
    assert [layout.row(block, head=2) for block in range(4)] == [[0], [0, 1], [0, 1, 2], [0, 1, 2]]
    window = create_block_mask(lambda b, h, q, k: (q < 16) | (q >= k), 1, 2, 64, 64, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(ValueError, match=r"mask: expected no block that is live in part, got block \(1, 1\) of head 0"):
        BlockLayout.from_block_mask(window)


def test_block_masks_that_are_no_layout_are_refused() -> None:
    with pytest.raises(TypeError, match="mask: expected a BlockMask, got str"):
        BlockLayout.from_block_mask("mask")  # type: ignore[arg-type]
    two = create_block_mask(lambda b, h, q, k: q >= 0, 2, 1, 32, 32, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(ValueError, match=r"mask: expected a batch of 1, got lists of shape \(2, 1, 2\)"):
        BlockLayout.from_block_mask(two)
    ours = layout_of(Sizes(32, 32, (16, 16)), 1, 1.0, 0).to_block_mask()
    longer = BlockMask.from_kv_blocks(
        ours.kv_num_blocks,
        ours.kv_indices,
        ours.full_kv_num_blocks,
        ours.full_kv_indices,
        BLOCK_SIZE=16,
        mask_mod=ours.mask_mod,
        seq_lengths=(64, 32),
    )
    with pytest.raises(ValueError, match="mask: expected 4 rows of blocks of 16 for q_len=64, got 2"):
        BlockLayout.from_block_mask(longer)


def test_a_block_mask_always_looks_its_blocks_up() -> None:
    layout = layout_of(RAGGED, 2, 0.5, 0)
    table = layout.to_block_mask().mask_mod
    assert isinstance(table, BlockTable)
    head, query, key = torch.meshgrid(torch.arange(2), torch.arange(20), torch.arange(30), indexing="ij")
    assert torch.equal(table(torch.zeros_like(head), head, query, key), layout.to_dense())


def test_a_block_mask_above_the_byte_limit_is_refused_before_it_is_built() -> None:
    blocks = 65536
    long = BlockLayout(torch.arange(blocks + 1), torch.arange(blocks), blocks, blocks, block_size=1)
    size = BYTES_A_BLOCK * blocks * blocks
    with pytest.raises(ValueError, match=f"to_block_mask: expected at most {BLOCK_MASK_LIMIT} bytes, got {size}"):
        long.to_block_mask()


def test_the_byte_limit_counts_what_a_block_mask_keeps() -> None:
    layout = layout_of(Sizes(60, 70, (4, 7)), 2, 0.5, 0)
    mask = layout.to_block_mask()
    lists = (mask.kv_indices, mask.full_kv_indices, mask.q_indices, mask.full_q_indices, mask.mask_mod.blocks)
    assert sum(tensor.nbytes for tensor in lists) == BYTES_A_BLOCK * 2 * 15 * 10


def test_bad_options_of_a_block_mask_are_refused() -> None:
    with pytest.raises(ValueError, match="causal: expected q_len == kv_len"):
        layout_of(RAGGED, 1, 0.5, 0).to_block_mask(is_causal=True)
    with pytest.raises(TypeError, match="is_causal: expected a bool"):
        layout_of(RAGGED, 1, 0.5, 0).to_block_mask(is_causal=1)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ flash kernels


def test_bsr_is_what_scipy_and_flashinfer_call_so() -> None:
    # The example of FlashInfer's manual: [[0, 0, 1], [1, 0, 1], [0, 1, 1]].
    layout = BlockLayout.from_rows([[2], [0, 2], [1, 2]], 6, 9, block_size=(2, 3))
    indptr, indices = layout.to_bsr()
    assert (indptr.dtype, indices.dtype) == (torch.int32, torch.int32)
    assert (indptr.tolist(), indices.tolist()) == ([0, 1, 3, 5], [2, 0, 2, 1, 2])
    indices.zero_()
    assert layout.row(0) == [2]


def test_bsr_in_any_order_is_read() -> None:
    indptr, indices = torch.tensor([0, 1, 3, 5]), torch.tensor([2, 2, 0, 2, 1])
    layout = BlockLayout.from_bsr(indptr, indices, 6, 9, block_size=(2, 3))
    assert [layout.row(block) for block in range(3)] == [[2], [0, 2], [1, 2]]


def test_lists_hold_the_columns_of_every_row() -> None:
    layout = BlockLayout.from_rows([[[], [1, 3]], [[0], [0, 1, 2]]], 8, 16, block_size=4)
    counts, columns = layout.to_lists()
    assert (counts.dtype, columns.dtype) == (torch.int32, torch.int32)
    assert counts.tolist() == [[[0, 2], [1, 3]]]
    assert columns.tolist() == [[[[0, 0, 0], [1, 3, 0]], [[0, 0, 0], [0, 1, 2]]]]


def test_lists_in_any_order_and_with_anything_past_the_count_are_read() -> None:
    counts = torch.tensor([[[2, 0]]])
    columns = torch.tensor([[[[3, 1, 99], [-5, 7, 7]]]])
    assert BlockLayout.from_lists(counts, columns, 8, 16, block_size=4).row(0) == [1, 3]


def test_lists_of_no_live_block_are_one_wide() -> None:
    counts, columns = layout_of(RAGGED, 2, 0.0, 0).to_lists()
    assert (int(counts.sum()), columns.shape) == (0, (1, 2, 5, 1))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: layout_of(RAGGED, 2, 0.5, 0).to_bsr(), ValueError, "to_bsr: .* all heads share, got one of 2 heads"),
        (
            lambda: layout_of(RAGGED, 1, 0.5, 0).to_bsr(),
            ValueError,
            "to_bsr: expected kv_len to be a multiple of the 7 tokens of a block, got 30",
        ),
        (lambda: BlockLayout.from_bsr(ones(3), ones(1), 8, 8), ValueError, r"indptr: .* \(heads, 2\), got \(1, 3\)"),
        (lambda: BlockLayout.from_bsr(ones(2), ones(1), 8, 8), ValueError, "indptr: expected head 0 to start at 0"),
        (lambda: BlockLayout.from_bsr(ones(2), ones(1, 1), 8, 8), ValueError, r"\(live blocks,\), got \(1, 1\)"),
        (
            lambda: BlockLayout.from_bsr(torch.tensor([0, 2]), ones(2), 8, 8, block_size=(8, 4)),
            ValueError,
            "row 0 of head 0: expected columns that rise, got 1 before 1",
        ),
        (lambda: BlockLayout.from_lists(ones(1, 1), ones(1, 1, 1, 1), 8, 8), ValueError, r"counts: .* \(1, heads, 1\)"),
        (
            lambda: BlockLayout.from_lists(ones(2, 1, 1), ones(2, 1, 1, 1), 8, 8),
            ValueError,
            r"counts: .* got \(2, 1, 1\)",
        ),
        (lambda: BlockLayout.from_lists(ones(1, 1, 1), ones(1, 1, 1), 8, 8), ValueError, "columns: expected shape"),
        (
            lambda: BlockLayout.from_lists(ones(1, 1, 1), ones(1, 2, 1, 1), 8, 8),
            ValueError,
            r"counts: expected counts for the \(1, 2, 1\) lists of columns, got \(1, 1, 1\)",
        ),
        (
            lambda: BlockLayout.from_lists(2 * ones(1, 1, 1), ones(1, 1, 1, 1), 8, 8),
            ValueError,
            "counts: expected counts from 0 to 1, got 2",
        ),
        (
            lambda: BlockLayout.from_lists(ones(1, 1, 1), ones(1, 1, 1, 1), 8, 8),
            ValueError,
            "row 0 of head 0: expected columns from 0 to 0, got 1",
        ),
        (
            lambda: BlockLayout.from_lists(torch.ones(1, 1, 1), ones(1, 1, 1, 1), 8, 8),
            TypeError,
            "got dtype torch.float32",
        ),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
