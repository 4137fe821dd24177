"""Forward: every rectangle attended, and written to its rows, or merged where a rectangle before had them.

Memory beyond the result: what is gathered of one call. Where the result is half precision and rows are merged, float32
sums for a quarter of the heads at a time.
"""

from __future__ import annotations

import math

from torch import Tensor

from dilated_block_sparse.engine.bias import COLUMNS
from dilated_block_sparse.engine.heads import heads_of
from dilated_block_sparse.engine.work import Extras, Options, Work, readable, work_of
from dilated_block_sparse.layout import BlockLayout
from dilated_core.kernels import Kernel, Needs, choose
from dilated_core.partial import accumulation_dtype
from dilated_core.resources import NO_RESOURCES, Resources
from dilated_core.tiles import attend_tile, last_stride_1, merge_tile

RESULTS = ("out", "lse")


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: Extras,
    layout: BlockLayout,
    options: Options,
    resources: Resources = NO_RESOURCES,
) -> tuple[Tensor, Tensor]:
    """Block-sparse attention of (batch, seq, heads, head_dim) tensors -> out like query, lse (batch, heads, q_len).

    Takes its arguments as checked: ``block_sparse_attention`` is the door.
    """
    needs = Needs(extras.real is not None, extras.seed is not None)
    width = query.shape[-1] + (0 if extras.bias is None else COLUMNS)
    if extras.bias is not None and bool(extras.bias.isinf().any()):
        raise ValueError("block_bias: expected finite numbers, got inf (to hide a block, leave it out of the layout)")
    engine = choose(options.kernel, query.device, query.dtype, width, needs)
    out, lse = results_of_forward(query, resources)
    out.zero_()
    lse.fill_(-math.inf)
    if query.numel() == 0 or key.numel() == 0:
        return out, lse
    for work in work_of(query, key, value, layout, extras, options, resources, sums=False):
        queries, keys = work.block.queries, work.block.keys
        own_query, own_out, own_lse = (heads_of(tensor, queries) for tensor in (query, out, lse.transpose(1, 2)))
        own_key = readable(work, "keys", heads_of(key, keys))
        own_value = readable(work, "values", heads_of(value, keys))
        sums = own_out
        if not work.plan.once and lse.dtype != query.dtype:
            sums = work.scratch.empty("sums", own_out.shape, lse.dtype).zero_()
        _attend(engine, work, last_stride_1(own_query), own_key, own_value, sums, own_lse)
        if sums is not own_out:
            own_out.copy_(sums)
    return out, lse


def _attend(engine: Kernel, work: Work, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write out and lse of a head block, (batch, q_len, heads, ...), which hold 0 and -inf."""
    heads, head_dim = query.shape[2:]
    for call in work.calls(query, key):
        problem = work.problem(call, *(tensor[call.batch] for tensor in (query, key, value)))
        if problem is None:
            continue
        new_out, new_lse = attend_tile(engine, problem)
        rows = work.as_rows(call, new_out[..., :head_dim], heads), work.as_rows(call, new_lse, heads)
        totals = out[call.batch], lse[call.batch]
        if not call.stack.fresh:
            sums = [call.rows.get(name, total, work.scratch) for name, total in zip(RESULTS, totals, strict=True)]
            merge_tile(rows, *sums, all_have_keys=work.extras.real is None)
            if call.rows.span is not None:  # merged in their place
                continue
            rows = sums[0], sums[1]
        for total, new in zip(totals, rows, strict=True):
            call.rows.put(total, new)


def results_of_forward(query: Tensor, resources: Resources = NO_RESOURCES) -> tuple[Tensor, Tensor]:
    """Tensors shaped like the results. lse lies in memory as (batch, q_len, heads)."""
    dtype = accumulation_dtype(query.dtype)
    out = resources.empty(query.shape, dtype=query.dtype, device=query.device, kind="output")
    lse = resources.empty(query.shape[:-1], dtype=dtype, device=query.device, kind="output")
    return out, lse.transpose(1, 2)
