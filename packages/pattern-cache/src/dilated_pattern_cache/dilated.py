"""DilatedPatternCache: a PatternCache for attention patterns, with keys that say what they are."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from dilated_pattern_cache.cache import PatternCache
from dilated_pattern_cache.indices import DilatedIndices, dilated_indices
from dilated_pattern_cache.keys import DilatedIndexKey, PatternKey
from dilated_pattern_cache.values.leaves import is_tensor

if TYPE_CHECKING:
    from torch import device as Device


@dataclass(frozen=True)
class KindInfo:
    """The entries of one kind together.

    Attributes:
        entries: how many there are.
        nbytes: of their memory; what entries share counts for each.
        hits: how often they were found.
        seconds: what they took to make.
        seconds_saved: by their hits.
    """

    entries: int
    nbytes: int
    hits: int
    seconds: float
    seconds_saved: float


class DilatedPatternCache(PatternCache[Hashable, Any]):
    """A ``PatternCache`` whose keys are typed, or tuples that begin with the kind of what they stand for.

    The latter are what the packages of this family use, such as ("dilated_core.tiles", ...). A key that could never be
    found again is refused: one with a tensor, a function, or anything else that is equal to nothing but itself.

    It takes the arguments of ``PatternCache``.

    >>> from dilated_pattern_cache import BlockLayoutKey
    >>> cache = DilatedPatternCache(max_bytes=64 * 2**20)
    >>> key = BlockLayoutKey(8192, "local", options={"window": 3})
    >>> layout = cache.get_or_create(key, lambda: "made with care")
    >>> first, *_ = cache.dilated_indices(16, [8, 16], [1, 4], heads=2)
    >>> sorted(cache.by_kind())
    ['dilated', 'sparse']
    """

    def dilated_indices(
        self,
        seq_len: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        heads: int = 1,
        *,
        device: Device | str | None = None,
    ) -> DilatedIndices:
        """The positions that each head visits in each branch; see ``indices.dilated_indices``. Needs PyTorch.

        Args:
            seq_len: tokens.
            segment_lengths: of the branches.
            dilation_rates: of the branches.
            heads: of queries.
            device: where the tensors must lie; the CPU by default.

        Raises:
            TypeError, ValueError: as ``DilatedIndexKey``; there is no such device.
            ImportError: PyTorch is not installed.
        """
        key = DilatedIndexKey(seq_len, tuple(segment_lengths), tuple(dilation_rates), heads)
        return cast(DilatedIndices, self.get_or_create(key, partial(dilated_indices, key), device=device))

    def by_kind(self) -> dict[str, KindInfo]:
        """The statistics of the entries there are, added up by kind. Memory that entries share counts for each."""
        kinds = defaultdict(list)
        for entry in self.snapshot():
            kinds[_kind(entry.key)].append(entry)
        return {
            kind: KindInfo(
                entries=len(entries),
                nbytes=sum(entry.nbytes for entry in entries),
                hits=sum(entry.hits for entry in entries),
                seconds=sum(entry.seconds for entry in entries),
                seconds_saved=sum(entry.seconds_saved for entry in entries),
            )
            for kind, entries in sorted(kinds.items())
        }

    @staticmethod
    def _check_key(key: Hashable) -> None:
        named = isinstance(key, tuple) and len(key) > 0 and isinstance(key[0], str)
        if not isinstance(key, PatternKey) and not named:
            raise TypeError(f"key: expected a PatternKey or a tuple that begins with its kind, got {key!r}")
        _check_part(key, key)


def _kind(key: Hashable) -> str:
    return key.kind if isinstance(key, PatternKey) else cast(tuple[str], key)[0]


def _check_part(part: Hashable, key: Hashable) -> None:
    if isinstance(part, tuple | frozenset):
        for inner in part:
            _check_part(inner, key)
    elif isinstance(part, float) and math.isnan(part):
        raise ValueError(f"key: expected one that equals itself, without NaN, got {key!r}")
    elif is_tensor(part) or (type(part).__hash__ is object.__hash__ and not _is_one_for_all(part)):
        kind = type(part).__name__
        raise TypeError(f"key: expected no {kind} in it, which is equal to nothing but itself, got {key!r}")


def _is_one_for_all(part: object) -> bool:
    """Whether there is one such object, which everybody means: None, a class, a dtype."""
    if part is None or part is ... or isinstance(part, type):
        return True
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(part, torch.dtype | torch.layout | torch.memory_format)
