"""Block-sparse attention over many ranks: each gets only the key blocks that its rows keep. Needs the extra "ring"."""

from dilated_block_sparse.ring.bounds import block_bounds
from dilated_block_sparse.ring.functional import block_sparse_ring_attention
from dilated_block_sparse.ring.modules import BlockSparseRingAttention, BlockSparseRingMultiheadAttention
from dilated_block_sparse.ring.plan import BlockSparseRingPlan

__all__ = [
    "BlockSparseRingAttention",
    "BlockSparseRingMultiheadAttention",
    "BlockSparseRingPlan",
    "block_bounds",
    "block_sparse_ring_attention",
]
