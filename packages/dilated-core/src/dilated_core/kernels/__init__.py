"""The kernel table: who can attend one tile, who is chosen, and why not the others.

One file an engine. Each attends one tile, forward and backward, in SDPA's layout (batch, heads, seq, head_dim), and
nothing above this folder touches a private operator.
"""

from dilated_core.kernels.gradient import tile_backward
from dilated_core.kernels.problem import Problem
from dilated_core.kernels.table import Kernel, choose, survey, table

__all__ = ["Kernel", "Problem", "choose", "survey", "table", "tile_backward"]
