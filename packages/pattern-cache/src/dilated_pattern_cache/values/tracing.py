"""When PyTorch is watching: a cache steps aside. Imports PyTorch never; asks it only where it was imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast


def compiling() -> Callable[[], bool]:
    """A function that says whether the caller is being traced by torch.compile or torch.export."""
    torch = sys.modules.get("torch")
    return _ask_torch if torch is None else cast(Callable[[], bool], torch.compiler.is_compiling)


def _ask_torch() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def watched() -> bool:
    """Whether tensors made now are not what they seem: in a dispatch mode, a transform of torch.func, a trace."""
    if "torch" not in sys.modules:
        return False
    from dilated_pattern_cache.values import tensors

    return tensors.watched()


def outside_of_autograd() -> AbstractContextManager[object]:
    """Within it tensors are made that everybody can use: with no graph behind them, and no inference tensors."""
    if "torch" not in sys.modules:
        return nullcontext()
    from dilated_pattern_cache.values import tensors

    return tensors.outside_of_autograd()
