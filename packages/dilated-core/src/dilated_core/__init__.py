"""Exact dilated (LongNet) attention: plan, attend, merge. See DilatedPattern and dilated_attention."""

from dilated_core import kernels, measure, reference
from dilated_core.attend import attend
from dilated_core.functional import AuxOutput, AuxRequest, dilated_attention
from dilated_core.maps import AttentionMap, attention_map
from dilated_core.modules import DilatedAttention, MultiheadDilatedAttention
from dilated_core.partial import Partial, merge
from dilated_core.pattern import DilatedPattern
from dilated_core.resources import Allocator, PatternStore

__all__ = [
    "Allocator",
    "AttentionMap",
    "AuxOutput",
    "AuxRequest",
    "DilatedAttention",
    "DilatedPattern",
    "MultiheadDilatedAttention",
    "Partial",
    "PatternStore",
    "attend",
    "attention_map",
    "dilated_attention",
    "kernels",
    "measure",
    "merge",
    "reference",
]
