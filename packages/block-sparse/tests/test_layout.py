"""BlockLayout itself: what it refuses, its identity, files, pictures, and that long sequences cost no table."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.layout.picture import MOST_CELLS, cells

ROWS = [[0, 2], [1], [], [2, 0]]


def small() -> BlockLayout:
    return BlockLayout.from_rows(ROWS, 30, 20, block_size=8)


def per_head() -> BlockLayout:
    return BlockLayout.from_rows([[[0], [1, 2]], [[], [2]]], 6, 7, block_size=3)


# ------------------------------------------------------------------------------------------------ construction


def test_sizes_of_a_layout_with_short_blocks_at_the_ends() -> None:
    layout = small()
    assert (layout.q_blocks, layout.kv_blocks, layout.live, layout.heads) == (4, 3, 5, 1)
    assert layout.block_size == (8, 8)
    assert [layout.row(block) for block in range(4)] == [[0, 2], [1], [], [0, 2]]
    assert (layout.indptr.dtype, layout.indices.dtype) == (torch.int64, torch.int32)
    assert layout.indptr.tolist() == [[0, 2, 3, 3, 5]]
    # Live pairs by hand: 8 rows of 8 + 4 keys, 8 of 8, none, and 6 of 8 + 4.
    assert layout.density == (8 * 12 + 8 * 8 + 6 * 12) / (30 * 20)


def test_rows_of_a_head_are_found() -> None:
    layout = per_head()
    assert (layout.heads, layout.row(1), layout.row(1, head=1), layout.row(0, head=1)) == (2, [1, 2], [2], [])
    assert layout.head(1).row(1) == [2]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_gives_the_same_layout(dtype: torch.dtype) -> None:
    indptr, indices = torch.tensor([0, 2, 3, 3, 5], dtype=dtype), torch.tensor([0, 2, 1, 0, 2], dtype=dtype)
    assert BlockLayout(indptr, indices, 30, 20, block_size=8) == small()


def test_a_layout_keeps_copies() -> None:
    indptr, indices = torch.tensor([[0, 2, 3, 3, 5]]), torch.tensor([0, 2, 1, 0, 2], dtype=torch.int32)
    layout = BlockLayout(indptr, indices, 30, 20, block_size=8)
    indptr.zero_()
    indices.zero_()
    assert layout == small()
    assert layout.validate() is layout


def test_a_strided_argument_is_kept_contiguous() -> None:
    indptr = torch.tensor([[0, 9], [2, 9], [3, 9], [3, 9], [5, 9]]).T[:1]
    indices = torch.tensor([0, 9, 2, 9, 1, 9, 0, 9, 2, 9])[::2]
    layout = BlockLayout(indptr, indices, 30, 20, block_size=8)
    assert layout.indptr.is_contiguous()
    assert layout.indices.is_contiguous()
    assert layout.key() == small().key()


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_empty_and_single_token_sizes_work(q_len: int, kv_len: int) -> None:
    live = torch.ones(2, -(-q_len // 4), -(-kv_len // 3), dtype=torch.bool)
    layout = BlockLayout.from_blocks(live, q_len, kv_len, block_size=(4, 3))
    assert layout.live == 2 * q_len * kv_len
    assert layout.density == float(q_len * kv_len > 0)
    assert layout == layout.T.T
    assert layout | layout == layout - (layout - layout) == layout & layout
    assert torch.equal(layout.to_dense(), torch.ones(2, q_len, kv_len, dtype=torch.bool))
    assert BlockLayout.from_lists(*layout.to_lists(), q_len, kv_len, block_size=(4, 3)) == layout
    assert layout.q_slice(0, q_len).kv_slice(0, kv_len) == layout


def integers(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


# indptr, indices, q_len, kv_len, block_size
BAD: dict[str, tuple[tuple[Any, Any, Any, Any, Any], type[Exception], str]] = {
    "indptr is a list": (([0, 1], integers(0), 4, 4, 4), TypeError, "indptr: expected a tensor of integers, got list"),
    "indices float": ((integers(0, 1), torch.zeros(1), 4, 4, 4), TypeError, "indices: .* got dtype torch.float32"),
    "indices bool": ((integers(0, 1), torch.zeros(1) > 0, 4, 4, 4), TypeError, "indices: .* got dtype torch.bool"),
    "indptr complex": ((torch.zeros(2) * 1j, integers(0), 4, 4, 4), TypeError, "indptr: .* torch.complex64"),
    "q_len is a float": ((integers(0, 1), integers(0), 4.0, 4, 4), TypeError, "q_len: expected an int"),
    "q_len is a bool": ((integers(0, 1), integers(0), True, 4, 4), TypeError, "q_len: expected an int"),
    "kv_len below 0": ((integers(0, 1), integers(0), 4, -4, 4), ValueError, "kv_len: .* got -4"),
    "block_size 0": ((integers(0, 1), integers(0), 4, 4, 0), ValueError, "block_size: expected a positive int, got 0"),
    "block_size of three": ((integers(0, 1), integers(0), 4, 4, (1, 2, 3)), ValueError, "block_size: .* 3 entries"),
    "block_size columns": ((integers(0, 1), integers(0), 4, 4, (4, -1)), ValueError, r"block_size\[1\]: .* got -1"),
    "block_size a text": ((integers(0, 1), integers(0), 4, 4, "4"), TypeError, "block_size: expected a positive int"),
    "kv_len of too many blocks": ((integers(0, 0), integers(), 4, 2**40, 4), ValueError, "kv_len: expected at most"),
    "indptr of another length": ((integers(0, 1), integers(0), 8, 4, 4), ValueError, r"\(heads, 3\), got \(1, 2\)"),
    "indptr of three dimensions": ((integers([[0, 1]]), integers(0), 4, 4, 4), ValueError, r"got \(1, 1, 2\)"),
    "indptr of no heads": ((torch.zeros(0, 2).long(), integers(), 4, 4, 4), ValueError, r"got \(0, 2\)"),
    "indices of two dimensions": (
        (integers(0, 1), integers([0]), 4, 4, 4),
        ValueError,
        r"\(live blocks,\), got \(1, 1\)",
    ),
    "indptr starts late": (
        (integers(1, 1), integers(0), 4, 4, 4),
        ValueError,
        "indptr: expected head 0 to start at 0, got 1",
    ),
    "indptr falls": (
        (integers(0, 3, 1, 3), integers(0, 1, 2), 12, 12, 4),
        ValueError,
        "indptr: row 1 of head 0: expected offsets that do not fall, got 3, 1",
    ),
    "indptr ends early": (
        (integers(0, 1), integers(0, 1), 4, 8, 4),
        ValueError,
        "to be the 2 entries of indices, got 1",
    ),
    "indptr ends late": (
        (integers(0, 3), integers(0, 1), 4, 8, 4),
        ValueError,
        "to be the 2 entries of indices, got 3",
    ),
    "a gap between heads": (
        (integers([0, 1], [2, 3]), integers(0, 0, 0), 4, 4, 4),
        ValueError,
        "indptr: expected head 1 to start where head 0 ends, 1, got 2",
    ),
    "columns unsorted": (
        (integers([0, 0, 0, 0, 0], [0, 0, 1, 1, 3]), integers(1, 5, 3), 16, 24, 4),
        ValueError,
        "indices: row 3 of head 1: expected columns that rise, got 5 before 3",
    ),
    "columns twice": (
        (integers(0, 1, 3), integers(0, 5, 5), 8, 24, 4),
        ValueError,
        "indices: row 1 of head 0: expected columns that rise, got 5 before 5",
    ),
    "a column too far": (
        (integers(0, 0, 2), integers(0, 6), 8, 24, 4),
        ValueError,
        "indices: row 1 of head 0: expected columns from 0 to 5, got 6",
    ),
    "a column below 0": (
        (integers(0, 2, 2), integers(-1, 3), 8, 24, 4),
        ValueError,
        "indices: row 0 of head 0: expected columns from 0 to 5, got -1",
    ),
    "a column of int64 that int32 would wrap": (
        (integers(0, 1), integers(2**32), 4, 4, 4),
        ValueError,
        "indices: row 0 of head 0: expected columns from 0 to 0, got 4294967296",
    ),
    "a column without keys": ((integers(0, 1), integers(0), 4, 0, 4), ValueError, "expected no columns, .* got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_layout_is_refused_by_name(name: str) -> None:
    (indptr, indices, q_len, kv_len, block_size), kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        BlockLayout(indptr, indices, q_len, kv_len, block_size=block_size)


def test_columns_may_fall_from_one_row_to_the_next() -> None:
    layout = BlockLayout(integers(0, 1, 1, 2), integers(5, 5), 12, 24, block_size=4)
    assert [layout.row(block) for block in range(3)] == [[5], [], [5]]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: small().row(4), ValueError, "block: expected an int from 0 to 3, got 4"),
        (lambda: small().row(-1), ValueError, "block: expected an int from 0 to 3, got -1"),
        (lambda: small().row(0, head=1), ValueError, "head: expected an int from 0 to 0, got 1"),
        (lambda: small().row(True), TypeError, "block: expected an int from 0 to 3, got True"),
        (lambda: small().head(2), ValueError, "head: expected an int from 0 to 0, got 2"),
    ],
)
def test_a_row_or_head_that_is_not_there_is_refused(
    call: Callable[[], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_validate_finds_what_was_written_later() -> None:
    layout = small()
    layout.indices[1] = 7
    with pytest.raises(ValueError, match="row 0 of head 0: expected columns from 0 to 2, got 7"):
        layout.validate()


# ------------------------------------------------------------------------------------------------ identity


def test_the_key_is_the_same_text_in_every_process() -> None:
    assert small().key() == "blocks_q30_k20_b8x8_h1_0aac4954aab073e4bcfb4c77a5091977"
    assert per_head().key() == "blocks_q6_k7_b3x3_h2_e42fa94f3d9ffe02071a6fa754df6981"


def test_equal_layouts_have_one_hash_and_key() -> None:
    assert small() == small()
    assert hash(small()) == hash(small())
    assert {small(): 1}[small()] == 1


@pytest.mark.parametrize(
    "other",
    [
        BlockLayout.from_rows([[0, 2], [1], [], [0, 1]], 30, 20, block_size=8),
        BlockLayout.from_rows([[0, 2], [1], [0], [2]], 30, 20, block_size=8),
        BlockLayout.from_rows(ROWS, 31, 20, block_size=8),
        BlockLayout.from_rows(ROWS, 30, 21, block_size=8),
        BlockLayout.from_rows(ROWS, 30, 20, block_size=(8, 7)),
        BlockLayout.from_rows([ROWS, ROWS], 30, 20, block_size=8),
        "blocks",
        None,
    ],
    ids=["column", "row", "q_len", "kv_len", "block_size", "heads", "text", "none"],
)
def test_other_layouts_differ(other: object) -> None:
    assert small() != other
    assert not isinstance(other, BlockLayout) or other.key() != small().key()


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda layout: pickle.loads(pickle.dumps(layout))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_is_equal_and_its_own(copied: Callable[[BlockLayout], BlockLayout]) -> None:
    for layout in (small(), per_head()):
        layout.plans["kept"] = object()  # must not travel
        other = copied(layout)
        assert other == layout
        assert other.plans == {}
        assert other.indices.data_ptr() != layout.indices.data_ptr()


def test_repr_tells_the_sizes() -> None:
    assert repr(small()) == "BlockLayout(q_len=30, kv_len=20, block_size=(8, 8), heads=1, live=5, density=0.387)"


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("layout", [small(), per_head(), BlockLayout.from_rows([], 0, 3)], ids=repr)
def test_a_file_gives_the_layout_back(layout: BlockLayout, tmp_path: Path) -> None:
    layout.save(tmp_path / "layout.pt")
    assert BlockLayout.load(tmp_path / "layout.pt") == layout
    assert BlockLayout.load(str(tmp_path / "layout.pt")) == layout


def _saved(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "layout.pt"
    small().save(path)
    content = torch.load(path, weights_only=True)
    content.update(changes)
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "another"}, "expected a file of a BlockLayout, got something else"),
        ({"version": 2}, "expected version 1, got version 2"),
        ({"indices": None}, "got a damaged one"),
        ({"indices": torch.tensor([0, 2, 1, 2, 0])}, "row 3 of head 0: expected columns that rise, got 2 before 0"),
        ({"q_len": "30"}, "got a damaged one"),
        ({"block_size": 9.5}, "got a damaged one"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = _saved(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        BlockLayout.load(path)
    assert str(path) in str(caught.value)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    whole = path.read_bytes()
    for content in (b"", b"not a layout", whole[: len(whole) // 2], pickle.dumps({"format": 1}), b"\x80\x02junk"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="path: expected a file of a BlockLayout") as caught:
            BlockLayout.load(path)
        assert str(path) in str(caught.value)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="got something else"):
        BlockLayout.load(path)


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        BlockLayout.load(tmp_path / "none.pt")


# ------------------------------------------------------------------------------------------------ pictures


def test_cells_are_the_blocks_where_they_fit() -> None:
    shares, rows, columns = cells(small())
    assert torch.equal(shares, small().to_blocks()[0].float())
    assert (rows, columns) == (8, 8)


def test_cells_share_blocks_where_they_do_not_fit() -> None:
    blocks = torch.rand(MOST_CELLS + 1, 2 * MOST_CELLS + 5) < 0.3
    layout = BlockLayout.from_blocks(blocks, 4 * (MOST_CELLS + 1), 2 * (2 * MOST_CELLS + 5), block_size=(4, 2))
    shares, rows, columns = cells(layout)
    assert (rows, columns) == (8, 6)
    for row, column in ((0, 0), (3, 7), (shares.shape[0] - 1, shares.shape[1] - 1)):
        block = blocks[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        assert shares[row, column] == pytest.approx(float(block.float().mean()))


def test_a_picture_has_a_panel_a_head_and_says_what_is_left_out(tmp_path: Path) -> None:
    layout = BlockLayout.stack([small()] * 18)
    figure = layout.draw(tmp_path / "layout.png", heads=[0, 17])
    assert (tmp_path / "layout.png").read_bytes().startswith(b"\x89PNG")
    panels = [panel for panel in figure.axes if panel.images]
    assert [panel.get_title() for panel in panels] == ["head 0: density 0.387", "head 17: density 0.387"]
    assert (panels[0].get_xlim(), panels[0].get_ylim()) == ((0.0, 20.0), (30.0, 0.0))
    everything = layout.draw()
    assert sum(bool(panel.images) for panel in everything.axes) == 16
    assert "2 more heads are not shown" in everything.get_suptitle()
    assert "density 0.387" in small().draw().get_suptitle()


def test_a_picture_leaves_pyplot_alone() -> None:
    before = "matplotlib.pyplot" in sys.modules
    small().draw()
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_a_picture_of_no_head_or_an_unknown_one_is_refused() -> None:
    with pytest.raises(ValueError, match="heads: expected at least one head, got none"):
        small().draw(heads=[])
    with pytest.raises(ValueError, match=r"heads\[1\]: expected an int from 0 to 0, got 3"):
        small().draw(heads=[0, 3])


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as where it is not installed
    with pytest.raises(ImportError, match=r"dilated-block-sparse\[plot\]"):
        small().draw()


# ------------------------------------------------------------------------------------------------ long sequences

# A million tokens in blocks of 16: a table of blocks would take 4 GiB, a layout of five blocks a row takes 2 MB.
LONG = """
import resource, sys, tempfile
import torch
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.layout.picture import cells

torch.set_num_threads(1)
blocks = 65536
seq = 16 * blocks
columns = torch.arange(blocks).unsqueeze(1) + torch.arange(-2, 3)
inside = (columns >= 0) & (columns < blocks)
indptr = torch.cat([torch.zeros(1, dtype=torch.int64), inside.sum(1).cumsum(0)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
window = BlockLayout(indptr, columns[inside], seq, seq, block_size=16)
first = BlockLayout(torch.arange(blocks + 1), torch.zeros(blocks, dtype=torch.int32), seq, seq, block_size=16)
both = window | first
assert both.live == 6 * blocks - 3 - 6
assert (both - first) | (both & first) == both
assert both.causal().live == 4 * blocks - 3 - 3
assert both.T.T == both
assert BlockLayout.stack([both.q_slice(0, seq // 2), both.q_slice(seq // 2, seq)]).live == both.live
assert both.kv_slice(16, seq).live == both.live - first.live
assert 0 < both.density < 1e-4
assert BlockLayout.from_bsr(*both.to_bsr(), seq, seq, block_size=16) == both
assert BlockLayout.from_lists(*both.to_lists(), seq, seq, block_size=16).key() == both.key()
cells(both)
with tempfile.TemporaryDirectory() as folder:
    both.save(folder + "/layout.pt")
    assert BlockLayout.load(folder + "/layout.pt") == both
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown * (1 if sys.platform == "darwin" else 1024))
"""


def test_a_million_tokens_build_no_table() -> None:
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200e6
