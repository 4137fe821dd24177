"""Copies on other devices. The other device is host memory by another name; a test says when its work is done."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dilated_pattern_cache import Eviction, PatternCache, PatternMutatedError
from dilated_pattern_cache.values import devices
from dilated_pattern_cache.values.devices import canonical, copied, moved

CPU, META = torch.device("cpu"), torch.device("meta")
PLACES = {"far": torch.device("cpu", 1), "farther": torch.device("cpu", 2)}  # tensors there say "cpu" of themselves
COUNT, NBYTES = 16, 64  # elements, and bytes, of a tensor
SECONDS = 60  # far more than any of this takes


# ------------------------------------------------------------------------------------------------ a far device


class FarEvent(NamedTuple):
    """Done when all work that ``stream`` was given before is."""

    device: FarDevice
    stream: int
    mark: int

    def query(self) -> bool:
        assert not self.device.capturing(), "an event asked during a capture breaks the capture"
        return not any(stream == self.stream and number < self.mark for number, stream, _ in self.device.work)

    def synchronize(self) -> None:
        self.device.run()


class FarDevice:
    """Streams 0, 1, 2, ...: what they are given is done when a test calls ``run``. See ``streams.Streams``."""

    def __init__(self) -> None:
        self.work: list[tuple[int, int, Callable[[], object]]] = []
        self.waits: list[tuple[int, int]] = []  # (who waited, for whose work)
        self.held: list[tuple[int, int]] = []  # (identity of a tensor, stream)
        self.count = 0
        self.local = threading.local()

    @contextmanager
    def stream(self, stream: int) -> Iterator[None]:
        before, self.local.stream = self.current(), stream
        try:
            yield
        finally:
            self.local.stream = before

    @contextmanager
    def capture(self) -> Iterator[None]:
        self.local.capturing = True
        try:
            yield
        finally:
            self.local.capturing = False

    def run(self) -> None:
        while self.work:
            _, _, call = self.work.pop(0)
            call()

    def current(self) -> int:
        return getattr(self.local, "stream", 0)

    def capturing(self) -> bool:
        return getattr(self.local, "capturing", False)

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        arrived = torch.zeros_like(tensor)
        self.count += 1
        self.work.append((self.count, self.current(), lambda: arrived.data.copy_(tensor)))
        return arrived

    def record(self, stream: int) -> FarEvent:
        return FarEvent(self, stream, self.count + 1)

    def wait(self, stream: int, event: FarEvent) -> None:
        self.waits.append((stream, event.stream))

    def hold(self, tensor: torch.Tensor, stream: int) -> None:
        self.held.append((id(tensor), stream))


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> FarDevice:
    """The device "far"; and "farther", where copies are waited for."""
    device = FarDevice()

    def streams_of(place: torch.device) -> FarDevice | None:
        return device if place == PLACES["far"] else None

    def cloned(value: Any, place: torch.device) -> Any:
        return devices._Move(place, torch.clone)(value)

    monkeypatch.setattr(
        devices, "canonical", lambda name: PLACES.get(name) or (name if name in PLACES.values() else canonical(name))
    )
    monkeypatch.setattr(devices, "streams_of", streams_of)
    monkeypatch.setattr(devices, "moved", cloned)
    return device


def numbers() -> torch.Tensor:
    return torch.arange(1.0, COUNT + 1)


def in_threads(count: int, call: Callable[[int], None]) -> None:
    """Call it in many threads at once, with their numbers, and see that all come to an end."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            barrier.wait(SECONDS)
            call(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


# ------------------------------------------------------------------------------------------------ which device


@pytest.mark.parametrize("name", ["cpu", "cpu:0", CPU, torch.device("cpu", 0)], ids=str)
def test_the_host_has_one_name(name: torch.device | str) -> None:
    assert canonical(name) == CPU
    assert canonical(name).index is None


def test_what_is_no_device_is_refused() -> None:
    with pytest.raises(ValueError, match="'nonsense'"):
        canonical("nonsense")
    with pytest.raises(ValueError, match="'cuda:-1'"):
        canonical("cuda:-1")
    with pytest.raises(ValueError, match="meta"):
        canonical("meta")
    for thing in (3, None, ["cpu"]):
        with pytest.raises(TypeError, match=r": expected a torch\.device"):
            canonical(thing)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "xla"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"'{name}' is not available"):
        canonical(name)


def test_the_current_device_is_meant_where_no_index_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(devices, "_known", {})
    assert [canonical("cuda"), canonical(torch.device("cuda"))] == [torch.device("cuda", 1)] * 2
    current[0] = 0
    assert canonical("cuda") == canonical("cuda:0") == torch.device("cuda", 0)
    assert canonical("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(RuntimeError, match="sees 2 of its kind"):
        canonical("cuda:2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused_before_any_work() -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    made: list[str] = []

    def create() -> torch.Tensor:
        made.append("value")
        return numbers()

    for device in ("cuda", "nonsense"):
        with pytest.raises((RuntimeError, ValueError), match=device):
            cache.get_or_create("a", create, device=device)
        with pytest.raises((RuntimeError, ValueError), match=device):
            asyncio.run(cache.aget_or_create("a", create, device=device))
    assert made == []


# ------------------------------------------------------------------------------------------------ what is moved


class Pair(NamedTuple):
    one: Any
    other: Any


@dataclass
class Record:
    tensor: Any
    name: str = "a"
    derived: Any = field(init=False, default=None)


@dataclass(frozen=True)
class Frozen:
    tensor: Any
    derived: Any = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "derived", self.tensor + 1)
        object.__setattr__(self, "hidden", self.tensor + 2)


@dataclass(frozen=True, slots=True)
class Slotted:
    tensor: Any
    name: str = "a"


class Titled(dict[str, Any]):
    title = "none"


class Listed(list[Any]):
    title = "none"


class OnlyAMapping(Mapping[str, Any]):
    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = dict(parts)

    def __getitem__(self, name: str) -> Any:
        return self.parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def all_on(value: Any, device: torch.device) -> bool:
    tensors = [leaf for leaf in devices.leaves(value) if isinstance(leaf, torch.Tensor)]
    assert tensors
    return all(tensor.device == device for tensor in tensors)


MOVABLE = [
    numbers(),
    (numbers(), 1),
    Pair(numbers(), "text"),
    [numbers(), None],
    {"a": numbers(), "b": 3},
    {"deep": [(Pair({"a": numbers()}, 1),)]},
    OrderedDict(b=numbers(), a=numbers()),
    defaultdict(list, a=numbers()),
    MappingProxyType({"a": numbers()}),
    OnlyAMapping({"a": numbers()}),
    deque([numbers()], maxlen=3),
    {numbers()},
    frozenset({numbers()}),
    torch.sort(numbers()),
    Record(numbers()),
    Frozen(numbers()),
    Slotted(numbers()),
    torch.eye(3).to_sparse(),
]


@pytest.mark.parametrize("value", MOVABLE, ids=lambda value: type(value).__name__)
def test_every_tensor_in_it_moves_and_the_rest_is_as_before(value: Any) -> None:
    twin = moved(value, META)
    assert type(twin) is type(value)
    assert twin is not value
    assert all_on(twin, META)
    assert all_on(value, CPU), "the value itself is as before"
    assert [leaf.shape for leaf in devices.leaves(twin)] == [leaf.shape for leaf in devices.leaves(value)]


def test_everything_but_tensors_is_kept() -> None:
    names, function = ["a"], len
    value = {"names": names, "call": function, "tensor": numbers(), "pair": Pair(1, 2)}
    twin = moved(value, META)
    assert list(twin) == list(value)
    assert twin["names"] is names
    assert twin["call"] is function
    assert twin["pair"] is value["pair"]


def test_subclasses_of_containers_keep_what_else_they_are() -> None:
    titled, listed, by_default = Titled(a=numbers()), Listed([numbers()]), defaultdict(list, a=numbers())
    titled.title = listed.title = "some"
    assert moved(titled, META).title == moved(listed, META).title == "some"
    assert moved(by_default, META).default_factory is list
    assert moved(deque([numbers()], maxlen=3), META).maxlen == 3


def test_fields_without_init_and_hidden_ones_move_along() -> None:
    record = Record(numbers())
    record.derived = numbers()
    assert all_on(moved(record, META).derived, META)
    twin = moved(Frozen(numbers()), META)
    assert all_on([twin.tensor, twin.derived, twin.hidden], META)  # type: ignore[attr-defined]


def test_what_is_one_object_stays_one_object() -> None:
    tensor = numbers()
    inner = [tensor]
    twin = moved({"a": tensor, "b": inner, "c": inner, "d": Pair(tensor, 1)}, META)
    assert twin["a"] is twin["b"][0] is twin["d"].one
    assert twin["b"] is twin["c"]


@pytest.mark.parametrize(
    "value",
    [3, "text", (1, [2]), {"a": len}, Record(3), object()],
    ids=["int", "text", "tuple", "dict", "record", "object"],
)
def test_a_value_without_tensors_is_itself_everywhere(value: Any) -> None:
    assert moved(value, META) is value


def test_what_is_there_already_is_itself() -> None:
    value = {"a": [numbers()], "b": object()}
    assert moved(value, CPU) is value
    there, elsewhere = torch.ones(2, device=META), numbers()
    assert moved((there, elsewhere), META)[0] is there


def test_a_block_mask_moves_itself() -> None:
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 256, 256, device="cpu")
    twin = moved([mask], META)[0]
    assert isinstance(twin, BlockMask)
    assert twin.kv_indices.device == META
    assert mask.kv_indices.device == CPU


def test_what_moves_itself_in_place_leaves_the_value_where_it_is() -> None:
    class Movable:
        def __init__(self) -> None:
            self.tensor = numbers()

        def to(self, device: torch.device) -> Movable:
            self.tensor = self.tensor.to(device)
            return self

    for value in (Movable(), torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2))):
        twin = moved(value, META)
        assert all_on(twin, META)
        assert all_on(value, CPU)


def test_tensors_in_an_object_that_cannot_be_rebuilt_are_a_type_error() -> None:
    class Opaque:
        def __init__(self, item: Any) -> None:
            self.item = item

    for value in (Opaque(numbers()), [Opaque([numbers()])], {"a": Opaque({"b": numbers()})}):
        with pytest.raises(TypeError, match="Opaque"):
            moved(value, META)
    assert moved(harmless := Opaque(3), META) is harmless


def test_an_object_may_leave_on_the_host_what_belongs_there() -> None:
    twin = moved(torch.nn.utils.rnn.pack_sequence([numbers()]), META)
    assert (twin.data.device, twin.batch_sizes.device) == (META, CPU)


def test_a_value_that_contains_itself_is_a_type_error() -> None:
    value: list[Any] = [numbers()]
    value.append(value)
    with pytest.raises(TypeError, match="contains itself"):
        moved(value, META)
    assert moved(value, CPU) is value


def test_a_mapping_that_cannot_be_built_from_one_is_a_type_error() -> None:
    class Peculiar(OnlyAMapping):
        def __init__(self) -> None:
            super().__init__({"a": numbers()})

    with pytest.raises(TypeError, match="Peculiar"):
        moved(Peculiar(), META)


def test_a_copy_has_no_graph_and_is_no_inference_tensor() -> None:
    weight = torch.nn.Parameter(numbers().double())
    with torch.enable_grad():
        twin, arrive = copied(weight, META)
    assert (twin.grad_fn, arrive) == (None, None)
    with torch.inference_mode():
        twin, _ = copied(numbers(), META)
    assert not twin.is_inference()


# ------------------------------------------------------------------------------------------------ streams


def test_the_stream_that_copied_waits_for_nothing(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    with far.stream(3):
        copy = cache.get_or_create("a", numbers, device="far")
        assert cache.get_or_create("a", numbers, device="far") is copy
    assert copy.eq(0).all(), "nobody waited for it"
    assert (far.waits, far.held) == ([], [])
    far.run()
    assert torch.equal(copy, numbers())


def test_another_stream_waits_for_the_copy_until_it_was_seen_to_be_done(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    with far.stream(3):
        copy = cache.get_or_create("a", numbers, device="far")
    with far.stream(4):
        assert cache.get_or_create("a", numbers, device="far") is copy
        assert cache.get("a", device="far") is copy
    assert far.waits == [(4, 3), (4, 3)]
    far.run()
    with far.stream(4):
        cache.get("a", device="far")
    with far.stream(5):
        cache.get("a", device="far")
    assert far.waits == [(4, 3), (4, 3)]


def test_the_allocator_is_told_of_each_stream_once_and_of_every_tensor(far: FarDevice) -> None:
    cache: PatternCache[str, Any] = PatternCache()
    copy = cache.get_or_create("a", lambda: [numbers(), {"b": numbers()}], device="far")
    for stream in (0, 4, 5, 4, 0):
        with far.stream(stream):
            cache.get("a", device="far")
    assert sorted(far.held) == sorted((id(part), stream) for part in (copy[0], copy[1]["b"]) for stream in (4, 5))


def test_who_waited_for_the_one_who_copied_is_on_a_stream_that_waits_too(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    cache["a"] = numbers()
    copying, found = threading.Event(), []
    send = far.send

    def slow_send(tensor: torch.Tensor) -> torch.Tensor:
        copying.set()
        assert waiter_waits.wait(SECONDS)
        return send(tensor)

    far.send = slow_send  # type: ignore[method-assign]
    waiter_waits = threading.Event()

    def look(stream: int) -> None:
        with far.stream(stream):
            found.append(cache.get("a", device="far"))

    author = threading.Thread(target=look, args=(1,), daemon=True)
    author.start()
    assert copying.wait(SECONDS)
    waiter = threading.Thread(target=look, args=(2,), daemon=True)
    waiter.start()
    while not cache._store.tiers[str(PLACES["far"])].waits.value:
        assert waiter.is_alive()
        waiter.join(0.001)
    waiter_waits.set()
    for thread in (author, waiter):
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert found[0] is found[1]
    assert far.waits == [(2, 1)]
    assert far.held == [(id(found[0]), 2)]


def test_a_copy_that_is_not_there_is_an_error_in_a_capture(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    with far.capture(), pytest.raises(RuntimeError, match="warm the cache for the device"):
        cache.get_or_create("a", numbers, device="far")
    assert far.work == []
    assert torch.equal(cache["a"], numbers()), "the value itself was made"
    assert cache.get("a", device="far") is not None


def test_a_copy_that_was_not_seen_to_be_done_is_an_error_in_a_capture(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    copy = cache.get_or_create("a", numbers, device="far")
    with far.capture(), pytest.raises(RuntimeError, match="warm the cache for the device before the capture"):
        cache.get("a", device="far")
    far.run()  # which the copy cannot ask about during a capture
    with far.capture(), pytest.raises(RuntimeError, match="warm the cache for the device"):
        cache.get("a", device="far")
    cache.get("a", device="far")
    with far.capture():
        assert cache.get("a", device="far") is copy
    with far.stream(7), far.capture():
        assert cache.get("a", device="far") is copy
    assert (far.waits, far.held) == ([], [])


def test_what_a_copy_does_in_a_capture_concerns_others_not(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    cache["a"] = numbers()
    with far.capture():
        assert torch.equal(cache["a"], numbers())
        assert cache.get("a", device="cpu") is cache["a"]
        assert torch.equal(cache.get("a", torch.empty(0), device="farther"), numbers())


# ------------------------------------------------------------------------------------------------ in a cache


def test_the_device_where_it_was_made_gives_the_value_itself(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    value = cache.get_or_create("a", numbers, device="cpu")
    assert cache["a"] is value
    assert cache.get("a", device=CPU) is value
    assert cache.get_or_create("a", numbers, device="cpu:0") is value
    assert cache.info().devices == {}


def test_a_value_without_tensors_has_no_copies(far: FarDevice) -> None:
    cache: PatternCache[str, list[int]] = PatternCache()
    value = cache.get_or_create("a", lambda: [1, 2], device="far")
    assert cache.get("a", device="far") is value
    assert cache.info().devices == {}


def test_all_ways_to_ask_give_the_one_copy(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    copy = cache.get_or_create("a", numbers, device="far")
    assert cache.get_or_create("a", numbers, device="far") is copy
    assert cache.get("a", device="far") is copy
    assert asyncio.run(cache.aget_or_create("a", numbers, device="far")) is copy
    assert cache["a"] is not copy
    assert cache.get("b", device="far") is None
    assert cache.get("b", "none", device="far") == "none"
    info = cache.info()
    assert (info.creations, info.devices["cpu:1"].copies, info.devices["cpu:1"].entries) == (1, 1, 1)
    assert cache.snapshot()[0].devices == ("cpu:1",)


def test_a_task_that_creates_gets_a_copy(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()

    async def create() -> torch.Tensor:
        await asyncio.sleep(0)
        return numbers()

    async def run() -> list[torch.Tensor]:
        return list(await asyncio.gather(*(cache.aget_or_create("a", create, device="far") for _ in range(5))))

    copies = asyncio.run(run())
    far.run()
    assert torch.equal(copies[0], numbers())
    assert len({id(copy) for copy in copies}) == 1
    assert cache.info().devices["cpu:1"].copies == 1


def test_warm_makes_copies_and_pins_what_it_made(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache(max_device_bytes=NBYTES)
    cache.warm({"a": numbers}, device="far", pin=True)
    assert cache.snapshot()[0].devices == ("cpu:1",)
    assert cache.snapshot()[0].pinned
    with far.capture(), far.stream(1):  # warm waited for the copies
        assert torch.equal(cache.get("a", torch.empty(0), device="far"), numbers())


def test_a_capture_that_asks_for_a_copy_leaves_others_alone_who_wait_for_it(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    cache["a"] = numbers()
    copying, go, found = threading.Event(), threading.Event(), []
    send = far.send

    def slow_send(tensor: torch.Tensor) -> torch.Tensor:
        copying.set()
        assert go.wait(SECONDS)
        return send(tensor)

    far.send = slow_send  # type: ignore[method-assign]
    author = threading.Thread(target=lambda: found.append(cache.get("a", device="far")), daemon=True)
    author.start()
    assert copying.wait(SECONDS)
    with far.capture(), pytest.raises(RuntimeError, match="warm the cache"):
        cache.get("a", device="far")
    go.set()
    author.join(SECONDS)
    assert len(found) == 1


def test_each_device_has_copies_of_its_own_and_a_limit_of_its_own(far: FarDevice) -> None:
    cache: PatternCache[int, torch.Tensor] = PatternCache(max_device_bytes=2 * NBYTES)
    for key in range(3):
        cache.get_or_create(key, numbers, device="far")
    cache.get(0, device="farther")
    info = cache.info()
    assert (info.entries, info.evictions, info.nbytes) == (3, 0, 3 * NBYTES)
    near, farther = info.devices["cpu:1"], info.devices["cpu:2"]
    assert (near.entries, near.nbytes, near.max_bytes, near.copies, near.evictions) == (2, 2 * NBYTES, 2 * NBYTES, 3, 1)
    assert (farther.entries, farther.copies, farther.evictions) == (1, 1, 0)


def test_the_copy_that_was_not_used_for_the_longest_time_leaves(far: FarDevice) -> None:
    left: list[Eviction] = []
    cache: PatternCache[int, torch.Tensor] = PatternCache(max_device_bytes=2 * NBYTES, on_evict=left.append)
    first = cache.get_or_create(0, numbers, device="far")
    second = cache.get_or_create(1, numbers, device="far")
    cache.get(0, device="far")
    cache.get_or_create(2, numbers, device="far")
    assert [(event.entry.key, event.device, event.reason) for event in left] == [(1, "cpu:1", "max_bytes")]
    assert left[0].value is second
    assert cache.get(0, device="far") is first
    assert len(cache) == 3, "the values stay"
    assert cache.get(1, device="far") is not second
    assert cache.info().devices["cpu:1"].copies == 4


def test_a_copy_that_is_too_large_is_given_and_not_kept(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache(max_device_bytes=NBYTES - 1)
    first = cache.get_or_create("a", numbers, device="far")
    second = cache.get("a", device="far")
    far.run()
    assert first is not second
    assert second is not None
    assert torch.equal(first, second)
    assert cache.info().devices["cpu:1"].entries == 0


def test_a_value_that_is_not_kept_has_no_copy_that_is(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache(max_entries=0)
    copy = cache.get_or_create("a", numbers, device="far")
    assert torch.equal(copy, numbers()), "it was waited for"
    assert cache.info().devices == {}


def test_memory_that_views_share_is_counted_as_it_is_on_the_device(far: FarDevice) -> None:
    cache: PatternCache[str, Any] = PatternCache()
    base = numbers()
    cache["a"] = (base, base, base[2:])
    assert cache.nbytes == NBYTES
    cache.get("a", device="far")
    assert cache.info().devices["cpu:1"].nbytes == NBYTES + NBYTES - 2 * 4


def test_many_threads_share_one_copy(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    copies: list[torch.Tensor] = []
    in_threads(16, lambda number: copies.append(cache.get_or_create("a", numbers, device="far")))
    assert len(copies) == 16
    assert len({id(copy) for copy in copies}) == 1
    info = cache.info()
    assert (info.creations, info.devices["cpu:1"].copies) == (1, 1)


def remove_by_del(cache: PatternCache[str, torch.Tensor]) -> None:
    del cache["a"]


def remove_by_replacing(cache: PatternCache[str, torch.Tensor]) -> None:
    cache["a"] = numbers() + 1


def remove_by_evicting(cache: PatternCache[str, torch.Tensor]) -> None:
    cache.update(b=numbers(), c=numbers())


REMOVALS: list[Callable[[PatternCache[str, torch.Tensor]], object]] = [
    remove_by_del,
    remove_by_replacing,
    remove_by_evicting,
    lambda cache: cache.pop("a"),
    lambda cache: cache.popitem(),
    lambda cache: cache.clear(),
]


@pytest.mark.parametrize("remove", REMOVALS)
def test_no_copy_outlives_its_master(far: FarDevice, remove: Callable[[Any], object]) -> None:
    left: list[Eviction] = []
    cache: PatternCache[str, torch.Tensor] = PatternCache(max_entries=2, on_evict=left.append)
    copy = cache.get_or_create("a", numbers, device="far")
    cache.get("a", device="farther")
    remove(cache)
    for info in cache.info().devices.values():
        assert (info.entries, info.nbytes, info.evictions) == (0, 0, 0)
    assert all(event.device is None for event in left)
    again = cache.get_or_create("a", numbers, device="far")
    far.run()
    assert again is not copy
    assert torch.equal(again, cache["a"])


def test_a_copy_of_what_was_replaced_while_it_was_made_is_not_kept(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    cache["a"] = numbers()
    send = far.send

    def replace_and_send(tensor: torch.Tensor) -> torch.Tensor:
        cache["a"] = numbers() + 1
        far.send = send  # type: ignore[method-assign]
        return send(tensor)

    far.send = replace_and_send  # type: ignore[method-assign]
    old = cache.get("a", device="far")
    assert cache.info().devices["cpu:1"].entries == 0
    new = cache.get("a", device="far")
    far.run()
    assert old is not None
    assert new is not None
    assert torch.equal(old, numbers())
    assert torch.equal(new, numbers() + 1)


def test_copies_of_what_is_pinned_are_pinned(far: FarDevice) -> None:
    cache: PatternCache[int, torch.Tensor] = PatternCache(max_device_bytes=NBYTES)
    copy = cache.get_or_create(0, numbers, device="far")
    cache.pin(0)
    cache.get_or_create(1, numbers, device="far")
    assert cache.get(0, device="far") is copy
    assert cache.info().devices["cpu:1"].entries == 1
    cache.unpin(0)
    cache.get(1, device="far")
    assert [entry.key for entry in cache.snapshot() if entry.devices] == [1]


def test_a_copy_of_what_is_pinned_already_is_pinned(far: FarDevice) -> None:
    cache: PatternCache[int, torch.Tensor] = PatternCache(max_device_bytes=NBYTES)
    cache.update({0: numbers(), 1: numbers()})
    cache.pin(0)
    copy = cache.get(0, device="far")
    cache.get(1, device="far")
    assert cache.get(0, device="far") is copy


def test_a_copy_that_was_changed_is_noticed_and_made_anew(far: FarDevice) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    copy = cache.get_or_create("a", numbers, device="far")
    far.run()
    copy.add_(1)
    with pytest.raises(PatternMutatedError, match="'a'"):
        cache.get("a", device="far")
    again = cache.get("a", device="far")
    far.run()
    assert again is not None
    assert torch.equal(again, numbers())
    assert "a" in cache


def test_what_cannot_be_moved_stays_in_the_cache(far: FarDevice) -> None:
    class Opaque:
        def __init__(self) -> None:
            self.tensor = numbers()

    cache: PatternCache[str, Opaque] = PatternCache()
    with pytest.raises(TypeError, match="Opaque"):
        cache.get_or_create("a", Opaque, device="far")
    assert isinstance(cache["a"], Opaque)


@pytest.mark.slow
def test_copies_under_changes_by_many_threads_are_of_values_that_were_there(far: FarDevice) -> None:
    cache: PatternCache[int, torch.Tensor] = PatternCache(max_entries=4, max_device_bytes=2 * NBYTES)

    def use(number: int) -> None:
        for turn in range(150):
            key = (number + turn) % 6
            copy = cache.get_or_create(key, lambda key=key: torch.full((COUNT,), float(key)), device="farther")
            assert copy.eq(key).all()
            if turn % 50 == number:
                cache.pop(key, None)

    in_threads(8, use)
    info = cache.info()
    assert info.entries <= 4
    assert info.devices["cpu:2"].nbytes <= 2 * NBYTES
    assert info.devices["cpu:2"].entries <= info.entries
