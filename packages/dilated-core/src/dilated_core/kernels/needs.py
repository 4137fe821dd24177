"""What a call asks of a kernel beyond plain or causal attention."""

from __future__ import annotations

from typing import NamedTuple

from dilated_core.kernels.problem import Problem

NO_DROPOUT = "it drops no probabilities"


class Needs(NamedTuple):
    """What a call needs of a kernel beside the tensors' device, dtype and head_dim.

    Attributes:
        mask: some keys are padding.
        dropout: probabilities are dropped.
    """

    mask: bool = False
    dropout: bool = False

    @classmethod
    def of(cls, problem: Problem) -> Needs:
        """What this problem needs."""
        return cls(problem.real is not None, problem.dropout is not None)


NO_NEEDS = Needs()
