"""Layouts of blocks: storage, set algebra, conversions, pictures, files. Imports torch and dilated_core only."""

from dilated_block_sparse.layout.block_layout import BlockLayout
from dilated_block_sparse.layout.checks import BlockSize

__all__ = ["BlockLayout", "BlockSize"]
