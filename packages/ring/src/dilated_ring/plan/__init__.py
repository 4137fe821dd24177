"""The plan of a sequence that lies over many ranks: a pure function of sizes, without tensors and without a network."""

from dilated_ring.plan.crossing import Crossing, Part, Strip
from dilated_ring.plan.make import make_plan
from dilated_ring.plan.ranges import RowRange
from dilated_ring.plan.rank_plan import Bundle, RankPlan, Route, Segment
from dilated_ring.plan.ring_plan import Peers, RingPlan
from dilated_ring.plan.sharding import check_bounds, even_bounds
from dilated_ring.plan.traffic import Traffic

__all__ = [
    "Bundle",
    "Crossing",
    "Part",
    "Peers",
    "RankPlan",
    "RingPlan",
    "Route",
    "RowRange",
    "Segment",
    "Strip",
    "Traffic",
    "check_bounds",
    "even_bounds",
    "make_plan",
]
