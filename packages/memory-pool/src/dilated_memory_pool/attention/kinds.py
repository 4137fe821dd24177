"""The purposes that an attention computation needs memory for."""

from __future__ import annotations

from enum import Enum


class BufferKind(str, Enum):
    """What a buffer is for. ``BufferKind("Query")`` finds a kind by its name in any case.

    >>> BufferKind("TEMP") is BufferKind.TEMP
    True
    """

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    OUTPUT = "output"
    SCORES = "scores"
    WEIGHTS = "weights"
    TEMP = "temp"
    COMM = "comm"
    MASK = "mask"
    CACHE = "cache"

    @classmethod
    def _missing_(cls, value: object) -> BufferKind:
        """The kind of that name in another case; TypeError or ValueError where there is none."""
        names = [kind.value for kind in cls]
        if not isinstance(value, str):
            raise TypeError(f"kind: expected a BufferKind or one of {names}, got {value!r}")
        if value.lower() not in names:
            raise ValueError(f"kind: expected one of {names}, got {value!r}")
        return cls(value.lower())
