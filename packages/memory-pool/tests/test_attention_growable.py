"""GrowableBuffer: exact contents, amortised growth, and views that stay what they were."""

from __future__ import annotations

import math
import mmap
import threading
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_checks import PATIENCE, in_threads

from dilated_memory_pool import PoolLimitError
from dilated_memory_pool.attention import DEFAULT_POLICIES, AttentionBufferManager, BufferKind
from dilated_memory_pool.attention.growable import GrowableBuffer

torch = pytest.importorskip("torch")

PAGE = mmap.PAGESIZE
CACHE = replace(DEFAULT_POLICIES[BufferKind.CACHE], min_bytes=0)


def make(limit: int | None = None, **fields: Any) -> AttentionBufferManager:
    """A manager whose caches are pooled at any size."""
    return AttentionBufferManager("host", limit=limit, policies={"cache": replace(CACHE, **fields)})


@pytest.mark.parametrize("growth", [2.0, 1.5, 4])
def test_ten_thousand_appends_reallocate_a_logarithmic_number_of_times(growth: float) -> None:
    appends = 10_000
    manager = make(growth=growth)
    buffer = manager.growable((3,), dtype=torch.float64)
    rows = torch.randn(appends, 3, dtype=torch.float64)
    reallocations = moved = 0
    for row in rows.split(1):
        before = buffer.capacity
        buffer.append(row)
        if buffer.capacity != before:
            reallocations += 1
            moved += before
    now = manager.statistics("cache")
    assert now.hits + now.misses == reallocations
    assert reallocations <= math.log(appends, growth) + 2
    assert moved < appends * growth / (growth - 1)
    assert torch.equal(buffer.view(), rows)
    assert len(buffer) == appends


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    capacity=st.integers(0, 5),
)
def test_any_sequence_of_changes_leaves_what_a_concatenation_would(
    shape: list[int], data: Any, dtype: Any, capacity: int
) -> None:
    dim = data.draw(st.integers(-len(shape) - 1, len(shape)))
    place = dim % (len(shape) + 1)
    buffer = make().growable(shape, dtype=dtype, dim=dim, capacity=capacity)
    expected = torch.empty((*shape[:place], 0, *shape[place:]), dtype=dtype)
    assert buffer.capacity == capacity
    for step in data.draw(st.lists(st.one_of(st.integers(0, 6), st.sampled_from(["truncate", "clear"])), max_size=8)):
        if step == "truncate":
            length = data.draw(st.integers(0, len(buffer)))
            buffer.truncate(length)
            expected = expected.narrow(place, 0, length)
        elif step == "clear":
            buffer.clear()
            expected = expected.narrow(place, 0, 0)
        else:
            rows = torch.randint(0, 2, (*shape[:place], step, *shape[place:])).to(dtype)
            buffer.append(rows)
            expected = torch.cat([expected, rows], dim=place)
        assert buffer.view().dtype == dtype
        assert torch.equal(buffer.view(), expected)
        assert len(buffer) == expected.shape[place] <= buffer.capacity


def test_views_stay_valid_and_unchanged_when_the_buffer_grows() -> None:
    buffer = make().growable((PAGE,), dtype=torch.uint8, capacity=1)
    views = []
    for number in range(9):
        buffer.append(torch.full((1, PAGE), number, dtype=torch.uint8))
        views.append(buffer.view())
    for length, view in enumerate(views, start=1):
        assert view[:, 0].tolist() == list(range(length))
        assert bool((view == view[:, :1]).all())


def test_a_view_shares_the_memory_and_appending_itself_is_exact() -> None:
    buffer = make().growable((2,), dtype=torch.float32, capacity=8)
    buffer.append(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    first = buffer.view()
    buffer.append(first)
    assert buffer.view().data_ptr() == first.data_ptr()
    assert buffer.view().tolist() == [[1.0, 2.0], [3.0, 4.0]] * 2


def test_memory_comes_from_the_pool_of_caches_and_goes_back_to_it() -> None:
    manager = make()
    buffer = manager.growable((PAGE,), dtype=torch.uint8, capacity=3)
    assert manager.statistics("cache").allocated_bytes == 3 * PAGE
    buffer.append(torch.zeros(5, PAGE, dtype=torch.uint8))
    assert manager.kind_of(buffer.view()) is BufferKind.CACHE
    assert manager.statistics("cache").allocated_bytes == buffer.capacity * PAGE == 6 * PAGE
    buffer.truncate(0)
    assert manager.statistics("cache").allocated_bytes == 6 * PAGE
    buffer.clear()
    assert manager.statistics("cache").allocated_bytes == 0


def test_another_layer_of_the_same_growth_uses_the_memory_of_the_first() -> None:
    manager = make()
    misses = []
    for _ in range(2):
        buffer = manager.growable((PAGE,), dtype=torch.uint8)
        for _ in range(9):
            buffer.append(torch.zeros(1, PAGE, dtype=torch.uint8))
        misses.append(manager.statistics("cache").misses)
    assert misses[0] == misses[1]


def test_near_the_limit_it_grows_by_what_is_needed_and_a_failed_append_changes_nothing() -> None:
    manager = make(limit=10 * PAGE)
    buffer = manager.growable((PAGE,), dtype=torch.uint8, capacity=4)
    rows = torch.randint(0, 255, (6, PAGE), dtype=torch.uint8)
    buffer.append(rows[:4])
    buffer.append(rows[4:])  # 4 pages are in use: 8 more would be 12
    assert buffer.capacity == len(buffer) == 6
    with pytest.raises(PoolLimitError) as caught:
        buffer.append(rows[:1])
    assert (caught.value.requested, caught.value.allocated) == (7 * PAGE, 6 * PAGE)
    assert torch.equal(buffer.view(), rows)


@pytest.mark.parametrize("capacity", [1, 8])
def test_rows_appended_in_inference_mode_and_outside_of_it_mix(capacity: int) -> None:
    rows = torch.randn(5, 2)
    with torch.inference_mode():
        buffer = make().growable((2,), capacity=capacity)
        buffer.append(rows[:1].clone())
        buffer.append(rows[1:2].clone())
    buffer.append(rows[2:4])
    with torch.inference_mode():
        buffer.append(rows[4:].clone())
    assert torch.equal(buffer.view(), rows)


def test_it_traces_into_one_graph() -> None:
    buffer = make().growable((2,), capacity=4)

    def step(row: Any) -> Any:
        buffer.append(row)
        return buffer.view() * 2

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    rows = torch.randn(3, 2)
    results = [compiled(row) for row in rows.split(1)]
    assert torch.equal(results[-1], rows * 2)


def test_threads_that_append_lose_no_row_and_mix_none() -> None:
    threads, each = 6, 50
    buffer = make().growable((7,), dtype=torch.int64)

    def work(number: int) -> None:
        for turn in range(each):
            buffer.append(torch.full((2, 7), number * each + turn))

    in_threads(work, threads)
    rows = buffer.view()
    assert bool((rows == rows[:, :1]).all())
    assert torch.equal(rows[0::2], rows[1::2])
    assert sorted(rows[::2, 0].tolist()) == list(range(threads * each))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([[1.0, 2.0]], TypeError, "rows: expected a tensor, got list"),
        (torch.ones(2), ValueError, r"the shape \(n, 2\), got \(2,\)"),
        (torch.ones(1, 3), ValueError, r"the shape \(n, 2\), got \(1, 3\)"),
        (torch.ones(1, 2, dtype=torch.float64), ValueError, "rows: expected torch.float32 on cpu, got torch.float64"),
        (torch.ones(1, 2, device="meta"), ValueError, "got torch.float32 on meta"),
        (torch.ones(1, 2, requires_grad=True), ValueError, r"append rows.detach\(\)"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: Any, error: type[Exception], message: str) -> None:
    buffer = make().growable((2,))
    with pytest.raises(error, match=message):
        buffer.append(rows)
    assert len(buffer) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"row_shape": (2, -1)}, ValueError, "row_shape: expected at least 0"),
        ({"row_shape": (2.0,)}, TypeError, "row_shape: expected a whole number"),
        ({"row_shape": 2}, TypeError, "row_shape: expected a sequence of whole numbers"),
        ({"dim": 2}, ValueError, r"dim: expected one in \[-2, 1\] for rows of \(2,\), got 2"),
        ({"dim": 0.0}, TypeError, "dim: expected a whole number"),
        ({"capacity": -1}, ValueError, "capacity: expected at least 0"),
        ({"capacity": "many"}, TypeError, "capacity: expected a whole number"),
        ({"dtype": "float"}, TypeError, "dtype: expected a torch.dtype, got 'float'"),
        ({"kind": "query"}, ValueError, r"policy has growth, \['cache'\] here, got 'query'"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make().growable(**{"row_shape": (2,), **arguments})


def test_only_rows_that_are_there_can_be_kept() -> None:
    buffer = make().growable((2,), capacity=4)
    buffer.append(torch.ones(2, 2))
    for length in (-1, 3):
        with pytest.raises(ValueError, match=r"length: expected one in \[0, 2\]"):
            buffer.truncate(length)


def test_a_signal_handler_may_look_at_it_in_the_middle_of_an_append() -> None:
    seen: list[tuple[int, int, list[float]]] = []

    def empty(size: tuple[int, ...], *, dtype: Any) -> Any:
        if started.is_set():
            seen.append((len(buffer), buffer.capacity, buffer.view().tolist()))
        return torch.empty(size, dtype=dtype)

    started = threading.Event()
    buffer = GrowableBuffer(empty, (), dtype=torch.float64, device="cpu", dim=0, capacity=1, growth=2.0)
    buffer.append(torch.ones(1, dtype=torch.float64))
    started.set()
    appending = threading.Thread(target=buffer.append, args=(torch.ones(4, dtype=torch.float64),), daemon=True)
    appending.start()
    appending.join(PATIENCE)
    assert not appending.is_alive(), "deadlock"
    assert seen == [(1, 1, [1.0])]
    assert buffer.view().tolist() == [1.0] * 5
