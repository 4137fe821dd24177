"""Layouts that differ between batch rows: a layout has no batch, so batch rows become heads.

Imports torch and this package's layouts and attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_block_sparse.functional import block_sparse_attention
from dilated_block_sparse.layout import BlockLayout
from dilated_core import AuxRequest, checks


def attend_layout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    key_padding_mask: Tensor | None = None,
    block_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """``block_sparse_attention`` for a layout of 1, kv_heads, heads, or batch * heads heads.

    Args:
        query: (batch, q_len, heads, head_dim); key, value: (batch, kv_len, kv_heads, head_dim).
        layout: with batch * heads heads, those of the first batch row come first.
        key_padding_mask: (batch, kv_len), bool, True where the key is real.
        block_bias: (layout.live,), in the order of layout.indices, of any dtype.
        options: of ``block_sparse_attention``.

    Returns:
        out, like query, and lse, (batch, heads, q_len).
    """
    query, key, value = checks.autocast(query, key, value)
    if block_bias is not None:
        block_bias = block_bias.to(query.dtype)
    batch, _, heads, _ = query.shape
    options["return_aux"] = AuxRequest(lse=True)
    if batch == 1 or layout.heads != batch * heads:
        out, aux = block_sparse_attention(
            query, key, value, layout, key_padding_mask=key_padding_mask, block_bias=block_bias, **options
        )
        return out, aux.lse
    if key_padding_mask is None:
        query, key, value = (tensor.transpose(0, 1).flatten(1, 2).unsqueeze(0) for tensor in (query, key, value))
        out, aux = block_sparse_attention(query, key, value, layout, block_bias=block_bias, **options)
        return out[0].unflatten(1, (batch, heads)).transpose(0, 1), aux.lse[0].unflatten(0, (batch, heads))
    # Padding differs from batch row to batch row, so each goes by itself.
    layouts = [BlockLayout.stack([layout.head(row * heads + head) for head in range(heads)]) for row in range(batch)]
    biases = [None] * batch if block_bias is None else block_bias.split([part.live for part in layouts])
    queries, keys, values, masks = (tensor.split(1) for tensor in (query, key, value, key_padding_mask))
    outs, lses = [], []
    for row, part in enumerate(layouts):
        out, aux = block_sparse_attention(
            queries[row],
            keys[row],
            values[row],
            part,
            key_padding_mask=masks[row],
            block_bias=biases[row],
            **options,
        )
        outs.append(out)
        lses.append(aux.lse)
    return torch.cat(outs), torch.cat(lses)
