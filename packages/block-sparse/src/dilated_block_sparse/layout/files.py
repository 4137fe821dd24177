"""Layouts in files: plain tensors and numbers in torch's file format, read without running code from the file.

Imports torch and this room.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dilated_block_sparse.layout import block_layout

if TYPE_CHECKING:
    from dilated_block_sparse.layout.block_layout import BlockLayout

FORMAT = "dilated_block_sparse.BlockLayout"
VERSION = 1


def save(layout: BlockLayout, path: str | Path) -> None:
    """Write ``layout`` to ``path``, 4 bytes a live block and 8 a row of blocks and head."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "q_len": layout.q_len,
        "kv_len": layout.kv_len,
        "block_size": list(layout.block_size),
        "indptr": layout.indptr,
        "indices": layout.indices,
    }
    torch.save(content, path)


def load(path: str | Path) -> BlockLayout:
    """Read what ``save`` wrote, and check it as any new layout.

    Raises:
        OSError: no file that can be read.
        ValueError: a damaged file, one of something else, or one of a later version; the path is named.
    """
    content = _read(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"path: expected a file of a BlockLayout, got something else in {str(path)!r}")
    if content.get("version") != VERSION:
        raise ValueError(f"path: expected version {VERSION}, got version {content.get('version')!r} in {str(path)!r}")
    try:
        return block_layout.BlockLayout(
            content["indptr"],
            content["indices"],
            content["q_len"],
            content["kv_len"],
            block_size=content["block_size"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: expected a whole BlockLayout, got a damaged one in {str(path)!r}: {error}") from error


def _read(path: str | Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises any of a dozen kinds for bytes that are not its own
        raise ValueError(
            f"path: expected a file of a BlockLayout, got one that torch cannot read, {str(path)!r}"
        ) from error
