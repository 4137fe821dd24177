"""block_sparse_ring_attention: the front door. Checks its arguments, then lets the ranks agree and work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from dilated_block_sparse.engine import Options
from dilated_block_sparse.functional import check_heads
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.ring.agreement import Call
from dilated_block_sparse.ring.bounds import check_layout_bounds, sequence_length
from dilated_block_sparse.ring.operators import ring_attention_function
from dilated_core import Allocator, AuxOutput, AuxRequest, PatternStore, checks
from dilated_core.kernels import Needs, choose
from dilated_ring.comm import Comm, comm_of, refuse


@overload
def block_sparse_ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    group: ProcessGroup | DeviceMesh | Comm | None = None,
    bounds: Sequence[int] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    refetch: bool = False,
    verify: bool = True,
    kernel: str = "auto",
    allocator: Allocator | None = None,
    patterns: PatternStore | None = None,
    return_aux: None = None,
) -> Tensor: ...


@overload
def block_sparse_ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    group: ProcessGroup | DeviceMesh | Comm | None = None,
    bounds: Sequence[int] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    refetch: bool = False,
    verify: bool = True,
    kernel: str = "auto",
    allocator: Allocator | None = None,
    patterns: PatternStore | None = None,
    return_aux: AuxRequest,
) -> tuple[Tensor, AuxOutput]: ...


def block_sparse_ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    group: ProcessGroup | DeviceMesh | Comm | None = None,
    bounds: Sequence[int] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    refetch: bool = False,
    verify: bool = True,
    kernel: str = "auto",
    allocator: Allocator | None = None,
    patterns: PatternStore | None = None,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Block-sparse attention over one sequence that lies on many ranks, exact.

    Every rank calls this with its shard: a stretch of positions, in the order of the ranks, of any length, also none;
    best are shards of whole blocks (``block_bounds``). A rank gets the keys of others that its rows keep, each once,
    and only in the key heads that keep it; with one layout for all heads, in all. The result is that of
    ``block_sparse_attention`` over the whole sequence, and so are the gradients.

    All ranks must also take part in the backward: an output of one rank that the loss leaves out makes the others wait.
    Dropout is not offered. Under torch.compile the graph breaks here, so ``fullgraph=True`` raises.

    Args:
        query: (batch, local seq, heads, head_dim), this rank's shard; float64, float32, bfloat16 or float16.
        key, value: (batch, local seq, kv_heads, head_dim), dtype and device of query; kv_heads == heads, or with
            ``enable_gqa`` a divisor of it.
        layout: of the whole sequence, the same on every rank; for 1 head, kv_heads or heads.
        group: the ranks: a process group, one dimension of a device mesh, a Comm; None for the default group.
        bounds: world_size + 1 positions, where shards start and end; None to ask the ranks.
        is_causal, scale, enable_gqa, kernel: as in ``block_sparse_attention``.
        key_padding_mask: (batch, local seq), bool, True where this rank's key is real; on all ranks or on none.
        refetch: False keeps gathered keys for the backward; True frees them and gathers them again.
        verify: whether ranks compare how they were called before keys travel, in a small exchange of its own. Without
            it, and with ``bounds``, that is saved, and a difference between ranks is undefined behaviour.
        allocator: where results, buffers and scratch are allocated, by kind where it is a BufferManager; torch.empty by
            default.
        patterns: where plans are kept between calls; with the layout by default.
        return_aux: ``AuxRequest(lse=True)`` to have the lse of this rank's rows too; on all ranks or on none.

    Returns:
        Output like query; with ``return_aux``, a pair of it and an AuxOutput.

    Raises:
        TypeError, ValueError: arguments of a wrong type or value, or shards that are not the layout's sequence.
        DisagreementError: on every rank, where ranks were called differently; it says who, and in what.
        PeerError: a rank died, or stalled past the group's timeout; it says what was being exchanged.

    >>> from dilated_block_sparse import block_sparse_attention
    >>> from dilated_ring.comm import run_ranks
    >>> layout = BlockLayout.from_rows([[0], [0, 1], [1, 2], [0, 3]], 64, 64, block_size=16)
    >>> q, k, v = torch.randn(3, 1, 64, 4, 16).unbind()
    >>> def work(comm):
    ...     shard = slice(comm.rank * 32, comm.rank * 32 + 32)
    ...     return block_sparse_ring_attention(q[:, shard], k[:, shard], v[:, shard], layout, group=comm)
    >>> out = torch.cat(run_ranks(2, work), 1)
    >>> torch.allclose(out, block_sparse_attention(q, k, v, layout), atol=1e-5)
    True
    """
    comm = comm_of(group)
    try:
        checks.boolean("is_causal", is_causal)
        checks.boolean("enable_gqa", enable_gqa)
        checks.boolean("refetch", refetch)
        checks.boolean("verify", verify)
        checks.kernel(kernel)
        with_lse = checks.asks_for_lse(return_aux)
        resources = checks.resources(allocator, patterns)
        query, key, value = checks.autocast(query, key, value)
        query, key, value = checks.query_key_value(query, key, value, same_length=True, enable_gqa=enable_gqa)
        real = checks.key_padding_mask(key_padding_mask, key)
        _check_layout(layout, query.shape[2], key.shape[2])
        if bounds is not None:
            bounds = _own_bounds(layout, bounds, comm, query.shape[1])
        signed_scale = checks.softmax_scale(scale, query.shape[3])
        query, scale = checks.query_and_scale(query, scale)
        choose(kernel, query.device, query.dtype, query.shape[3], Needs(real is not None, dropout=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        if bounds is None or verify is not False:
            refuse(comm, error)  # the others are about to agree, and would wait
        raise
    options = Options(is_causal, scale, 0.0, kernel)
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    call = Call(
        layout,
        options,
        bounds,
        verify,
        real is not None,
        with_lse,
        signed_scale,
        keep=differentiable and not refetch,
        differentiable=differentiable,
    )
    out: Tensor
    lse: Tensor
    out, lse = ring_attention_function(query, key, value, real, comm, call, resources)
    if return_aux is None:
        return out
    return out, AuxOutput(lse=lse if with_lse else None)


def _check_layout(layout: BlockLayout, heads: int, kv_heads: int) -> None:
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout: expected a BlockLayout, got {type(layout).__name__}")
    sequence_length(layout)
    check_heads(layout, heads, kv_heads)


def _own_bounds(layout: BlockLayout, bounds: Sequence[int], comm: Comm, length: int) -> tuple[int, ...]:
    """The bounds, if they are some, end where the layout does and fit this rank's shard."""
    positions = check_layout_bounds(layout, bounds, comm.size)
    expected = positions[comm.rank + 1] - positions[comm.rank]
    if expected != length:
        raise ValueError(f"query: expected the {expected} positions that bounds give rank {comm.rank}, got {length}")
    return positions
