"""Exact dilated (LongNet) attention for PyTorch: plan which rows meet, attend each tile, merge the partials exactly.

``dilated_attention`` is the function, ``DilatedAttention`` and ``MultiheadDilatedAttention`` are the modules. Imports
torch and nothing else; Triton and the flash packages are looked for only when a kernel of theirs is asked for.
"""

from dilated_core import interop, kernels, measure, reference
from dilated_core.attend import attend
from dilated_core.auxiliary import AuxOutput, AuxRequest
from dilated_core.decode import DilatedKVCache, decode_step
from dilated_core.functional import dilated_attention
from dilated_core.maps import AttentionMap, attention_map
from dilated_core.modules import DilatedAttention, MultiheadDilatedAttention
from dilated_core.partial import Partial, merge
from dilated_core.pattern import DilatedPattern
from dilated_core.resources import Allocator, BufferManager, PatternStore

__all__ = [
    "Allocator",
    "AttentionMap",
    "AuxOutput",
    "AuxRequest",
    "BufferManager",
    "DilatedAttention",
    "DilatedKVCache",
    "DilatedPattern",
    "MultiheadDilatedAttention",
    "Partial",
    "PatternStore",
    "attend",
    "attention_map",
    "decode_step",
    "dilated_attention",
    "interop",
    "kernels",
    "measure",
    "merge",
    "reference",
]
