"""A warm cache in a file: what one process has computed, the next one need not.

Needs PyTorch and safetensors: ``pip install "dilated-pattern-cache[persistence]"``.
"""

from dilated_pattern_cache.persistence.errors import CacheFileError
from dilated_pattern_cache.persistence.warmth import LoadReport, SaveReport, load, save

__all__ = ["CacheFileError", "LoadReport", "SaveReport", "load", "save"]
