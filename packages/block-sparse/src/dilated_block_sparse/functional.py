"""block_sparse_attention: the front door. Checks its arguments, then hands them to a backend.

Imports torch, dilated_core and this package's layouts and backends.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from dilated_block_sparse import flex
from dilated_block_sparse.engine import Extras, Options
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.operators import tiled_attention
from dilated_core import Allocator, AuxOutput, AuxRequest, PatternStore, checks
from dilated_core.attend import dropout_seed

BACKENDS = ("auto", "tiles", "flex")


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    block_bias: Tensor | None = None,
    backend: str = "auto",
    kernel: str = "auto",
    allocator: Allocator | None = None,
    patterns: PatternStore | None = None,
    return_aux: None = None,
) -> Tensor: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    block_bias: Tensor | None = None,
    backend: str = "auto",
    kernel: str = "auto",
    allocator: Allocator | None = None,
    patterns: PatternStore | None = None,
    return_aux: AuxRequest,
) -> tuple[Tensor, AuxOutput]: ...


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    block_bias: Tensor | None = None,
    backend: str = "auto",
    kernel: str = "auto",
    allocator: Allocator | None = None,
    patterns: PatternStore | None = None,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Softmax attention of every row to the keys of its live blocks, exact, with exact gradients.

    out_i = sum_j p_ij v_j with p_ij = exp(s_ij - lse_i) over the keys j of row i's live blocks, s_ij = scale * q_i k_j.
    One softmax a row over a *set* of keys: a key counts once, however many patterns of a union hold it. (Dilated
    attention is a softmax over a multiset: there a key counts once a branch.) A row with no live key gives 0.

    The time follows the live blocks. A plan cuts them into rectangles for dense kernels; it is made at a layout's first
    call, and kept with the layout.

    Args:
        query: (batch, q_len, heads, head_dim), float64, float32, bfloat16 or float16, CPU or CUDA. Under autocast,
            float32 inputs are cast to autocast's dtype.
        key, value: (batch, kv_len, kv_heads, head_dim), dtype and device of query; kv_heads == heads, or with
            ``enable_gqa`` a divisor of it (query head j then meets key head j // (heads // kv_heads)).
        layout: which blocks are live, for all heads, or one layout a key head, or one a query head.
        is_causal: whether a row sees only keys at or before it, also inside the blocks that the diagonal crosses;
            needs q_len == kv_len.
        scale: factor on the scores, 1 / sqrt(head_dim) by default.
        dropout_p: probability in [0, 1) that an attention weight is dropped (the rest divided by 1 - dropout_p).
            Applied whenever it is above 0: pass 0.0 when not training. Only the "math" kernel drops.
        generator: a CPU generator that the dropout's seed is drawn from; the global one by default, which alone
            ``torch.utils.checkpoint`` sets back.
        key_padding_mask: (batch, kv_len), bool, True where the key is real (SDPA's sense). What padding holds, even
            NaN, has no influence; its own rows attend like any other.
        enable_gqa: whether query heads may share key heads.
        block_bias: (layout.live,), dtype and device of query, in the order of ``layout.indices``: added to the scores
            of all pairs of a block, differentiable; finite. Under autocast it is cast as query is. Rows of blocks are
            then attended one by one, which is slower.
        backend: "tiles", dense kernels on the plan's rectangles; "flex", PyTorch's compiled FlexAttention; "auto":
            tiles on a CPU, elsewhere flex where it can run. What a backend cannot do raises.
        kernel: of "tiles": a name from ``dilated_core.kernels.table()``, or "auto" for the first that can run.
        allocator: where results and buffers are allocated, by kind where it is a BufferManager; torch.empty by default.
            What a kernel allocates stays its own.
        patterns: where plans are kept between calls, instead of with the layout itself. Neither it nor ``allocator``
            is used while PyTorch traces (compile, export), nor by "flex".
        return_aux: ``AuxRequest(lse=True)`` to have the lse too.

    Returns:
        Output like query; with ``return_aux``, a pair of it and an AuxOutput, whose lse is (batch, heads, q_len),
        float32 (float64 for float64), natural log, -inf in a row with no key; differentiable.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices, a layout or values that do not fit, or a backend or kernel that cannot run them.

    >>> q, k, v = torch.randn(3, 1, 1000, 4, 16).unbind()
    >>> layout = BlockLayout.local(1000, 1, block_size=64) | BlockLayout.global_(1000, 1, 1, block_size=64)
    >>> block_sparse_attention(q, k, v, layout, is_causal=True).shape
    torch.Size([1, 1000, 4, 16])
    """
    checks.boolean("is_causal", is_causal)
    checks.boolean("enable_gqa", enable_gqa)
    checks.choice("backend", backend, BACKENDS)
    checks.kernel(kernel)
    dropout_p = checks.probability("dropout_p", dropout_p)
    with_lse = checks.asks_for_lse(return_aux)
    resources = checks.resources(allocator, patterns)
    query, key, value = checks.autocast(query, key, value)
    if isinstance(block_bias, Tensor):
        (block_bias,) = checks.autocast(block_bias)
    query, key, value = checks.query_key_value(query, key, value, same_length=is_causal, enable_gqa=enable_gqa)
    layout = check_layout(layout, query, key)
    real = checks.key_padding_mask(key_padding_mask, key)
    bias = _block_bias(block_bias, layout, query)
    query, factor = checks.query_and_scale(query, scale)
    if _takes_flex(backend, query, key, value, layout, is_causal, real, dropout_p, bias, kernel, with_lse):
        out, lse = flex.attend(query, key, value, real, layout, is_causal=is_causal, scale=factor, with_lse=with_lse)
    else:
        extras = Extras(real, bias, dropout_seed(dropout_p, generator))
        options = Options(is_causal, factor, dropout_p, kernel)
        out, lse = tiled_attention(query, key, value, extras, layout, options, resources)
    if return_aux is None:
        return out
    return out, AuxOutput(lse=lse if with_lse else None)


def check_layout(layout: object, query: Tensor, key: Tensor) -> BlockLayout:
    """Return the layout if it fits the tensors.

    Raises:
        TypeError: not a BlockLayout.
        ValueError: other lengths or heads.
    """
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout: expected a BlockLayout, got {type(layout).__name__}")
    lengths = (query.shape[1], key.shape[1])
    if (layout.q_len, layout.kv_len) != lengths:
        raise ValueError(
            f"layout: expected (q_len, kv_len) = {lengths} as query and key have, got {(layout.q_len, layout.kv_len)}"
        )
    check_heads(layout, query.shape[2], key.shape[2])
    return layout


def check_heads(layout: BlockLayout, heads: int, kv_heads: int) -> None:
    """Raise ValueError unless the layout has 1 head, or as many as key or query has."""
    if layout.heads not in (1, kv_heads, heads):
        accepted = " or ".join(str(count) for count in sorted({1, kv_heads, heads}))
        raise ValueError(f"layout: expected {accepted} heads for query's {heads}, got {layout.heads}")


def _block_bias(bias: object, layout: BlockLayout, query: Tensor) -> Tensor | None:
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        raise TypeError(f"block_bias: expected a torch.Tensor or None, got {type(bias).__name__}")
    if bias.dtype != query.dtype:
        raise TypeError(f"block_bias: expected the dtype of query, {query.dtype}, got {bias.dtype}")
    if bias.shape != (layout.live,):
        raise ValueError(f"block_bias: expected shape (layout.live,) = {(layout.live,)}, got {tuple(bias.shape)}")
    if bias.device != query.device:
        raise ValueError(f"block_bias: expected the device of query, {query.device}, got {bias.device}")
    return bias


def _takes_flex(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    is_causal: bool,
    real: Tensor | None,
    dropout_p: float,
    bias: Tensor | None,
    kernel: str,
    with_lse: bool,
) -> bool:
    """Whether FlexAttention is to run: where it is asked for, and elsewhere than on a CPU where it can."""
    if backend == "tiles" or (backend == "auto" and (query.device.type == "cpu" or kernel != "auto")):
        return False
    reason = flex.refusal(
        query,
        key,
        layout,
        is_causal=is_causal,
        has_mask=real is not None,
        dropout=dropout_p > 0.0,
        has_bias=bias is not None,
        needs_grad=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)),
        with_lse=with_lse,
    )
    if reason is None and kernel != "auto":
        reason = f'kernel="{kernel}" is one of the tiles'
    if reason is not None and backend == "flex":
        raise ValueError(f'backend: "flex" cannot run this: {reason}')
    return reason is None
