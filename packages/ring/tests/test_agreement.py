"""The agreement: all ranks raise the same, it names who differs, and nobody waits for a rank that refuses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_processes

from dilated_ring.comm import Comm, RecordingComm, agree, comm_of, refuse, run_ranks
from dilated_ring.errors import DisagreementError, PeerError, RingError

SIZES = [1, 2, 3, 8]


def outcome(comm: Comm, call: Callable[[Comm], object]) -> object:
    """What a rank's call returns, or the text of the error that it raises."""
    try:
        return call(comm)
    except RingError as error:
        return f"{type(error).__name__}: {error}"


def outcomes(calls: list[Mapping[str, object]]) -> list[object]:
    """What each rank has of its own arguments."""
    return run_ranks(len(calls), lambda comm: outcome(comm, lambda comm: agree(comm, calls[comm.rank], comm.rank)))


def disagreement(calls: list[Mapping[str, object]]) -> str:
    """What all ranks raise, without its beginning."""
    first, *others = outcomes(calls)
    assert all(other == first for other in others)
    beginning = "DisagreementError: the ranks were called with different arguments: "
    assert isinstance(first, str)
    assert first.startswith(beginning)
    return first.removeprefix(beginning)


@pytest.mark.parametrize("size", SIZES)
def test_ranks_that_are_called_alike_learn_each_others_lengths(size: int) -> None:
    call = {"heads": 4, "dtype": torch.float64, "bounds": (0, 5, 11)}
    assert outcomes([call] * size) == [list(range(size))] * size


@pytest.mark.parametrize("length", [0, 1, 2**62])
def test_any_length_travels(length: int) -> None:
    assert run_ranks(2, lambda comm: agree(comm, {}, length * comm.rank)) == [[0, length]] * 2


def test_who_differs_is_named_last() -> None:
    calls = [{"heads": 4, "dtype": torch.float32} for _ in range(8)]
    calls[5] = {"heads": 6, "dtype": torch.float32}
    assert disagreement(calls) == "heads is 4 on ranks 0-4 and 6-7, 6 on rank 5"


def test_every_difference_is_told() -> None:
    found = disagreement([{"heads": 4, "dtype": 1}, {"heads": 2, "dtype": 1}, {"heads": 4, "dtype": 3}])
    assert found == "heads is 4 on ranks 0 and 2, 2 on rank 1; dtype is 1 on ranks 0-1, 3 on rank 2"


def test_a_field_that_only_some_have_is_told() -> None:
    assert disagreement([{"a": 1}, {"a": 1, "b": 2}]) == "b is nothing on rank 0, 2 on rank 1"
    assert disagreement([{}, {"a": 1}]) == "a is nothing on rank 0, 1 on rank 1"


def test_the_order_of_the_fields_does_not_matter() -> None:
    assert outcomes([{"a": 1, "b": 2}, {"b": 2, "a": 1}]) == [[0, 1]] * 2


@pytest.mark.parametrize(
    "value",
    ["two\nlines", "a=b", "name=value\nheads=5", "Größe ≤ 4 🙂", "\ud800", "", "\0", "x" * 100_000, '"quoted"', "\\n"],
    ids=["newline", "equals", "forged", "unicode", "surrogate", "empty", "nul", "long", "quotes", "backslash"],
)
def test_any_text_is_told_as_it_is(value: str) -> None:
    call = {"text": value, "heads": 4}
    assert outcomes([call, call]) == [[0, 1]] * 2
    assert disagreement([call, {**call, "heads": 5}]) == "heads is 4 on rank 0, 5 on rank 1"
    assert disagreement([call, {**call, "text": "other"}]) == f"text is {value} on rank 0, other on rank 1"


@settings(max_examples=40)
@given(st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=8), max_size=3), min_size=2, max_size=4))
def test_ranks_agree_exactly_if_their_calls_are_equal(calls: list[dict[str, str]]) -> None:
    found = outcomes(list(calls))
    assert all(other == found[0] for other in found)
    assert isinstance(found[0], list) == all(call == calls[0] for call in calls)


# ------------------------------------------------------------------------------------------------ refusals


def call_or_refuse(comm: Comm, errors: Mapping[int, Exception]) -> object:
    """What an attention does: it refuses bad arguments, and else agrees."""
    if comm.rank in errors:
        refuse(comm, errors[comm.rank])
        return "refused"
    return outcome(comm, lambda comm: agree(comm, {"heads": 4}, 7))


@pytest.mark.parametrize("size", SIZES)
def test_a_refusal_is_told_to_all_others(size: int) -> None:
    found = run_ranks(size, lambda comm: call_or_refuse(comm, {0: TypeError("query: expected\na tensor")}))
    told = "DisagreementError: rank 0 refused its arguments: TypeError: query: expected\na tensor"
    assert found == ["refused"] + [told] * (size - 1)


def test_several_refuse_at_once() -> None:
    errors = {1: ValueError("key: ≥ 1"), 3: TypeError("")}
    found = run_ranks(4, lambda comm: call_or_refuse(comm, errors))
    reasons = "rank 1 refused its arguments: ValueError: key: ≥ 1; rank 3 refused its arguments: TypeError: "
    told = f"DisagreementError: {reasons}"
    assert found == [told, "refused", told, "refused"]


def test_all_refuse() -> None:
    error = ValueError("nobody wants this")
    assert run_ranks(3, lambda comm: call_or_refuse(comm, dict.fromkeys(range(3), error))) == ["refused"] * 3


def test_who_refuses_says_so_even_if_the_others_are_gone() -> None:
    def work(comm: Comm) -> str:
        if comm.rank == 1:
            return "left"
        refuse(comm, ValueError("its own error"))  # which this rank then raises, rather than that another one left
        return "refused"

    assert run_ranks(3, work) == ["refused", "left", "refused"]


def test_a_value_that_has_no_text_is_refused() -> None:
    class Silent:
        def __str__(self) -> str:
            raise ValueError("no text")

    def work(comm: Comm) -> str:
        try:
            agree(comm, {"heads": Silent() if comm.rank == 1 else 4}, 7)
        except ValueError as error:
            return str(error)
        return "agreed"

    told = "rank 1 refused its arguments: ValueError: no text"
    assert run_ranks(3, work) == [told, "no text", told]


def test_a_rank_that_leaves_without_a_word_is_named() -> None:
    def work(comm: Comm) -> object:
        return "left" if comm.rank == 1 else agree(comm, {}, 7)

    with pytest.raises(PeerError, match=r"exchanging what they were called with, agreement: rank 1 is gone"):
        run_ranks(3, work)


# ------------------------------------------------------------------------------------------------ traffic


@pytest.mark.parametrize("size", SIZES)
def test_ranks_that_agree_exchange_a_few_numbers_whatever_the_call_is(size: int) -> None:
    def work(comm: Comm) -> tuple[int, int]:
        recording = RecordingComm(comm)
        agree(recording, {"plan": "x" * 10_000}, 7)
        return len(recording.records), recording.received_bytes("agreement")

    assert run_ranks(size, work) == [(int(size > 1), 64 * (size - 1))] * size


def on_a_group(rank: int) -> list[object]:
    comm = comm_of(None)
    alike = agree(comm, {"heads": 4}, 10 * rank)
    differing = outcome(comm, lambda comm: agree(comm, {"heads": 4 if rank else "ü\n6"}, rank))
    refused = call_or_refuse(comm, {comm.size - 1: ValueError("z" * 70_000)})
    again = agree(comm, {"heads": 5}, rank)  # a disagreement leaves the group as good as it was
    return [alike, differing, refused, again]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_processes_agree_and_disagree_like_threads(size: int, tmp_path: Path) -> None:
    found = run_processes(size, on_a_group, tmp_path=tmp_path)
    expected = run_ranks(size, lambda comm: [agree(comm, {}, 10 * comm.rank), agree(comm, {}, comm.rank)])
    assert [[alike, again] for alike, _, _, again in found] == expected
    if size > 1:
        others = f"ranks 1-{size - 1}" if size > 2 else "rank 1"
        both = f"4 on {others}, ü\n6 on rank 0" if size > 2 else f"ü\n6 on rank 0, 4 on {others}"
        told = f"DisagreementError: the ranks were called with different arguments: heads is {both}"
        assert [differing for _, differing, _, _ in found] == [told] * size
        told = f"DisagreementError: rank {size - 1} refused its arguments: ValueError: {'z' * 70_000}"
        assert [refused for _, _, refused, _ in found] == [told] * (size - 1) + ["refused"]


def test_a_disagreement_is_both_a_ring_error_and_a_value_error() -> None:
    def work(comm: Comm) -> None:
        agree(comm, {"heads": comm.rank}, 1)

    with pytest.raises(ValueError, match=re.escape("heads is 0 on rank 0, 1 on rank 1")) as caught:
        run_ranks(2, work)
    assert isinstance(caught.value, DisagreementError)
    assert isinstance(caught.value, RingError)
