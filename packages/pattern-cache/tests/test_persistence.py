"""A warm cache in a file: what comes back, which files are refused, and what a failure leaves behind."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import dilated_pattern_cache
from dilated_pattern_cache import DilatedIndexKey, DilatedPatternCache, PatternCache, PatternMutatedError
from dilated_pattern_cache.persistence import CacheFileError, LoadReport, load, save

SOURCE = Path(dilated_pattern_cache.__file__).parents[1]
NAME = "dilated_pattern_cache"
LEAD = b'{\\"sha256\\":\\"'
WATCHDOG_SECONDS = 120


class Point(NamedTuple):
    x: Any
    y: Any


def sealed(data: bytes) -> bytes:
    """A file with the digest that it should have, by the description of the format."""
    start = data.index(LEAD) + len(LEAD)
    blank = data[:start] + b"0" * 64 + data[start + 64 :]
    return data[:start] + hashlib.sha256(blank).hexdigest().encode() + data[start + 64 :]


def forged(manifest: Any, tensors: dict[str, torch.Tensor]) -> bytes:
    """A file of any manifest, as if ``save`` had written it."""
    if not isinstance(manifest, str):
        manifest = json.dumps({"sha256": "0" * 64, **manifest}, separators=(",", ":"))
    return sealed(safetensors.torch.save(tensors, metadata={NAME: manifest}))


def contents(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The manifest and the tensors, read by safetensors alone."""
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()[NAME]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def state(cache: PatternCache[Any, Any]) -> Any:
    return cache.info(), cache.snapshot(), [(key, id(value)) for key, value in cache.items()]


def warm() -> PatternCache[Any, Any]:
    """A small cache whose first entry was used last, and whose second is pinned."""
    cache = PatternCache[Any, Any]()
    shared = torch.arange(3, dtype=torch.uint8)
    cache.put("a", shared, seconds=0.5)
    cache.put(DilatedIndexKey(8, (4,), (1,)), (shared, {"k": Point(1, 2.5)}))
    cache.put(("c", 1), None, seconds=2.0)
    cache.pin(DilatedIndexKey(8, (4,), (1,)))
    _ = cache["a"]
    return cache


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "warm.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    save(warm(), path, types=[Point])
    return path


# ------------------------------------------------------------------------------------------------ there and back


def test_entries_come_back_with_their_seconds_pins_and_order(path: Path) -> None:
    cache, other = warm(), PatternCache[Any, Any]()
    report = save(cache, path, types=[Point])
    assert (report.entries, report.nbytes) == (3, path.stat().st_size)
    assert load(other, path, types=[Point]) == LoadReport(loaded=3, found=0, rejected=0)
    before, after = cache.snapshot(), other.snapshot()
    assert [(entry.key, entry.seconds, entry.pinned) for entry in before] == [
        (entry.key, entry.seconds, entry.pinned) for entry in after
    ]
    assert [entry.key for entry in after] == [DilatedIndexKey(8, (4,), (1,)), ("c", 1), "a"]
    assert torch.equal(other["a"], cache["a"])
    assert other.nbytes == cache.nbytes


def test_saving_is_no_use_of_the_entries(path: Path) -> None:
    cache = warm()
    before = state(cache)
    save(cache, path, types=[Point])
    save(cache, path, keys=["a"])
    assert state(cache) == before


def test_some_keys_are_saved_in_the_order_of_leaving(path: Path) -> None:
    cache, other = warm(), PatternCache[Any, Any]()
    assert save(cache, path, keys=["a", ("c", 1), "a"]).entries == 2
    load(other, path)
    assert list(other) == [("c", 1), "a"]
    assert save(cache, path, keys=[]).entries == 0
    assert load(other, path) == LoadReport(0, 0, 0)


def test_a_key_that_is_not_there_is_an_error(path: Path) -> None:
    with pytest.raises(KeyError, match="missing"):
        save(warm(), path, keys=["a", "missing"])
    assert not path.exists()


def test_what_the_cache_has_stays(saved: Path) -> None:
    cache = PatternCache[Any, Any]()
    cache["a"] = mine = torch.ones(1)
    assert load(cache, saved, types=[Point]) == LoadReport(loaded=2, found=1, rejected=0)
    assert cache["a"] is mine


def test_what_is_too_large_is_rejected(path: Path) -> None:
    cache, small = PatternCache[str, Any](), PatternCache[str, Any](max_bytes=100)
    cache["small"], cache["large"], cache["last"] = torch.ones(5), torch.ones(500), torch.ones(6)
    save(cache, path)
    assert load(small, path) == LoadReport(loaded=2, found=0, rejected=1)
    assert list(small) == ["small", "last"]


def test_in_a_narrow_cache_those_that_were_used_last_stay(path: Path) -> None:
    cache, narrow = PatternCache[int, int](), PatternCache[int, int](max_entries=2)
    cache.update({number: number for number in range(4)})
    _ = cache[1]
    save(cache, path)
    load(narrow, path)
    assert [entry.key for entry in narrow.snapshot()] == [3, 1]


def test_what_on_evict_raises_reaches_the_caller(path: Path) -> None:
    def complain(eviction: object) -> None:
        raise ValueError("full")

    cache = PatternCache[int, int]()
    cache.update({number: number for number in range(3)})
    save(cache, path)
    with pytest.raises(ValueError, match="full"):
        load(PatternCache[int, int](max_entries=1, on_evict=complain), path)


def test_two_saves_of_one_content_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        cache = warm()
        cache["set"] = {"x", "y", (1, 2), torch.int8}
        save(cache, tmp_path / name, types=[Point])
    load(cache := PatternCache[Any, Any](), tmp_path / "one", types=[Point])
    save(cache, tmp_path / "three", types=[Point])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == (tmp_path / "three").read_bytes()


def test_a_person_can_read_the_manifest(saved: Path) -> None:
    manifest, tensors = contents(saved)
    assert list(manifest) == ["sha256", "format", "version", "tag", "types", "entries"]
    assert (manifest["format"], manifest["version"]) == (NAME, 1)
    assert manifest["entries"][2] == {"key": "a", "seconds": 0.5, "pinned": False, "value": {"tensor": "0"}}
    assert manifest["types"]["test_persistence.Point"] == ["x", "y"]
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"0": [0, 1, 2]}


def test_tiles_of_the_core_come_back(path: Path) -> None:
    plan = pytest.importorskip("dilated_core.plan")
    tiles = [plan.Tile(0, 2, 8, 2, 4, 0, 1, 1, 2, 1), plan.Tile(1, 2, 8, 2, 4, 0, 1, 1, 2, 1, phantoms=3)]
    key = ("dilated_core.tiles", (8,), (2,), 16, 2, "paper", False, range(1))
    cache, other = DilatedPatternCache(), DilatedPatternCache()
    cache[key] = tiles
    save(cache, path, types=[plan.Tile])
    load(other, path, types=[plan.Tile])
    assert other[key] == tiles
    assert type(other[key][0]) is plan.Tile


# ------------------------------------------------------------------------------------------------ surroundings


def test_what_is_loaded_in_inference_mode_is_of_use_to_all(saved: Path) -> None:
    cache = PatternCache[Any, Any]()
    with torch.inference_mode():
        load(cache, saved, types=[Point])
    assert not cache["a"].is_inference()


def test_the_default_device_does_not_matter(saved: Path) -> None:
    cache = PatternCache[Any, Any]()
    empty = PatternCache[Any, Any]()
    with torch.device("meta"):
        load(cache, saved, types=[Point])
        save(cache, saved, types=[Point])
    load(empty, saved, types=[Point])
    assert empty["a"].tolist() == cache["a"].tolist() == [0, 1, 2]


def test_within_a_dispatch_mode_nothing_is_saved_or_loaded(saved: Path) -> None:
    cache = warm()
    with FakeTensorMode():
        with pytest.raises(RuntimeError, match=r"save\(\) within a dispatch mode"):
            save(cache, saved, types=[Point])
        with pytest.raises(RuntimeError, match=r"load\(\) within a dispatch mode"):
            load(cache, saved, types=[Point])


@pytest.mark.parametrize("guard", ["version", "contents"])
def test_a_value_that_was_changed_in_place_is_not_saved(path: Path, guard: Any) -> None:
    cache = PatternCache[str, Any](guard=guard)
    cache["a"] = torch.zeros(2)
    dict(cache.items())["a"].add_(1)
    with pytest.raises(PatternMutatedError):
        save(cache, path)
    assert not path.exists()


def test_a_cache_that_does_not_take_a_key_takes_none_of_the_file(path: Path) -> None:
    cache, typed = PatternCache[Any, int](), DilatedPatternCache()
    cache.update({("tiles", 1): 1, "text": 2})
    save(cache, path)
    with pytest.raises(CacheFileError, match="this cache does not take its key 'text': key: expected a PatternKey"):
        load(typed, path)
    assert len(typed) == 0


def test_a_tag_must_be_a_string(path: Path) -> None:
    with pytest.raises(TypeError, match="tag: expected a string, got 1"):
        save(warm(), path, tag=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tag: expected a string, got 1"):
        load(warm(), path, tag=1)  # type: ignore[arg-type]


def run(program: str, *arguments: object, **environment: str) -> str:
    """What a fresh interpreter prints. It says nothing else."""
    command = [sys.executable, "-W", "error", "-W", "ignore:Failed to initialize NumPy:UserWarning", "-c"]
    variables = os.environ | {"PYTHONPATH": str(SOURCE)} | environment
    done = subprocess.run(
        [*command, textwrap.dedent(program), *map(str, arguments)],
        env=variables, capture_output=True, text=True, timeout=WATCHDOG_SECONDS, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_another_process_finds_the_keys(path: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from dilated_pattern_cache import BlockLayoutKey, DilatedPatternCache
        from dilated_pattern_cache.persistence import load, save
        path = Path(sys.argv[1])
        keys = [BlockLayoutKey(64, "local", options={"w": 3}), ("tiles", frozenset({"x", "y", "z"}), range(4))]
        cache = DilatedPatternCache()
        if path.exists():
            assert load(cache, path).loaded == 2
            before = path.read_bytes()
        for key in keys:
            value = cache.get_or_create(key, lambda: {"p", "q", "r", str(key)})
        save(cache, path)
        print(cache.info().creations, hash("x"))
        if cache.info().hits:
            assert path.read_bytes() == before
    """
    first, one_hash = run(program, path, PYTHONHASHSEED="1").split()
    second, other_hash = run(program, path, PYTHONHASHSEED="2").split()
    assert (first, second) == ("2", "0")
    assert one_hash != other_hash


@pytest.mark.slow
def test_without_safetensors_the_error_names_the_extra(path: Path) -> None:
    printed = run(
        """
        import sys
        from dilated_pattern_cache import PatternCache
        from dilated_pattern_cache.persistence import load, save
        assert "torch" not in sys.modules and "safetensors" not in sys.modules
        sys.modules["safetensors"] = None
        for call in (save, load):
            try:
                call(PatternCache(), sys.argv[1])
            except ImportError as error:
                print(error)
        """,
        path,
    )
    extra = 'needs PyTorch and safetensors: pip install "dilated-pattern-cache[persistence]"'
    assert printed.splitlines() == [f"save() {extra}", f"load() {extra}"]


# ------------------------------------------------------------------------------------------------ refused files


def refused(data: bytes, path: Path, match: str = "cannot be loaded") -> None:
    """The file raises CacheFileError, which names it, and leaves the cache as it was."""
    path.write_bytes(data)
    cache = PatternCache[Any, Any]()
    cache["mine"] = 1
    before = state(cache)
    with pytest.raises(CacheFileError, match=match) as caught:
        load(cache, path, types=[Point])
    assert str(caught.value).startswith(str(path))
    assert state(cache) == before


def test_a_file_that_is_not_there_is_not_found(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(warm(), path)


def test_another_tag_is_refused(path: Path) -> None:
    save(PatternCache(), path, tag="one")
    with pytest.raises(CacheFileError, match="its tag is 'one', not 'two'"):
        load(warm(), path, tag="two")
    assert load(warm(), path, tag="one").loaded == 0


@pytest.fixture
def small(path: Path) -> Path:
    """A file of few bytes."""
    cache = PatternCache[Any, Any]()
    cache["a"] = torch.arange(3, dtype=torch.uint8)
    save(cache, path)
    return path


def test_a_flip_of_any_byte_is_refused(small: Path) -> None:
    data = small.read_bytes()
    for place in range(len(data)):
        for change in (1, 0x20):  # the latter makes another letter of a letter
            refused(data[:place] + bytes([data[place] ^ change]) + data[place + 1 :], small)


def test_a_file_cut_short_anywhere_is_refused(small: Path) -> None:
    data = small.read_bytes()
    for length in range(len(data)):
        refused(data[:length], small)
    refused(data + b"\0", small)


def test_blanks_in_the_header_are_part_of_the_digest(path: Path) -> None:
    for length in range(8):  # one of these needs blanks to fill up the header
        cache = PatternCache[str, int]()
        cache["x" * length] = 1
        save(cache, path)
        data = path.read_bytes()
        blank = data.rfind(b" ")
        if blank > 0:
            refused(data[:blank] + b"\n" + data[blank + 1 :], path, "SHA-256")
            return
    pytest.fail("no header had blanks")


def header_of(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


START = b'{"__metadata__":{"dilated_pattern_cache":"' + LEAD + b"0" * 64
FOREIGN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "text": (b"not at all", "no file of a pattern cache"),
    "safetensors": (safetensors.torch.save({"a": torch.ones(2)}, metadata={"format": "pt"}), "no file of a pattern"),
    "huge header": ((2**63).to_bytes(8, "little") + b"{}", "no file of a pattern cache"),
    "deep header": (
        sealed(header_of(START + b'"}},"a":' + b"[" * 10_000)),
        "makes no sense",
    ),
    "deep manifest": (forged('{"sha256":"' + "0" * 64 + '","format":' + "[" * 10_000, {}), "makes no sense"),
    "manifest of another kind": (
        sealed(header_of(START + b'"},"a":1}')),
        "makes no sense",
    ),
    "duplicate tensor": (
        sealed(
            header_of(
                START + b'\\"}"},'
                b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
            )
            + b"x"
        ),
        "a name twice",
    ),
    "unknown dtype": (
        sealed(header_of(START + b'\\"}"},"a":{"dtype":"X8","shape":[1],"data_offsets":[0,1]}}') + b"x"),
        "makes no sense",
    ),
}


@pytest.mark.parametrize(("data", "match"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused(path: Path, data: bytes, match: str) -> None:
    refused(data, path, match)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheFileError, match="it is a folder"):
        load(warm(), tmp_path)


def edit(*steps: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        inner: Any = manifest
        for step in steps[:-1]:
            inner = inner[step]
        inner[steps[-1]] = to

    return change


def deep(depth: int) -> Any:
    node: Any = 1
    for _ in range(depth):
        node = [node]
    return node


VALUE = ("entries", 1, "value")
LIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "version": (edit("version", to=2), "of version 2 of the format, and 1 is known here"),
    "version true": (edit("version", to=True), "of version True"),
    "format": (edit("format", to="other"), "of the format 'other'"),
    "no format": (lambda manifest: manifest.pop("format"), "makes no sense: KeyError"),
    "types is a list": (edit("types", to=[]), "makes no sense"),
    "unknown type": (edit("types", "os.system", to=["x"]), r"class os\.system: give the class in types"),
    "other fields": (edit("types", "test_persistence.Point", to=["y", "x"]), "have the fields"),
    "type that the table lacks": (edit(*VALUE, to={"type": ["os.system", []]}), "makes no sense"),
    "too few fields": (edit(*VALUE, to={"type": ["test_persistence.Point", [1]]}), "has 1 fields, not 2"),
    "entries is a number": (edit("entries", to=1), "makes no sense"),
    "entry is a string": (edit("entries", 0, to="x"), "makes no sense"),
    "key twice": (edit("entries", 1, "key", to="a"), "has the key 'a' twice"),
    "key is a list": (edit("entries", 1, "key", to=[1]), "a list where no such value can be"),
    "key has a list": (edit("entries", 1, "key", to={"tuple": [[1]]}), "a list where no such value can be"),
    "key is a tensor": (edit("entries", 1, "key", to={"tensor": "0"}), "a 'tensor' where no such value can be"),
    "key fails its checks": (
        edit("entries", 0, "key", to={"type": ["DilatedIndexKey", [-1, {"tuple": [1]}, {"tuple": [1]}, 1, "paper"]]}),
        "makes no sense: ValueError.*seq_len: expected at least 0",
    ),
    "seconds": (edit("entries", 1, "seconds", to=-1.0), "seconds=-1.0"),
    "seconds is a string": (edit("entries", 1, "seconds", to="1"), "seconds='1'"),
    "pinned": (edit("entries", 1, "pinned", to=1), "pinned=1"),
    "absent tensor": (edit(*VALUE, to={"tensor": "99"}), "no tensor '99'"),
    "spare tensor": (edit("entries", to=[]), r"no entry has its tensors \['0'\]"),
    "unknown tag": (edit(*VALUE, to={"eval": "1"}), "a 'eval' where no such value can be"),
    "two tags": (edit(*VALUE, to={"int": "1", "float": "inf"}), "a dict where no such value can be"),
    "no tag": (edit(*VALUE, to={}), "a dict where no such value can be"),
    "float": (edit(*VALUE, to={"float": "3ff0000000000000"}), "neither an infinity nor NaN"),
    "float out of range": (edit(*VALUE, to={"float": "00"}), "makes no sense"),
    "step 0": (edit(*VALUE, to={"range": [0, 1, 0]}), "makes no sense: ValueError"),
    "range of floats": (edit(*VALUE, to={"range": [0.0, 1.0, 1.0]}), "no 3 numbers of type int"),
    "slice of four": (edit(*VALUE, to={"slice": [1, 2, 3, 4]}), "makes no sense: TypeError"),
    "complex of one": (edit(*VALUE, to={"complex": [1.0]}), "no 2 numbers of type float"),
    "size": (edit(*VALUE, to={"size": ["x"]}), "numbers of type int"),
    "dtype": (edit(*VALUE, to={"dtype": "nn"}), "makes no sense: KeyError"),
    "bytes": (edit(*VALUE, to={"bytes": "*"}), "makes no sense"),
    "tuple of a string": (edit(*VALUE, to={"tuple": "ab"}), "a str where a list must be"),
    "member twice": (edit(*VALUE, to={"set": [1, True]}), "a set has a member twice"),
    "dict key twice": (edit(*VALUE, to={"dict": [[1, 2], [1, 3]]}), "a dict has a key twice"),
    "dict key that has no hash": (edit(*VALUE, to={"dict": [[{"set": []}, 2]]}), "a 'set' where no such value can be"),
    "deep": (edit(*VALUE, to=deep(65)), "more than 64 deep"),
    "very deep": (edit(*VALUE, to=deep(400)), "more than 64 deep"),
    "huge int": (edit(*VALUE, to={"int": "g"}), "makes no sense"),
}


@pytest.mark.parametrize(("change", "match"), LIES.values(), ids=LIES)
def test_a_forged_manifest_is_refused(saved: Path, change: Callable[[dict[str, Any]], None], match: str) -> None:
    manifest, tensors = contents(saved)
    assert forged(manifest, tensors) == saved.read_bytes()
    change(manifest)
    refused(forged(manifest, tensors), saved, match)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", "1" * 5000, "[1", '{"tuple":[],"tuple":[]}'])
def test_json_beyond_the_standard_is_refused(saved: Path, text: str) -> None:
    manifest, tensors = contents(saved)
    manifest["entries"][1]["value"] = "PLACE"
    refused(forged(json.dumps(manifest, separators=(",", ":")).replace('"PLACE"', text), tensors), saved)


def test_an_array_of_a_type_that_numpy_lacks_is_refused(saved: Path) -> None:
    pytest.importorskip("numpy")
    manifest, tensors = contents(saved)
    manifest["entries"][2]["value"] = {"array": "0"}
    refused(forged(manifest, {"0": tensors["0"].to(torch.bfloat16)}), saved, "makes no sense")


def places(node: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every node of a JSON tree."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [way] * bool(way) + [place for name, child in inner for place in places(child, (*way, name))]


def rich() -> PatternCache[Any, Any]:
    """A cache with a node of every kind."""
    cache = warm()
    cache["all"] = {
        "numbers": [1, 2**70, 1.5, float("inf"), float("nan"), 1j, True, None],
        (1, "two"): ("text", b"bytes", range(3), slice(1, None)),
        frozenset({1}): [{1, 2}, torch.Size([1]), torch.int8, {"deep": [Point((), [])]}],
    }
    return cache


TAGS = "int float complex bytes range slice size dtype tuple frozenset type set dict tensor array x".split()  # noqa: SIM905
json_nodes = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.sampled_from(["", "0", "a", "inf", "x" * 99]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TAGS), inner, max_size=2),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def rich_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rich") / "rich.safetensors"
    save(rich(), path, types=[Point])
    return path


@settings(max_examples=400)
@given(data=st.data())
def test_any_manifest_is_refused_or_gives_what_can_be_saved_again(rich_file: Path, data: st.DataObject) -> None:
    fuzz(rich_file, data)


@pytest.mark.fuzz
@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_any_of_many_manifests_is_refused_or_gives_what_can_be_saved_again(
    rich_file: Path, data: st.DataObject
) -> None:
    fuzz(rich_file, data)


def fuzz(rich_file: Path, data: st.DataObject) -> None:
    path = rich_file.with_name("fuzzed.safetensors")
    manifest, tensors = contents(rich_file)
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        ways = [way for way in places(manifest) if way[0] != "sha256"]
        if not ways:
            break
        *way, last = data.draw(st.sampled_from(ways), label="place")
        parent: Any = manifest
        for step in way:
            parent = parent[step]
        action = data.draw(st.sampled_from(["replace", "remove", "copy"]), label="action")
        if action == "replace":
            parent[last] = data.draw(json_nodes, label="node")
        elif action == "remove":
            del parent[last]
        else:
            other: Any = manifest
            for step in data.draw(st.sampled_from(ways), label="source"):
                other = other[step]
            parent[last] = copy.deepcopy(other)
    manifest.pop("sha256")
    path.write_bytes(forged(manifest, tensors))
    cache = PatternCache[Any, Any]()
    before = state(cache)
    try:
        load(cache, path, types=[Point])
    except CacheFileError:
        assert state(cache) == before
    else:
        save(cache, path, types=[Point])


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit of file sizes")
def test_a_full_disk_leaves_the_old_file_and_no_litter(path: Path) -> None:
    old = save(warm(), path, types=[Point])
    before = path.read_bytes()
    run(
        """
        import resource, sys
        import torch
        from dilated_pattern_cache import PatternCache
        from dilated_pattern_cache.persistence import save
        cache = PatternCache()
        cache["large"] = torch.ones(10_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save(cache, sys.argv[1])
        except OSError:
            pass
        else:
            raise AssertionError
        """,
        path,
    )
    assert path.read_bytes() == before
    assert len(before) == old.nbytes
    assert list(path.parent.iterdir()) == [path]


def test_a_name_that_cannot_be_taken_leaves_no_litter(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OSError, match="folder"):
        save(warm(), folder, types=[Point])
    with pytest.raises(FileNotFoundError):
        save(warm(), tmp_path / "absent" / "file", types=[Point])
    assert list(tmp_path.iterdir()) == [folder]


def test_the_file_is_replaced_whole_and_readable_by_the_same_people_as_any(path: Path) -> None:
    other = path.with_name("any")
    other.touch()
    path.write_bytes(b"x" * 100_000)
    with open(path, "rb") as reader:
        report = save(warm(), path, types=[Point])
        assert reader.read() == b"x" * 100_000
    assert path.stat().st_size == report.nbytes
    assert path.stat().st_mode == other.stat().st_mode
    assert {file.name for file in path.parent.iterdir()} == {"any", path.name}


def test_a_value_that_cannot_be_saved_leaves_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    cache = warm()
    cache["bad"] = object()
    with pytest.raises(TypeError, match="the value of 'bad' cannot be saved"):
        save(cache, saved, types=[Point])
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_saving_while_others_change_the_cache_gives_whole_entries(path: Path) -> None:
    cache = PatternCache[int, Any](max_entries=20)
    stop = threading.Event()
    failures: list[BaseException] = []

    def change(start: int) -> None:
        number = start
        try:
            while not stop.is_set():
                number += 1
                key = number % 30
                cache.put(key, [torch.full((3,), number), number], seconds=float(number))
                cache.get(key + 1)
                cache.pop(key + 2, None)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=change, args=(number * 10**6,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            save(cache, path)
            other = PatternCache[int, Any]()
            load(other, path)
            for entry in other.snapshot():
                tensor, number = dict(other.items())[entry.key]
                assert tensor.tolist() == [number] * 3
                assert entry.seconds == number
                assert number % 30 == entry.key
    finally:
        stop.set()
        for thread in threads:
            thread.join(WATCHDOG_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


def test_of_two_who_save_at_the_same_time_one_file_stays_whole(path: Path) -> None:
    caches = [warm(), PatternCache[Any, Any]()]
    failures: list[BaseException] = []

    def write(cache: PatternCache[Any, Any]) -> None:
        try:
            for _ in range(20):
                save(cache, path, types=[Point])
        except BaseException as error:
            failures.append(error)

    save(caches[0], path, types=[Point])
    threads = [threading.Thread(target=write, args=(cache,), daemon=True) for cache in caches]
    for thread in threads:
        thread.start()
    for _ in range(20):
        assert load(PatternCache[Any, Any](), path, types=[Point]).loaded in (0, 3)
    for thread in threads:
        thread.join(WATCHDOG_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    assert list(path.parent.iterdir()) == [path]
