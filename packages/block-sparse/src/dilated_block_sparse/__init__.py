"""Exact block-sparse attention, forward and backward, whose cost follows the blocks that are kept."""

from typing import TYPE_CHECKING, Any

from dilated_block_sparse.functional import block_sparse_attention
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.modules import BlockSparseAttention, BlockSparseMultiheadAttention
from dilated_block_sparse.pattern import Pattern

if TYPE_CHECKING:
    from dilated_block_sparse.adaptive import BlockScorer as BlockScorer
    from dilated_block_sparse.adaptive import BlockSparseAdaptiveAttention as BlockSparseAdaptiveAttention
    from dilated_block_sparse.adaptive import attention_recall as attention_recall
    from dilated_block_sparse.adaptive import block_scores as block_scores

# torch.compiler.disable, which it needs, loads the compiler: as long as torch itself takes.
_ADAPTIVE = ("BlockScorer", "BlockSparseAdaptiveAttention", "attention_recall", "block_scores")
_RING = (
    "BlockSparseRingAttention",
    "BlockSparseRingMultiheadAttention",
    "BlockSparseRingPlan",
    "block_bounds",
    "block_sparse_ring_attention",
)

__all__ = [
    "BlockLayout",
    "BlockScorer",
    "BlockSparseAdaptiveAttention",
    "BlockSparseAttention",
    "BlockSparseMultiheadAttention",
    "Pattern",
    "attention_recall",
    "block_scores",
    "block_sparse_attention",
]


def __dir__() -> list[str]:
    """What is there, and what the extra "ring" brings, which is not in ``__all__``: ``import *`` takes all that."""
    return sorted({*globals(), *_ADAPTIVE, *_RING})


def __getattr__(name: str) -> Any:
    """What is dear to import, or needs the extra "ring", is imported when it is asked for."""
    if name in _ADAPTIVE:
        from dilated_block_sparse import adaptive

        return getattr(adaptive, name)
    if name not in _RING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from dilated_block_sparse import ring
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("dilated_ring"):
            raise
        raise ImportError(
            f'{name} needs dilated-ring, which is not installed: pip install "dilated-block-sparse[ring]"'
        ) from error
    return getattr(ring, name)
