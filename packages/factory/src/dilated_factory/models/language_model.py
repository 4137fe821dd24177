"""LongNetLM: a causal language model of dilated layers (arXiv 2307.02486): token ids to logits, and plain sampling.

May import torch, dilated_core and this package's models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dilated_core import DilatedKVCache
from dilated_factory.models.initialisation import initialise_embedding
from dilated_factory.models.layers import DilatedTransformerDecoderLayer
from dilated_factory.models.longnet import DilatedStack

__all__ = ["LongNetLM"]

_ID_DTYPES = (torch.int64, torch.int32)


class LongNetLM(DilatedStack):
    """Decoder-only language model: token table, causal dilated layers with XPOS, projection back to the vocabulary.

    Token vectors are N(0, 1 / embed_dim), times sqrt(embed_dim) on the way in; logits are a bias-free projection of the
    normalised hidden states, initialised alike.

    Args:
        vocab_size: number of token ids.
        embed_dim, num_heads, num_layers, segment_lengths, dilation_rates: as LongNet.
        positions: "xpos", "rotary" or "none".
        xpos_scale_base: XPOS's decay distance in tokens, 512 where None; that reaches 36,260 tokens, see XPOSPositions.
        dropout: probability on the embeddings and on what each half layer adds to the residual stream.
        tie_embeddings: one matrix for the token table and the projection.
        options: any further keyword of LongNet or DilatedTransformerDecoderLayer.

    State dict: embed_tokens.weight, layers.{i}.* (see DilatedTransformerEncoderLayer), layer_norm.{weight,bias},
    output_projection.weight (the table's own when tied): a torchscale LongNetDecoder's.

    Raises:
        TypeError, ValueError: an argument is out of its range, named.

    >>> model = LongNetLM(256, 32, 4, 2, [16, 64], [1, 4])
    >>> model(torch.zeros(1, 100, dtype=torch.int64)).shape
    torch.Size([1, 100, 256])
    """

    layer_class = DilatedTransformerDecoderLayer

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        positions: str = "xpos",
        dropout: float = 0.0,
        tie_embeddings: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if vocab_size < 1:
            raise ValueError(f"vocab_size: expected a positive number, got {vocab_size}")
        super().__init__(
            embed_dim,
            num_heads,
            num_layers,
            segment_lengths,
            dilation_rates,
            positions=positions,
            dropout=dropout,
            device=device,
            dtype=dtype,
            **options,
        )
        self.vocab_size = vocab_size
        self.embed_tokens = nn.Embedding(vocab_size, embed_dim, device=device, dtype=dtype)
        self.embedding_dropout = nn.Dropout(dropout)
        self.output_projection = nn.Linear(embed_dim, vocab_size, bias=False, device=device, dtype=dtype)
        initialise_embedding(self.embed_tokens)
        if tie_embeddings:
            self.output_projection.weight = self.embed_tokens.weight
        else:
            initialise_embedding(self.output_projection)

    def forward(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Token ids (batch, seq), int64 or int32, to logits (batch, seq, vocab_size); row n predicts token n + 1.

        Args:
            tokens: the ids. Padding on the right needs no mask, since no row sees what comes after it.
            key_padding_mask: (batch, seq), bool, True where a token is padding, which no row attends.

        Raises:
            TypeError, ValueError: tokens is not an integer tensor of that shape; the mask is not bool or does not fit.
        """
        return self._logits(tokens, key_padding_mask)

    def _logits(
        self, tokens: Tensor, key_padding_mask: Tensor | None = None, caches: list[DilatedKVCache] | None = None
    ) -> Tensor:
        self._check_tokens("tokens", tokens)
        hidden = self.embedding_dropout(self.embed_tokens(tokens) * math.sqrt(self.embed_dim))
        logits: Tensor = self.output_projection(self.run_layers(hidden, key_padding_mask, caches))
        return logits

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        window: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Appends `max_new_tokens` sampled tokens to `prompt`, in eval mode, the model's own mode restored after.

        A token costs what attending the keys it reaches costs: each layer keeps those in a cache. With a `window` or
        under autocast it costs a whole forward pass over what is seen; a window starts anew, half of it back, each time
        it is full, so that segments keep starting where they did.

        Args:
            prompt: token ids (batch, seq >= 1).
            max_new_tokens: how many to append, 0 or more.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: sample among the k likeliest only.
            window: most tokens to look back on; all of them where None.
            generator: source of randomness on the prompt's device, for samples that can be repeated.

        Returns:
            Token ids (batch, seq + max_new_tokens), in the prompt's dtype.

        Raises:
            TypeError, ValueError: an argument is out of its range, named; a token id is outside the vocabulary.

        >>> model = LongNetLM(256, 32, 4, 1, [16], [1])
        >>> model.generate(torch.zeros(1, 3, dtype=torch.int64), 5, temperature=0).shape
        torch.Size([1, 8])
        """
        self._check_tokens("prompt", prompt)
        if prompt.shape[1] < 1:
            raise ValueError("prompt: expected at least one token a row, got none")
        if prompt.numel() and not 0 <= int(prompt.min()) <= int(prompt.max()) < self.vocab_size:
            raise ValueError(
                f"prompt: expected ids in [0, {self.vocab_size}), got [{int(prompt.min())}, {int(prompt.max())}]"
            )
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: expected 0 or more, got {max_new_tokens}")
        if not 0.0 <= temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
        if top_k is not None and not 1 <= top_k <= self.vocab_size:
            raise ValueError(f"top_k: expected 1 to vocab_size={self.vocab_size}, got {top_k}")
        if window is not None and window < 2:
            raise ValueError(f"window: expected at least 2 tokens, got {window}")

        was_training = self.training
        self.eval()
        try:
            tokens = prompt
            caches = self._new_caches(prompt) if window is None else None
            for _ in range(max_new_tokens):
                if caches is None:
                    logits = self(tokens[:, _window_start(tokens.shape[1], window) :])
                else:
                    logits = self._logits(tokens if tokens is prompt else tokens[:, -1:], caches=caches)
                logits = logits[:, -1].float()
                chosen = _choose(logits, temperature, top_k, generator)
                tokens = torch.cat((tokens, chosen.to(tokens.dtype)), dim=1)
        finally:
            self.train(was_training)
        return tokens

    def _new_caches(self, prompt: Tensor) -> list[DilatedKVCache] | None:
        """One empty cache a layer; None where a layer's type has none, or autocast would give keys another dtype."""
        attentions: list[Any] = [layer.self_attn for layer in self.layers]
        if torch.is_autocast_enabled(prompt.device.type) or not all(hasattr(each, "new_cache") for each in attentions):
            return None
        return [each.new_cache(prompt.shape[0]) for each in attentions]

    def _check_tokens(self, name: str, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor) or tokens.dtype not in _ID_DTYPES:
            found = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"{name}: expected int64 or int32 token ids, got {found}")
        if tokens.ndim != 2:
            raise ValueError(f"{name}: expected (batch, seq), got {tuple(tokens.shape)}")


def _window_start(length: int, window: int | None) -> int:
    """First position to look at: 0 while all fits, then forward by half a window whenever it does not.

    >>> [_window_start(length, 8) for length in (8, 9, 12, 13)]
    [0, 4, 4, 8]
    """
    if window is None or length <= window:
        return 0
    step = window // 2
    return -(-(length - window) // step) * step


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token id a row, (batch, 1), from logits (batch, vocab_size)."""
    if temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probabilities = functional.softmax(logits / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)
