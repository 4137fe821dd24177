"""The same attention as nn.Modules, for one layout or one a length; weights named as dilated_core's.

Imports torch, dilated_core and the function.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

from dilated_block_sparse.functional import BACKENDS, block_sparse_attention
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.pattern import LayoutLike, Layouts
from dilated_core import Allocator, PatternStore, checks
from dilated_core.projections import MultiheadProjections


class BlockSparseAttention(nn.Module):
    """``block_sparse_attention`` as a module, without weights.

    Args:
        layout: a BlockLayout, for calls of its length; or a Pattern, or another function of the length that returns a
            BlockLayout, for calls of any length: the layouts of the last 8 lengths are kept. A function must return
            equal layouts for equal lengths.
        softmax_scale: factor on the scores, 1 / sqrt(head_dim) by default.
        attention_dropout: probability in [0, 1) that a weight is dropped, in training mode only.
        is_causal, enable_gqa, backend, kernel, allocator: as in ``block_sparse_attention``.
        patterns: as there; it also keeps the layouts of a Pattern, for all modules that share it.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> from dilated_block_sparse import Pattern
    >>> attention = BlockSparseAttention(Pattern("local", window=1, block_size=4), is_causal=True)
    >>> attention(*torch.randn(3, 2, 11, 4, 16)).shape, attention(*torch.randn(3, 2, 30, 4, 16)).shape
    (torch.Size([2, 11, 4, 16]), torch.Size([2, 30, 4, 16]))
    """

    def __init__(
        self,
        layout: LayoutLike,
        *,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        is_causal: bool = False,
        enable_gqa: bool = False,
        backend: str = "auto",
        kernel: str = "auto",
        allocator: Allocator | None = None,
        patterns: PatternStore | None = None,
    ) -> None:
        super().__init__()
        self.attention_dropout = checks.probability("attention_dropout", attention_dropout)
        checks.softmax_scale(softmax_scale, 1, name="softmax_scale")
        self.softmax_scale = softmax_scale
        self.is_causal = checks.boolean("is_causal", is_causal)
        self.enable_gqa = checks.boolean("enable_gqa", enable_gqa)
        self.backend = checks.choice("backend", backend, BACKENDS)
        self.kernel = checks.kernel(kernel)
        checks.resources(allocator, patterns)
        self.allocator, self.patterns = allocator, patterns
        self._layouts = Layouts(layout, patterns)

    @property
    def layout(self) -> LayoutLike:
        """What the module was made with."""
        return self._layouts.source

    # A trace runs this as it is and takes the layout for a constant of that length: how it is made is not in the graph.
    def layout_for(self, seq_len: int) -> BlockLayout:
        """The layout of a call of ``seq_len`` query rows; a fixed one is the same for all.

        Raises:
            TypeError: the function given as ``layout`` returned something else.
        """
        return self._layouts.of(seq_len)

    # What torch.compiler.assume_constant_result sets; calling it would load the whole compiler with this package.
    layout_for._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
        block_bias: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (batch, q_len, heads, head_dim); key, value: (batch, kv_len, kv_heads, head_dim).
            is_causal: overrides the module's own, for this call.
            key_padding_mask: (batch, kv_len), bool, True where the key is real.
            block_bias: (live blocks,), added to the scores of each live block, in the order of the layout's indices.

        Returns:
            Output like query.

        Raises:
            TypeError, ValueError: as ``block_sparse_attention``.
        """
        return block_sparse_attention(
            query,
            key,
            value,
            self._layout_of(query),
            is_causal=self.is_causal if is_causal is None else is_causal,
            scale=self.softmax_scale,
            dropout_p=self.attention_dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            enable_gqa=self.enable_gqa,
            block_bias=block_bias,
            backend=self.backend,
            kernel=self.kernel,
            allocator=self.allocator,
            patterns=self.patterns,
        )

    def _layout_of(self, query: Tensor) -> BlockLayout:
        """The layout of the rows of ``query``, whose shape the function checks in full."""
        if isinstance(self._layouts.source, BlockLayout):
            return self._layouts.source
        # A trace may not know the length; this makes it look, and compile once for each.
        layout: BlockLayout = self.layout_for(operator.index(length_of(query)))
        return layout

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{self.layout}, is_causal={self.is_causal}, backend={self.backend!r}, kernel={self.kernel!r}"


def length_of(query: object) -> int:
    """The length of (batch, seq, heads, head_dim), before anything else of it is looked at.

    Raises:
        TypeError, ValueError: it is no tensor of four dimensions.
    """
    if not isinstance(query, Tensor):
        raise TypeError(f"query: expected a torch.Tensor, got {type(query).__name__}")
    if query.ndim != 4:
        raise ValueError(f"query: expected 4 dimensions (batch, seq, heads, head_dim), got shape {tuple(query.shape)}")
    return query.shape[1]


class BlockSparseMultiheadAttention(MultiheadProjections):
    """Multi-head block-sparse self-attention with projections, called like ``nn.MultiheadAttention(batch_first=True)``.

    dilated_core.MultiheadDilatedAttention with blocks in the place of segments: the same weights, names and
    initialisation, so that state dicts load in both directions.

    Args:
        embed_dim: width of input and output; a multiple of num_heads.
        num_heads: query heads.
        layout: as in BlockSparseAttention; with one layout a head, or one a key head, or one for all.
        dropout: probability in [0, 1) that an attention weight is dropped, in training mode only.
        bias, layer_norm, layer_norm_eps, gamma_init, kv_heads, device, dtype: as in MultiheadDilatedAttention.
        rotary: a module called as ``rotary(query, key) -> (query, key)`` on (batch, seq, heads, head_dim) after the
            projections: rotary or XPOS positions.
        softmax_scale, is_causal, backend, kernel, allocator, patterns: as in BlockSparseAttention.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> from dilated_block_sparse import Pattern
    >>> attention = BlockSparseMultiheadAttention(64, 4, Pattern("local", window=1, block_size=8))
    >>> output, _ = attention(torch.randn(2, 19, 64), is_causal=True)
    >>> output.shape
    torch.Size([2, 19, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        layout: LayoutLike,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        kv_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rotary: nn.Module | None = None,
        softmax_scale: float | None = None,
        is_causal: bool = False,
        backend: str = "auto",
        kernel: str = "auto",
        allocator: Allocator | None = None,
        patterns: PatternStore | None = None,
    ) -> None:
        attention = BlockSparseAttention(
            layout,
            softmax_scale=softmax_scale,
            attention_dropout=checks.probability("dropout", dropout),
            is_causal=is_causal,
            enable_gqa=kv_heads not in (None, num_heads),
            backend=backend,
            kernel=kernel,
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
    ) -> tuple[Tensor, None]:
        """Attend, in the argument order of ``nn.MultiheadAttention.forward``.

        Args:
            query: (batch, seq, embed_dim).
            key, value: the same shape; query itself by default.
            key_padding_mask: (batch, seq), bool, True where the key is *padding*: nn.MultiheadAttention's sense, the
                opposite of ``block_sparse_attention``'s.
            attn_mask: None; there is no further mask, anything else raises.
            need_weights: False; weights are never formed, True raises.
            average_attn_weights: without effect, as there are no weights; here for the argument order.
            is_causal: overrides the module's own, for this call.

        Returns:
            (output of query's shape, None).

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape or value.
        """
        q, k, v, real = self.projected(query, key, value, key_padding_mask, need_weights, attn_mask)
        if self.rotary is not None:
            q, k = self.rotary(q, k)
        return self.joined(self.attention(q, k, v, is_causal=is_causal, key_padding_mask=real)), None
