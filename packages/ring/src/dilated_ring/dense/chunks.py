"""A whole sequence on one device, its keys taken a chunk at a time: a ring without ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from dilated_ring.dense.engine import Engine, Keys
from dilated_ring.plan import even_bounds


class Chunks:
    """Attends the keys of a whole sequence in ``count`` chunks; there may be more of them than keys."""

    def __init__(self, own: Keys, count: int) -> None:
        self.own, self.bounds = own, even_bounds(own.key.shape[1], count)

    def forward(self, engine: Engine) -> None:
        """Let the engine attend all keys that its rows may see."""
        engine.start_forward()
        for keys, _ in self._chunks():
            engine.attend(keys)

    def backward(self, engine: Engine) -> tuple[Tensor, Tensor]:
        """Let the engine differentiate them again, and return the sums of the keys' and values' gradients."""
        grad_key, grad_value = engine.zeros(*self.own.key.shape), engine.zeros(*self.own.key.shape)
        for keys, rows in self._chunks():
            engine.differentiate(keys, grad_key[:, rows], grad_value[:, rows])
        return grad_key, grad_value

    def _chunks(self) -> Iterator[tuple[Keys, slice]]:
        _, key, value, real = self.own
        for start, stop in pairwise(self.bounds):
            if start < stop:
                rows = slice(start, stop)
                yield (
                    Keys(((start, stop),), key[:, rows], value[:, rows], real if real is None else real[:, rows]),
                    rows,
                )
