"""The count of what the Triton kernel walks is what the kernel does, and what a plain loop over its tiles finds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_core import DilatedPattern, dilated_attention
from dilated_core.kernels.triton.blocks import INTERPRETED, Pass
from dilated_core.kernels.triton.schedule import Branches, make_tables

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_triton_work as work  # noqa: E402

PATTERNS = [
    DilatedPattern([8, 20, 90], [1, 3, 4]),
    DilatedPattern([16, 36], [2, 3]),
    DilatedPattern([50, 50], [1, 1]),
    DilatedPattern([32, 64, 128], [1, 2, 4]),
    DilatedPattern([6, 64], [4, 7]),
]
HEADS, SEQ = 3, 131
causal = pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: str(pattern.segment_lengths))


def _orders(branches: Branches, seq: int) -> list[Tensor]:
    """The order of every head."""
    tables = make_tables(branches, [(0, seq)], torch.device("cpu"))
    if tables.order is None:
        return [torch.arange(seq, dtype=torch.int32)] * len(branches.phases[0])
    assert tables.head_class is not None
    return list(tables.order[tables.head_class])


def _grid(branches: Branches, branch: int, head: int, seq: int) -> list[tuple[int, int]]:
    """(segment, position) of every row of a branch, in the order in which it is walked."""
    (length, rate), phase = branches.pairs[branch], branches.phases[branch][head]
    return [
        (start // length, position)
        for start in range(0, seq, length)
        for position in range(start + phase, min(start + length, seq), rate)
    ]


def _walked_by_a_loop(tile: list[int], grid: list[tuple[int, int]], which: Pass, is_causal: bool) -> list[int]:
    """The rows of the grid between the first and the last that some row of the tile meets, as numbers along it."""
    segment_of = {position: segment for segment, position in grid}

    def meets(row: int, segment: int, position: int) -> bool:
        if segment_of.get(row) != segment:
            return False
        seen = position >= row if which == "grad_key_value" else position <= row
        return seen or not is_causal

    met = [n for n, (segment, position) in enumerate(grid) if any(meets(row, segment, position) for row in tile)]
    return list(range(met[0], met[-1] + 1)) if met else []


@each_pattern
@causal
@pytest.mark.parametrize("which", work.PASSES)
def test_a_plain_loop_over_tiles_walks_the_same(pattern: DilatedPattern, which: Pass, is_causal: bool) -> None:
    branches, rows, others = work.make_branches(pattern, HEADS), 16, 8
    orders = _orders(branches, SEQ)
    found = work.walk_all(work.meet_all(orders, branches, range(HEADS), rows), which, others, is_causal)
    blocks, read = [], []
    for head, order in enumerate(orders):
        grids = [_grid(branches, branch, head, SEQ) for branch in range(pattern.branches)]
        for begin in range(0, SEQ, rows):
            tile = order[begin : begin + rows].tolist()
            walked = [len(_walked_by_a_loop(tile, grid, which, is_causal)) for grid in grids]
            read.append(sum(walked))
            blocks.append(sum(-(-number // others) for number in walked))
    assert found.read.tolist() == read
    if which == "grad_key_value" and is_causal:  # blocks start afresh after those with a mask: one more here and there
        assert all(0 <= more <= pattern.branches for more in (found.blocks - torch.tensor(blocks)).tolist())
    else:
        assert found.blocks.tolist() == blocks


class _Counter:
    """A device function, and how often it was called without and with a mask."""

    def __init__(self, function: Callable[..., object], masked_at: int) -> None:
        self.function, self.masked_at = function, masked_at
        self.plain = self.masked = 0

    def __call__(self, *arguments: Any) -> object:
        masked = arguments[self.masked_at]
        self.masked += bool(masked)
        self.plain += not masked
        return self.function(*arguments)


@causal
def test_the_kernel_makes_as_many_steps_as_counted(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("with a card the programs are compiled, and their steps cannot be counted")
    from dilated_core.kernels.triton.programs import attend, differentiate

    steps: dict[Pass, tuple[object, str]] = {
        "forward": (attend, "_attend"),
        "grad_query": (differentiate, "_score_keys"),
        "grad_key_value": (differentiate, "_collect"),
    }
    counters = {}
    for which, (module, name) in steps.items():
        function = getattr(module, name)
        counters[which] = _Counter(function, function.arg_names.index("MASKED"))
        monkeypatch.setattr(module, name, counters[which])
    pattern, seq = DilatedPattern([32, 110], [1, 2]), 101
    heads = 2
    query = torch.randn(1, seq, heads, 8, requires_grad=True)
    options = {"is_causal": is_causal, "kernel": "triton"}
    out = dilated_attention(query, query, query, pattern.segment_lengths, pattern.dilation_rates, **options)
    torch.autograd.grad(out, query, torch.randn_like(out))
    branches, (rows, others, *_) = work.make_branches(pattern, heads), INTERPRETED
    met = list(work.meet_all(_orders(branches, seq), branches, range(heads), rows))
    for which, counter in counters.items():
        found = work.walk_all(met, which, others, is_causal)
        assert (counter.plain, counter.masked) == (int(found.plain.sum()), int(found.masked.sum())), which
        assert counter.plain > 0
        assert counter.masked > 0


def test_computed_scores_hold_all_that_are_needed() -> None:
    for row in work.count(PATTERNS[0], HEADS, SEQ, [(16, 8), (8, 16)]):
        assert row["computed"] >= row["needed"]


def test_blocks_of_one_row_compute_nothing_in_vain() -> None:
    for row in work.count(PATTERNS[0], HEADS, SEQ, [(1, 1)]):
        assert row["work_over_needed"] == 1.0


def test_a_tile_without_rows_in_a_branch_walks_nothing_of_it() -> None:
    tiles = torch.tensor([[1, 3, -1, -1]])
    met = work.meet(tiles, (8, 2), 0, 8)
    for which in work.PASSES:
        for is_causal in (False, True):
            assert work.walk(met, which, 4, is_causal).blocks.tolist() == [0]


def test_programs_are_shared_out_as_processors_become_free() -> None:
    assert work.makespan([1, 1, 1, 1, 4], processors=2) == 6
    assert work.makespan([4, 1, 1, 1, 1], processors=2) == 4


def test_the_script_writes_a_table_and_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--patterns", "paper", "--sizes", "999", "--blocks", "128x64", "64x64", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_triton_work.py", *arguments])
    work.main()
    rows = json.loads((tmp_path / "triton_work.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 2 * 3
    assert all(row["computed"] >= row["needed"] > 0 for row in rows)
    page = (tmp_path / "triton_work.md").read_text()
    assert page.count("\n| paper, 12 | 999 |") == 2
    assert "not yet measured" in page
    assert "The order divides the work" in page
