"""LongNet: a stack of dilated layers over embeddings (arXiv 2307.02486 on MAGNETO, arXiv 2210.06423).

``DilatedStack`` is what encoder and language model share: the layers, one positions module between them, the final
norm, activation checkpointing, the record of its arguments. May import torch and this package's models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dilated_factory.models.initialisation import magneto_gain
from dilated_factory.models.layers import (
    DilatedTransformerEncoderLayer,
    check_hidden,
)
from dilated_factory.models.positions import create_positions
from dilated_factory.models.pretrained import Pretrained, defaults_of
from dilated_factory.models.row_caches import LayerCache


class DilatedStack(Pretrained):
    """``num_layers`` layers of one class, MAGNETO-initialised, and a LayerNorm at the end; arguments as LongNet's.

    State dict: layers.{i}.* as the layer documents, layer_norm.{weight,bias}. Positions hold nothing.
    """

    layer_class: ClassVar[type[DilatedTransformerEncoderLayer]]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        positions: str,
        xpos_scale_base: float | None = None,
        drop_path: float = 0.0,
        layer_norm_eps: float = 1e-5,
        checkpoint_activations: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **layer_options: Any,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a positive divisor of embed_dim={embed_dim}, got {num_heads} heads")
        gain = magneto_gain(num_layers)
        rotary = create_positions(positions, embed_dim // num_heads, scale_base=xpos_scale_base)
        self.embed_dim = embed_dim
        self.checkpoint_activations = checkpoint_activations
        self.layers = nn.ModuleList(
            self.layer_class(
                embed_dim,
                num_heads,
                segment_lengths,
                dilation_rates,
                # Deeper layers are skipped more often, the first never: the linear rule of stochastic depth.
                drop_path=drop_path * depth / max(num_layers - 1, 1),
                layer_norm_eps=layer_norm_eps,
                gamma_init=gain,
                rotary=rotary,
                device=device,
                dtype=dtype,
                **layer_options,
            )
            for depth in range(num_layers)
        )
        self.layer_norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps, device=device, dtype=dtype)
        self.arguments = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "segment_lengths": tuple(segment_lengths),
            "dilation_rates": tuple(dilation_rates),
            "positions": positions,
            "xpos_scale_base": xpos_scale_base,
            "drop_path": drop_path,
            "layer_norm_eps": layer_norm_eps,
            "checkpoint_activations": checkpoint_activations,
            # A default of today is what the model has been trained with, whatever the default will be.
            **defaults_of(self.layer_class, leaving_out=("drop_path", "layer_norm_eps", "gamma_init", "rotary")),
            **layer_options,
        }

    def run_layers(
        self,
        hidden: Tensor,
        key_padding_mask: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """Hidden states (batch, seq, embed_dim) through every layer and the final norm.

        True in the mask is padding; of ``caches``, one a layer, each is added to.
        """
        recompute = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        for depth, layer in enumerate(self.layers):
            if recompute:
                hidden = checkpoint(layer, hidden, key_padding_mask, use_reentrant=False)
            else:
                hidden = layer(hidden, key_padding_mask, None if caches is None else caches[depth])
        normalised: Tensor = self.layer_norm(hidden)
        return normalised


class LongNet(DilatedStack):
    """Encoder: embeddings in, hidden states out, every row seeing both ways through the dilated pattern.

    Args:
        embed_dim: channels of the residual stream.
        num_heads: query heads, a divisor of embed_dim.
        num_layers: depth; sets MAGNETO's gain sqrt(log(2 N)) too.
        segment_lengths, dilation_rates: the pattern, one pair a branch, in tokens.
        positions: "rotary" or "none" (where the embeddings carry their own, as Prov-GigaPath's do). XPOS is for causal
            models and is refused.
        drop_path: stochastic depth of the last layer, from 0 at the first, linearly.
        layer_norm_eps: epsilon of every norm.
        checkpoint_activations: recompute each layer in the backward pass instead of keeping its activations.
        device, dtype: of the parameters.
        layer_options: any further keyword of DilatedTransformerEncoderLayer (ffn_dim=, dropout=, kernel=, ...).

    State dict: layers.{i}.* (see DilatedTransformerEncoderLayer), layer_norm.{weight,bias}: a torchscale
    LongNetEncoder's, without its token table.

    Raises:
        TypeError, ValueError: an argument is out of its range, named.

    >>> encoder = LongNet(32, 4, 2, [8, 16], [1, 2])
    >>> encoder(torch.zeros(1, 40, 32)).shape
    torch.Size([1, 40, 32])
    """

    layer_class = DilatedTransformerEncoderLayer

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        positions: str = "none",
        **options: Any,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, num_layers, segment_lengths, dilation_rates, positions=positions, **options
        )

    def forward(self, embeddings: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Embeddings (batch, seq, embed_dim) to hidden states of the same shape and dtype.

        Args:
            embeddings: shorter sequences of a batch padded on the right, so that segments start where they would alone.
            key_padding_mask: (batch, seq), bool, True where a position is padding, as nn.TransformerEncoder's
                src_key_padding_mask. The others come out as without the padding (not under semantics="torchscale",
                whose zero keys depend on the padded length); what the padding itself comes out as means nothing.

        Raises:
            TypeError, ValueError: embeddings is not floating or not of that shape; the mask is not bool or of another.
        """
        check_hidden(embeddings, self.embed_dim)
        return self.run_layers(embeddings, key_padding_mask)
