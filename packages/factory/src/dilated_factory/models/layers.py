"""Transformer layers around dilated attention: MAGNETO's sub-layer normalisation, encoder and causal decoder.

    x = x + drop_path(dropout(self_attn(self_attn_layer_norm(x))))        self_attn normalises again before out_proj
    x = x + drop_path(dropout(ffn(final_layer_norm(x))))                  ffn normalises again before fc2

Parameter names are torchscale's, so its checkpoints load. The attention comes from the factory, so a layer's kernel and
memory policy are at ``layer.self_attn.decision``. May import torch, dilated_core's checks, the factory's create
and this package's models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dilated_core.checks import positive_integer, probability
from dilated_factory.create import create_multihead_dilated_attention
from dilated_factory.models.initialisation import initialise_linear
from dilated_factory.models.positions import XPOSPositions
from dilated_factory.models.row_caches import LayerCache, RowCaches

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
}


class FeedForward(nn.Module):
    """fc2(ffn_layernorm(activation(fc1(x)))), the sub-layer-normalised feed-forward of MAGNETO.

    Args:
        embed_dim: channels in and out.
        ffn_dim: channels between.
        activation: "gelu", "relu" or "silu".
        activation_dropout: probability of dropping a hidden channel.
        layer_norm: whether ffn_layernorm is there.
        layer_norm_eps: its epsilon.
        gamma_init: Xavier gain of both matrices.

    State dict: fc1.{weight,bias}, ffn_layernorm.{weight,bias}, fc2.{weight,bias}.

    >>> FeedForward(8, 32)(torch.zeros(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        embed_dim: int,
        ffn_dim: int,
        *,
        activation: str = "gelu",
        activation_dropout: float = 0.0,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
        ffn_dim = positive_integer("ffn_dim", ffn_dim)
        self.activation = activation
        self.gamma_init = gamma_init
        self.fc1 = nn.Linear(embed_dim, ffn_dim, device=device, dtype=dtype)
        self.activation_dropout = nn.Dropout(probability("activation_dropout", activation_dropout))
        self.ffn_layernorm = (
            nn.LayerNorm(ffn_dim, eps=layer_norm_eps, device=device, dtype=dtype) if layer_norm else None
        )
        self.fc2 = nn.Linear(ffn_dim, embed_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw MAGNETO's initial weights again."""
        initialise_linear(self.fc1, self.gamma_init)
        initialise_linear(self.fc2, self.gamma_init)
        if self.ffn_layernorm is not None:
            self.ffn_layernorm.reset_parameters()

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., embed_dim) to (..., embed_dim), dtype kept."""
        hidden = self.activation_dropout(ACTIVATIONS[self.activation](self.fc1(hidden)))
        if self.ffn_layernorm is not None:
            hidden = self.ffn_layernorm(hidden)
        projected: Tensor = self.fc2(hidden)
        return projected

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"activation={self.activation!r}"


class DilatedTransformerEncoderLayer(nn.Module):
    """One transformer layer with dilated self-attention in both directions (LongNet, arXiv 2307.02486).

    Args:
        embed_dim: channels of the residual stream.
        num_heads: query heads; embed_dim is a multiple of it.
        segment_lengths, dilation_rates: the pattern, one pair a branch, in tokens.
        ffn_dim: hidden channels of the feed-forward; 4 * embed_dim where None.
        dropout: probability on what each half adds to the residual stream.
        attention_dropout: probability on the attention weights, while training; their kernel is then "math", which
            alone drops.
        activation_dropout: probability on the feed-forward's hidden channels.
        drop_path: probability that a sample skips a half (stochastic depth, arXiv 1603.09382).
        activation: "gelu", "relu" or "silu".
        layer_norm: whether the two *sub*-layer norms are there; the two pre-norms always are.
        layer_norm_eps: epsilon of all of them.
        gamma_init: Xavier gain of fc1, fc2, v_proj and out_proj; ``magneto_gain(num_layers)`` in a stack.
        kv_heads: key/value heads for grouped queries; num_heads where None.
        rotary: module called as rotary(query, key) -> (query, key) after the projections, or None.
        attention_type: the factory's type, "auto" to let its policy choose.
        sequence_length: expected tokens, for that policy; None where unknown.
        device, dtype: of the parameters.
        options: any further keyword of ``create_multihead_dilated_attention`` (kernel=, semantics=, ...).

    State dict: self_attn.{q,k,v,out}_proj.{weight,bias}, self_attn.inner_attn_ln.{weight,bias},
    self_attn_layer_norm.{weight,bias}, ffn.fc1.{weight,bias}, ffn.ffn_layernorm.{weight,bias},
    ffn.fc2.{weight,bias}, final_layer_norm.{weight,bias}: torchscale's names and shapes.

    Raises:
        TypeError, ValueError: an argument is out of its range, named; rotary is XPOS, which needs causal attention.

    >>> layer = DilatedTransformerEncoderLayer(32, 4, [8, 16], [1, 2])
    >>> layer(torch.zeros(2, 24, 32)).shape
    torch.Size([2, 24, 32])
    """

    is_causal = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        ffn_dim: int | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        drop_path: float = 0.0,
        activation: str = "gelu",
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        kv_heads: int | None = None,
        rotary: nn.Module | None = None,
        attention_type: str = "auto",
        sequence_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(rotary, XPOSPositions) and not self.is_causal:
            raise ValueError(
                "rotary: XPOS decays towards the past and grows without bound towards the future, so it needs a causal "
                "layer; use rotary positions or none here"
            )
        self.embed_dim = embed_dim
        self.self_attn = create_multihead_dilated_attention(
            attention_type,
            embed_dim=embed_dim,
            num_heads=num_heads,
            segment_lengths=segment_lengths,
            dilation_rates=dilation_rates,
            sequence_length=sequence_length,
            dropout=probability("attention_dropout", attention_dropout),
            layer_norm=layer_norm,
            layer_norm_eps=layer_norm_eps,
            gamma_init=gamma_init,
            kv_heads=kv_heads,
            rotary=rotary,
            is_causal=self.is_causal,
            device=device,
            dtype=dtype,
            **options,
        )
        self.self_attn_layer_norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps, device=device, dtype=dtype)
        self.ffn = FeedForward(
            embed_dim,
            4 * embed_dim if ffn_dim is None else ffn_dim,
            activation=activation,
            activation_dropout=activation_dropout,
            layer_norm=layer_norm,
            layer_norm_eps=layer_norm_eps,
            gamma_init=gamma_init,
            device=device,
            dtype=dtype,
        )
        self.final_layer_norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps, device=device, dtype=dtype)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.drop_path = DropPath(drop_path)

    def forward(
        self, hidden: Tensor, key_padding_mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Hidden states (batch, seq, embed_dim) to the same shape and dtype.

        Args:
            hidden: the states.
            key_padding_mask: (batch, seq), bool, True where a position is padding, as nn.TransformerEncoderLayer's
                src_key_padding_mask: no row attends it. Rows of padding come out finite and mean nothing.
            cache: of self_attn.new_cache: hidden follows the states it has seen, and is added to it. For causal layers.
                RowCaches where the rows have seen different numbers of them. Without a mask.

        Raises:
            TypeError, ValueError: hidden is not floating or not of that shape; the mask is not bool or does not fit.
        """
        check_hidden(hidden, self.embed_dim)
        normalised = self.self_attn_layer_norm(hidden)
        if isinstance(cache, RowCaches):
            if key_padding_mask is not None:
                raise ValueError("key_padding_mask: expected None beside RowCaches, whose groups say what is padding")
            attended = cache.attend(self.self_attn, normalised)
        else:
            # Types that others register may know no cache: they are asked for it only where there is one.
            options = {} if cache is None else {"cache": cache}
            attended, _ = self.self_attn(normalised, key_padding_mask=key_padding_mask, **options)
        hidden = hidden + self.drop_path(self.dropout(attended))
        fed = self.ffn(self.final_layer_norm(hidden))
        output: Tensor = hidden + self.drop_path(self.dropout(fed))
        return output


class DilatedTransformerDecoderLayer(DilatedTransformerEncoderLayer):
    """The same layer with causal self-attention: row n sees the keys its pattern reaches at or before n.

    Decoder-only: there is no cross-attention, because LongNet defines dilation only where queries and keys share one
    axis of positions. Arguments, state dict and errors are DilatedTransformerEncoderLayer's; XPOS is welcome.

    >>> layer = DilatedTransformerDecoderLayer(32, 4, [8, 16], [1, 2], rotary=XPOSPositions(8))
    >>> layer(torch.zeros(2, 24, 32)).shape
    torch.Size([2, 24, 32])
    """

    is_causal = True


class DropPath(nn.Module):
    """Zeroes whole samples with probability ``p`` while training and rescales the rest (arXiv 1603.09382)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = probability("drop_path", p)

    def forward(self, update: Tensor) -> Tensor:
        """(batch, ...) to the same shape, each sample kept and scaled by 1 / (1 - p), or zero."""
        if self.p == 0.0 or not self.training:
            return update
        keep = torch.rand(update.shape[0], device=update.device) >= self.p
        shape = (-1,) + (1,) * (update.ndim - 1)
        return update * (keep.to(update.dtype) / (1.0 - self.p)).view(shape)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"p={self.p}"


def check_hidden(hidden: Tensor, embed_dim: int) -> None:
    """Raise TypeError or ValueError unless hidden is floating, (batch, seq, embed_dim)."""
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        found = hidden.dtype if isinstance(hidden, Tensor) else type(hidden).__name__
        raise TypeError(f"hidden: expected a floating-point tensor, got {found}")
    if hidden.ndim != 3 or hidden.shape[-1] != embed_dim:
        raise ValueError(f"hidden: expected (batch, seq, embed_dim={embed_dim}), got {tuple(hidden.shape)}")
