"""Values that everybody shares: a change in place is noticed before the value is next given out."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dilated_pattern_cache import PatternCache, PatternMutatedError
from dilated_pattern_cache.values.guards import Guard

BOTH: list[Guard] = ["version", "contents"]


def ones() -> torch.Tensor:
    return torch.ones(4)


def make(guard: Guard | None, value: Any) -> PatternCache[str, Any]:
    cache: PatternCache[str, Any] = PatternCache(guard=guard)
    cache["a"] = value
    return cache


def add_in_place(tensor: torch.Tensor) -> None:
    tensor.add_(1)


def write_an_element(tensor: torch.Tensor) -> None:
    tensor[1] = 7


def write_through_a_view(tensor: torch.Tensor) -> None:
    tensor.view(2, 2)[0].mul_(2)


def write_by_out(tensor: torch.Tensor) -> None:
    torch.add(tensor, 1, out=tensor)


def write_through_detach(tensor: torch.Tensor) -> None:
    tensor.detach().zero_()


def step_of_an_optimiser(tensor: torch.Tensor) -> None:
    torch.optim.SGD([tensor.requires_grad_()], lr=1.0).step(lambda: tensor.sum().backward())


def write_by_data(tensor: torch.Tensor) -> None:
    tensor.data.add_(1)


def write_by_numpy(tensor: torch.Tensor) -> None:
    pytest.importorskip("numpy")
    tensor.numpy()[0] = 5


SEEN_BY_VERSION = [
    add_in_place,
    write_an_element,
    write_through_a_view,
    write_by_out,
    write_through_detach,
    step_of_an_optimiser,
]

ASKING: list[Callable[[PatternCache[str, Any]], Any]] = [
    lambda cache: cache["a"],
    lambda cache: cache.get("a"),
    lambda cache: cache.get_or_create("a", ones),
    lambda cache: cache.setdefault("a", ones()),
]


@pytest.mark.parametrize("guard", BOTH)
@pytest.mark.parametrize("change", SEEN_BY_VERSION)
def test_a_change_of_a_tensor_is_noticed(guard: Guard, change: Callable[[torch.Tensor], None]) -> None:
    cache = make(guard, ones())
    change(cache["a"])
    with pytest.raises(PatternMutatedError, match="'a' was changed in place"):
        cache.get_or_create("a", ones)


@pytest.mark.parametrize("guard", BOTH)
@pytest.mark.parametrize("ask", ASKING, ids=["[]", "get", "get_or_create", "setdefault"])
def test_every_way_to_ask_notices_and_the_next_makes_it_anew(guard: Guard, ask: Callable[[Any], Any]) -> None:
    cache = make(guard, ones())
    spoilt = ask(cache)
    spoilt.add_(1)
    with pytest.raises(PatternMutatedError, match="'a'"):
        ask(cache)
    assert "a" not in cache
    assert cache.nbytes == 0
    fresh = cache.get_or_create("a", ones)
    assert fresh is not spoilt
    assert torch.equal(fresh, ones())
    assert ask(cache) is fresh


@dataclass
class Plan:
    parts: list[dict[str, tuple[torch.Tensor, ...]]]


@pytest.mark.parametrize("guard", BOTH)
def test_a_change_deep_in_a_value_is_noticed(guard: Guard) -> None:
    cache = make(guard, Plan([{"a": (ones(), ones())}, {"b": (ones(),)}]))
    cache["a"].parts[0]["a"][1].neg_()
    with pytest.raises(PatternMutatedError):
        cache["a"]


@pytest.mark.parametrize("guard", BOTH)
def test_a_change_of_the_memory_that_only_a_view_is_kept_of_is_noticed(guard: Guard) -> None:
    base = torch.zeros(8)
    cache = make(guard, base[:4])
    base.add_(1)
    with pytest.raises(PatternMutatedError):
        cache["a"]


@pytest.mark.parametrize("guard", BOTH)
def test_what_is_changed_before_it_is_stored_is_no_change(guard: Guard) -> None:
    cache = make(guard, torch.empty(4).fill_(1))
    assert torch.equal(cache["a"], ones())


@pytest.mark.parametrize("guard", BOTH)
def test_reading_is_no_change(guard: Guard) -> None:
    cache = make(guard, ones())
    value = cache["a"]
    assert value.sum() + (value[1:] * 2).sum() + value.view(2, 2).T.contiguous().sum() == 14
    assert cache["a"] is value


@pytest.mark.parametrize("guard", BOTH)
def test_a_change_is_not_asked_for_where_nothing_is_given_out(guard: Guard) -> None:
    cache = make(guard, ones())
    cache["a"].add_(1)
    assert "a" in cache
    assert len(list(cache.values())) == 1
    cache["a"] = ones()
    assert torch.equal(cache["a"], ones())


@pytest.mark.parametrize("change", [write_by_data, write_by_numpy])
def test_what_the_versions_cannot_see_the_contents_show(change: Callable[[torch.Tensor], None]) -> None:
    by_version, by_contents = make("version", ones()), make("contents", ones())
    for cache in (by_version, by_contents):
        change(cache["a"])
    assert not torch.equal(by_version["a"], ones())
    with pytest.raises(PatternMutatedError):
        by_contents["a"]


def test_without_a_guard_a_change_is_not_noticed() -> None:
    cache = make(None, ones())
    cache["a"].add_(1)
    assert torch.equal(cache["a"], ones() + 1)


def test_an_unknown_guard_is_refused() -> None:
    with pytest.raises(ValueError, match="guard: expected"):
        PatternCache(guard="checksum")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ by contents


def spoil_list(value: Any) -> None:
    value.append(1)


def spoil_dict(value: Any) -> None:
    value["new"] = 1


def spoil_item(value: Any) -> None:
    value["list"][0] = "other"


def spoil_bytes(value: Any) -> None:
    value[0] = 1


def spoil_deep(value: Any) -> None:
    value[0]["a"].clear()


MUTABLE: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    (lambda: [1, 2], spoil_list),
    (lambda: {"a": 1}, spoil_dict),
    (lambda: {"list": ["one"]}, spoil_item),
    (lambda: bytearray(4), spoil_bytes),
    (lambda: array("i", [5, 6]), spoil_bytes),
    (lambda: memoryview(bytearray(4)), spoil_bytes),
    (lambda: ({"a": [1]},), spoil_deep),
]


@pytest.mark.parametrize(("create", "spoil"), MUTABLE, ids=lambda item: getattr(item, "__name__", "").strip("<>"))
def test_the_contents_of_python_objects_are_seen(create: Callable[[], Any], spoil: Callable[[Any], None]) -> None:
    cache = make("contents", create())
    assert cache["a"] == create()
    spoil(cache["a"])
    with pytest.raises(PatternMutatedError):
        cache["a"]
    assert "a" not in cache


ODD_TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "nan": lambda: torch.full((3,), float("nan")),
    "bf16": lambda: torch.tensor([1.0, float("nan"), float("inf")], dtype=torch.bfloat16),
    "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "bool": lambda: torch.tensor([True, False]),
    "complex": lambda: torch.tensor([1 + 2j, complex("nan")]),
    "conjugated": lambda: torch.tensor([1 + 2j]).conj(),
    "negated": lambda: torch.tensor([1 + 2j]).conj().imag,
    "scalar": lambda: torch.tensor(3.0),
    "scalar of bools": lambda: torch.tensor(True),
    "empty": lambda: torch.empty(0),
    "empty in one dimension": lambda: torch.empty(2, 0, 3),
    "transposed": lambda: torch.arange(6.0).view(2, 3).T,
    "expanded": lambda: torch.ones(1, 3).expand(4, 3),
    "strided": lambda: torch.arange(8)[::2],
    "one of many": lambda: torch.arange(1.0, 9.0)[::8],
    "coo": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "csc": lambda: torch.eye(3).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "parameter": lambda: torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
@pytest.mark.parametrize("guard", [*BOTH, None])
@pytest.mark.parametrize("name", ODD_TENSORS)
def test_a_tensor_of_any_kind_is_equal_to_itself(name: str, guard: Guard | None) -> None:
    cache = make(guard, value := ODD_TENSORS[name]())
    assert cache["a"] is value
    assert cache.get_or_create("a", ones) is value


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
@pytest.mark.parametrize(
    "name", sorted(set(ODD_TENSORS) - {"empty", "empty in one dimension", "nan", "expanded", "csr", "csc", "bsr"})
)
def test_the_contents_of_a_tensor_of_any_kind_are_seen(name: str) -> None:
    cache = make("contents", value := ODD_TENSORS[name]())
    (value._values() if value.is_sparse else value).untyped_storage().fill_(0)
    with pytest.raises(PatternMutatedError):
        cache["a"]


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
@pytest.mark.parametrize("name", ["csr", "bsr"])
def test_the_contents_of_compressed_tensors_are_seen(name: str) -> None:
    cache = make("contents", value := ODD_TENSORS[name]())
    value.values().data.zero_()
    with pytest.raises(PatternMutatedError):
        cache["a"]


def test_a_nan_of_other_bits_is_a_change() -> None:
    value = torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32)
    cache = make("contents", value)
    value.data.view(torch.int32).add_(1)
    assert value.isnan().all()
    with pytest.raises(PatternMutatedError):
        cache["a"]


def test_a_tensor_that_was_resized_is_a_change() -> None:
    cache = make("contents", ones())
    cache["a"].data = torch.ones(5)
    with pytest.raises(PatternMutatedError):
        cache["a"]


def test_a_tensor_of_another_type_is_a_change() -> None:

    cache = make("contents", torch.zeros(4))
    cache["a"].data = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(PatternMutatedError):
        cache["a"]


def test_a_value_that_contains_itself_is_watched() -> None:
    value: list[Any] = [1]
    value.append(value)
    cache = make("contents", value)
    assert cache["a"] is value
    value[0] = 2
    with pytest.raises(PatternMutatedError):
        cache["a"]


def test_a_float_that_is_no_number_is_equal_to_itself() -> None:
    cache = make("contents", [float("nan"), {"a": float("nan")}])
    assert cache["a"] is cache["a"]


# ------------------------------------------------------------------------------------------------ numpy


@pytest.mark.parametrize("guard", BOTH)
def test_arrays_become_read_only(guard: Guard) -> None:
    numpy = pytest.importorskip("numpy")
    value = {"deep": [numpy.arange(4)]}
    cache = make(guard, value)
    with pytest.raises(ValueError, match="read-only"):
        cache["a"]["deep"][0][1] = 7
    assert cache["a"] is value


def test_arrays_without_a_guard_stay_writable() -> None:
    numpy = pytest.importorskip("numpy")
    cache = make(None, numpy.zeros(2))
    cache["a"][0] = 1
    assert cache["a"].tolist() == [1, 0]


def test_the_memory_of_an_array_that_is_written_in_another_way_is_seen_by_its_contents() -> None:
    numpy = pytest.importorskip("numpy")
    for dtype in ("float32", "int8", "complex64", object):
        base = numpy.zeros((3, 4), dtype=dtype)
        by_version, by_contents = make("version", base[::2]), make("contents", base[::2])
        base[0, 0] = 1
        assert by_version["a"][0, 0] == 1
        with pytest.raises(PatternMutatedError):
            by_contents["a"]


# ------------------------------------------------------------------------------------------------ gradients


def store_by_put(cache: PatternCache[str, Any], value: Any) -> None:
    cache.put("a", value)


def store_by_create(cache: PatternCache[str, Any], value: Any) -> None:
    cache.get_or_create("a", lambda: value)


both_ways = pytest.mark.parametrize("store", [store_by_put, store_by_create])


@both_ways
@pytest.mark.parametrize("guard", [*BOTH, None])
def test_an_inference_tensor_is_refused(store: Callable[[Any, Any], None], guard: Guard | None) -> None:
    with torch.inference_mode():
        value = ones()
    cache: PatternCache[str, Any] = PatternCache(guard=guard)
    with pytest.raises(TypeError, match=r"'a' has an inference tensor.*clone it"):
        store(cache, [{"deep": value}])
    assert "a" not in cache


@both_ways
@pytest.mark.parametrize("guard", [*BOTH, None])
def test_a_tensor_with_a_graph_is_refused(store: Callable[[Any, Any], None], guard: Guard | None) -> None:
    value = ones().requires_grad_() * 2
    cache: PatternCache[str, Any] = PatternCache(guard=guard)
    with pytest.raises(TypeError, match=r"'a' has a tensor with a graph.*detach"):
        store(cache, (value,))
    assert "a" not in cache
    store(cache, value.detach())
    assert "a" in cache


GRADIENT_MODES: list[Callable[[], AbstractContextManager[Any]]] = [
    torch.inference_mode,
    torch.no_grad,
    torch.enable_grad,
]


@pytest.mark.parametrize("guard", [*BOTH, None])
@pytest.mark.parametrize("mode", GRADIENT_MODES)
def test_whatever_mode_it_was_made_in_everybody_can_train_with_it(
    mode: Callable[[], AbstractContextManager[Any]], guard: Guard | None
) -> None:
    weight = torch.full((4,), 3.0, requires_grad=True)
    cache: PatternCache[str, Any] = PatternCache(guard=guard)
    with mode():
        made = cache.get_or_create("a", lambda: weight * 2)
        found = cache.get_or_create("a", ones)
    assert found is made
    assert not made.is_inference()
    assert made.grad_fn is None
    assert not made.requires_grad
    (cache["a"] * weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((4,), 6.0))
    assert cache["a"] is made, "training is no change"


@pytest.mark.parametrize("mode", GRADIENT_MODES)
def test_the_mode_of_who_asks_is_as_before(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    cache: PatternCache[str, Any] = PatternCache()
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        cache.get_or_create("a", ones)
        with pytest.raises(ZeroDivisionError):
            cache.get_or_create("b", lambda: 1 / 0)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


def test_a_leaf_that_wants_a_gradient_can_be_shared() -> None:
    cache = make("version", torch.ones(3, requires_grad=True))
    cache["a"].sum().backward()
    assert torch.equal(cache["a"].grad, torch.ones(3))


def test_a_change_under_inference_mode_is_seen() -> None:
    cache = make("version", ones())
    with torch.inference_mode():
        cache["a"].add_(1)
    with pytest.raises(PatternMutatedError):
        cache["a"]
