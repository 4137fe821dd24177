"""What values weigh: each piece of memory once, however many views, containers and entries share it."""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from mmap import mmap
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from dilated_pattern_cache import PatternCache
from dilated_pattern_cache.storage.shelf import Ledger
from dilated_pattern_cache.values.leaves import charges_of, leaves


def weight(value: Any) -> int:
    return sum(charges_of(value).values())


def floats(number: int) -> Tensor:
    """A tensor of 4 bytes for each."""
    return torch.zeros(number)


def recounted(values: Iterable[Iterable[Tensor]]) -> int:
    """The bytes of all storages of these tensors, by a plain walk."""
    storages = {}
    for value in values:
        for tensor in value:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# ------------------------------------------------------------------------------------------ tensors


def test_a_tensor_weighs_its_storage() -> None:
    assert weight(floats(10)) == 40
    assert weight(torch.zeros(3, 5, dtype=torch.int64)) == 120
    assert weight(torch.zeros(7, dtype=torch.bool)) == 7
    assert weight(torch.tensor(1.0, dtype=torch.float64)) == 8
    assert weight(torch.nn.Parameter(floats(10))) == 40
    assert weight(torch.zeros(0)) == 0


def test_views_of_one_storage_are_one_piece_of_its_whole_size() -> None:
    base = floats(100)
    views = [base[3:5], base.view(10, 10).t(), base.detach(), base[::7], base.expand(4, 100), base.unbind()[99]]
    for view in views:
        assert charges_of(view) == charges_of(base)
    assert weight(views) == weight([base, *views]) == 400
    assert weight([base, base.clone()]) == 800
    assert weight(torch.zeros(1).expand(1000)) == 4


def test_complex_tensors_and_their_parts_are_one_piece() -> None:
    z = torch.zeros(4, dtype=torch.complex64)
    assert weight([z, z.real, z.imag, z.conj()]) == 32


SPARSE: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
    "bsr": lambda x: x.to_sparse_bsr((2, 2)),
    "bsc": lambda x: x.to_sparse_bsc((2, 2)),
}


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("convert", SPARSE.values(), ids=list(SPARSE))
def test_a_sparse_tensor_weighs_its_indices_and_values(convert: Callable[[Tensor], Tensor]) -> None:
    dense = torch.zeros(4, 6)
    dense[0, 0] = dense[1, 1] = dense[3, 4] = 1.0
    sparse = convert(dense)
    parts = sparse_parts(sparse)
    assert weight(sparse) == recounted([parts]) > 0
    assert weight([sparse, sparse, *parts, sparse.detach()]) == weight(sparse)
    cache: PatternCache[str, Tensor] = PatternCache()
    cache["a"] = sparse
    assert cache["a"] is sparse
    assert cache.nbytes == weight(sparse)


def sparse_parts(sparse: Tensor) -> list[Tensor]:
    if sparse.layout is torch.sparse_coo:
        return [sparse._indices(), sparse._values()]
    by_row = sparse.layout in (torch.sparse_csr, torch.sparse_bsr)
    pointers, indices = ("crow_indices", "col_indices") if by_row else ("ccol_indices", "row_indices")
    return [getattr(sparse, pointers)(), getattr(sparse, indices)(), sparse.values()]


def test_a_jagged_tensor_weighs_its_values_and_offsets() -> None:
    values, offsets = floats(10), torch.tensor([0, 4, 10])
    jagged = torch.nested.nested_tensor_from_jagged(values, offsets)
    assert charges_of(jagged) == charges_of([values, offsets])
    assert weight(jagged) == 40 + 24


class Pair(Tensor):
    """A wrapper around two tensors, as quantisation has them."""

    one: Tensor
    other: Tensor

    @staticmethod
    def __new__(cls, one: Tensor, other: Tensor) -> Pair:  # noqa: PYI034
        return torch.Tensor._make_wrapper_subclass(cls, one.shape, dtype=one.dtype, device=one.device)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, one: Tensor, other: Tensor) -> None:
        self.one, self.other = one, other

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["one", "other"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} is not needed")


def test_a_wrapper_weighs_what_it_wraps() -> None:
    one, other = floats(10), floats(100)
    assert weight(Pair(one, other)) == 440
    assert weight([one, Pair(one, other), other[3:]]) == 440
    assert weight(Pair(Pair(one, other), one[2:])) == 440
    cache: PatternCache[str, Tensor] = PatternCache()
    cache["a"] = Pair(one, other)
    cache["b"] = other
    assert cache.nbytes == 440


def test_meta_tensors_weigh_nothing_and_are_not_kept() -> None:
    meta = torch.empty(1000, device="meta")
    assert charges_of(meta) == charges_of([meta, meta[3:], torch.empty(3, 3, device="meta")]) == {}
    assert weight([meta, floats(10)]) == 40
    cache: PatternCache[str, Tensor] = PatternCache()
    with pytest.raises(ValueError, match="the value of 'a' cannot be stored: it has tensors without memory"):
        cache["a"] = meta
    assert cache.get_or_create("a", lambda: meta) is meta
    assert len(cache) == 0
    assert cache.info().rejections == 1


# ------------------------------------------------------------------------------------------ arrays and buffers


def test_an_array_weighs_what_its_base_does() -> None:
    base = np.zeros((10, 10), np.float32)
    views = [base[3:5], base.T, base.reshape(-1)[::7], np.broadcast_to(base, (5, 10, 10)), base.view(np.uint8)]
    for view in views:
        assert charges_of(view) == charges_of(base)
    assert weight(views) == weight([base, *views]) == 400
    assert weight([base, base.copy()]) == 800
    assert weight(np.zeros(0)) == 0
    assert weight(np.float64(3)) == 0


def test_windows_of_an_array_weigh_what_it_does() -> None:
    base = np.zeros(1000)
    windows = np.lib.stride_tricks.sliding_window_view(base, 100)
    assert weight([base, windows]) == 8000
    assert weight(windows) == 8000
    assert weight(windows[3:5]) == 8000


def test_an_array_over_a_tensor_and_a_tensor_over_an_array_are_one_piece() -> None:
    tensor = floats(10)
    assert charges_of([tensor, tensor.numpy(), tensor.numpy()[3:]]) == charges_of(tensor)
    made = np.zeros(10)
    assert charges_of([made, torch.from_numpy(made), torch.from_numpy(made)[3:]]) == charges_of(made)
    assert charges_of([made[3:], torch.from_numpy(made)]) == charges_of(made)


def test_an_array_over_a_part_of_a_tensor_weighs_the_tensor() -> None:
    tensor = floats(10)
    for view in (tensor[5:].numpy(), tensor[5:].numpy()[1:], tensor.view(2, 5).t()[1].numpy()):
        assert charges_of(view) == charges_of(tensor)
    assert weight([tensor, tensor[5:].numpy()]) == 40


BUFFERS: dict[str, tuple[Any, int]] = {
    "bytes": (bytes(10), 10),
    "bytearray": (bytearray(10), 10),
    "array": (array("d", range(10)), 80),
    "memoryview": (memoryview(bytearray(10)), 10),
    "memoryview-cast": (memoryview(bytearray(16)).cast("d"), 16),
    "empty": (b"", 0),
}


@pytest.mark.parametrize(("buffer", "nbytes"), BUFFERS.values(), ids=list(BUFFERS))
def test_a_buffer_weighs_its_bytes_once(buffer: Any, nbytes: int) -> None:
    assert weight(buffer) == weight([buffer, buffer, {"again": (buffer,)}]) == nbytes


@pytest.mark.parametrize(
    "base", [bytes(100), bytearray(100), array("b", bytes(100)), np.zeros(100, np.uint8), mmap(-1, 100)], ids=type
)
def test_views_of_a_buffer_are_one_piece_of_its_whole_size(base: Any) -> None:
    views = [memoryview(base), memoryview(base)[3:5], memoryview(base)[3:][::2]]
    for view in views:
        assert weight(view) == 100
    assert weight(views) == weight(views[::-1]) == 100
    if not isinstance(base, mmap):  # the object itself is no buffer to look for
        assert weight([views, base]) == weight([base, views]) == 100


@pytest.mark.parametrize("base", [bytes(100), bytearray(100), array("b", bytes(100))], ids=type)
def test_arrays_over_a_buffer_are_one_piece_with_it(base: Any) -> None:
    arrays = [np.frombuffer(base, np.uint8, count) for count in (10, 100)]
    for view in arrays:
        assert weight(view) == 100
    assert weight([arrays, base]) == weight([memoryview(base)[5:], arrays[::-1]]) == 100


class OnAGpu:
    """As much of another library's array as a cache looks at."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = address

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"data": (self.address, False)}


def test_arrays_of_other_libraries_weigh_what_they_say() -> None:
    assert weight([OnAGpu(1000, 40), OnAGpu(2000, 8), OnAGpu(1000, 40)]) == 48


# ------------------------------------------------------------------------------------------ containers


class Named(NamedTuple):
    """A tuple with names."""

    indices: Tensor
    size: int


@dataclass
class Data:
    """A dataclass."""

    indices: Tensor
    inner: Any = None


@dataclass(frozen=True, slots=True)
class Frozen:
    """A dataclass with slots."""

    indices: Tensor
    inner: Any = None


class Slots:
    """Has slots: one by itself, one that Python renames, one that is not set."""

    __slots__ = ("__hidden", "missing", "shown")

    def __init__(self, shown: Any, hidden: Any) -> None:
        self.shown, self.__hidden = shown, hidden


class MoreSlots(Slots):
    """Adds a single slot to those it inherits."""

    __slots__ = "more"

    def __init__(self, shown: Any, hidden: Any, more: Any) -> None:
        super().__init__(shown, hidden)
        self.more = more


class SlotsAndMore(MoreSlots):
    """Has a dictionary, too."""

    def __init__(self, shown: Any, hidden: Any, more: Any, attribute: Any) -> None:
        super().__init__(shown, hidden, more)
        self.attribute = attribute


Old = namedtuple("Old", "indices size")  # noqa: PYI024

ONE, TWO, THREE, FOUR = floats(1), floats(10), floats(100), floats(1000)
CONTAINERS: dict[str, tuple[Any, int]] = {
    "tuple": ((ONE, TWO), 44),
    "list": ([ONE, [TWO, [THREE]]], 444),
    "set": ({ONE, TWO}, 44),
    "frozenset": (frozenset([ONE, TWO]), 44),
    "deque": (deque([ONE, TWO]), 44),
    "dict": ({"a": ONE, "b": {"c": TWO}}, 44),
    "ordered-dict": (OrderedDict(a=ONE, b=TWO), 44),
    "keys-not": ({b"a key is no part of the value": ONE}, 4),
    "named-tuple": (Named(THREE, 3), 400),
    "old-named-tuple": (Old(THREE, 3), 400),
    "dataclass": (Data(ONE, Data(TWO, Frozen(THREE))), 444),
    "slots": (Slots(ONE, TWO), 44),
    "more-slots": (MoreSlots(ONE, TWO, THREE), 444),
    "slots-and-more": (SlotsAndMore(ONE, TWO, THREE, FOUR), 4444),
    "object": (SimpleNamespace(a=ONE, b=[TWO]), 44),
    "module-of-torch": (torch.nn.Linear(10, 5, bias=True), 220),
    "same-twice": ([ONE, ONE, (ONE,), ONE.view(1, 1)], 4),
    "mixed": ([ONE, b"1234", np.zeros(2), array("b", b"12")], 4 + 4 + 16 + 2),
    "functions-not": ((lambda: ONE, partial(torch.add, ONE), torch.nn.Linear, torch, len, [].append), 0),
    "plain-not": ((1, 2.0, 3j, "text", None, True, range(9), slice(1), int), 0),
}


@pytest.mark.parametrize(("value", "nbytes"), CONTAINERS.values(), ids=list(CONTAINERS))
def test_what_is_in_containers_and_objects_counts(value: Any, nbytes: int) -> None:
    assert weight(value) == nbytes


def test_a_value_that_contains_itself_is_no_endless_walk() -> None:
    cycle: list[Any] = [floats(10)]
    cycle.append({"again": cycle})
    data = Data(floats(10))
    data.inner = [data, cycle]
    assert weight(cycle) == 40
    assert weight(data) == 80


def test_a_value_may_be_as_deep_as_it_likes() -> None:
    value: Any = floats(10)
    for _ in range(100_000):
        value = (value,)
    assert weight(value) == 40
    while isinstance(value, tuple):  # one by one: Python frees what is nested so deep by itself, but slowly
        (value,) = value


def test_each_leaf_is_found_once() -> None:
    buffer, made = b"bytes", np.zeros(3)
    found = leaves([ONE, (ONE, {"a": buffer}), Data(ONE, made), buffer])
    assert len(found) == 3
    assert {id(leaf) for leaf in found} == {id(ONE), id(buffer), id(made)}


def test_a_block_mask_weighs_its_tensors() -> None:
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 256, 256, device="cpu", BLOCK_SIZE=64)
    tensors = [part for part in vars(mask).values() if isinstance(part, Tensor)]
    assert len(tensors) >= 4
    assert weight(mask) == recounted([tensors]) > 0
    cache: PatternCache[str, Any] = PatternCache()
    assert cache.get_or_create("causal", lambda: mask) is mask
    assert cache["causal"] is mask
    assert cache.nbytes == weight(mask)


# ------------------------------------------------------------------------------------------ between entries


def test_memory_that_entries_share_counts_once_and_goes_with_the_last() -> None:
    base, own = floats(100), floats(10)
    cache: PatternCache[str, Any] = PatternCache()
    cache["whole"] = base
    cache["part"] = base[:10]
    cache["with its own"] = (base.t(), own)
    assert cache.nbytes == cache.info().nbytes == 440
    assert {entry.key: entry.nbytes for entry in cache.snapshot()} == {"whole": 400, "part": 400, "with its own": 440}
    del cache["whole"]
    assert cache.nbytes == 440
    cache["with its own"] = own
    assert cache.nbytes == 440
    assert cache.pop("part") is not None
    assert cache.nbytes == 40
    cache.clear()
    assert cache.nbytes == 0


def test_a_view_of_what_is_there_displaces_nothing() -> None:
    base = floats(100)
    cache: PatternCache[Any, Tensor] = PatternCache(None, 400)
    for number in range(20):
        cache[number] = base[number:]
    assert (len(cache), cache.nbytes, cache.info().evictions) == (20, 400, 0)
    cache["other"] = floats(1)  # all that share must leave before anything is free
    assert list(cache) == ["other"]
    assert cache.info().evictions == 20


def test_what_is_pinned_and_shared_leaves_room() -> None:
    base = floats(100)
    cache: PatternCache[str, Any] = PatternCache(None, 440)
    cache["base"] = base
    cache.pin("base")
    cache["view"] = (base[3:], floats(10))
    assert cache.nbytes == 440
    with pytest.raises(ValueError, match="with the pinned entries it takes 444 bytes, more than the limit of 440"):
        cache["more"] = floats(11)
    assert set(cache) == {"base", "view"}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_nothing_is_left_of_memory_of_which_entries_say_different_sizes(order: tuple[int, ...]) -> None:
    buffer = bytearray(10)
    cache: PatternCache[int, Any] = PatternCache()
    for key in range(3):
        cache[key] = [buffer]
        buffer.extend(bytes(10))  # the next entry finds it larger
    for key in order:
        assert 10 <= cache.nbytes <= 30
        del cache[key]
    assert cache.nbytes == 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_views_of_one_buffer_in_several_entries_count_it_once(order: tuple[int, ...]) -> None:
    base = bytearray(100)
    cache: PatternCache[int, Any] = PatternCache()
    cache[0], cache[1] = memoryview(base)[:10], memoryview(base)
    assert cache.nbytes == 100
    del cache[order[0]]
    assert cache.nbytes == 100
    del cache[order[1]]
    assert cache.nbytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("limits", [(None, None), (40, None), (None, 20_000)], ids=["unlimited", "entries", "bytes"])
def test_bytes_are_exact_after_many_operations(limits: tuple[int | None, int | None]) -> None:
    random = Random(2)
    shared = [floats(random.randrange(1, 500)) for _ in range(60)]
    cache: PatternCache[int, tuple[Tensor, ...]] = PatternCache(*limits, guard=None)

    def value() -> tuple[Tensor, ...]:
        views = [tensor[random.randrange(len(tensor)) :] for tensor in random.choices(shared, k=random.randrange(4))]
        return (*views, floats(random.randrange(1, 100))) if random.random() < 0.3 else tuple(views)

    for turn in range(20_000):
        key, choice = random.randrange(80), random.random()
        if choice < 0.5:
            cache[key] = value()
        elif choice < 0.75:
            cache.get_or_create(key, value)
        elif choice < 0.95:
            cache.pop(key, None)
        elif cache:
            cache.popitem()
        if random.random() < 0.001:
            shared[random.randrange(60)] = floats(random.randrange(1, 500))
        if turn % 100 == 0:
            assert cache.nbytes == recounted(cache.values())
    assert cache.nbytes == recounted(cache.values())
    while cache:
        cache.popitem()
    assert cache.nbytes == 0


def test_a_ledger_is_that_of_its_entries() -> None:
    random, ledger = Random(3), Ledger()
    sizes = {memory: random.randrange(100) for memory in range(20)}
    entries: list[dict[int, int]] = []
    for _ in range(1500):
        if random.random() < 0.55 or not entries:
            entries.append({memory: sizes[memory] for memory in random.sample(range(20), 4)})
            ledger.add(entries[-1])
        else:
            ledger.remove(entries.pop(random.randrange(len(entries))))
        held = {memory for entry in entries for memory in entry}
        assert ledger.total == sum(sizes[memory] for memory in held) == Ledger(entries).total


# ------------------------------------------------------------------------------------------ size_of


def test_size_of_replaces_all_other_counting() -> None:
    cache: PatternCache[str, Any] = PatternCache(None, 10, size_of=len)
    cache["a"] = "12345"
    cache["b"] = [floats(1000)]
    shared = "1234"
    cache["c"] = shared
    assert cache.nbytes == 10
    cache["d"] = shared  # nothing that size_of counts is shared
    assert cache.nbytes == 9
    assert set(cache) == {"b", "c", "d"}


def test_size_of_is_called_once_for_a_value() -> None:
    seen: list[Any] = []
    cache: PatternCache[str, str] = PatternCache(size_of=lambda value: seen.append(value) or 3)
    cache["a"] = "put"
    assert cache.get_or_create("b", lambda: "made") == "made"
    assert cache["a"] + cache["b"] == "putmade"
    assert cache.nbytes == cache.info().nbytes == 6
    assert seen == ["put", "made"]


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "float": (1.0, TypeError, "size_of: expected a function that returns bytes as an int, got one that returns 1.0"),
    "none": (None, TypeError, "size_of: expected a function that returns bytes as an int, got one that returns None"),
    "bool": (True, TypeError, "size_of: expected a function that returns bytes as an int, got one that returns True"),
    "text": ("12", TypeError, "size_of: expected a function that returns bytes as an int, got one that returns '12'"),
    "negative": (-1, ValueError, "size_of: expected a function that returns at least 0, got one that returns -1"),
}


@pytest.mark.parametrize(("size", "kind", "message"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_size_is_an_error_and_changes_nothing(size: Any, kind: type[Exception], message: str) -> None:
    cache: PatternCache[str, Any] = PatternCache(size_of=lambda value: 1 if value == "right" else size)
    cache["a"] = "right"
    stores: list[Callable[[str], Any]] = [
        lambda key: cache.put(key, "wrong"),
        lambda key: cache.update({key: "wrong"}),
        lambda key: cache.setdefault(f"{key} anew", "wrong"),
        lambda key: cache.get_or_create(f"{key} anew", lambda: "wrong"),
    ]
    for store in stores:
        with pytest.raises(kind) as caught:
            store("a")
        assert str(caught.value) == message
        assert dict(cache.items()) == {"a": "right"}
        assert cache.nbytes == 1


def test_what_size_of_raises_reaches_the_caller_and_changes_nothing() -> None:
    cache: PatternCache[str, Any] = PatternCache(size_of=len)
    cache["a"] = "text"
    with pytest.raises(TypeError, match="has no len"):
        cache["a"] = 5
    with pytest.raises(TypeError, match="has no len"):
        cache.get_or_create("b", lambda: 5)
    assert dict(cache.items()) == {"a": "text"}
    assert cache.get_or_create("b", lambda: "more") == "more"
    assert cache.nbytes == 8
