from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilated_pattern_cache import BlockLayoutKey, BlockMaskKey, CommunicationPlanKey, DilatedIndexKey, PatternKey

NAMES = st.sampled_from(["local", "bigbird", "a", "A", "a-b", "0.1", "full", "causal", "h1", "1"])
SIZES = st.integers(1, 3)
BRANCHES = st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=2)
OPTIONS = st.dictionaries(
    st.sampled_from(["window", "seed", "h", "a", "a_b"]),
    st.one_of(SIZES, st.booleans(), st.sampled_from([0.0, 0.5, 1.0, 1e-9]), NAMES),
    max_size=2,
)
PAIR = st.one_of(SIZES, st.tuples(SIZES, SIZES))


@st.composite
def dilated_keys(draw: st.DrawFn) -> DilatedIndexKey:
    lengths, rates = zip(*draw(BRANCHES), strict=True)
    return DilatedIndexKey(draw(SIZES), lengths, rates, draw(SIZES), draw(NAMES))


@st.composite
def plan_keys(draw: st.DrawFn) -> CommunicationPlanKey:
    lengths, rates = zip(*draw(BRANCHES), strict=True)
    seq_len, ranks = draw(SIZES), draw(SIZES)
    inner = draw(st.none() | st.lists(st.integers(0, seq_len), min_size=ranks - 1, max_size=ranks - 1).map(sorted))
    bounds = None if inner is None else (0, *inner, seq_len)
    return CommunicationPlanKey(seq_len, lengths, rates, draw(SIZES), ranks, draw(st.booleans()), draw(NAMES), bounds)


RATIOS = st.none() | st.sampled_from([0, 1, 0.0, 1.0, 0.1, 1e-5, -0.0])
KEYS: st.SearchStrategy[PatternKey] = st.one_of(
    dilated_keys(),
    plan_keys(),
    st.builds(BlockLayoutKey, SIZES, NAMES, RATIOS, PAIR, SIZES, st.booleans(), OPTIONS),
    st.builds(BlockMaskKey, SIZES, SIZES, NAMES, PAIR, st.none() | SIZES, st.none() | SIZES, OPTIONS),
)


def fields(key: PatternKey) -> tuple[Any, ...]:
    """The class and the fields, each with its type all the way down."""

    def typed(value: Any) -> Any:
        return tuple(map(typed, value)) if isinstance(value, tuple) else (type(value), value)

    kind, values = key.__reduce__()
    return kind, typed(values)


@given(KEYS, KEYS)
def test_keys_are_equal_where_all_fields_are_and_so_are_their_texts(one: PatternKey, other: PatternKey) -> None:
    assert (one == other) == (fields(one) == fields(other)) == (str(one) == str(other))
    if one == other:
        assert hash(one) == hash(other)


@given(KEYS)
def test_a_key_survives_pickling_and_is_made_anew_from_its_fields(key: PatternKey) -> None:
    assert pickle.loads(pickle.dumps(key)) == key
    kind, values = key.__reduce__()
    assert kind(*values) == key
    assert {key: 1}[kind(*values)] == 1


def test_numbers_that_python_takes_for_equal_are_different_options() -> None:
    keys = {BlockLayoutKey(8, "local", options={"a": value}) for value in (1, True, 1.0, "1", "True")}
    assert len(keys) == 5


def test_options_have_no_order() -> None:
    one, other = ({"a": 1, "b": 2}, [("b", 2), ("a", 1)])
    assert BlockLayoutKey(8, "local", options=one) == BlockLayoutKey(8, "local", options=other)  # type: ignore[arg-type]


def test_sizes_of_any_integer_type_are_one_key() -> None:
    numpy = pytest.importorskip("numpy")
    assert DilatedIndexKey(numpy.int64(8), [numpy.int32(4)], [1]) == DilatedIndexKey(8, (4,), (1,))  # type: ignore[arg-type]


def test_no_class_is_equal_to_another() -> None:
    class Other(DilatedIndexKey):
        kind = "other"

    assert DilatedIndexKey(8, (4,), (1,)) != Other(8, (4,), (1,))
    assert DilatedIndexKey(8, (4,), (1,)) != str(DilatedIndexKey(8, (4,), (1,)))


def test_a_key_cannot_be_changed() -> None:
    key = DilatedIndexKey(8, (4,), (1,))
    with pytest.raises(AttributeError):
        key.seq_len = 9  # type: ignore[misc]


def test_text_is_the_same_in_every_process_and_a_pickle_finds_its_key_there() -> None:
    key = BlockLayoutKey(8192, "local", ratio=0.1, options={"window": 3, "name": "a"})
    program = (
        "import pickle, sys\n"
        "from dilated_pattern_cache import BlockLayoutKey\n"
        "here = BlockLayoutKey(8192, 'local', ratio=0.1, options={'name': 'a', 'window': 3})\n"
        "there = pickle.loads(sys.stdin.buffer.read())\n"
        "assert {here: 1}[there] == 1\n"
        "sys.stdout.write(str(here))"
    )
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", program],
            input=pickle.dumps(key),
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert run.stdout.decode() == str(key) == "sparse_s8192_tlocal_r0.1_b128x128_h1_full_name='a'_window=3"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DilatedIndexKey(-1, (4,), (1,)), ValueError, "seq_len: expected at least 0, got -1"),
        (lambda: DilatedIndexKey(8.0, (4,), (1,)), TypeError, "seq_len: expected a whole number"),  # type: ignore[arg-type]
        (lambda: DilatedIndexKey(True, (4,), (1,)), TypeError, "seq_len: expected a whole number, got True"),
        (lambda: DilatedIndexKey(8, (4, 8), (1,)), ValueError, "one entry of each for every branch, got 2 and 1"),
        (lambda: DilatedIndexKey(8, (), ()), ValueError, "one entry of each for every branch, got 0 and 0"),
        (lambda: DilatedIndexKey(8, (0,), (1,)), ValueError, "segment_lengths: expected at least 1"),
        (lambda: DilatedIndexKey(8, (4,), (0,)), ValueError, "dilation_rates: expected at least 1"),
        (lambda: DilatedIndexKey(8, (4,), (1,), heads=0), ValueError, "heads: expected at least 1"),
        (lambda: DilatedIndexKey(8, (4,), (1,), semantics="a_b"), ValueError, "semantics: expected letters"),
        (lambda: BlockLayoutKey(8, 3), TypeError, "pattern: expected a name, got 3"),  # type: ignore[arg-type]
        (lambda: BlockLayoutKey(8, "a", ratio=1.5), ValueError, "ratio: expected a number between 0 and 1, got 1.5"),
        (lambda: BlockLayoutKey(8, "a", ratio=float("nan")), ValueError, "expected a number between 0 and 1, got nan"),
        (lambda: BlockLayoutKey(8, "a", ratio="1"), TypeError, "ratio: expected a number, got '1'"),  # type: ignore[arg-type]
        (lambda: BlockLayoutKey(8, "a", block_size=(1, 2, 3)), ValueError, "block_size: expected"),  # type: ignore[arg-type]
        (lambda: BlockLayoutKey(8, "a", is_causal=1), TypeError, "is_causal: expected True or False"),  # type: ignore[arg-type]
        (lambda: BlockLayoutKey(8, "a", options={"a b": 1}), ValueError, "options: expected names like"),  # type: ignore[arg-type]
        (lambda: BlockLayoutKey(8, "a", options={"a": None}), TypeError, "options['a']: expected a number"),  # type: ignore[arg-type]
        (lambda: BlockLayoutKey(8, "a", options={"a": "x_y"}), ValueError, "['a']: expected letters"),  # type: ignore[arg-type]
        (lambda: BlockLayoutKey(8, "a", options={"a": float("nan")}), ValueError, "that equals itself"),  # type: ignore[arg-type]
        (lambda: BlockLayoutKey(8, "a", options=(("a", 1), ("a", 2))), ValueError, "different names"),
        (lambda: BlockMaskKey(8, 8, "a", heads=0), ValueError, "heads: expected at least 1"),
        (lambda: CommunicationPlanKey(8, (4,), (1,), 1, 2, bounds=(0, 8)), ValueError, "world_size + 1 = 3 positions"),
        (lambda: CommunicationPlanKey(8, (4,), (1,), 1, 2, bounds=(0, 4, 9)), ValueError, "from 0 to seq_len=8"),
        (lambda: CommunicationPlanKey(8, (4,), (1,), 1, 3, bounds=(0, 5, 4, 8)), ValueError, "that do not fall"),
    ],
)
def test_bad_fields_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)
