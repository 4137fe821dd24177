"""What a dense rectangle costs, in pairs: a pair is one query row meeting one key, in one head, in a long call.

Measured on CPUs with PyTorch's flash operator, head_dim 64; docs/benchmarks/block_sparse_density.md has what comes of
it. The plan is exact whatever these say; they only decide which rows share a call.
"""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """What is paid beside the pairs themselves, in pairs.

    Attributes:
        key: for each key. Short calls are slow as if they had so many more rows; gathering is in it.
        row: for each row: its gathering, and merging it into the result.
        call: for each rectangle.
    """

    key: int
    row: int
    call: int

    def rectangle(self, rows: int, keys: int) -> int:
        """The pairs that ``rows`` x ``keys`` tokens are worth; 0 for an empty rectangle."""
        return keys * (rows + self.key) + rows * self.row + self.call if rows and keys else 0


FULL_PRECISION = Cost(key=22, row=32, call=2000)
# Half precision products are faster, or as fast, and all around them costs the same.
HALF_PRECISION = Cost(key=60, row=48, call=2500)
