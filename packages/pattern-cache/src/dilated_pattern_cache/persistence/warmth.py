"""Saving a cache's entries, and loading them into a cache."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dilated_pattern_cache.cache import PatternCache
from dilated_pattern_cache.persistence.classes import Types
from dilated_pattern_cache.persistence.codec import Decoder, Encoder
from dilated_pattern_cache.persistence.errors import CacheFileError
from dilated_pattern_cache.persistence.files import compose, dissect, read, write
from dilated_pattern_cache.storage.shelf import Entry
from dilated_pattern_cache.values.tracing import outside_of_autograd, watched

_FORMAT = "dilated_pattern_cache"
_VERSION = 1

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True)
class SaveReport:
    """What ``save`` wrote.

    Attributes:
        entries: how many.
        nbytes: of the file.
    """

    entries: int
    nbytes: int


@dataclass(frozen=True)
class LoadReport:
    """What ``load`` did with the entries of a file.

    Attributes:
        loaded: how many it stored. Where the limits are narrow, later ones may have displaced earlier ones.
        found: how many keys the cache had already; it keeps its own values.
        rejected: how many the cache refused: too large, or all else is pinned.
    """

    loaded: int
    found: int
    rejected: int


class _Loaded(NamedTuple):
    key: Hashable
    value: Any
    seconds: float
    pinned: bool


def save(
    cache: PatternCache[K, V],
    path: str | os.PathLike[str],
    *,
    keys: Iterable[K] | None = None,
    types: Iterable[type] = (),
    tag: str = "",
) -> SaveReport:
    """Write the entries of a cache into one file, from which ``load`` brings them back in any process.

    The file is in safetensors' format, so any reader of it shows the tensors; what else there is, is JSON in the
    metadata. It appears at once and whole: until then the old file stays, and it stays for good if anything fails.
    Two files of the same content, seconds and order of leaving are the same bytes; written by the same safetensors.

    Saving is no use of the entries. Other threads may use and change the cache meanwhile: what is saved of an entry
    belongs together, and later entries may be missing. Copies on devices are not saved. Until it is written, the
    content takes about twice its size of memory more.

    Keys may be the typed ones of this package, and strings, numbers, tuples and other plain data. Values may be

    - None, bool, int, float, complex, str, bytes, range, slice, tuple, list, dict, set, frozenset, one in another up
      to 64 deep; the very types, not subclasses;
    - ``torch.dtype``, ``torch.Size``, and dense CPU tensors of any shape, strides and type that safetensors stores.
      A tensor that is met twice, in one entry or in two, comes back as one. Strides do not come back: a view becomes
      a contiguous tensor of its own, which may be larger than what it was a view of;
    - NumPy arrays, which come back contiguous and read-only;
    - dataclasses and NamedTuples of the classes in ``types``. They come back with the same fields, without a call of
      their constructors.

    Args:
        cache: left as it is.
        path: where to; by custom ``*.safetensors``. A file there is replaced.
        keys: which entries; all by default. They are saved in the order they would leave the cache in, in any case.
        types: classes of values and keys. Of a ``PatternKey`` of your own the constructor is called when it is
            loaded.
        tag: what ``load`` must be given, too: name here the version of the code that made the values, and what else
            they depend on beside their keys.

    Raises:
        KeyError: a key is not in the cache.
        TypeError: a key or value is of another kind. It says which, and where in it; nothing is written.
        ValueError: two classes in ``types`` have one name; or what is not in tensors takes more than 100 MB.
        PatternMutatedError: a value was changed in place after it was stored. Nothing is written, and the
            entry stays until it is next looked up.
        RuntimeError: within a dispatch mode of PyTorch, a transform or a trace.
        ImportError: PyTorch or safetensors is not installed.
        OSError: the file cannot be written.

    >>> import os, tempfile, torch
    >>> cache = PatternCache()
    >>> _ = cache.get_or_create(("band", 8), lambda: torch.ones(8, 8).tril().triu(-2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "warm.safetensors")
    ...     save(cache, path, tag="1.0").entries
    ...     other = PatternCache()
    ...     load(other, path, tag="1.0")
    1
    LoadReport(loaded=1, found=0, rejected=0)
    >>> torch.equal(other["band", 8], cache["band", 8])
    True
    """
    _check("save", tag)
    encoder = Encoder(Types(types))
    rows = [_row(entry, encoder) for entry in _entries(cache, keys)]
    manifest = {"format": _FORMAT, "version": _VERSION, "tag": tag, "types": encoder.fields, "entries": rows}
    data = compose(manifest, encoder.tensors)
    write(Path(path), data)
    return SaveReport(len(rows), len(data))


def load(
    cache: PatternCache[K, V], path: str | os.PathLike[str], *, types: Iterable[type] = (), tag: str = ""
) -> LoadReport:
    """Put the entries of a file into a cache, as if they had been used in the order they would have left theirs.

    The file is read, checked by its SHA-256 and decoded before the first entry is stored, so a file that is refused
    leaves the cache as it was. The digest shows damage; it does not show who wrote the file. No file, whoever wrote
    it, can have a name imported or code of its choice run: it is data, and names classes among ``types`` alone.

    Args:
        cache: keeps what it has: a key that is there is left alone. What was pinned is pinned.
        path: a file of ``save``.
        types: as they were given to ``save``, with the same names and fields.
        tag: as it was given to ``save``.

    Raises:
        CacheFileError: it is no such file, it is damaged, it has another tag, another version of the format, or
            classes that ``types`` lacks, or a key that this cache does not take.
        FileNotFoundError: there is none.
        TypeError, ValueError: ``types`` has what can be none, or two classes of one name.
        RuntimeError: within a dispatch mode of PyTorch, a transform or a trace.
        ImportError: PyTorch or safetensors is not installed.
        Exception: what ``on_evict`` or ``size_of`` raises, with the entries up to there stored.
    """
    _check("load", tag)
    known, path = Types(types), Path(path)
    try:
        with outside_of_autograd():  # else the tensors of who loads in inference mode would be of no use to others
            entries = _decoded(cache, *dissect(read(path)), known, tag)
    except (OSError, MemoryError):
        raise
    except CacheFileError as error:
        raise CacheFileError(f"{path} cannot be loaded: {error}") from error
    except Exception as error:  # whatever its nonsense leads to, the file is at fault
        raise CacheFileError(f"{path} cannot be loaded: its content makes no sense: {error!r}") from error
    return _put_all(cache, entries)


def _entries(cache: PatternCache[K, V], keys: Iterable[K] | None) -> list[Entry]:
    entries = cache._store.masters.ranked()
    if keys is None:
        return entries
    wanted = dict.fromkeys(keys)
    there = {entry.key for entry in entries}
    for key in wanted:
        if key not in there:
            raise KeyError(key)
    return [entry for entry in entries if entry.key in wanted]


def _row(entry: Entry, encoder: Encoder) -> dict[str, Any]:
    if entry.intact is not None:
        entry.intact()  # raises where it is not
    return {
        "key": encoder.key(entry.key),
        "seconds": float(entry.seconds),
        "pinned": entry.pinned,
        "value": encoder.value(entry.key, entry.value),
    }


def _decoded(
    cache: PatternCache[K, V], manifest: dict[str, Any], tensors: dict[str, Any], types: Types, tag: str
) -> list[_Loaded]:
    """The entries of a file, of which nothing is taken for granted."""
    if manifest["format"] != _FORMAT:
        raise CacheFileError(f"it is of the format {manifest['format']!r}")
    if type(manifest["version"]) is not int or manifest["version"] != _VERSION:
        raise CacheFileError(f"it is of version {manifest['version']!r} of the format, and {_VERSION} is known here")
    if manifest["tag"] != tag:
        raise CacheFileError(f"its tag is {manifest['tag']!r}, not {tag!r}: its values may be of other code")
    decoder = Decoder(types, manifest["types"], tensors)
    entries: dict[Hashable, _Loaded] = {}
    for row in manifest["entries"]:
        key = decoder.key(row["key"])
        if key in entries:
            raise CacheFileError(f"it has the key {key!r} twice")
        try:
            cache._check_key(key)
        except (TypeError, ValueError) as error:
            raise CacheFileError(f"this cache does not take its key {key!r}: {error}") from error
        seconds, pinned = row["seconds"], row["pinned"]
        if type(seconds) is not float or not 0 <= seconds < math.inf or type(pinned) is not bool:
            raise CacheFileError(f"the entry of {key!r} has seconds={seconds!r} and pinned={pinned!r}")
        entries[key] = _Loaded(key, decoder.value(row["value"]), seconds, pinned)
    decoder.finish()
    return list(entries.values())


def _put_all(cache: PatternCache[Any, Any], entries: list[_Loaded]) -> LoadReport:
    loaded = found = rejected = 0
    for key, value, seconds, pinned in entries:
        if key in cache:
            found += 1
            continue
        try:
            cache.put(key, value, seconds=seconds)
        except ValueError:
            if key in cache:  # it was stored, and on_evict raised this
                raise
            rejected += 1
            continue
        loaded += 1
        if pinned:
            with suppress(KeyError):  # another thread may have removed it
                cache.pin(key)
    return LoadReport(loaded, found, rejected)


def _check(name: str, tag: str) -> None:
    if not isinstance(tag, str):
        raise TypeError(f"tag: expected a string, got {tag!r}")
    try:
        import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            f'{name}() needs PyTorch and safetensors: pip install "dilated-pattern-cache[persistence]"'
        ) from error
    if watched():
        raise RuntimeError(
            f"{name}() within a dispatch mode of PyTorch, a transform or a trace: tensors are unreal there"
        )
