"""Patterns of blocks: pure functions of numbers that give compressed rows. BlockLayout has a constructor for each.

All take ``(seq_len, ..., *, block_size=128, heads=1)``, count in blocks where nothing else is said, and give
(indptr, indices); ``topk`` and ``threshold`` take scores. No pattern ever holds a table of q_blocks x kv_blocks.
"""

from dilated_block_sparse.patterns.anchors import Blocks, global_
from dilated_block_sparse.patterns.branches import longnet
from dilated_block_sparse.patterns.grid import CompressedRows
from dilated_block_sparse.patterns.ratio import PATTERNS, named
from dilated_block_sparse.patterns.sampling import bigbird, random
from dilated_block_sparse.patterns.scores import Choice, threshold, topk
from dilated_block_sparse.patterns.strides import dilated, fixed, strided
from dilated_block_sparse.patterns.windows import empty, full, hierarchical, local

__all__ = [
    "PATTERNS",
    "Blocks",
    "Choice",
    "CompressedRows",
    "bigbird",
    "dilated",
    "empty",
    "fixed",
    "full",
    "global_",
    "hierarchical",
    "local",
    "longnet",
    "named",
    "random",
    "strided",
    "threshold",
    "topk",
]
