"""Decoding: the text so far, which rows have ended, and where the logits of the next tokens come from.

Either each layer keeps the keys and values that tokens to come can reach, or all that is looked back on passes through
the model again. May import torch, dilated_core and this package's row caches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dilated_core import DilatedKVCache
from dilated_factory.models.row_caches import LayerCache, RowCaches, RowGroup


class LanguageModel(Protocol):
    """What decoding asks of a model."""

    layers: nn.ModuleList

    def last_logits(
        self, tokens: Tensor, caches: Sequence[LayerCache] | None = None, last: Tensor | None = None
    ) -> Tensor:
        """Logits (batch, vocab_size) of what follows column ``last`` (batch,) of tokens, the last one where None."""


class Text:
    """Token ids of a batch, each row's from the left, what is right of them filled.

    Attributes:
        ids: (batch, room), all valid ids.
        lengths: tokens each row holds; of rows that have ended, with what filled them since.
    """

    def __init__(self, prompt: Tensor, lengths: Sequence[int], pad: int) -> None:
        self.lengths = list(lengths)
        self._next = torch.tensor(self.lengths, device=prompt.device)[:, None] if lengths else prompt.new_zeros(0, 1)
        self._next = self._next.long()
        self.seq = max(self.lengths, default=prompt.shape[1])
        columns = torch.arange(self.seq, device=prompt.device)
        self.ids = prompt[:, : self.seq].masked_fill(columns >= self._next, pad)
        self._pad = pad

    @property
    def now(self) -> Tensor:
        """The ids so far, (batch, seq)."""
        return self.ids[:, : self.seq]

    def append(self, chosen: Tensor) -> None:
        """Put ids (batch, 1) after each row's last."""
        if self.seq == self.ids.shape[1]:  # by doubling, so that n tokens cost O(n)
            self.ids = torch.cat((self.ids, torch.full_like(self.ids, self._pad)), dim=1)
        self.ids.scatter_(1, self._next, chosen)
        self._next += 1
        self.lengths = [length + 1 for length in self.lengths]
        self.seq += 1

    def seen(self, vocab_size: int) -> Tensor:
        """(batch, vocab_size), True where a row holds that id."""
        columns = torch.arange(self.seq, device=self.ids.device)
        # Where there is padding, the row's first id once more, which changes nothing.
        ids = torch.where(columns < self._next, self.now, self.ids[:, :1]).long()
        return torch.zeros(len(self.lengths), vocab_size, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)


class Ending:
    """Which rows have ended, by which ids, and what fills them then."""

    def __init__(self, ends: Sequence[int], pad: int, text: Text) -> None:
        self._ids = torch.tensor(ends, device=text.ids.device, dtype=text.ids.dtype) if ends else None
        self._ended = torch.zeros(len(text.lengths), 1, dtype=torch.bool, device=text.ids.device)
        self._pad = pad
        self.rows = [False] * len(text.lengths)

    @property
    def all(self) -> bool:
        """Whether no row goes on."""
        return self._ids is not None and all(self.rows)

    def apply(self, chosen: Tensor) -> Tensor:
        """The ids chosen, (batch, 1), those of rows that ended before filled; notes which end with them."""
        if self._ids is None:
            return chosen
        chosen = chosen.masked_fill(self._ended, self._pad)
        self._ended = self._ended | torch.isin(chosen, self._ids)
        self.rows = self._ended[:, 0].tolist()
        return chosen


class Decoder(Protocol):
    """Where the logits of the next tokens come from."""

    def next_logits(self, ended: Sequence[bool]) -> Tensor:
        """Logits (batch, vocab_size) of what follows the text; of rows that have ended, any finite ones."""


class WholePasses:
    """A forward pass over all that is looked back on, for every token; rows of one length together."""

    def __init__(self, model: LanguageModel, text: Text, window: int | None) -> None:
        self._model, self._text, self._window = model, text, window

    def next_logits(self, ended: Sequence[bool]) -> Tensor:
        """See Decoder."""
        ids, lengths = self._text.ids, self._text.lengths
        live = [row for row, done in enumerate(ended) if not done]
        if len({lengths[row] for row in live}) <= 1 and len(live) == len(lengths):
            return self._model.last_logits(ids[:, _window_start(self._text.seq, self._window) : self._text.seq])
        logits = None
        for length, rows in _by_length(lengths, live).items():
            index = torch.tensor(rows, device=ids.device)
            part = self._model.last_logits(ids[index, _window_start(length, self._window) : length])
            if logits is None:
                logits = part.new_zeros(len(lengths), part.shape[1])
            logits[index] = part
        assert logits is not None  # a row goes on, or there would be no next token
        return logits


class CachedSteps:
    """The prompt once, then one token a row at a time, after what the caches keep."""

    def __init__(
        self, model: LanguageModel, text: Text, caches: Sequence[LayerCache], groups: Sequence[RowGroup]
    ) -> None:
        self._model, self._text, self._caches, self._groups = model, text, caches, groups
        self._rows_of = [group.rows.tolist() for group in groups]
        self._started = False

    def next_logits(self, ended: Sequence[bool]) -> Tensor:
        """See Decoder."""
        text = self._text
        last = torch.tensor(text.lengths, device=text.ids.device) - 1 if self._groups else None
        if not self._started:
            self._started = True
            return self._model.last_logits(text.now, self._caches, last)
        for group, rows in zip(self._groups, self._rows_of, strict=True):
            group.tokens = 0 if all(ended[row] for row in rows) else 1
        newest = text.now[:, -1:] if last is None else text.ids.gather(1, last[:, None])
        return self._model.last_logits(newest, self._caches)


def cached(model: LanguageModel, text: Text, autocast: Autocast) -> CachedSteps | None:
    """Decoding with caches; None where an attention's type has none."""
    attentions: list[Any] = [layer.self_attn for layer in model.layers]
    if not all(hasattr(attention, "new_cache") for attention in attentions):
        return None
    by_length = _by_length(text.lengths, range(len(text.lengths)))
    if len(by_length) <= 1:
        return CachedSteps(model, text, [autocast.cache(one, len(text.lengths)) for one in attentions], ())
    device = text.ids.device
    groups = [RowGroup(torch.tensor(rows, device=device), length) for length, rows in by_length.items()]
    sizes = [len(rows) for rows in by_length.values()]
    caches = [RowCaches(groups, [autocast.cache(one, size) for size in sizes]) for one in attentions]
    return CachedSteps(model, text, caches, groups)


@dataclass(frozen=True)
class Autocast:
    """Autocast's state on one kind of device, to compute every token in, wherever the iterator is advanced."""

    device_type: str
    dtype: torch.dtype | None

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        """The present state; dtype None where it is off."""
        enabled = torch.is_autocast_enabled(device_type)
        return cls(device_type, torch.get_autocast_dtype(device_type) if enabled else None)

    def again(self) -> AbstractContextManager[Any]:
        """A context in that state; nothing at all where it holds already."""
        if Autocast.now(self.device_type) == self:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None)

    def cache(self, attention: Any, batch_size: int) -> DilatedKVCache:
        """``attention.new_cache(batch_size)``, in the dtype that autocast gives its keys; it leaves float64 alone."""
        cache: DilatedKVCache = attention.new_cache(batch_size)
        if self.dtype in (None, cache.dtype) or cache.dtype == torch.float64:
            return cache
        return DilatedKVCache(
            cache.segment_lengths,
            cache.dilation_rates,
            batch_size=cache.batch_size,
            num_heads=cache.num_heads,
            head_dim=cache.head_dim,
            kv_heads=cache.kv_heads,
            semantics=cache.semantics,
            dtype=self.dtype,
            device=cache.device,
            allocator=cache.resources.allocator,
        )


def uncompiled() -> AbstractContextManager[Any]:
    """Compiled modules run as they were written, for a while: a graph of a step would hold for one position only."""
    if "torch._dynamo" not in sys.modules:  # whose import takes seconds; nothing has been compiled without it
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; each module's own mode after."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _by_length(lengths: Sequence[int], rows: Sequence[int] | range) -> dict[int, list[int]]:
    """Length -> those of the rows that have it."""
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(lengths[row], []).append(row)
    return groups


def _window_start(length: int, window: int | None) -> int:
    """First position to look at: 0 while all fits, then forward by half a window whenever it does not.

    >>> [_window_start(length, 8) for length in (8, 9, 12, 13)]
    [0, 4, 4, 8]
    """
    if window is None or length <= window:
        return 0
    step = window // 2
    return -(-(length - window) // step) * step
