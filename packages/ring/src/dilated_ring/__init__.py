"""Exact attention over sequences that lie on many devices, or that are larger than one.

``dilated_ring_attention`` is LongNet's attention over shards, ``ring_attention`` dense attention over shards, and
``streamed_attention`` dense attention over keys in host memory. Imports torch and dilated_core, and matplotlib only
when a plan is drawn.
"""

from dilated_ring.dense import ring_attention, shard, unshard
from dilated_ring.dilated.functional import dilated_ring_attention
from dilated_ring.errors import DisagreementError, PeerError, RingError
from dilated_ring.modules import RingDilatedAttention, RingMultiheadDilatedAttention
from dilated_ring.plan import RingPlan, make_plan
from dilated_ring.streaming import streamed_attention

__all__ = [
    "DisagreementError",
    "PeerError",
    "RingDilatedAttention",
    "RingError",
    "RingMultiheadDilatedAttention",
    "RingPlan",
    "dilated_ring_attention",
    "make_plan",
    "ring_attention",
    "shard",
    "streamed_attention",
    "unshard",
]
