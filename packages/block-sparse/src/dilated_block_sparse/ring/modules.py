"""The same attention as nn.Modules, called with a rank's shard. State dicts load in both directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.modules import BlockSparseAttention, length_of
from dilated_block_sparse.pattern import LayoutLike
from dilated_block_sparse.ring.bounds import check_layout_bounds
from dilated_block_sparse.ring.functional import block_sparse_ring_attention
from dilated_core import Allocator, PatternStore, checks
from dilated_core.projections import MultiheadProjections
from dilated_ring.comm import Group, HeldGroup, asked_bounds, comm_of, refuse
from dilated_ring.plan import check_bounds

FUNCTION = "block_sparse_ring_attention"


class BlockSparseRingAttention(BlockSparseAttention):
    """``block_sparse_ring_attention`` as a module: as BlockSparseAttention, called with this rank's shard.

    Copies made by ``copy.deepcopy`` share the group. With a group of its own the module cannot be pickled, as a group
    cannot be; with None, the default group, which is looked up at each call, it can. A state dict never holds a group.

    Args:
        layout: of the whole sequence: a BlockLayout, or a Pattern or another function of its length. Of a function,
            without ``bounds``, the ranks tell each other their lengths in one more small exchange at each call.
        softmax_scale: factor on the scores, 1 / sqrt(head_dim) by default.
        attention_dropout: 0.0; anything else raises.
        group: the ranks: a process group, one dimension of a device mesh, a Comm; None for the default group.
        bounds: world_size + 1 positions, where shards start and end; None to ask the ranks at each call.
        refetch, verify, is_causal, enable_gqa, kernel, allocator, patterns: as in ``block_sparse_ring_attention``.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> from dilated_ring.comm import run_ranks
    >>> layout = BlockLayout.from_rows([[0], [0, 1], [1, 2], [2, 3]], 64, 64, block_size=16)
    >>> query, key, value = torch.randn(3, 1, 64, 4, 16).unbind()
    >>> def work(comm):
    ...     attention = BlockSparseRingAttention(layout, group=comm)
    ...     return attention(*(each.tensor_split(4, 1)[comm.rank] for each in (query, key, value)))
    >>> whole = BlockSparseAttention(layout)(query, key, value)
    >>> torch.allclose(torch.cat(run_ranks(4, work), 1), whole, atol=1e-5)
    True
    """

    def __init__(
        self,
        layout: LayoutLike,
        *,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        group: Group = None,
        bounds: Sequence[int] | None = None,
        refetch: bool = False,
        verify: bool = True,
        is_causal: bool = False,
        enable_gqa: bool = False,
        kernel: str = "auto",
        allocator: Allocator | None = None,
        patterns: PatternStore | None = None,
    ) -> None:
        _no_dropout("attention_dropout", attention_dropout)
        super().__init__(
            layout,
            softmax_scale=softmax_scale,
            is_causal=is_causal,
            enable_gqa=enable_gqa,
            backend="tiles",
            kernel=kernel,
            allocator=allocator,
            patterns=patterns,
        )
        # The default group may be initialised after the module is made.
        size = None if group is None else comm_of(group).size
        self._held = HeldGroup(group)
        self.bounds = None if bounds is None else _check_bounds(layout, bounds, size)
        self.refetch = checks.boolean("refetch", refetch)
        self.verify = checks.boolean("verify", verify)

    @property
    def group(self) -> Group:
        """The ranks, as they were given."""
        return self._held.group

    def forward(  # type: ignore[override]  # without a bias, and with bounds
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
        bounds: Sequence[int] | None = None,
    ) -> Tensor:
        """Attend; all ranks of the group call it together.

        Args:
            query: (batch, local seq, heads, head_dim); key, value: (batch, local seq, kv_heads, head_dim).
            is_causal, bounds: override the module's own, for this call.
            key_padding_mask: (batch, local seq), bool, True where this rank's key is real; on all ranks or on none.

        Returns:
            Output like query.

        Raises:
            TypeError, ValueError, DisagreementError, PeerError: as ``block_sparse_ring_attention``.
        """
        bounds = self.bounds if bounds is None else bounds
        layout = self.layout
        if not isinstance(layout, BlockLayout):
            comm = comm_of(self.group)
            if bounds is None:
                try:
                    length = length_of(query)
                except (TypeError, ValueError) as error:
                    refuse(comm, error)
                    raise
                bounds = asked_bounds(comm, FUNCTION, length)
            try:
                layout = self.layout_for(check_bounds(bounds, comm.size)[-1])
            except Exception as error:  # whatever a function of the caller's raises
                self.refuse(error, bounds)
                raise
        return block_sparse_ring_attention(
            query,
            key,
            value,
            layout,
            group=self.group,
            bounds=bounds,
            is_causal=self.is_causal if is_causal is None else is_causal,
            scale=self.softmax_scale,
            key_padding_mask=key_padding_mask,
            enable_gqa=self.enable_gqa,
            refetch=self.refetch,
            verify=self.verify,
            kernel=self.kernel,
            allocator=self.allocator,
            patterns=self.patterns,
        )

    def refuse(self, error: Exception, bounds: Sequence[int] | None) -> None:
        """Tell the other ranks, if they are about to listen, that this one raises ``error`` instead of attending."""
        if bounds is None or self.verify:
            refuse(comm_of(self.group), error)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        bounds = None if self.bounds is None else list(self.bounds)
        return (
            f"{self.layout}, is_causal={self.is_causal}, kernel={self.kernel!r}, group={self._held}, bounds={bounds}, "
            f"refetch={self.refetch}, verify={self.verify}"
        )


class BlockSparseRingMultiheadAttention(MultiheadProjections):
    """Multi-head block-sparse self-attention with projections: BlockSparseMultiheadAttention over shards.

    Every rank has all the weights and calls it with its shard of the input. The gradients of the weights are those of
    this rank's rows: their sum over the ranks is the whole sequence's.

    Args:
        embed_dim, num_heads, layout: as in BlockSparseMultiheadAttention, the layout of the whole sequence.
        dropout: 0.0; anything else raises.
        bias, layer_norm, layer_norm_eps, gamma_init, kv_heads, device, dtype: as in BlockSparseMultiheadAttention.
        rotary: a module called as ``rotary(query, key, start=...) -> (query, key)`` on (batch, local seq, heads,
            head_dim) after the projections; start is the position of the shard's first row in the whole sequence.
        group, bounds, refetch, verify: as in BlockSparseRingAttention. Without ``bounds``, a ``rotary``, or a layout
            that is a function, costs one more small exchange at each call, in which ranks tell their lengths.
        softmax_scale, is_causal, kernel, allocator, patterns: as in BlockSparseRingAttention.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> from dilated_block_sparse import BlockSparseMultiheadAttention
    >>> from dilated_ring.comm import run_ranks
    >>> layout = BlockLayout.from_rows([[0], [0, 1], [1, 2], [2, 3]], 64, 64, block_size=16)
    >>> whole, tokens = BlockSparseMultiheadAttention(32, 4, layout), torch.randn(2, 64, 32)
    >>> def work(comm):
    ...     attention = BlockSparseRingMultiheadAttention(32, 4, layout, group=comm)
    ...     attention.load_state_dict(whole.state_dict())
    ...     return attention(tokens.tensor_split(2, 1)[comm.rank])[0]
    >>> torch.allclose(torch.cat(run_ranks(2, work), 1), whole(tokens)[0], atol=1e-5)
    True
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
        group: Group = None,
        bounds: Sequence[int] | None = None,
        refetch: bool = False,
        verify: bool = True,
        softmax_scale: float | None = None,
        is_causal: bool = False,
        kernel: str = "auto",
        allocator: Allocator | None = None,
        patterns: PatternStore | None = None,
    ) -> None:
        _no_dropout("dropout", dropout)
        attention = BlockSparseRingAttention(
            layout,
            softmax_scale=softmax_scale,
            group=group,
            bounds=bounds,
            refetch=refetch,
            verify=verify,
            is_causal=is_causal,
            enable_gqa=kv_heads not in (None, num_heads),
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
        *,
        bounds: Sequence[int] | None = None,
    ) -> tuple[Tensor, None]:
        """Attend, in the argument order of ``nn.MultiheadAttention.forward``; all ranks of the group call it together.

        Args:
            query: (batch, local seq, embed_dim).
            key, value: the same shape; query itself by default.
            key_padding_mask: (batch, local seq), bool, True where the key is *padding*: nn.MultiheadAttention's sense;
                on all ranks or on none.
            need_weights, attn_mask, average_attn_weights: as in BlockSparseMultiheadAttention.
            is_causal, bounds: override the module's own, for this call.

        Returns:
            (output of query's shape, None).

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape or value.
            DisagreementError, PeerError: as ``block_sparse_ring_attention``.
        """
        ring = self.attention
        bounds = ring.bounds if bounds is None else bounds
        try:
            q, k, v, real = self.projected(query, key, value, key_padding_mask, need_weights, attn_mask)
        except Exception as error:  # a projection may raise anything
            ring.refuse(error, bounds)
            raise
        if self.rotary is not None:
            comm = comm_of(ring.group)
            if bounds is None:
                bounds = asked_bounds(comm, FUNCTION, q.shape[1])
            try:
                q, k = self.rotary(q, k, start=check_bounds(bounds, comm.size)[comm.rank])
            except Exception as error:  # one rank's positions may lie beyond its table: an IndexError
                ring.refuse(error, bounds)
                raise
        return self.joined(ring(q, k, v, is_causal=is_causal, key_padding_mask=real, bounds=bounds)), None


def _no_dropout(name: str, probability: object) -> None:
    if checks.probability(name, probability) > 0.0:
        raise ValueError(
            f"{name}: expected 0.0, block-sparse attention over many ranks drops nothing, got {probability}"
        )


def _check_bounds(layout: LayoutLike, bounds: Sequence[int], size: int | None) -> tuple[int, ...]:
    """The bounds, which are checked at each call where the layout is not known yet."""
    return check_layout_bounds(layout, bounds, size) if isinstance(layout, BlockLayout) else check_bounds(bounds, size)
