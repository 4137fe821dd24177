"""The Triton programs: dilated attention of one tile of rows over all branches, and its gradients. Imports Triton.

A tile is ``BLOCK_ROWS`` rows of one head in one sequence, whichever ``order`` names (see ``schedule``). For each branch
a program finds the segments its rows lie in, walks the rows of the same grid there, in place, a stride apart, and lets
one online softmax run on over all branches: there are no partial results to merge. Blocks that every row of the tile
meets as a whole need no mask; where tiles are cut well, most are such. What is computed never depends on the order:
membership, segments and causality are checked row by row wherever a block is not whole.

Numbers that change from call to call (lengths, branches, phases) are data: no new length or pattern compiles anything.

Arguments that all programs share:
    q, k, v, ...: tensors (batch, seq, heads, head_dim), last stride 1; ``*_strides``: of batch, seq and head.
    lse, grad_lse: float32 (batch, heads, seq); ``*_batch``, ``*_head``, ``*_row``: their strides.
    stats: float32 (batch, heads, seq, 2), contiguous; see ``row_stats``.
    real: (batch, kv_heads, seq), bool, True where a key is attended, and its strides; read only with HAS_MASK.
    order: (classes, rows), int32, positions; head_class: (heads,), int32. Read only with ORDERED.
    tiles: (tiles, 3), int32: where a tile's rows begin in the order, where its sequence starts and stops. Read only
        with PACKED.
    branches: (branches, 2), int32: segment lengths and rates; phases: (branches, heads), int32, where each head's grid
        starts in a segment, -1 where it has none.
    rows, others: how many rows the side has that is cut into tiles, and how many the side that is walked.
"""

from dilated_core.kernels.triton.programs.attend import forward
from dilated_core.kernels.triton.programs.differentiate import grad_key_value, grad_query, row_stats

__all__ = ["forward", "grad_key_value", "grad_query", "row_stats"]
