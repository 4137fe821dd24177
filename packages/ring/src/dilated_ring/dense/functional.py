"""ring_attention: the front door. Checks its arguments, then lets the ranks agree and work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from dilated_core import Allocator, AuxOutput, AuxRequest, checks
from dilated_core.kernels import Needs, choose
from dilated_ring.comm import Group
from dilated_ring.dense.attention import Call, Inputs
from dilated_ring.dense.operators import ring_attention_function
from dilated_ring.dense.sharding import BALANCES, pieces_of, rows_of
from dilated_ring.dense.team import Team, team_of
from dilated_ring.plan import check_bounds

MODES = ("ring", "all_to_all")


@overload
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Group | Team = None,
    ring_size: int | None = None,
    bounds: Sequence[int] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    mode: str = "ring",
    balance: str = "contiguous",
    verify: bool = True,
    kernel: str = "auto",
    allocator: Allocator | None = None,
    return_aux: None = None,
) -> Tensor: ...


@overload
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Group | Team = None,
    ring_size: int | None = None,
    bounds: Sequence[int] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    mode: str = "ring",
    balance: str = "contiguous",
    verify: bool = True,
    kernel: str = "auto",
    allocator: Allocator | None = None,
    return_aux: AuxRequest,
) -> tuple[Tensor, AuxOutput]: ...


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Group | Team = None,
    ring_size: int | None = None,
    bounds: Sequence[int] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    mode: str = "ring",
    balance: str = "contiguous",
    verify: bool = True,
    kernel: str = "auto",
    allocator: Allocator | None = None,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Softmax attention of every row to every key of one sequence that lies on many ranks, exact, with exact gradients.

    Every rank calls this with its shard and gets the output of its own rows. Ring (arXiv 2310.01889): keys and values
    go from rank to rank, each on its way while the last are attended, and their gradients follow them home; memory is
    that of shards, not of the sequence. All-to-all (Ulysses, arXiv 2309.14509): ranks exchange positions of all heads
    for all positions of some heads, and back; ranks beyond the number of key heads get none. On a mesh of two
    dimensions both: its first is the ring, its second exchanges heads, and shards are numbered row by row.

    All ranks must also take part in the backward: an output of one rank that the loss leaves out makes the others wait.

    Args:
        query: (batch, local seq, heads, head_dim), this rank's shard; float64, float32, bfloat16 or float16. Shards may
            have different lengths, also none.
        key, value: (batch, local seq, kv_heads, head_dim), dtype and device of query; kv_heads == heads, or with
            ``enable_gqa`` a divisor of it.
        group: the ranks: a process group, a device mesh of one or two dimensions, a Comm, or a Team of two Comms; None
            for the default group.
        ring_size: instead of a group: the tensors are the whole sequence, on this device, and its keys are taken in so
            many chunks.
        bounds: world_size + 1 positions that rise from 0: rank i's shard has bounds[i + 1] - bounds[i]. None to ask the
            ranks.
        is_causal: whether a row sees only keys at or before it, in the whole sequence.
        scale: factor on the scores, 1 / sqrt(head_dim) by default.
        key_padding_mask: (batch, local seq), bool, True where this rank's key is real; on all ranks or on none. What
            padding keys and values hold, even NaN, has no influence; rows of padding attend like any other.
        enable_gqa: whether query heads may share key heads: query head j meets key head j // (heads // kv_heads).
        mode: "ring" or "all_to_all"; with a mesh of two dimensions "ring", which then is of its first.
        balance: which positions a shard holds. "contiguous": a stretch, in the order of the ranks. "head_tail": one
            from the front and one from the back, as ``dilated_ring.shard`` makes them: causal work is then equal.
        verify: whether ranks compare how they were called before rows travel, in a small exchange of its own. Without
            it, and with ``bounds``, that is saved, and a difference between ranks is undefined behaviour.
        kernel: a name from ``dilated_core.kernels.table()``, or "auto" for the first that can run.
        allocator: where results, buffers and sums are allocated, by kind where it is a BufferManager; torch.empty by
            default, and under torch.compile.
        return_aux: ``AuxRequest(lse=True)`` to have the lse of this rank's rows too, (batch, heads, local seq); on all
            ranks or on none.

    Returns:
        Output like query; with ``return_aux``, a pair of it and an AuxOutput. A row with no key gives 0, and lse -inf.

    Raises:
        TypeError, ValueError: arguments of a wrong type or value.
        DisagreementError: on every rank, where ranks were called differently; it says who, and in what.
        PeerError: a rank died, or stalled past the group's timeout; it says what was being exchanged.
        RuntimeError: no group, and torch.distributed is not initialised.

    >>> from dilated_ring.comm import run_ranks
    >>> q, k, v = torch.randn(3, 1, 1000, 4, 16).unbind()
    >>> def work(comm):
    ...     mine = slice(comm.rank * 250, comm.rank * 250 + 250)
    ...     return ring_attention(q[:, mine], k[:, mine], v[:, mine], group=comm)
    >>> from dilated_core import attend
    >>> torch.allclose(torch.cat(run_ranks(4, work), 1), attend(q, k, v).out, atol=1e-5)
    True
    """
    team = Team() if group is None and ring_size is not None else team_of(group)
    try:
        if ring_size is not None and group is not None:
            raise ValueError(f"ring_size: expected None with a group, got {ring_size!r} (it chunks keys on one device)")
        checks.boolean("is_causal", is_causal)
        checks.boolean("enable_gqa", enable_gqa)
        checks.boolean("verify", verify)
        checks.kernel(kernel)
        checks.choice("mode", mode, MODES)
        checks.choice("balance", balance, BALANCES)
        chunks = 1 if ring_size is None else checks.positive_integer("ring_size", ring_size)
        if mode == "all_to_all":
            team = _exchanging_heads(team)
        with_lse = checks.asks_for_lse(return_aux)
        resources = checks.resources(allocator, None)
        query, key, value = checks.autocast(query, key, value)
        query, key, value = checks.query_key_value(query, key, value, same_length=True, enable_gqa=enable_gqa)
        real = checks.key_padding_mask(key_padding_mask, key)
        positions = () if bounds is None else _own_bounds(bounds, team, query.shape[1], balance)
        asked = checks.softmax_scale(scale, query.shape[3])
        query, factor = checks.query_and_scale(query, scale)
        if not torch.compiler.is_compiling():
            choose(kernel, query.device, query.dtype, query.shape[3], Needs(mask=real is not None))
    except (TypeError, ValueError, NotImplementedError) as error:
        if (bounds is None or verify is not False) and not torch.compiler.is_compiling():
            team.refuse(error)  # the others are about to agree, and would wait
        raise
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    call = Call(is_causal, asked, factor, mode, balance, positions, chunks, verify, with_lse, differentiable, kernel)
    out, lse = ring_attention_function(Inputs(query, key, value, real), team, call, resources)
    if return_aux is None:
        return out
    return out, AuxOutput(lse=lse if with_lse else None)


def _exchanging_heads(team: Team) -> Team:
    """The team of ``mode="all_to_all"``: who would be a ring exchanges heads."""
    if team.ring is None:
        raise ValueError(
            'mode: expected "ring" with ring_size, got "all_to_all" (one device has nobody to exchange with)'
        )
    if team.heads is not None:
        raise ValueError(
            'mode: expected "ring" with a mesh of two dimensions, whose second one exchanges heads, got "all_to_all"'
        )
    return Team(heads=team.ring)


def _own_bounds(bounds: Sequence[int], team: Team, length: int, balance: str) -> tuple[int, ...]:
    """The bounds, if they are some and fit this rank's shard and the balance."""
    positions = check_bounds(bounds, team.size)
    expected = rows_of(pieces_of(positions, balance)[team.rank])
    if expected != length:
        raise ValueError(f"query: expected the {expected} positions that bounds give rank {team.rank}, got {length}")
    return positions
