"""The kernel table: who can attend one tile, who is chosen, and why not the others.

One file an engine. Each attends one tile, forward and backward, in SDPA's layout (batch, heads, seq, head_dim), and
nothing above this folder touches a private operator.
"""

from dilated_core.kernels.gradient import rows_for_backward, tile_backward
from dilated_core.kernels.needs import Needs
from dilated_core.kernels.problem import Dropout, Problem
from dilated_core.kernels.table import Kernel, choose, survey, table

__all__ = ["Dropout", "Kernel", "Needs", "Problem", "choose", "rows_for_backward", "survey", "table", "tile_backward"]
