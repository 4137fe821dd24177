"""Layouts that differ between batch rows: a layout has no batch, so batch rows become heads.

Imports torch and this package's layouts and attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_block_sparse.functional import block_sparse_attention
from dilated_block_sparse.layout import BlockLayout
from dilated_core import AuxOutput, AuxRequest, checks


def attend_layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    is_causal: bool = False,
    enable_gqa: bool = False,
    key_padding_mask: Tensor | None = None,
    block_bias: Tensor | None = None,
    return_aux: AuxRequest | None = None,
    **options: Any,
) -> Any:
    """``block_sparse_attention`` for a layout of 1, kv_heads, heads, or batch * heads heads.

    Args:
        query: (batch, q_len, heads, head_dim); key, value: (batch, kv_len, kv_heads, head_dim).
        layout: with batch * heads heads, those of the first batch row come first.
        key_padding_mask: (batch, kv_len), bool, True where the key is real.
        block_bias: (layout.live,), in the order of layout.indices, of any dtype.
        is_causal, enable_gqa, return_aux, options: as in ``block_sparse_attention``.

    Returns:
        As ``block_sparse_attention``.

    Raises:
        TypeError, ValueError: as ``block_sparse_attention``.
    """
    query, key, value = checks.autocast(query, key, value)
    query, key, value = checks.query_key_value(query, key, value, same_length=is_causal, enable_gqa=enable_gqa)
    real = checks.key_padding_mask(key_padding_mask, key)
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout: expected a BlockLayout, got {type(layout).__name__}")
    if block_bias is not None:
        if not isinstance(block_bias, Tensor) or block_bias.shape != (layout.live,):
            found = tuple(block_bias.shape) if isinstance(block_bias, Tensor) else type(block_bias).__name__
            raise ValueError(f"block_bias: expected a tensor of shape (layout.live,) = {(layout.live,)}, got {found}")
        block_bias = block_bias.to(query.dtype)
    attend: Any = block_sparse_attention  # its overloads do not see through **options
    options.update(is_causal=is_causal, enable_gqa=enable_gqa, return_aux=return_aux)
    batch, _, heads, _ = query.shape
    if batch == 1 or layout.heads != batch * heads:
        return attend(query, key, value, layout, key_padding_mask=real, block_bias=block_bias, **options)
    if real is None:
        query, key, value = (tensor.transpose(0, 1).flatten(1, 2).unsqueeze(0) for tensor in (query, key, value))
        found = attend(query, key, value, layout, block_bias=block_bias, **options)
        return _apart(found, batch, heads)
    # Padding differs from batch row to batch row, so each goes by itself.
    layouts = [BlockLayout.stack([layout.head(row * heads + head) for head in range(heads)]) for row in range(batch)]
    biases = [None] * batch if block_bias is None else block_bias.split([part.live for part in layouts])
    parts = [
        attend(*tensors, part, key_padding_mask=mask, block_bias=bias, **options)
        for *tensors, mask, part, bias in zip(
            query.split(1), key.split(1), value.split(1), real.split(1), layouts, biases, strict=True
        )
    ]
    if return_aux is None:
        return torch.cat(parts)
    outs, aux = zip(*parts, strict=True)
    return torch.cat(outs), AuxOutput(lse=torch.cat([each.lse for each in aux]) if return_aux.lse else None)


def _apart(found: Any, batch: int, heads: int) -> Any:
    """Results of (1, q_len, batch * heads, ...) as those of the batch."""
    out, aux = found if isinstance(found, tuple) else (found, None)
    out = out[0].unflatten(1, (batch, heads)).transpose(0, 1)
    if aux is None:
        return out
    return out, AuxOutput(lse=None if aux.lse is None else aux.lse[0].unflatten(0, (batch, heads)))
