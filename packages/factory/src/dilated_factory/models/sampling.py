"""Sampling: from a row of logits to a token id. The usual rules, as one plain value that is checked once.

In this order: the penalty on what was said before, the temperature, the k likeliest, the nucleus, the floor under the
likeliest. May import torch only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Sampling:
    """How to choose a token.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token, the first of equals.
        top_k: keep the k likeliest tokens only, of equals the first.
        top_p: keep the nucleus, the fewest likeliest tokens that hold at least p of the mass that is left
            (arXiv 1904.09751).
        min_p: keep the tokens at least min_p times as likely as the likeliest (arXiv 2407.01082).
        repetition_penalty: for tokens that occur before, positive logits are divided by it and the others multiplied
            (CTRL, arXiv 1909.05858, section 4.1); 1 is none.

    Raises:
        TypeError, ValueError: one is out of its range, named.

    >>> logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    >>> Sampling(top_p=0.7).probabilities(logits)
    tensor([[0.6250, 0.3750, 0.0000, 0.0000]])
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= _number("temperature", self.temperature) < math.inf:
            raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature}")
        if self.top_k is not None:
            if isinstance(self.top_k, bool) or not isinstance(self.top_k, int):
                raise TypeError(f"top_k: expected an int or None, got {self.top_k!r}")
            if self.top_k < 1:
                raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0.0 < _number("top_p", self.top_p) <= 1.0:
            raise ValueError(f"top_p: expected a share of the mass in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0.0 <= _number("min_p", self.min_p) <= 1.0:
            raise ValueError(f"min_p: expected a share of the likeliest in [0, 1], got {self.min_p}")
        if not 0.0 < _number("repetition_penalty", self.repetition_penalty) < math.inf:
            raise ValueError(f"repetition_penalty: expected a finite number > 0, got {self.repetition_penalty}")

    def penalised(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits (batch, vocab_size), of the tokens that are True in ``seen``, of that shape, made less likely."""
        less = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(seen, less, logits)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that tokens are drawn from, (batch, vocab_size); temperature is not 0, top_k at most that.

        Relative to the likeliest, so that no temperature, however low, makes inf - inf.
        """
        relative = logits - logits.amax(dim=-1, keepdim=True)
        relative = relative / max(self.temperature, torch.finfo(logits.dtype).tiny)
        if self.top_k is not None:
            relative = relative.masked_fill(~_likeliest(relative, self.top_k), -math.inf)
        if self.top_p is not None and self.top_p < 1.0:  # 1 keeps all, whatever their sum is rounded to
            relative = relative.masked_fill(~_nucleus(relative, self.top_p), -math.inf)
        if self.min_p:  # 0 keeps all, and has no logarithm
            relative = relative.masked_fill(relative < math.log(self.min_p), -math.inf)
        return functional.softmax(relative, dim=-1)

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One token id a row, (batch, 1), int64, from logits (batch, vocab_size) in float32 or float64."""
        if self.temperature == 0.0:  # the truncations keep the likeliest in any case
            return logits.argmax(dim=-1, keepdim=True)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator)


def _likeliest(logits: Tensor, k: int) -> Tensor:
    """True for the k largest of each row; of those equal to the k-th, the first."""
    kth = logits.topk(k, dim=-1).values[:, -1:]
    above, equal = logits > kth, logits == kth
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def _nucleus(logits: Tensor, p: float) -> Tensor:
    """True for the fewest likeliest tokens of each row whose probabilities sum to at least p; the first of equals."""
    descending, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = functional.softmax(descending, dim=-1)
    # What the tokens before it hold, summed as whole numbers of 2^-52, exactly and so in any order: a GPU's running sum
    # of floats differs between runs.
    whole = (probabilities.double() * 2.0**52).round().to(torch.int64)
    likelier = (whole.cumsum(-1) - whole).double() * 2.0**-52
    return torch.empty_like(likelier, dtype=torch.bool).scatter_(-1, order, likelier < p)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}")
    return value
