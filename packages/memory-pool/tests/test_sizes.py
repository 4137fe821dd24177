"""Byte counts as people write them, and what size classes promise."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilated_memory_pool.sizes import Bins, Exact, Geometric, format_bytes, parse_bytes, parse_limit, size_classes

ALL = [
    Geometric(),
    Geometric(1),
    Geometric(4),
    Geometric(16, smallest=64),
    Exact(),
    Exact(1),
    Bins([10, "4kB", "1MiB"]),
]


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (0, 0),
        (7, 7),
        ("4096", 4096),
        ("12B", 12),
        ("1kB", 1000),
        ("1 KIB", 1024),
        ("64MiB", 2**26),
        (" 1.5 GB ", 1_500_000_000),
        ("0.5kib", 512),
        ("3TiB", 3 * 2**40),
        ("9007199254740993", 2**53 + 1),
        ("1PiB", 2**50),
    ],
)
def test_bytes_are_parsed(value: int | str, nbytes: int) -> None:
    assert parse_bytes(value) == nbytes


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, "size: expected at least 0, got -1"),
        ("-1", ValueError, "size: expected text like '4096', '64MiB' or '1.5GB', got '-1'"),
        ("", ValueError, "size: expected text like"),
        ("MiB", ValueError, "size: expected text like"),
        ("1 furlong", ValueError, "size: expected text like"),
        ("1e9", ValueError, "size: expected text like"),
        (1.5, TypeError, "size: expected a number of bytes or text such as '2GiB', got 1.5"),
        (True, TypeError, "got True"),
        (None, TypeError, "got None"),
    ],
)
def test_what_is_no_size_is_refused(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_bytes(value, "size")


def test_limits_are_bytes_or_fractions() -> None:
    assert parse_limit(None, 1000) is None
    assert parse_limit(0.25, 1000) == 250
    assert parse_limit(1.0, 1000) == 1000
    assert parse_limit(1, 1000) == 1
    assert parse_limit("2kB", 1000) == 2000


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_a_fraction_lies_within_one(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"limit: expected a fraction in \(0, 1\], got .*; give bytes as an int"):
        parse_limit(fraction, 1000)


@pytest.mark.parametrize("value", [[], True, Fraction(1, 2)])
def test_what_is_no_limit_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="limit: expected a number of bytes"):
        parse_limit(value, 1000)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (2**50, "1024 TiB")],
)
def test_bytes_are_written_for_people(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(0, 2**60))
def test_what_is_written_can_be_read(nbytes: int) -> None:
    assert parse_bytes(format_bytes(nbytes)) == pytest.approx(nbytes, rel=0.05)


@pytest.mark.parametrize("classes", ALL, ids=repr)
@given(st.integers(1, 2**50), st.integers(1, 2**50))
def test_classes_are_large_enough_monotonic_and_their_own(classes: Any, first: int, second: int) -> None:
    small, large = sorted((first, second))
    assert classes.round_up(small) >= small
    assert classes.round_up(small) <= classes.round_up(large)
    assert classes.round_up(classes.round_up(small)) == classes.round_up(small)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 64])
@given(st.integers(4096, 2**50))
def test_the_waste_of_geometric_classes_is_bounded(steps: int, nbytes: int) -> None:
    size = Geometric(steps).round_up(nbytes)
    assert (size - nbytes) * (steps + 1) < size
    power = 1 << (size.bit_length() - 1)
    assert size % (power // steps) == 0


def test_geometric_classes_start_at_the_smallest() -> None:
    assert [Geometric(4, smallest=64).round_up(n) for n in (1, 64, 65, 80, 81)] == [64, 64, 80, 80, 96]


@pytest.mark.parametrize(
    "draw",
    [lambda dice: int(2 ** dice.uniform(20, 32)), lambda dice: dice.randint(2**20, 2**24)],
    ids=["log-uniform", "uniform"],
)
def test_the_default_classes_waste_five_percent_on_average_at_most(draw: Any) -> None:
    dice, classes = random.Random(0), size_classes("geometric")
    sizes = [draw(dice) for _ in range(20_000)]
    assert sum(1 - size / classes.round_up(size) for size in sizes) / len(sizes) <= 0.05


@pytest.mark.parametrize("steps", [0, -1, 3, 12])
def test_steps_are_a_power_of_two(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps: expected a power of two, got {steps}"):
        Geometric(steps)


@pytest.mark.parametrize("smallest", [0, 4, 100, -8])
def test_the_smallest_class_is_a_power_of_two_that_steps_divide(smallest: int) -> None:
    with pytest.raises(ValueError, match=f"smallest: expected a power of two of at least steps=8, got {smallest}"):
        Geometric(8, smallest)


def test_a_granule_is_positive() -> None:
    with pytest.raises(ValueError, match="granule: expected at least 1, got 0"):
        Exact(0)


@pytest.mark.parametrize("sizes", [[], [0, 5]])
def test_bins_are_positive(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="size_classes: expected one or more positive sizes, got"):
        Bins(sizes)


def test_bins_are_sorted_and_met_once() -> None:
    bins = Bins(["2kB", 10, 2000])
    assert repr(bins) == "Bins([10, 2000])"
    assert [bins.round_up(n) for n in (1, 10, 11, 2000, 2001, 4001)] == [10, 10, 2000, 2000, 4000, 6000]


def test_classes_by_name_by_list_and_by_object() -> None:
    mine = Exact(3)
    assert size_classes("geometric") == Geometric()
    assert size_classes("power_of_two") == Geometric(1)
    assert size_classes("exact") == Exact()
    assert size_classes(mine) is mine
    assert repr(size_classes(iter([5, 3]))) == "Bins([3, 5])"


def test_what_is_no_size_classes_is_refused() -> None:
    names = r"size_classes: expected one of \['exact', 'geometric', 'power_of_two'\], bins or an object, got"
    with pytest.raises(ValueError, match=f"{names} 'fibonacci'"):
        size_classes("fibonacci")
    with pytest.raises(TypeError, match="size_classes: expected a name, bins or an object with round_up, got 5"):
        size_classes(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="size_classes: expected a number of bytes"):
        size_classes([1.5])  # type: ignore[list-item]
