"""Real text that every machine has: the sources of the running Python's standard library, split by module.

A module or package is either read in training or held out, never both, and which is decided by its name alone, so the
split is the same on every machine and in every run. Standard library only.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

EXCLUDED_FOLDERS = frozenset(
    {
        # not the standard library
        "site-packages",
        "dist-packages",
        # tests: present on some machines only
        "test",
        "tests",
        "idle_test",
        # tables and topics written by a program, nearly alike from file to file: they flatter any learner
        "encodings",
        "lib2to3",
        "pydoc_data",
    }
)

HELD_OUT_ONE_IN = 16
"""A module is held out when the hash of its name is a multiple of this: about half a megabyte of CPython 3.11."""


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text, each the concatenation of whole files.

    Attributes:
        root: folder the files were read from.
        training, held_out: the bytes.
        training_files, held_out_files: paths relative to root, with forward slashes, in order of concatenation.
    """

    root: Path
    training: bytes
    held_out: bytes
    training_files: tuple[str, ...]
    held_out_files: tuple[str, ...]


def load_corpus(root: Path | None = None) -> Corpus:
    """Read every .py file below ``root`` (the running Python's standard library where None), in sorted order.

    Raises:
        FileNotFoundError: one of the two halves has no text, as where the library is only there as a zip archive.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    texts: dict[bool, list[bytes]] = {False: [], True: []}
    files: dict[bool, list[str]] = {False: [], True: []}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if not EXCLUDED_FOLDERS.isdisjoint(relative.parts[:-1]):
            continue
        held_out = is_held_out(relative.parts[0])
        texts[held_out].append(path.read_bytes())
        files[held_out].append(relative.as_posix())
    training, held_out_text = b"".join(texts[False]), b"".join(texts[True])
    if not training or not held_out_text:
        raise FileNotFoundError(f"no Python sources to learn from and to hold out below {root}")
    return Corpus(root, training, held_out_text, tuple(files[False]), tuple(files[True]))


def is_held_out(module: str) -> bool:
    """Whether the top-level module or package of this file name is kept from training.

    >>> is_held_out("random.py"), is_held_out("argparse.py")
    (True, False)
    """
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0
