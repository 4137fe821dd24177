"""What every attention here can return beside its output: asked for by an object, given as one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AuxRequest:
    """What to return beside the output.

    Attributes:
        lse: the natural log of each row's softmax denominator.
    """

    lse: bool = False


@dataclass(frozen=True)
class AuxOutput:
    """What was asked for beside the output; None where it was not.

    Attributes:
        lse: (batch, heads, seq), float32 (float64 for float64), -inf in a row with no key; differentiable. With
            dropout, that of all weights before any is dropped. With "torchscale", zero keys included.
    """

    lse: Tensor | None = None
