"""Dense attention over shards: keys go round a ring of ranks, or ranks exchange heads, or both."""

from dilated_ring.dense.functional import ring_attention
from dilated_ring.dense.sharding import shard, unshard
from dilated_ring.dense.team import Team

__all__ = ["Team", "ring_attention", "shard", "unshard"]
