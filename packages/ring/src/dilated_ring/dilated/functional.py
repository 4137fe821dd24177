"""dilated_ring_attention: the front door. Checks its arguments, then lets the ranks agree and work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from dilated_core import Allocator, AuxOutput, AuxRequest, PatternStore, checks
from dilated_core.attend import dropout_seed
from dilated_core.kernels import Needs, choose
from dilated_core.span import Options
from dilated_ring.comm import Comm, Group, comm_of, refuse
from dilated_ring.dilated.agreement import Call
from dilated_ring.dilated.operators import Extras, ring_attention_function
from dilated_ring.plan import check_bounds
from dilated_ring.plan.ring_plan import check_exchange


@overload
def dilated_ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    group: Group = None,
    bounds: Sequence[int] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    semantics: str = "paper",
    exchange: str | Sequence[str] = "auto",
    refetch: bool = False,
    verify: bool = True,
    kernel: str = "auto",
    allocator: Allocator | None = None,
    patterns: PatternStore | None = None,
    return_aux: None = None,
) -> Tensor: ...


@overload
def dilated_ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    group: Group = None,
    bounds: Sequence[int] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    semantics: str = "paper",
    exchange: str | Sequence[str] = "auto",
    refetch: bool = False,
    verify: bool = True,
    kernel: str = "auto",
    allocator: Allocator | None = None,
    patterns: PatternStore | None = None,
    return_aux: AuxRequest,
) -> tuple[Tensor, AuxOutput]: ...


def dilated_ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    group: Group = None,
    bounds: Sequence[int] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    semantics: str = "paper",
    exchange: str | Sequence[str] = "auto",
    refetch: bool = False,
    verify: bool = True,
    kernel: str = "auto",
    allocator: Allocator | None = None,
    patterns: PatternStore | None = None,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """LongNet's dilated self-attention (arXiv 2307.02486, eq. 3-15) over one sequence that lies on many ranks, exact.

    Every rank calls this with its shard: a stretch of positions, in the order of the ranks, of any length, also none.
    A segment inside a shard needs no other rank. Of one that crosses into other shards a rank gets only the rows that
    its own attend, or, where that is less, all rows of some heads. The result is that of ``dilated_attention`` over the
    whole sequence, and so are the gradients.

    All ranks must also take part in the backward: an output of one rank that the loss leaves out makes the others wait.

    Args:
        query: (batch, local seq, heads, head_dim), this rank's shard; float64, float32, bfloat16 or float16.
        key, value: (batch, local seq, kv_heads, head_dim), dtype and device of query; kv_heads == heads, or with
            ``enable_gqa`` a divisor of it.
        segment_lengths, dilation_rates: LongNet's branches, in positions of the whole sequence.
        group: the ranks: a process group, one dimension of a device mesh, a Comm; None for the default group.
        bounds: world_size + 1 positions, where shards start and end; None to ask the ranks.
        is_causal, scale, enable_gqa, semantics, kernel: as in ``dilated_core.dilated_attention``.
        dropout_p: as in ``dilated_core.dilated_attention``; each rank drops by random numbers of its own.
        generator: of this rank's dropout seed; the global one by default.
        key_padding_mask: (batch, local seq), bool, True where this rank's key is real; on all ranks or on none.
        exchange: "auto" lets each branch move what brings the busiest rank fewer bytes; "gather": the keys and values
            that rows attend; "heads": all rows of some heads. One for all branches, or a sequence with one for each.
        refetch: False keeps gathered rows for the backward, ``plan.bytes`` of them; True frees them and gathers again
            (the forward's own peak stays: all its exchanges start at once).
            Under torch.compile they are always gathered again.
        verify: whether ranks compare how they were called before rows travel, in a small exchange of its own. Without
            it, and with ``bounds``, that is saved, and a difference between ranks is undefined behaviour.
        allocator: where results, buffers and scratch are allocated, by kind where it is a BufferManager; torch.empty by
            default.
        patterns: where plans are kept between calls; by default the last few are. Neither is used under torch.compile.
        return_aux: ``AuxRequest(lse=True)`` to have the lse of this rank's rows too; on all ranks or on none.

    Returns:
        Output like query; with ``return_aux``, a pair of it and an AuxOutput.

    Raises:
        TypeError, ValueError: arguments of a wrong type or value.
        DisagreementError: on every rank, where ranks were called differently; it says who, and in what.
        PeerError: a rank died, or stalled past the group's timeout; it says what was being exchanged.

    >>> from dilated_ring.comm import run_ranks
    >>> q, k, v = torch.randn(3, 1, 1000, 4, 16).unbind()
    >>> def work(comm):
    ...     shard = slice(comm.rank * 250, comm.rank * 250 + 250)
    ...     return dilated_ring_attention(q[:, shard], k[:, shard], v[:, shard], [128, 512], [1, 4], group=comm)
    >>> from dilated_core import dilated_attention
    >>> out = torch.cat(run_ranks(4, work), 1)
    >>> torch.allclose(out, dilated_attention(q, k, v, [128, 512], [1, 4]), atol=1e-5)
    True
    """
    comm = comm_of(group)
    try:
        checks.boolean("is_causal", is_causal)
        checks.boolean("enable_gqa", enable_gqa)
        checks.boolean("refetch", refetch)
        checks.boolean("verify", verify)
        checks.semantics(semantics)
        checks.kernel(kernel)
        dropout_p = checks.probability("dropout_p", dropout_p)
        with_lse = checks.asks_for_lse(return_aux)
        lengths, rates = checks.branches(segment_lengths, dilation_rates)
        exchanges = check_exchange(exchange, len(rates))
        resources = checks.resources(allocator, patterns)
        query, key, value = checks.autocast(query, key, value)
        query, key, value = checks.query_key_value(query, key, value, same_length=True, enable_gqa=enable_gqa)
        real = checks.key_padding_mask(key_padding_mask, key)
        if bounds is not None:
            bounds = _own_bounds(bounds, comm, query.shape[1])
        signed_scale = checks.softmax_scale(scale, query.shape[3])
        query, scale = checks.query_and_scale(query, scale)
        if not torch.compiler.is_compiling():
            choose(kernel, query.device, query.dtype, query.shape[3], Needs(real is not None, dropout_p > 0))
        seed = dropout_seed(dropout_p, generator)
    except (TypeError, ValueError, NotImplementedError) as error:
        if (bounds is None or verify is not False) and not torch.compiler.is_compiling():
            refuse(comm, error)  # the others are about to agree, and would wait
        raise
    options = Options(lengths, rates, semantics, is_causal, scale, dropout_p, kernel)
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    keep = differentiable and not refetch
    call = Call(options, bounds, exchanges, verify, real is not None, with_lse, signed_scale, keep, differentiable)
    out, lse = ring_attention_function(query, key, value, Extras(real, seed), comm, call, resources)
    if semantics == "grouped":
        out = out / len(rates)
    if return_aux is None:
        return out
    return out, AuxOutput(lse=lse if with_lse else None)


def _own_bounds(bounds: Sequence[int], comm: Comm, length: int) -> tuple[int, ...]:
    """The bounds, if they are some and fit this rank's shard."""
    positions = check_bounds(bounds, comm.size)
    expected = positions[comm.rank + 1] - positions[comm.rank]
    if expected != length:
        raise ValueError(f"query: expected the {expected} positions that bounds give rank {comm.rank}, got {length}")
    return positions
