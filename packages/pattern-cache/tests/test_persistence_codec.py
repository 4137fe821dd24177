"""What of keys and values a file brings back, and what it refuses: with the path to it, before anything is written."""

from __future__ import annotations

import collections
import enum
import functools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_pattern_cache import (
    BlockLayoutKey,
    BlockMaskKey,
    CommunicationPlanKey,
    DilatedIndexKey,
    PatternCache,
    PatternKey,
)
from dilated_pattern_cache.persistence import CacheFileError, load, save


class Point(NamedTuple):
    x: Any
    y: Any = 0


@dataclass(frozen=True)
class Layout:
    rows: Any
    mask: Any = None
    total: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", 7)

    @functools.cached_property
    def transposed(self) -> str:
        return "made on demand"


@dataclass
class Slotted:
    __slots__ = ("left", "right")
    left: Any
    right: Any


@dataclass(frozen=True, eq=False)
class OwnKey(PatternKey):
    size: int

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("size: expected at least 0")
        super().__post_init__()

    def text(self) -> str:
        return f"own_{self.size}"


TYPES = (Point, Layout, Slotted, OwnKey)
KEYS = [
    DilatedIndexKey(16, (4, 8), (1, 2), heads=3),
    BlockLayoutKey(
        64, "local", ratio=0.1, is_causal=True, options={"window": 3, "soft": True, "scale": 1.0, "of": "x"}
    ),
    BlockMaskKey(8, 9, "causal", block_size=(2, 3), batch=1),
    CommunicationPlanKey(8, (4,), (1,), 2, 2, bounds=(0, 3, 8)),
    ("dilated_core.tiles", (4, 8), (1, 2), 16, 3, "paper", False, range(0, 2)),
    "text",
    7,
    (),
    (None, True, 1.5, b"b", frozenset({1, "a"}), torch.float32, DilatedIndexKey(8, (4,), (1,))),
]


def through(value: Any, folder: Path, key: Any = "key") -> Any:
    """The value, once saved and loaded."""
    cache, other = PatternCache[Any, Any](guard=None), PatternCache[Any, Any](guard=None)
    cache[key] = value
    save(cache, folder / "cache.safetensors", types=TYPES)
    assert load(other, folder / "cache.safetensors", types=TYPES).loaded == 1
    return other[key]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one: Any, other: Any) -> bool:
    """Equal in every type, bit and order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    if isinstance(one, numpy.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other)
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, set | frozenset):
        return len(one) == len(other) and same(sorted(one, key=repr), sorted(other, key=repr))
    if isinstance(one, slice):
        return same((one.start, one.stop, one.step), (other.start, other.stop, other.step))
    if isinstance(one, Layout):
        return same((one.rows, one.mask, one.total), (other.rows, other.mask, other.total))
    if isinstance(one, Slotted):
        return same((one.left, one.right), (other.left, other.right))
    return bool(one == other)


nans = st.integers(1, 2**51).map(lambda payload: struct.unpack("d", struct.pack("Q", 0x7FF8 << 48 | payload))[0])
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | nans
    | st.complex_numbers()
    | st.text(st.characters(codec=None), max_size=5)  # lone surrogates, too
    | st.binary(max_size=5)
    | st.builds(range, st.integers(), st.integers(), st.integers(1))
    | st.sampled_from([torch.float32, torch.complex128, torch.Size([2, 0]), *KEYS[:4], OwnKey(3)])
)
keys = st.recursive(
    scalars.filter(lambda item: item == item),
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3) | st.builds(Point, inner, inner)
    ),
    max_leaves=4,
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e5m2])
    )
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = torch.empty(shape, dtype=dtype).nbytes
    content = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        content = bytes(byte % 2 for byte in content)
    whole = torch.frombuffer(bytearray(content), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return whole.reshape(shape).permute(tuple(reversed(range(len(shape)))))


values = st.recursive(
    scalars | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.sets(keys, max_size=3)
        | st.builds(slice, inner, inner)
        | st.builds(Point, inner, inner)
        | st.builds(Layout, inner, inner)
        | st.builds(Slotted, inner, inner)
    ),
    max_leaves=8,
)


@given(key=keys, value=values)
def test_every_key_and_value_comes_back_bit_for_bit(folder: Path, key: Any, value: Any) -> None:
    assert same(through(value, folder, key), value)


@pytest.mark.parametrize(
    "key", KEYS, ids=["indices", "layout", "mask", "plan", "tiles", "text", "int", "empty", "mixed"]
)
def test_keys_of_every_kind_come_back(tmp_path: Path, key: Any) -> None:
    cache, other = PatternCache[Any, int](), PatternCache[Any, int]()
    cache[key] = 1
    save(cache, tmp_path / "cache")
    load(other, tmp_path / "cache")
    (back,) = other
    assert same(back, key)
    assert hash(back) == hash(key)


@pytest.mark.parametrize(
    "number",
    [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        5e-324,
        1e308,
        pytest.param(1 << 40000, id="huge"),
        -(2**53),
        2**53 - 1,
        True,
        1,
        1.0,
    ],
)
def test_numbers_keep_their_type_and_bits(tmp_path: Path, number: Any) -> None:
    assert same(through(number, tmp_path), number)


STORED = [
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "float8_e4m3fn",
    "float8_e5m2",
]  # fmt: skip


@pytest.mark.parametrize("name", STORED)
def test_tensors_of_every_type_keep_every_bit_pattern(tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    whole = torch.arange(256, dtype=torch.uint8).repeat_interleave(3)
    tensor = whole % 2 == 1 if name == "bool" else whole.view(dtype)
    assert same(through(tensor, tmp_path), tensor)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(0),
        lambda: torch.empty(3, 0, 2, dtype=torch.int64),
        lambda: torch.tensor(5),
        lambda: torch.arange(12).reshape(3, 4).t(),
        lambda: torch.arange(12)[::3],
        lambda: torch.arange(3).expand(4, 3),
        lambda: torch.arange(12).reshape(3, 4)[1],
        lambda: torch.complex(torch.ones(3), torch.arange(3.0)).conj().imag,  # a view that negates
    ],
)
def test_tensors_of_every_form_come_back_contiguous(tmp_path: Path, make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    back = through(tensor, tmp_path)
    assert same(back, tensor.resolve_neg())
    assert back.is_contiguous()
    assert back.untyped_storage().nbytes() == back.nbytes
    assert not back.requires_grad


def test_a_tensor_that_is_met_twice_comes_back_as_one(tmp_path: Path) -> None:
    shared = torch.arange(4)
    cache, other = PatternCache[str, Any](), PatternCache[str, Any]()
    cache["a"], cache["b"] = [shared, {"again": shared}, shared[:]], shared
    save(cache, tmp_path / "cache")
    load(other, tmp_path / "cache")
    first, again, view = other["a"][0], other["a"][1]["again"], other["a"][2]
    assert first is again
    assert first is other["b"]
    assert view.data_ptr() != first.data_ptr()
    assert other.nbytes == 2 * shared.nbytes


ARRAYS = [
    numpy.arange(6).reshape(2, 3).T,
    numpy.array(2.5),
    numpy.zeros((0, 2), "u1"),
    numpy.arange(5, dtype="f2")[::-1],
    numpy.array([True, False]),
]


@pytest.mark.parametrize("array", ARRAYS, ids=repr)
def test_arrays_come_back_read_only(tmp_path: Path, array: Any) -> None:
    back, again, tensor = through([array, array, torch.ones(2)], tmp_path)
    assert same(back, array)
    assert back is again
    assert not back.flags.writeable
    assert type(tensor) is torch.Tensor


def test_the_order_of_a_dict_comes_back_and_lists_are_of_their_own(tmp_path: Path) -> None:
    inner = [1]
    back = through({"z": inner, "a": inner, (1, 2): None}, tmp_path)
    assert list(back) == ["z", "a", (1, 2)]
    assert back["z"] == back["a"]


def test_objects_come_back_by_their_fields_without_their_constructors(tmp_path: Path) -> None:
    layout = Layout([1], torch.ones(2))
    object.__setattr__(layout, "total", 8)  # the constructor would make it 7
    assert layout.transposed  # a cached property is no state
    back = through((layout, Point(1, Point(2)), Slotted(Layout(0), 1)), tmp_path)
    assert same(back, (layout, Point(1, Point(2)), Slotted(Layout(0), 1)))
    assert back[0].transposed == "made on demand"


def test_types_are_matched_by_their_qualified_name(tmp_path: Path) -> None:
    cache = PatternCache[str, Any]()
    cache["a"] = Point(1)
    save(cache, tmp_path / "cache", types=[Point])
    with pytest.raises(CacheFileError, match=r"class test_persistence_codec\.Point: give the class in types"):
        load(cache, tmp_path / "cache")

    class Changed(NamedTuple):
        x: int
        z: int

    Changed.__qualname__ = Point.__qualname__
    with pytest.raises(CacheFileError, match=r"have the fields \['x', 'y'\], the class has \['x', 'z'\]"):
        load(cache, tmp_path / "cache", types=[Changed])
    with pytest.raises(ValueError, match=r"got two of the name test_persistence_codec\.Point"):
        load(cache, tmp_path / "cache", types=[Point, Changed])
    assert load(cache, tmp_path / "cache", types=[Point, Point]).found == 1


@dataclass
class OfItsOwn:
    def __new__(cls) -> Any:
        return object.__new__(cls)


@dataclass
class Mapped(dict[str, int]):
    size: int = 0


@pytest.mark.parametrize("kind", [int, "Point", enum.Enum, dict, torch.Tensor, OfItsOwn, Mapped, PatternKey])
def test_types_that_cannot_be_rebuilt_are_refused(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(TypeError, match="types: expected"):
        save(PatternCache(), tmp_path / "cache", types=[kind])


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


class Other(NamedTuple):
    a: int


class Derived(torch.Tensor):
    pass


def noted() -> Layout:
    layout = Layout(1)
    object.__setattr__(layout, "note", "lost")
    return layout


def unset() -> Slotted:
    made = object.__new__(Slotted)
    made.left = 1
    return made


def endless() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (object, "it is a object: neither plain data nor of a class in types"),
    (lambda: {"rows": [0, 1, 2, Layout(0, mask=object())]}, r"\['rows'\]\[3\]\.mask is a object"),
    (lambda: {"a": ({1, 2}, [Colour.RED])}, r"\['a'\]\[1\]\[0\] is a test_persistence_codec\.Colour"),
    (lambda: Text("a"), r"it is a test_persistence_codec\.Text"),
    (lambda: [numpy.float64(1)], r"\[0\] is a numpy\.float64"),
    (lambda: {object(): 1}, r"\[<object object at .*>\] is a object"),
    (lambda: {1, Text("b")}, r"\{'b'\} is a test_persistence_codec\.Text"),
    (lambda: {torch.ones(1)}, "is a Tensor, which no key of a cache, key of a dict or member of a set may hold"),
    (collections.OrderedDict, r"it is a collections\.OrderedDict"),
    (lambda: bytearray(1), "it is a bytearray"),
    (lambda: abs, "it is a builtin_function_or_method"),
    (lambda: Other(1), "it is a .*Other: neither plain data nor of a class in types"),
    (noted, "with attributes that are no fields: note"),
    (unset, "whose field right is not set"),
    (endless, "more than 64 deep, or within itself"),
    (lambda: torch.ones(2, requires_grad=True), r"requires a gradient: give it\.detach\(\)"),
    (lambda: torch.nn.Parameter(torch.ones(2), requires_grad=False), "is a Parameter, a tensor of a kind of its own"),
    (lambda: torch.ones(2).as_subclass(Derived), "is a Derived, a tensor of a kind of its own"),
    (lambda: torch.eye(2).to_sparse(), r"another layout than strided: .*it\.to_dense\(\)"),
    (lambda: torch.ones(2, dtype=torch.complex128), r"of torch\.complex128, which safetensors cannot store"),
    (lambda: numpy.array(["a"]), "is an array of <U1, which safetensors cannot store"),
    (lambda: numpy.array([object()]), "is an array of object, which safetensors cannot store"),
    (lambda: numpy.arange(2, dtype="c16"), "is an array of complex128, which safetensors cannot store"),
    (lambda: numpy.arange(2).astype(">i4"), r"foreign byte order: give it\.astype\('<i4'\)"),
    (lambda: numpy.ma.masked_array([1]), "is a MaskedArray, a kind of its own"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_saved_is_named_with_its_path(tmp_path: Path, make: Callable[[], Any], message: str) -> None:
    cache = PatternCache[Any, Any](guard=None)
    cache["before"], cache["it", 1] = torch.ones(2), make()
    with pytest.raises(TypeError, match=rf"the value of \('it', 1\) cannot be saved: .*{message}"):
        save(cache, tmp_path / "cache", types=TYPES)
    assert not list(tmp_path.iterdir())


def test_a_tensor_without_content_is_refused(tmp_path: Path) -> None:
    from dilated_pattern_cache.persistence.classes import Types
    from dilated_pattern_cache.persistence.codec import Encoder

    with pytest.raises(TypeError, match="on the meta device"):  # which no cache stores either
        Encoder(Types(())).value("key", torch.ones(2, device="meta"))


@pytest.mark.parametrize(
    "key", [object(), (1, object()), ("a", torch.ones(1)), OwnKey(1), Point(1, Text("b"))], ids="abcde"
)
def test_keys_that_would_not_be_found_again_are_refused(tmp_path: Path, key: Any) -> None:
    cache = PatternCache[Any, int]()
    cache[key] = 1
    with pytest.raises(TypeError, match=r"the key .* cannot be saved"):
        save(cache, tmp_path / "cache", types=[Point])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("depth", [63, 64])
def test_values_are_saved_up_to_64_deep(tmp_path: Path, depth: int) -> None:
    value: Any = 1
    for _ in range(depth):
        value = Point(value)
    assert same(through(value, tmp_path), value)
    with pytest.raises(TypeError, match="64 deep"):
        through([[value]], tmp_path)


@pytest.mark.gpu
def test_a_tensor_on_a_gpu_is_refused(tmp_path: Path) -> None:
    cache = PatternCache[str, Any]()
    cache["a"] = torch.ones(2, device="cuda")
    with pytest.raises(TypeError, match=r"is a tensor on cuda:0: give it\.cpu\(\)"):
        save(cache, tmp_path / "cache")
