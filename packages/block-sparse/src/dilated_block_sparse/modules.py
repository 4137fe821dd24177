"""The same attention as nn.Modules, for one layout or one a length; weights named as dilated_core's."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dilated_block_sparse.functional import BACKENDS, block_sparse_attention
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.patterns import PATTERNS
from dilated_core import Allocator, DilatedKVCache, MultiheadDilatedAttention, PatternStore, checks

# Lengths whose layouts a module keeps: those of training and of evaluation, and some batches padded to other lengths.
KEPT_LENGTHS = 8


@dataclass(frozen=True, init=False, repr=False)
class Pattern:
    """A layout for any length: the name of one of BlockLayout's constructors, and what else it is given.

    ``pattern(seq_len)`` is the layout. Patterns of the same content are equal, hashable and picklable.
    ``first | second`` is the pattern of the blocks that live in either.

    Args:
        name: "local", "dilated", "global_", "strided", "random", "bigbird", "longnet", "hierarchical", ...; with
            ``sparsity_ratio``, a name that ``BlockLayout.named`` takes.
        options: of the constructor, by keyword: ``window=``, ``seed=``, ``block_size=``, ``heads=``, ...

    Raises:
        TypeError: the name is no str, or the constructor has no such option or needs another; it is named.
        ValueError: there is no such constructor. The values of the options are checked when a layout is made.

    >>> pattern = Pattern("local", window=1, block_size=64) | Pattern("global_", cols=1, rows=0, block_size=64)
    >>> pattern
    Pattern('local', block_size=64, window=1) | Pattern('global_', block_size=64, cols=1, rows=0)
    >>> pattern(1000).row(9), pattern(300).row(4)
    ([0, 8, 9, 10], [0, 3, 4])
    >>> Pattern("dilated_sparse", sparsity_ratio=0.75)(4096).density
    0.25
    """

    parts: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]

    def __init__(self, name: str, /, **options: Any) -> None:
        _check_options(name, options)
        settled = tuple(sorted((option, _settled(value)) for option, value in options.items()))
        object.__setattr__(self, "parts", ((name, settled),))

    def __call__(self, seq_len: int) -> BlockLayout:
        """The layout of ``seq_len`` tokens. Raises what BlockLayout's constructor raises."""
        layouts = [_make(name, seq_len, dict(options)) for name, options in self.parts]
        whole = layouts[0]
        for layout in layouts[1:]:
            whole |= layout
        return whole

    def __or__(self, other: Pattern) -> Pattern:
        if not isinstance(other, Pattern):
            return NotImplemented
        joined = object.__new__(Pattern)
        object.__setattr__(joined, "parts", self.parts + other.parts)
        return joined

    def __repr__(self) -> str:
        shown = []
        for name, options in self.parts:
            words = [repr(name), *(f"{option}={value!r}" for option, value in options)]
            shown.append(f"Pattern({', '.join(words)})")
        return " | ".join(shown)


LayoutLike: TypeAlias = "BlockLayout | Pattern | Callable[[int], BlockLayout]"


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
        self._layouts = _Layouts(layout, patterns)

    @property
    def layout(self) -> LayoutLike:
        """What the module was made with."""
        return self._layouts.source

    # A trace runs this as it is and takes the layout for a constant of that length: how it is made is not in the graph.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def layout_for(self, seq_len: int) -> BlockLayout:
        """The layout of a call of ``seq_len`` query rows; a fixed one is the same for all.

        Raises:
            TypeError: the function given as ``layout`` returned something else.
        """
        return self._layouts.of(seq_len)

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
        if not isinstance(query, Tensor):
            raise TypeError(f"query: expected a torch.Tensor, got {type(query).__name__}")
        if query.ndim != 4:
            raise ValueError(
                f"query: expected 4 dimensions (batch, seq, heads, head_dim), got shape {tuple(query.shape)}"
            )
        # A trace may not know the length; this makes it look, and compile once for each.
        layout: BlockLayout = self.layout_for(operator.index(query.shape[1]))
        return layout

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{self.layout}, is_causal={self.is_causal}, backend={self.backend!r}, kernel={self.kernel!r}"


class BlockSparseMultiheadAttention(MultiheadDilatedAttention):
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

    >>> attention = BlockSparseMultiheadAttention(64, 4, Pattern("local", window=1, block_size=8))
    >>> output, _ = attention(torch.randn(2, 19, 64), is_causal=True)
    >>> output.shape
    torch.Size([2, 19, 64])
    """

    attention: BlockSparseAttention  # type: ignore[assignment]  # not a DilatedAttention: it has no segments

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
        super().__init__(
            embed_dim,
            num_heads,
            (1,),  # a pattern that the attention below takes the place of
            (1,),
            dropout,
            bias,
            layer_norm,
            layer_norm_eps,
            gamma_init,
            kv_heads,
            device,
            dtype,
            rotary=rotary,
        )
        self.attention = BlockSparseAttention(
            layout,
            softmax_scale=softmax_scale,
            attention_dropout=dropout,
            is_causal=is_causal,
            enable_gqa=self.kv_heads != num_heads,
            backend=backend,
            kernel=kernel,
            allocator=allocator,
            patterns=patterns,
        )

    def forward(  # type: ignore[override]  # without packed sequences and a decoding cache
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
            attn_mask: None; a layout takes no further mask, anything else raises.
            need_weights: False; weights are never formed, True raises.
            average_attn_weights: without effect, as there are no weights; here for the argument order.
            is_causal: overrides the module's own, for this call.

        Returns:
            (output of query's shape, None).

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape or value.
        """
        if attn_mask is not None:
            raise ValueError("attn_mask: expected None, a layout takes no further mask (is_causal is one)")
        if need_weights:
            raise ValueError("need_weights: expected False, weights are never formed")
        q, k, v, real = self.projected(query, key, value, key_padding_mask, need_weights, attn_mask)
        if self.rotary is not None:
            q, k = self.rotary(q, k)
        return self.joined(self.attention(q, k, v, is_causal=is_causal, key_padding_mask=real)), None

    def new_cache(self, batch_size: int) -> DilatedKVCache:
        """Raises NotImplementedError: a cache keeps the keys of segments, not of blocks."""
        raise NotImplementedError("block-sparse attention is not decoded token by token: there is no cache for blocks")


class _Layouts:
    """A layout, or a function of the length with the layouts it gave last: shared by copies, left out of pickles."""

    def __init__(self, source: LayoutLike, patterns: PatternStore | None) -> None:
        if not isinstance(source, BlockLayout) and not callable(source):
            raise TypeError(
                f"layout: expected a BlockLayout, a Pattern or a function of the length, got {type(source).__name__}"
            )
        self.source, self.patterns = source, patterns
        self._kept = lru_cache(maxsize=KEPT_LENGTHS)(partial(_made, source))

    def of(self, seq_len: int) -> BlockLayout:
        """The layout of that many rows."""
        # Another function than a Pattern is equal to nothing but itself, so no other module could ask for what it gave.
        if self.patterns is None or not isinstance(self.source, Pattern):
            return self._kept(seq_len)
        key = ("dilated_block_sparse.layout", self.source, seq_len)
        layout: BlockLayout = self.patterns.get_or_create(key, partial(_made, self.source, seq_len))
        return layout

    def __deepcopy__(self, memo: object) -> _Layouts:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Layouts, (self.source, self.patterns)


def _made(source: LayoutLike, seq_len: int) -> BlockLayout:
    if isinstance(source, BlockLayout):
        return source
    # A thread of its own has none of the caller's modes. A layout made in them would hold an export's fake tensors, lie
    # on the default device of a ``with`` statement, or have tensors of inference mode, which training cannot save.
    with ThreadPoolExecutor(1) as apart:
        layout = apart.submit(source, seq_len).result()
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout: expected a function that returns a BlockLayout, got {type(layout).__name__}")
    return layout


def _check_options(name: str, options: dict[str, Any]) -> None:
    """Raise unless there is a constructor of that name, which takes these options and needs no other."""
    named = "sparsity_ratio" in options
    constructors = _constructors()
    checks.choice("name", name, PATTERNS if named else [one for one in constructors if one != "named"])
    accepted = dict(constructors["named" if named else name])
    for given in ("seq_len", "pattern" if named else ""):
        accepted.pop(given, None)
    for option in options:
        if option not in accepted:
            raise TypeError(f'{option}: pattern "{name}" has no such option, only {", ".join(accepted)}')
    for option, parameter in accepted.items():
        if parameter.default is parameter.empty and option not in options:
            raise TypeError(f'{option}: pattern "{name}" needs it, only {", ".join(options) or "nothing"} was given')


@lru_cache(maxsize=1)
def _constructors() -> dict[str, Mapping[str, inspect.Parameter]]:
    """The parameters of BlockLayout's constructors that take a length. Those of scores, as ``topk``, take none."""
    methods = ((name, getattr(BlockLayout, name)) for name in dir(BlockLayout) if not name.startswith("_"))
    found = {name: inspect.signature(one).parameters for name, one in methods if inspect.ismethod(one)}
    return {name: parameters for name, parameters in found.items() if "seq_len" in parameters}


def _settled(value: Any) -> Any:
    """An option's value as one that can be hashed: lists as tuples."""
    return tuple(map(_settled, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _make(name: str, seq_len: int, options: dict[str, Any]) -> BlockLayout:
    if "sparsity_ratio" in options:
        return BlockLayout.named(name, seq_len, **options)
    layout: BlockLayout = getattr(BlockLayout, name)(seq_len, **options)
    return layout
