"""The same attention as nn.Modules: DilatedAttention without weights, MultiheadDilatedAttention with projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dilated_core import checks
from dilated_core.decode import DilatedKVCache, decode_step
from dilated_core.functional import dilated_attention
from dilated_core.pattern import DilatedPattern
from dilated_core.projections import MultiheadProjections
from dilated_core.resources import Allocator, PatternStore


class DilatedAttention(nn.Module):
    """Dilated attention over projected heads, without weights (``dilated_core.dilated_attention`` as a module).

    Args:
        segment_lengths, dilation_rates: LongNet's branches, see DilatedPattern.
        softmax_scale: factor on the scores, 1 / sqrt(head_dim) by default.
        attention_dropout: probability in [0, 1) that a weight is dropped, in training mode only.
        is_causal, enable_gqa, semantics, kernel, fused, allocator, patterns: as in ``dilated_attention``.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> attention = DilatedAttention([4, 8], [1, 2], is_causal=True)
    >>> attention(*torch.randn(3, 2, 11, 4, 16)).shape
    torch.Size([2, 11, 4, 16])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        *,
        is_causal: bool = False,
        enable_gqa: bool = False,
        semantics: str = "paper",
        kernel: str = "auto",
        fused: bool = True,
        allocator: Allocator | None = None,
        patterns: PatternStore | None = None,
    ) -> None:
        super().__init__()
        self.attention_dropout = checks.probability("attention_dropout", attention_dropout)
        self.pattern = DilatedPattern(segment_lengths, dilation_rates)
        checks.softmax_scale(softmax_scale, 1, name="softmax_scale")
        self.softmax_scale = softmax_scale
        self.is_causal = checks.boolean("is_causal", is_causal)
        self.enable_gqa = checks.boolean("enable_gqa", enable_gqa)
        self.semantics = checks.semantics(semantics)
        self.kernel = checks.kernel(kernel)
        self.fused = checks.boolean("fused", fused)
        checks.resources(allocator, patterns)
        self.allocator, self.patterns = allocator, patterns

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (batch, seq, heads, head_dim).
            key, value: (batch, seq, kv_heads, head_dim).
            is_causal: overrides the module's own, for this call.
            key_padding_mask: (batch, seq), bool, True where the key is real.
            cu_seqlens: (sequences + 1,), offsets of the sequences packed into a batch of 1.

        Returns:
            Output like query.

        Raises:
            TypeError, ValueError: as ``dilated_attention``.
        """
        return dilated_attention(
            query,
            key,
            value,
            self.pattern.segment_lengths,
            self.pattern.dilation_rates,
            is_causal=self.is_causal if is_causal is None else is_causal,
            scale=self.softmax_scale,
            dropout_p=self.attention_dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            enable_gqa=self.enable_gqa,
            semantics=self.semantics,
            kernel=self.kernel,
            fused=self.fused,
            allocator=self.allocator,
            patterns=self.patterns,
        )

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return (
            f"segment_lengths={list(self.pattern.segment_lengths)}, "
            f"dilation_rates={list(self.pattern.dilation_rates)}, is_causal={self.is_causal}, "
            f"semantics={self.semantics!r}, kernel={self.kernel!r}, fused={self.fused}"
        )


class MultiheadDilatedAttention(MultiheadProjections):
    """Multi-head dilated self-attention with projections, called like ``nn.MultiheadAttention(batch_first=True)``.

    q, k, v = projections of the input; dilated attention per head; LayerNorm over the joined heads (MAGNETO's
    sub-LayerNorm, arXiv 2210.06423) unless ``layer_norm=False``; output projection. Weight names follow torchscale:
    ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``, ``inner_attn_ln``.

    Args:
        embed_dim: width of input and output; a multiple of num_heads.
        num_heads: query heads.
        segment_lengths, dilation_rates: LongNet's branches, see DilatedPattern.
        dropout: probability in [0, 1) that an attention weight is dropped, in training mode only.
        bias: whether the projections have biases.
        layer_norm: whether the joined heads are normalised before ``out_proj``.
        layer_norm_eps: its epsilon.
        gamma_init: Xavier gain of ``v_proj`` and ``out_proj`` (MAGNETO's gamma); q_proj and k_proj have gain 1.
        kv_heads: key and value heads, a divisor of num_heads; None for num_heads.
        device, dtype: of the weights; torch's defaults by default.
        rotary: a module called as ``rotary(query, key) -> (query, key)`` on (batch, seq, heads, head_dim) after the
            projections: rotary or XPOS positions.
        softmax_scale, is_causal, semantics, kernel, fused, allocator, patterns: as in DilatedAttention.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> attention = MultiheadDilatedAttention(64, 4, [8, 16], [1, 2])
    >>> output, _ = attention(torch.randn(2, 19, 64), is_causal=True)
    >>> output.shape
    torch.Size([2, 19, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        kv_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rotary: nn.Module | None = None,
        softmax_scale: float | None = None,
        is_causal: bool = False,
        semantics: str = "paper",
        kernel: str = "auto",
        fused: bool = True,
        allocator: Allocator | None = None,
        patterns: PatternStore | None = None,
    ) -> None:
        checks.probability("dropout", dropout)
        attention = DilatedAttention(
            segment_lengths,
            dilation_rates,
            softmax_scale,
            dropout,
            is_causal=is_causal,
            enable_gqa=kv_heads not in (None, num_heads),
            semantics=semantics,
            kernel=kernel,
            fused=fused,
            allocator=allocator,
            patterns=patterns,
        )
        super().__init__(
            embed_dim,
            num_heads,
            bias=bias,
            layer_norm=layer_norm,
            layer_norm_eps=layer_norm_eps,
            gamma_init=gamma_init,
            kv_heads=kv_heads,
            device=device,
            dtype=dtype,
            rotary=rotary,
        )
        self.attention = attention

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: None = None,
        average_attn_weights: bool = True,
        is_causal: bool | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cache: DilatedKVCache | None = None,
    ) -> tuple[Tensor, None]:
        """Attend, in the argument order of ``nn.MultiheadAttention.forward``.

        Args:
            query: (batch, seq, embed_dim).
            key, value: the same shape; query itself by default.
            key_padding_mask: (batch, seq), bool, True where the key is *padding*: nn.MultiheadAttention's sense, the
                opposite of ``dilated_attention``'s.
            attn_mask: None; a pattern takes no further mask, anything else raises.
            need_weights: False; weights are never formed, True raises.
            average_attn_weights: without effect, as there are no weights; here for the argument order.
            is_causal: overrides the module's own, for this call.
            cu_seqlens: (sequences + 1,), offsets of the sequences packed into a batch of 1. Not with ``rotary``, whose
                positions would run on from one sequence into the next.
            cache: from ``new_cache``: query holds the tokens that follow those it has seen, which are attended too, and
                is added to it (see ``decode_step``). For causal inference; without masks and packing. A ``rotary`` is
                then called with ``start=``, the number of tokens seen, and all batch rows must have seen as many.

        Returns:
            (output of query's shape, None).

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape or value.
        """
        q, k, v, real = self.projected(query, key, value, key_padding_mask, need_weights, attn_mask)
        if cu_seqlens is not None and self.rotary is not None:
            raise ValueError("cu_seqlens: expected None where there is a rotary, which numbers positions from 0 to seq")
        if cache is not None:
            self._check_cache(cache, is_causal, masked=real is not None or cu_seqlens is not None)
        if self.rotary is not None:
            q, k = self.rotary(q, k) if cache is None else self.rotary(q, k, start=max(cache.lengths, default=0))
        if cache is not None:
            attended = decode_step(q, k, v, cache, scale=self.attention.softmax_scale, kernel=self.attention.kernel)
        else:
            attended = self.attention(q, k, v, is_causal=is_causal, key_padding_mask=real, cu_seqlens=cu_seqlens)
        return self.joined(attended), None

    def new_cache(self, batch_size: int) -> DilatedKVCache:
        """An empty cache for ``forward(..., cache=)``, in the dtype and on the device of the weights.

        Args:
            batch_size: rows it is for.

        Returns:
            A DilatedKVCache of the module's pattern, heads and semantics.

        Raises:
            TypeError, ValueError: batch_size is no int of at least 0.

        >>> attention = MultiheadDilatedAttention(32, 4, [4, 8], [1, 2], is_causal=True).eval()
        >>> tokens, cache = torch.randn(1, 10, 32), attention.new_cache(1)
        >>> with torch.no_grad():
        ...     steps = [attention(token, cache=cache)[0] for token in tokens.split(1, dim=1)]
        ...     torch.allclose(torch.cat(steps, 1), attention(tokens)[0], atol=1e-5)
        True
        """
        return DilatedKVCache(
            self.attention.pattern.segment_lengths,
            self.attention.pattern.dilation_rates,
            batch_size=batch_size,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            kv_heads=self.kv_heads,
            semantics=self.attention.semantics,
            dtype=self.k_proj.weight.dtype,
            device=self.k_proj.weight.device,
            allocator=self.attention.allocator,
        )

    def _check_cache(self, cache: object, is_causal: bool | None, *, masked: bool) -> None:
        """Refuse what a step with a cache cannot honour. Raises TypeError or ValueError."""
        if not isinstance(cache, DilatedKVCache):
            raise TypeError(f"cache: expected a DilatedKVCache or None, got {type(cache).__name__}")
        attention = self.attention
        own = (attention.pattern.segment_lengths, attention.pattern.dilation_rates, attention.semantics)
        its = (cache.segment_lengths, cache.dilation_rates, cache.semantics)
        if its != own:
            raise ValueError(f"cache: expected the module's pattern and semantics, {own}, got {its}")
        if not (attention.is_causal if is_causal is None else is_causal):
            raise ValueError("cache: expected None where is_causal is False, a later token would change earlier rows")
        if masked:
            raise ValueError("cache: expected no key_padding_mask and no cu_seqlens beside it")
        if self.training and attention.attention_dropout > 0.0:
            raise ValueError("cache: expected eval mode, a step drops no probabilities")
        if self.rotary is not None and len(set(cache.lengths)) > 1:
            raise ValueError(f"cache: expected rows of one length beside a rotary, got {cache.lengths}")
