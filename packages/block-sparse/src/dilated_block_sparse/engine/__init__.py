"""The executor: the plan's rectangles through the core's kernels, merged; and the exact backward by the same plan.

No softmax and no gradient formula is here: those are dilated_core's. Here rows and keys are gathered, and results are
put back in their places. How PyTorch calls it: ``operators``.
"""

from dilated_block_sparse.engine.backward import Gradients, backward
from dilated_block_sparse.engine.forward import forward, results_of_forward
from dilated_block_sparse.engine.gather import GATHER_ELEMENTS
from dilated_block_sparse.engine.work import Extras, Options

__all__ = ["GATHER_ELEMENTS", "Extras", "Gradients", "Options", "backward", "forward", "results_of_forward"]
