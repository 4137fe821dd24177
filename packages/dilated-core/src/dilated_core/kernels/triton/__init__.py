"""One launch for all branches: the kernel "triton". Importing this imports no Triton; running it does.

kernel.py    what the kernel table and the fused path call
schedule.py  the order of the rows, and the pattern as numbers
blocks.py    how many rows at a time
launch.py    from tensors to launches
tuning.py    the search for block sizes on the card at hand
programs/    the programs themselves; the one folder that imports Triton
"""

from dilated_core.kernels.triton.kernel import Triton
from dilated_core.kernels.triton.schedule import Branches

__all__ = ["Branches", "Triton"]
