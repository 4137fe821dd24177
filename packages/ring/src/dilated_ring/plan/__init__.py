"""The plan of a sequence that lies over many ranks: a pure function of sizes, without tensors and without a network."""

from dilated_ring.plan.crossing import Crossing, Part, Strip
from dilated_ring.plan.ring_plan import RingPlan, make_plan
from dilated_ring.plan.sharding import even_bounds

__all__ = ["Crossing", "Part", "RingPlan", "Strip", "even_bounds", "make_plan"]
