"""Decoding with a cache: lanes (which heads share which kept rows), cache (the rows), step (attending them)."""

from dilated_core.decode.cache import DilatedKVCache
from dilated_core.decode.step import decode_step

__all__ = ["DilatedKVCache", "decode_step"]
