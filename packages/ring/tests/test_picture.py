"""The plan's picture: a PNG that shows what travels, at any number of ranks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from dilated_core import DilatedPattern
from dilated_ring import RingPlan, make_plan
from dilated_ring.plan.picture import _most_of_squares


def plan_of(ranks: int, seq_len: int = 1 << 20) -> RingPlan:
    pattern = DilatedPattern.gigapath()
    return make_plan(seq_len, pattern.segment_lengths, pattern.dilation_rates, 16, ranks)


def colours(path: Path) -> set[tuple[float, ...]]:
    image = importlib.import_module("matplotlib.image")
    pixels = torch.from_numpy(image.imread(path)[::3, ::3].copy()).flatten(0, 1)
    return {tuple(pixel) for pixel in pixels.unique(dim=0).tolist()}


@pytest.mark.parametrize("ranks", [2, 13, 150])
def test_a_picture_is_drawn(ranks: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    plan_of(ranks).save_picture(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert len(colours(path)) > 50


def test_phase_and_sizes_change_the_picture(tmp_path: Path) -> None:
    pictures = set()
    for number, options in enumerate([{}, {"phase": "backward"}, {"head_dim": 8}, {"dtype": torch.float32}]):
        path = tmp_path / f"{number}.png"
        plan_of(2).save_picture(str(path), **options)
        pictures.add(path.read_bytes())
    assert len(pictures) == 4


def test_where_nothing_travels_a_picture_says_so(tmp_path: Path) -> None:
    for ranks, seq_len in ((1, 100), (3, 0), (4, 4096)):
        make_plan(seq_len, [1024], [1], 4, ranks).save_picture(tmp_path / f"{ranks}.png")
        # Letters and faint grey: none of the colours that stand for bytes.
        assert all(
            max(pixel) - min(pixel) < 0.02 for pixel in (colour[:3] for colour in colours(tmp_path / f"{ranks}.png"))
        )


def test_no_pair_of_many_ranks_is_lost() -> None:
    sizes = [[0] * 7 for _ in range(7)]
    sizes[0][6], sizes[6][2], sizes[3][3] = 5, 7, 1
    assert _most_of_squares(sizes, 3) == [[0, 0, 5], [0, 1, 0], [7, 0, 0]]
    assert _most_of_squares(sizes, 1) == sizes


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r'pip install "dilated-ring\[plot\]"'):
        plan_of(2).save_picture(tmp_path / "plan.png")
    assert not (tmp_path / "plan.png").exists()
