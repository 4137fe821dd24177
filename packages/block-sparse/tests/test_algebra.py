"""The algebra of layouts, against bool tables and by its laws."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.layout.algebra import bytes_of, pairs


class Sizes(NamedTuple):
    q_len: int
    kv_len: int
    block_size: tuple[int, int]

    @property
    def blocks(self) -> tuple[int, int]:
        return -(-self.q_len // self.block_size[0]), -(-self.kv_len // self.block_size[1])


def layout_of(sizes: Sizes, heads: int, share: float, seed: int) -> BlockLayout:
    table = torch.rand(heads, *sizes.blocks, generator=torch.Generator().manual_seed(seed)) < share
    return BlockLayout.from_blocks(table, sizes.q_len, sizes.kv_len, block_size=sizes.block_size)


@st.composite
def layouts(draw: st.DrawFn, number: int = 1, square: bool = False) -> tuple[BlockLayout, ...]:
    q_len = draw(st.integers(0, 40))
    kv_len = q_len if square else draw(st.integers(0, 40))
    sizes = Sizes(q_len, kv_len, (draw(st.integers(1, 9)), draw(st.integers(1, 9))))
    heads = draw(st.integers(1, 3))
    return tuple(
        layout_of(
            sizes,
            draw(st.sampled_from([1, heads])),
            draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])),
            draw(st.integers(0, 2**16)),
        )
        for _ in range(number)
    )


def expanded(layout: BlockLayout, heads: int) -> BlockLayout:
    return layout if layout.heads == heads else BlockLayout.stack([layout] * heads)


# ------------------------------------------------------------------------------------------------ sets


@settings(max_examples=60)
@given(layouts(2))
def test_set_operations_equal_those_of_bool_tables(pair: tuple[BlockLayout, BlockLayout]) -> None:
    first, second = pair
    one, two = first.to_blocks(), second.to_blocks()
    assert torch.equal((first | second).to_blocks(), one | two)
    assert torch.equal((first & second).to_blocks(), one & two)
    assert torch.equal((first - second).to_blocks(), one & ~two)
    assert (first | second).validate().heads == max(first.heads, second.heads)


@settings(max_examples=60)
@given(layouts(3))
def test_laws_of_sets(three: tuple[BlockLayout, BlockLayout, BlockLayout]) -> None:
    one, two, three_ = three
    assert one | two == two | one
    assert one & two == two & one
    assert (one | two) | three_ == one | (two | three_)
    assert (one & two) & three_ == one & (two & three_)
    assert one & (two | three_) == (one & two) | (one & three_)
    assert one | (two & three_) == (one | two) & (one | three_)
    assert one - (two | three_) == (one - two) & (one - three_)
    assert one - (two & three_) == (one - two) | (one - three_)
    assert one | one == one & one == one
    assert (one - one).live == 0
    assert one | (one & two) == expanded(one, max(one.heads, two.heads))


def test_a_shared_layout_meets_one_a_head_on_either_side() -> None:
    sizes = Sizes(20, 30, (4, 7))
    shared, own = layout_of(sizes, 1, 0.4, 0), layout_of(sizes, 3, 0.4, 1)
    for head in range(3):
        assert (shared | own).head(head) == (own | shared).head(head) == shared | own.head(head)
        assert (shared - own).head(head) == shared - own.head(head)
        assert (own - shared).head(head) == own.head(head) - shared


@pytest.mark.parametrize("name", ["|", "&", "-"])
@pytest.mark.parametrize(
    ("sizes", "heads", "message"),
    [
        (Sizes(21, 30, (4, 7)), 2, r"expected layouts of the same sizes, got \(q_len=20.* and \(q_len=21"),
        (Sizes(20, 29, (4, 7)), 2, r"got \(q_len=20, kv_len=30.* and \(q_len=20, kv_len=29"),
        (Sizes(20, 30, (5, 7)), 2, r"block_size=\(4, 7\)\) and .*block_size=\(5, 7\)"),
        (Sizes(20, 30, (4, 7)), 3, "same heads, or one of 1, got 2 and 3 heads"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(name: str, sizes: Sizes, heads: int, message: str) -> None:
    operations: dict[str, Callable[[Any, Any], Any]] = {
        "|": lambda one, two: one | two,
        "&": lambda one, two: one & two,
        "-": lambda one, two: one - two,
    }
    first, second = layout_of(Sizes(20, 30, (4, 7)), 2, 0.5, 0), layout_of(sizes, heads, 0.5, 0)
    with pytest.raises(ValueError, match=message):
        operations[name](first, second)
    with pytest.raises(TypeError, match="expected a BlockLayout on both sides, got Tensor"):
        operations[name](first, first.to_blocks())


# ------------------------------------------------------------------------------------------------ causal


@settings(max_examples=60)
@given(layouts(2, square=True))
def test_causal_keeps_the_blocks_with_a_pair_in_order(pair: tuple[BlockLayout, BlockLayout]) -> None:
    layout, other = pair
    seq = layout.q_len
    order = torch.ones(seq, seq, dtype=torch.bool).tril()
    # A causal layout attends what the layout attends in order, and no block of it is without such a pair.
    causal = layout.causal()
    assert torch.equal(causal.to_dense() & order, layout.to_dense() & order)
    if causal.live:
        heads, rows, columns = causal.to_blocks().nonzero(as_tuple=True)
        high, wide = layout.block_size
        for head, row, column in zip(heads.tolist(), rows.tolist(), columns.tolist(), strict=True):
            tokens = (causal.to_dense()[head] & order)[
                row * high : (row + 1) * high, column * wide : (column + 1) * wide
            ]
            assert tokens.any()
    assert causal.causal() == causal
    assert (layout | other).causal() == causal | other.causal()
    assert (layout & other).causal() == causal & other.causal()
    assert (layout - other).causal() == causal - other


def test_causal_of_rectangular_blocks_keeps_those_the_diagonal_crosses() -> None:
    full = BlockLayout.from_blocks(torch.ones(3, 4, dtype=torch.bool), 11, 11, block_size=(4, 3))
    assert [full.causal().row(block) for block in range(3)] == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_causal_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="causal: expected q_len == kv_len, got 20 and 30"):
        layout_of(Sizes(20, 30, (4, 7)), 1, 0.5, 0).causal()


# ------------------------------------------------------------------------------------------------ transpose, slices


@settings(max_examples=60)
@given(layouts(2))
def test_transpose_exchanges_rows_and_columns(pair: tuple[BlockLayout, BlockLayout]) -> None:
    layout, other = pair
    assert layout == layout.T.T
    assert layout.T is layout.T  # kept
    assert torch.equal(layout.T.validate().to_dense(), layout.to_dense().transpose(1, 2))
    assert layout.T.block_size == layout.block_size[::-1]
    assert (layout | other).T == layout.T | other.T
    assert (layout - other).T == layout.T - other.T


@settings(max_examples=60)
@given(layouts(), st.data())
def test_slices_are_slices_of_the_token_mask(one: tuple[BlockLayout], data: st.DataObject) -> None:
    (layout,) = one
    dense = layout.to_dense()
    edges = [*range(0, layout.q_len, layout.block_size[0]), layout.q_len]
    start, stop = sorted((data.draw(st.sampled_from(edges)), data.draw(st.sampled_from(edges))))
    part = layout.q_slice(start, stop)
    assert (part.q_len, part.kv_len, part.heads) == (stop - start, layout.kv_len, layout.heads)
    assert torch.equal(part.to_dense(), dense[:, start:stop])
    edges = [*range(0, layout.kv_len, layout.block_size[1]), layout.kv_len]
    start, stop = sorted((data.draw(st.sampled_from(edges)), data.draw(st.sampled_from(edges))))
    part = layout.kv_slice(start, stop)
    assert torch.equal(part.to_dense(), dense[:, :, start:stop])
    assert part == layout.T.q_slice(start, stop).T


@settings(max_examples=40)
@given(layouts(), st.data())
def test_slices_one_after_the_other_are_the_whole(one: tuple[BlockLayout], data: st.DataObject) -> None:
    (layout,) = one
    middle = data.draw(st.integers(0, layout.q_blocks)) * layout.block_size[0]
    middle = min(middle, layout.q_len)
    above, below = layout.q_slice(0, middle), layout.q_slice(middle, layout.q_len)
    rows = [
        [
            *(above.row(block, head) for block in range(above.q_blocks)),
            *(below.row(block, head) for block in range(below.q_blocks)),
        ]
        for head in range(layout.heads)
    ]
    assert BlockLayout.from_rows(rows, layout.q_len, layout.kv_len, block_size=layout.block_size) == layout


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda layout: layout.q_slice(2, 8),
            ValueError,
            "q_slice: expected a start on the edge of a block of 4 .* got 2",
        ),
        (
            lambda layout: layout.q_slice(0, 6),
            ValueError,
            "q_slice: expected a stop on the edge of a block of 4 .* got 6",
        ),
        (lambda layout: layout.q_slice(8, 4), ValueError, "expected 0 <= start <= stop <= 19, got start 8 and stop 4"),
        (
            lambda layout: layout.q_slice(0, 20),
            ValueError,
            "expected 0 <= start <= stop <= 19, got start 0 and stop 20",
        ),
        (
            lambda layout: layout.kv_slice(0, 8),
            ValueError,
            "kv_slice: expected a stop on the edge of a block of 7 .* got 8",
        ),
        (lambda layout: layout.kv_slice(-7, 7), ValueError, "kv_slice: start: expected an int of at least 0, got -7"),
        (lambda layout: layout.kv_slice(0.0, 7), TypeError, "kv_slice: start: expected an int"),
    ],
)
def test_slices_off_the_edges_are_refused(
    call: Callable[[BlockLayout], BlockLayout], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call(layout_of(Sizes(19, 30, (4, 7)), 1, 0.5, 0))


def test_stack_puts_heads_after_one_another() -> None:
    sizes = Sizes(20, 30, (4, 7))
    parts = [layout_of(sizes, heads, 0.5, heads) for heads in (1, 3, 2)]
    stacked = BlockLayout.stack(parts)
    assert torch.equal(stacked.to_blocks(), torch.cat([part.to_blocks() for part in parts]))
    assert BlockLayout.stack([stacked.head(head) for head in range(6)]) == stacked
    assert BlockLayout.stack(parts[1:2]) == parts[1]


def test_what_does_not_stack_is_refused() -> None:
    first, second = layout_of(Sizes(20, 30, (4, 7)), 1, 0.5, 0), layout_of(Sizes(20, 31, (4, 7)), 1, 0.5, 0)
    with pytest.raises(ValueError, match="layouts: expected at least one layout, got none"):
        BlockLayout.stack([])
    with pytest.raises(ValueError, match=r"layouts: expected layouts of the same sizes.*kv_len=30.*kv_len=31"):
        BlockLayout.stack([first, second])
    with pytest.raises(TypeError, match=r"layouts\[1\]: expected a BlockLayout, got str"):
        BlockLayout.stack([first, "layout"])  # type: ignore[list-item]


# ------------------------------------------------------------------------------------------------ measures


@settings(max_examples=60)
@given(layouts())
def test_pairs_and_density_count_tokens(one: tuple[BlockLayout]) -> None:
    (layout,) = one
    dense = layout.to_dense()
    assert pairs(layout) == int(dense.sum())
    assert layout.density == (float(dense.double().mean()) if dense.numel() else 0.0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_bytes_of_a_tensor_are_its_memory(dtype: torch.dtype) -> None:
    values = [0, 1, 7, 100, 127]
    size = torch.empty(0, dtype=dtype).element_size()
    tensor = torch.tensor([5, *values], dtype=dtype)[1:]  # starts inside its storage
    assert bytes_of(tensor) == b"".join(value.to_bytes(size, sys.byteorder) for value in values)
    assert bytes_of(tensor[:0]) == b""
