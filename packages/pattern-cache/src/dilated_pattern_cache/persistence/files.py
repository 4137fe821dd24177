"""The file: a manifest and tensors in safetensors' format, under a SHA-256 of every byte.

The manifest is JSON, in the metadata under one name. Its first member is the digest, of the whole file with 64 zeros
in the digest's place. Every later version of the format keeps this much.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from dilated_pattern_cache.persistence.errors import CacheFileError

if TYPE_CHECKING:
    from torch import Tensor

_NAME = "dilated_pattern_cache"
_ZEROS = "0" * 64
# As safetensors writes it: the manifest is a string there, with its quotes escaped. It is the only metadatum, since
# safetensors writes several in any order.
_LEAD = f'{{"__metadata__":{{"{_NAME}":"{{\\"sha256\\":\\"'.encode()
_MAX_HEADER_BYTES = 100_000_000  # safetensors reads no longer ones


def compose(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a file. The same bytes for the same content.

    Raises:
        ValueError: the manifest is longer than safetensors reads.
    """
    from safetensors.torch import save

    text = json.dumps({"sha256": _ZEROS, **manifest}, separators=(",", ":"), allow_nan=False)
    data = save(dict(tensors), metadata={_NAME: text})
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > _MAX_HEADER_BYTES:
        raise ValueError(
            f"all that is not in tensors takes {header_bytes:,} bytes, more than the {_MAX_HEADER_BYTES:,} that a "
            "safetensors file can have: save fewer keys, or keep the bulk in tensors"
        )
    start = data.index(_LEAD) + len(_LEAD)
    return b"".join((data[:start], sha256(data).hexdigest().encode(), memoryview(data)[start + len(_ZEROS) :]))


def dissect(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors of a file's bytes, which are all what ``compose`` returned.

    Raises:
        CacheFileError: they are not.
        Exception: they are not, and were made to look as if they were.
    """
    import torch
    from safetensors.torch import load

    if not data:
        raise CacheFileError("it is empty")
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    if not header.startswith(_LEAD):
        raise CacheFileError("it is no file of a pattern cache")
    start, end = 8 + len(_LEAD), 8 + len(_LEAD) + len(_ZEROS)
    digest = sha256(data[:start])
    digest.update(_ZEROS.encode())
    digest.update(memoryview(data)[end:])
    if digest.hexdigest().encode() != data[start:end]:
        raise CacheFileError("it is damaged or cut short: its content does not have the SHA-256 that it names")
    manifest = _parse(_parse(header)["__metadata__"][_NAME])
    if not isinstance(manifest, dict):
        raise CacheFileError("its manifest is no JSON object")
    with torch.device("cpu"):  # whatever the default device is
        return manifest, load(data)


def write(path: Path, data: bytes) -> None:
    """Make ``data`` the content of the file, or leave it as it was.

    A reader finds the old content or the new, also after a loss of power.
    """
    draft = path.with_name(f".{path.name}.{token_hex(8)}.tmp")  # in the same folder: renamed, not copied
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    _sync_folder(path.parent)


def read(path: Path) -> bytes:
    """All bytes of the file.

    Raises:
        CacheFileError: it is a folder.
        OSError: it is not there, or must not be read.
    """
    if path.is_dir():  # which systems say in different ways when it is opened
        raise CacheFileError("it is a folder")
    return path.read_bytes()


def _parse(text: str | bytes) -> Any:
    return json.loads(text, object_pairs_hook=_members, parse_constant=_refuse)


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise CacheFileError("it has a name twice in one JSON object")
    return members


def _refuse(constant: str) -> None:
    raise CacheFileError(f"its JSON has {constant}")


def _sync_folder(folder: Path) -> None:
    """Let the new name itself survive a loss of power, where the system knows how."""
    if os.name == "posix":
        with suppress(OSError):  # some network folders cannot
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
