"""The FlexAttention backend: PyTorch's compiled ``flex_attention`` over a layout's BlockMask.

Not yet measured on a GPU. There it runs forward and backward and gives the lse; on a CPU the forward alone. It is
compiled, never called as it is: uncompiled, FlexAttention forms all scores.

One function is compiled, of static shapes, and a layout's lists and table are its data: another layout of the same
sizes runs what is compiled. Other shapes, strides, dtypes, block sizes and scales compile once more, which takes
seconds; so do causal order and padding. Shapes are static because dynamic ones do not compile on a CPU (torch 2.13: its
C++ names a size that it does not declare), and because on a GPU only a length known to be a multiple of 128 gives the
kernel without checks at its edges. A process may compile 256 such combinations.

Imports torch, and FlexAttention where it is asked for.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dilated_block_sparse.layout import BlockLayout, algebra
from dilated_block_sparse.layout.block_mask import BLOCK_MASK_LIMIT, BYTES_A_BLOCK, BlockTable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CUDA_BLOCK = 128
"""Tokens. The tiles of FlexAttention's GPU kernels are powers of two up to this, and must divide a layout's blocks."""

CUDA_HEAD_DIM = 16
"""The narrowest operand of a GPU's matrix unit that these kernels take."""

RECOMPILE_LIMIT = 256
"""Combinations of shapes and options that a process may compile; torch's own limit, of 8, is for loops gone astray."""


class Tables(NamedTuple):
    """A layout as FlexAttention reads it, on the device of the attention. Lists are int32 and of batch 1.

    Attributes:
        kv_num_blocks, kv_indices: (1, heads, q_blocks) and (1, heads, q_blocks, kv_blocks): how many blocks of a row
            are masked inside, and their columns.
        full_kv_num_blocks, full_kv_indices: the same of those that are not masked; None where all are.
        q_num_blocks, q_indices, full_q_num_blocks, full_q_indices: the same by columns, for the backward.
        live: bool (heads, q_blocks, kv_blocks), which the mask function looks up.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor | None
    full_kv_indices: Tensor | None
    q_num_blocks: Tensor | None
    q_indices: Tensor | None
    full_q_num_blocks: Tensor | None
    full_q_indices: Tensor | None
    live: Tensor


def refusal(
    query: Tensor,
    key: Tensor,
    layout: BlockLayout,
    *,
    is_causal: bool,
    has_mask: bool,
    dropout: bool,
    has_bias: bool,
    needs_grad: bool,
    with_lse: bool = False,
) -> str | None:
    """Why FlexAttention cannot run this; None where it can.

    Args:
        query, key: (batch, q_len, heads, head_dim), (batch, kv_len, kv_heads, head_dim), checked already.
        layout: of 1, kv_heads or heads heads.
        is_causal, has_mask: run everywhere; they say which tables must lie ready inside another torch.compile.
        dropout, has_bias: whether weights are dropped, or blocks have a bias.
        needs_grad: whether gradients flow; with_lse: whether the lse is asked for.

    >>> query = torch.empty(1, 64, 2, 16, dtype=torch.float64)
    >>> layout = BlockLayout.from_rows([[0]], 64, 64, block_size=64)
    >>> no = dict.fromkeys(("is_causal", "has_mask", "dropout", "has_bias", "needs_grad"), False)
    >>> refusal(query, query, layout, **no)
    'it runs float32, bfloat16 and float16, not torch.float64'
    """
    heads = layout.heads if layout.heads == 1 else query.shape[2]
    size = BYTES_A_BLOCK * heads * layout.q_blocks * layout.kv_blocks
    reasons = (
        (dropout, "it has no dropout"),
        (has_bias, "it is given no bias of the blocks here"),
        (query.dtype not in DTYPES, f"it runs float32, bfloat16 and float16, not {query.dtype}"),
        (0 in query.shape or 0 in key.shape, "there is nothing to attend: a size is 0"),
        (size > BLOCK_MASK_LIMIT, f"its tables would take {size} bytes, above the limit of {BLOCK_MASK_LIMIT}"),
    )
    for applies, reason in reasons:
        if applies:
            return reason
    if query.device.type == "cpu":
        return _cpu_refusal(needs_grad, with_lse)
    if query.device.type == "cuda":
        return _cuda_refusal(query, layout, is_causal, has_mask)
    return f"it runs on cpu and cuda, not on {query.device.type}"


def _cpu_refusal(needs_grad: bool, with_lse: bool) -> str | None:
    if needs_grad:
        return "on a CPU it has no backward"
    if with_lse:
        return "on a CPU it gives no lse"
    if torch.compiler.is_compiling():
        return "on a CPU it compiles static shapes alone, not inside another torch.compile or export"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "on a CPU it needs one with AVX2"
    return None


def _cuda_refusal(query: Tensor, layout: BlockLayout, is_causal: bool, has_mask: bool) -> str | None:
    block_size, head_dim = layout.block_size, query.shape[-1]
    if block_size[0] % CUDA_BLOCK or block_size[1] % CUDA_BLOCK:
        return f"on a GPU it needs blocks of multiples of {CUDA_BLOCK} tokens, not {block_size}"
    if head_dim < CUDA_HEAD_DIM:
        return f"on a GPU it needs a head_dim of at least {CUDA_HEAD_DIM}, not {head_dim}"
    if not _has_triton():
        return "on a GPU it needs triton, which is not installed"
    tables = _key(layout, query.device, query.shape[2], is_causal, has_mask)
    if torch.compiler.is_compiling() and tables not in layout.plans:
        return "inside torch.compile its tables must lie ready: attend once outside, or call flex.tables_of before"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    layout: BlockLayout,
    *,
    is_causal: bool,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Block-sparse attention by FlexAttention, for what ``refusal`` does not refuse.

    The first call with a layout makes its tables, which stay with it; the first with new shapes compiles.

    Args:
        query: (batch, q_len, heads, head_dim), float32, bfloat16 or float16.
        key, value: (batch, kv_len, kv_heads, head_dim); query head j meets key head j // (heads // kv_heads).
        real: (batch, kv_len), bool, True where the key is real; None for all. What padding holds has no influence.
        layout: of 1, kv_heads or heads heads.
        is_causal: row i sees keys j <= i only.
        scale: factor on the scores.
        with_lse: whether to give the lse; not on a CPU.

    Returns:
        out (batch, q_len, heads, head_dim), and lse (batch, heads, q_len), natural log, float32, or None. 0 and -inf in
        a row with no key.

    Raises:
        ValueError: the lse of an attention on a CPU.
        RuntimeError: run with compilation switched off, where FlexAttention would form all scores.
    """
    if with_lse and query.device.type == "cpu":
        raise ValueError('backend: "flex" gives no lse on a CPU; take "tiles"')
    tables = tables_of(layout, query.device, query.shape[2], is_causal=is_causal, masked=real is not None)
    return _run(query, key, value, real, tables, layout.block_size, is_causal, scale, with_lse)


def compiled(
    layout: BlockLayout, *, is_causal: bool = False, scale: float | None = None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled FlexAttention on a layout, for comparisons, as its authors advise: static shapes, the BlockMask made
    beforehand, no mask function in full blocks. What ``attend`` runs, without its look-ups.

    Returns:
        A function of query (batch, q_len, heads, head_dim), key and value (batch, kv_len, kv_heads, head_dim), that
        gives out. The first call compiles. Any strides will do: give FlexAttention's own order by
        ``x.transpose(1, 2).contiguous().transpose(1, 2)``. A layout of several heads must have the query's.
    """
    tables: dict[torch.device, Tables] = {}

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.device not in tables:
            tables[query.device] = _tables(layout, query.device, is_causal, False)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        own = tables[query.device]
        return _run(query, key, value, None, own, layout.block_size, is_causal, factor, False)[0]

    return run


# ------------------------------------------------------------------------------------------------ tables


def tables_of(layout: BlockLayout, device: torch.device, heads: int, *, is_causal: bool, masked: bool) -> Tables:
    """The tables of a layout, made at the first call and kept with it.

    Args:
        heads: query heads; a layout of fewer, but for 1, is that of the key heads.
        masked: whether keys are padded: every block is then masked inside.
    """
    key = _key(layout, device, heads, is_causal, masked)
    tables: Tables | None = layout.plans.get(key)
    if tables is None:
        tables = layout.plans[key] = _tables_for_heads(layout, device, heads, is_causal, masked)
    return tables


@torch.inference_mode(False)  # they stay, and a backward may save them
def _tables_for_heads(layout: BlockLayout, device: torch.device, heads: int, is_causal: bool, masked: bool) -> Tables:
    if layout.heads not in (1, heads):
        # FlexAttention's CPU and GPU kernels spread fewer heads over more in two different ways: leave them none.
        group = heads // layout.heads
        layout = algebra.select_heads(layout, [head // group for head in range(heads)])
    return _tables(layout, device, is_causal, masked)


def _key(layout: BlockLayout, device: torch.device, heads: int, is_causal: bool, masked: bool) -> tuple[object, ...]:
    return "flex", str(device), is_causal, masked, heads if layout.heads > 1 else 1


def _tables(layout: BlockLayout, device: torch.device, is_causal: bool, masked: bool) -> Tables:
    if is_causal:
        layout = layout.causal()
    if masked:
        from torch.nn.attention.flex_attention import BlockMask

        counts, columns = layout.to_lists(device=device)
        # The CPU kernel takes the key length from the width of the list.
        columns = pad(columns, (0, layout.kv_blocks - columns.shape[-1]))
        lengths = (layout.q_len, layout.kv_len)
        mask = BlockMask.from_kv_blocks(counts, columns, BLOCK_SIZE=layout.block_size, seq_lengths=lengths)
    else:
        mask = layout.to_block_mask(is_causal=is_causal, device=device)
    return Tables(
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
        mask.q_num_blocks,
        mask.q_indices,
        mask.full_q_num_blocks,
        mask.full_q_indices,
        layout.to_blocks().to(device),
    )


# ------------------------------------------------------------------------------------------------ the compiled function


def _run(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, tables: Tables, *options: object
) -> tuple[Tensor, Tensor | None]:
    """``_attention``, compiled here or by whoever compiles around it."""
    run = _attention if torch.compiler.is_compiling() else _compiled_attention()
    if query.device.type != "cpu":
        return run(query, key, value, real, tables, *options)  # type: ignore[arg-type]
    # FlexAttention refuses there what could take a gradient, even where none is recorded. And what is compiled holds in
    # one of the two modes alone.
    with torch.no_grad():
        return run(query.detach(), key.detach(), value.detach(), real, tables, *options)  # type: ignore[arg-type]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    tables: Tables,
    block_size: tuple[int, int],
    is_causal: bool,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """What is compiled. The BlockMask is put together inside, so that its tensors are arguments and not constants."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "flex: expected torch.compile to be at work, got a call without it "
            "(TORCHDYNAMO_DISABLE or set_stance?), where FlexAttention forms all scores"
        )
    look_up = BlockTable(tables.live, block_size, is_causal)
    if real is None:

        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return look_up(b, h, q_idx, kv_idx)

    else:
        padding = ~real[:, :, None, None]
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)

        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return look_up(b, h, q_idx, kv_idx) & real[b, kv_idx]

    block_mask = BlockMask(
        (query.shape[1], key.shape[1]),
        tables.kv_num_blocks,
        tables.kv_indices,
        tables.full_kv_num_blocks,
        tables.full_kv_indices,
        tables.q_num_blocks,
        tables.q_indices,
        tables.full_q_num_blocks,
        tables.full_q_indices,
        BLOCK_SIZE=block_size,
        mask_mod=mask,
    )
    out, aux = flex_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
        return_aux=AuxRequest(lse=with_lse),
    )
    return out.transpose(1, 2), aux.lse


@functools.cache
def _compiled_attention() -> Callable[..., tuple[Tensor, Tensor | None]]:
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return torch.compile(  # type: ignore[call-overload,no-any-return]
            _attention, fullgraph=True, dynamic=False, recompile_limit=RECOMPILE_LIMIT
        )
    compiled_attention = torch.compile(_attention, fullgraph=True, dynamic=False)

    @functools.wraps(_attention)
    def with_limit(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        # Without it (torch 2.11) the ninth combination would be an error; the limit is read where one is compiled.
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return compiled_attention(*arguments)

    return with_limit
