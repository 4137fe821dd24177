"""Settings of all tests."""

from __future__ import annotations

import hypothesis
import torch

# No deadlines: a first call warms caches. Derandomised, so that a red run is red again.
hypothesis.settings.register_profile("dilated", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("dilated")

# On tensors this small a second thread only waits for the first, and where processors are shared it waits for long.
torch.set_num_threads(1)
