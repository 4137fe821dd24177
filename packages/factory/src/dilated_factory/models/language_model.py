"""LongNetLM: a causal language model of dilated layers (arXiv 2307.02486): token ids to logits.

May import torch, dilated_core's checks and this package's models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dilated_core.checks import positive_integer
from dilated_factory.models.generation import GeneratesText, check_tokens
from dilated_factory.models.initialisation import initialise_embedding
from dilated_factory.models.layers import DilatedTransformerDecoderLayer
from dilated_factory.models.longnet import DilatedStack
from dilated_factory.models.row_caches import LayerCache


class LongNetLM(GeneratesText, DilatedStack):
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
        vocab_size = positive_integer("vocab_size", vocab_size)
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
        self.arguments = {"vocab_size": vocab_size, **self.arguments, "tie_embeddings": tie_embeddings}
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
        check_tokens("tokens", tokens)
        logits: Tensor = self.output_projection(self._hidden(tokens, key_padding_mask))
        return logits

    def last_logits(
        self, tokens: Tensor, caches: Sequence[LayerCache] | None = None, last: Tensor | None = None
    ) -> Tensor:
        """Logits (batch, vocab_size) of what follows one column of tokens (batch, seq): all that generation asks for.

        Args:
            tokens: the ids.
            caches: one a layer, of the tokens before these; they are added to it.
            last: (batch,), each row's column; the last one where None.
        """
        hidden = self._hidden(tokens, caches=caches)
        rows = hidden[:, -1] if last is None else hidden[torch.arange(len(last), device=last.device), last]
        logits: Tensor = self.output_projection(rows)
        return logits

    def _hidden(
        self, tokens: Tensor, key_padding_mask: Tensor | None = None, caches: Sequence[LayerCache] | None = None
    ) -> Tensor:
        embedded = self.embedding_dropout(self.embed_tokens(tokens) * math.sqrt(self.embed_dim))
        return self.run_layers(embedded, key_padding_mask, caches)
