"""DilatedPattern: presets, counts and errors."""

from __future__ import annotations

import pytest
import torch
from core_cases import CASES, Case

from dilated_core import DilatedPattern, reference


def test_presets() -> None:
    assert DilatedPattern.longnet().segment_lengths == (2048, 4096, 8192, 16384, 32768)
    assert DilatedPattern.gigapath().segment_lengths == (1024, 5792, 32768, 185363, 1048576)
    assert DilatedPattern.gigapath().dilation_rates == (1, 2, 4, 8, 16)
    assert DilatedPattern.gigapath(max_slide_px=65536).segment_lengths[-1] == 65536
    assert DilatedPattern.geometric(16, 2, 2) == DilatedPattern([16, 32], (1, 2))


def test_hashable_and_frozen() -> None:
    pattern = DilatedPattern([4, 8], [1, 2])
    assert {pattern: 1}[DilatedPattern((4, 8), (1, 2))] == 1
    with pytest.raises(AttributeError):
        pattern.segment_lengths = (1,)  # type: ignore[misc]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_counts_agree_with_the_definition(case: Case, is_causal: bool) -> None:
    pattern = DilatedPattern(case.segment_lengths, case.dilation_rates)
    count = reference.multiplicity(case.seq, case.heads, case.segment_lengths, case.dilation_rates, is_causal=is_causal)
    assert pattern.pairs(case.seq, case.heads, is_causal=is_causal) == int(count.sum())
    assert pattern.flops(case.seq, case.heads, 8, is_causal=is_causal) == 32 * int(count.sum())
    if not is_causal:
        assert pattern.density(case.seq, case.heads) == pytest.approx(float(count.sum() / count.numel()))
        covered = torch.diagonal(count, dim1=1, dim2=2) > 0
        assert pattern.coverage(case.seq, case.heads) == pytest.approx(float(covered.double().mean()))


def test_paper_pattern_costs_an_eighth_of_dense_at_32k() -> None:
    assert 1 / DilatedPattern.longnet().density(32768, heads=8) == pytest.approx(7.7, abs=0.1)


def test_empty_sequence() -> None:
    pattern = DilatedPattern([4], [2])
    assert (pattern.density(0), pattern.coverage(0), pattern.pairs(0, 3)) == (0.0, 1.0, 0)


BAD = {
    "not a sequence": (8, [1], TypeError, "segment_lengths: expected a sequence"),
    "a string": ("8", [1], TypeError, "segment_lengths: expected a sequence"),
    "a float": ([8.0], [1], TypeError, r"segment_lengths\[0\]: expected a positive int, got 8.0"),
    "a bool": ([8], [True], TypeError, r"dilation_rates\[0\]"),
    "empty": ([], [], ValueError, "segment_lengths: expected at least one branch"),
    "zero": ([0], [1], ValueError, r"segment_lengths\[0\]: expected a positive int, got 0"),
    "negative rate": ([8], [-1], ValueError, r"dilation_rates\[0\]"),
    "unequal": ([8, 16], [1], ValueError, "one rate a segment length, got 2 lengths"),
    "swapped": ([1, 2], [2048, 4096], ValueError, "were the two lists swapped"),
}


@pytest.mark.parametrize(("lengths", "rates", "error", "message"), BAD.values(), ids=BAD)
def test_errors(lengths: object, rates: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DilatedPattern(lengths, rates)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: DilatedPattern.geometric(0, 2, 2), "w0"),
        (lambda: DilatedPattern.geometric(4, "2", 2), "n"),
        (lambda: DilatedPattern.gigapath(max_slide_px=256), "max_slide_px"),
        (lambda: DilatedPattern.gigapath(tile_px=0), "tile_px"),
        (lambda: DilatedPattern([4], [2]).pairs(-1, 2), "seq_len"),
        (lambda: DilatedPattern([4], [2]).pairs(4, 0), "heads"),
        (lambda: DilatedPattern([4], [2]).flops(4, 2, 0), "head_dim"),
        (lambda: DilatedPattern([4], [2]).density(4.0), "seq_len"),
        (lambda: DilatedPattern([4], [2]).coverage(4, heads=0), "heads"),
    ],
)
def test_method_errors(call: object, name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
        call()  # type: ignore[operator]
