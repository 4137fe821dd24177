"""MAGNETO's initial weights (Foundation Transformers, arXiv 2210.06423, section 2.3), for sub-layer-normalised stacks.

Every matrix has Xavier's variance; those that carry the residual stream (the feed-forward's two, and the value and
output projections) are larger by a gain that grows with the depth, the query and key projections are not. May import
torch and dilated_core's checks.
"""

from __future__ import annotations

import math

from torch import nn

from dilated_core.checks import positive_integer


def magneto_gain(num_layers: int) -> float:
    """sqrt(log(2 N)): the gain of an encoder-only or decoder-only stack of N layers (arXiv 2210.06423, figure 2).

    Raises:
        TypeError, ValueError: num_layers is no positive int.

    >>> round(magneto_gain(12), 4)
    1.7827
    """
    return math.sqrt(math.log(2 * positive_integer("num_layers", num_layers)))


def initialise_linear(linear: nn.Linear, gain: float) -> None:
    """Weights of variance gain**2 * 2 / (fan_in + fan_out), normal; bias 0. In place."""
    nn.init.xavier_normal_(linear.weight, gain=gain)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def initialise_embedding(table: nn.Embedding | nn.Linear) -> None:
    """Normal rows of variance 1 / embed_dim, for a token table or the projection back to tokens. In place."""
    nn.init.normal_(table.weight, std=table.weight.shape[1] ** -0.5)
