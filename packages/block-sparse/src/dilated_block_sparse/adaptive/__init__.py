"""Sparsity that follows the content: blocks scored by pooled rows, the best kept, and what they miss measured.

Imports torch, dilated_core and this package's layouts and attention.
"""

from dilated_block_sparse.adaptive.folding import attend_layout
from dilated_block_sparse.adaptive.module import BlockSparseAdaptiveAttention
from dilated_block_sparse.adaptive.recall import Recall, attention_recall, block_masses
from dilated_block_sparse.adaptive.scorer import BlockScorer, distillation_loss
from dilated_block_sparse.adaptive.scores import block_scores
from dilated_block_sparse.adaptive.selection import select_blocks, select_layout

__all__ = [
    "BlockScorer",
    "BlockSparseAdaptiveAttention",
    "Recall",
    "attend_layout",
    "attention_recall",
    "block_masses",
    "block_scores",
    "distillation_loss",
    "select_blocks",
    "select_layout",
]
