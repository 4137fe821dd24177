"""Exact dilated (LongNet) attention: plan, attend, merge. See DilatedPattern and dilated_attention."""

from dilated_core import kernels, measure, reference
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
    "kernels",
    "measure",
    "merge",
    "reference",
]
