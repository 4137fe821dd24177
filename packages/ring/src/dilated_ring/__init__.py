"""Exact attention over sequences that lie on many devices, or that are larger than one."""

from dilated_ring.dilated.functional import dilated_ring_attention
from dilated_ring.errors import DisagreementError, PeerError, RingError
from dilated_ring.plan import RingPlan, make_plan

__all__ = [
    "DisagreementError",
    "PeerError",
    "RingError",
    "RingPlan",
    "dilated_ring_attention",
    "make_plan",
]
