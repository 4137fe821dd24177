"""The same attention as nn.Modules, weights named as dilated_core's: state dicts load in both directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dilated_core import Allocator, DilatedAttention, DilatedKVCache, PatternStore, checks
from dilated_core.projections import MultiheadProjections
from dilated_ring.comm import Comm, Group, HeldGroup, asked_bounds, comm_of, refuse
from dilated_ring.dilated.functional import dilated_ring_attention
from dilated_ring.plan import check_bounds
from dilated_ring.plan.ring_plan import check_exchange


class RingDilatedAttention(DilatedAttention):
    """``dilated_ring_attention`` as a module: as dilated_core.DilatedAttention, called with this rank's shard.

    Copies made by ``copy.deepcopy`` share the group. With a group of its own the module cannot be pickled, as a group
    cannot be; with None, the default group, which is looked up at each call, it can. A state dict never holds a group.

    Args:
        segment_lengths, dilation_rates: LongNet's branches, in positions of the whole sequence.
        softmax_scale: factor on the scores, 1 / sqrt(head_dim) by default.
        attention_dropout: probability in [0, 1) that a weight is dropped, in training mode only.
        group: the ranks: a process group, one dimension of a device mesh, a Comm; None for the default group.
        bounds: world_size + 1 positions, where shards start and end; None to ask the ranks at each call.
        exchange, refetch, verify: as in ``dilated_ring_attention``.
        is_causal, enable_gqa, semantics, kernel, allocator, patterns: as in ``dilated_ring_attention``.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> from dilated_ring.comm import run_ranks
    >>> query, key, value = torch.randn(3, 1, 100, 4, 16).unbind()
    >>> def work(comm):
    ...     attention = RingDilatedAttention([32, 64], [1, 2], group=comm)
    ...     return attention(*(each.tensor_split(4, 1)[comm.rank] for each in (query, key, value)))
    >>> whole = DilatedAttention([32, 64], [1, 2])(query, key, value)
    >>> torch.allclose(torch.cat(run_ranks(4, work), 1), whole, atol=1e-5)
    True
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        *,
        group: Group = None,
        bounds: Sequence[int] | None = None,
        exchange: str | Sequence[str] = "auto",
        refetch: bool = False,
        verify: bool = True,
        is_causal: bool = False,
        enable_gqa: bool = False,
        semantics: str = "paper",
        kernel: str = "auto",
        allocator: Allocator | None = None,
        patterns: PatternStore | None = None,
    ) -> None:
        super().__init__(
            segment_lengths,
            dilation_rates,
            softmax_scale,
            attention_dropout,
            is_causal=is_causal,
            enable_gqa=enable_gqa,
            semantics=semantics,
            kernel=kernel,
            allocator=allocator,
            patterns=patterns,
        )
        # The default group may be initialised after the module is made.
        size = None if group is None else comm_of(group).size
        self._held = HeldGroup(group)
        self.bounds = None if bounds is None else check_bounds(bounds, size)
        check_exchange(exchange, self.pattern.branches)
        self.exchange = exchange
        self.refetch = checks.boolean("refetch", refetch)
        self.verify = checks.boolean("verify", verify)

    @property
    def group(self) -> Group:
        """The ranks, as they were given."""
        return self._held.group

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        bounds: Sequence[int] | None = None,
    ) -> Tensor:
        """Attend; all ranks of the group call it together.

        Args:
            query: (batch, local seq, heads, head_dim).
            key, value: (batch, local seq, kv_heads, head_dim).
            is_causal, bounds: override the module's own, for this call.
            key_padding_mask: (batch, local seq), bool, True where this rank's key is real; on all ranks or on none.
            cu_seqlens: None; packed sequences are not for shards, anything else raises.

        Returns:
            Output like query.

        Raises:
            TypeError, ValueError, DisagreementError, PeerError: as ``dilated_ring_attention``.
        """
        bounds = self.bounds if bounds is None else bounds
        if cu_seqlens is not None:
            error = ValueError("cu_seqlens: expected None, sequences that lie on many ranks are not packed")
            self.refuse(error, bounds)
            raise error
        return dilated_ring_attention(
            query,
            key,
            value,
            self.pattern.segment_lengths,
            self.pattern.dilation_rates,
            group=self.group,
            bounds=bounds,
            is_causal=self.is_causal if is_causal is None else is_causal,
            scale=self.softmax_scale,
            dropout_p=self.attention_dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            enable_gqa=self.enable_gqa,
            semantics=self.semantics,
            exchange=self.exchange,
            refetch=self.refetch,
            verify=self.verify,
            kernel=self.kernel,
            allocator=self.allocator,
            patterns=self.patterns,
        )

    def refuse(self, error: Exception, bounds: Sequence[int] | None) -> None:
        """Tell the other ranks, if they are about to listen, that this one raises ``error`` instead of attending."""
        if (bounds is None or self.verify) and not torch.compiler.is_compiling():
            refuse(comm_of(self.group), error)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        bounds = None if self.bounds is None else list(self.bounds)
        return (
            f"{super().extra_repr()}, group={self._held}, bounds={bounds}, exchange={self.exchange!r}, "
            f"refetch={self.refetch}, verify={self.verify}"
        )


class RingMultiheadDilatedAttention(MultiheadProjections):
    """Multi-head dilated self-attention with projections: dilated_core.MultiheadDilatedAttention over shards.

    Every rank has all the weights and calls it with its shard of the input. The gradients of the weights are those of
    this rank's rows: their sum over the ranks is the whole sequence's.

    Args:
        embed_dim, num_heads, segment_lengths, dilation_rates, dropout, bias: as in
            dilated_core.MultiheadDilatedAttention.
        layer_norm, layer_norm_eps, gamma_init, kv_heads, device, dtype: the same.
        rotary: a module called as ``rotary(query, key, start=...) -> (query, key)`` on (batch, local seq, heads,
            head_dim) after the projections; start is the position of the shard's first row in the whole sequence.
        group, exchange, refetch, verify: as in RingDilatedAttention.
        bounds: as in RingDilatedAttention. Without them, a ``rotary`` costs one more small exchange at each call, in
            which the ranks tell each other their lengths.
        softmax_scale, is_causal, semantics, kernel, allocator, patterns: as in RingDilatedAttention.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> from dilated_ring.comm import run_ranks
    >>> from dilated_core import MultiheadDilatedAttention
    >>> whole, tokens = MultiheadDilatedAttention(64, 4, [32, 64], [1, 2]), torch.randn(2, 100, 64)
    >>> def work(comm):
    ...     attention = RingMultiheadDilatedAttention(64, 4, [32, 64], [1, 2], group=comm)
    ...     attention.load_state_dict(whole.state_dict())
    ...     return attention(tokens.tensor_split(3, 1)[comm.rank])[0]
    >>> torch.allclose(torch.cat(run_ranks(3, work), 1), whole(tokens)[0], atol=1e-5)
    True
    """

    attention: RingDilatedAttention

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        kv_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rotary: nn.Module | None = None,
        group: Group = None,
        bounds: Sequence[int] | None = None,
        exchange: str | Sequence[str] = "auto",
        refetch: bool = False,
        verify: bool = True,
        softmax_scale: float | None = None,
        is_causal: bool = False,
        semantics: str = "paper",
        kernel: str = "auto",
        allocator: Allocator | None = None,
        patterns: PatternStore | None = None,
    ) -> None:
        checks.probability("dropout", dropout)
        attention = RingDilatedAttention(
            segment_lengths,
            dilation_rates,
            softmax_scale,
            dropout,
            group=group,
            bounds=bounds,
            exchange=exchange,
            refetch=refetch,
            verify=verify,
            is_causal=is_causal,
            enable_gqa=kv_heads not in (None, num_heads),
            semantics=semantics,
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
        cu_seqlens: Tensor | None = None,
        cache: DilatedKVCache | None = None,
        bounds: Sequence[int] | None = None,
    ) -> tuple[Tensor, None]:
        """Attend, in the argument order of ``nn.MultiheadAttention.forward``; all ranks of the group call it together.

        Args:
            query: (batch, local seq, embed_dim).
            key, value: the same shape; query itself by default.
            key_padding_mask: (batch, local seq), bool, True where the key is *padding*: nn.MultiheadAttention's sense;
                on all ranks or on none.
            need_weights, attn_mask, average_attn_weights: as in dilated_core.MultiheadDilatedAttention.
            is_causal, bounds: override the module's own, for this call.
            cu_seqlens, cache: None; packed sequences and decoding are not for shards, anything else raises.

        Returns:
            (output of query's shape, None).

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape or value.
            DisagreementError, PeerError: as ``dilated_ring_attention``.
        """
        ring = self.attention
        bounds = ring.bounds if bounds is None else bounds
        try:
            for name, argument in (("cu_seqlens", cu_seqlens), ("cache", cache)):
                if argument is not None:
                    raise ValueError(f"{name}: expected None, a sequence that lies on many ranks is not for it")
            q, k, v, real = self.projected(query, key, value, key_padding_mask, need_weights, attn_mask)
        except Exception as error:  # a projection may raise anything
            ring.refuse(error, bounds)
            raise
        if self.rotary is not None:
            comm = comm_of(ring.group)
            if bounds is None:
                bounds = self._asked_bounds(comm, q.shape[1])
            try:
                q, k = self.rotary(q, k, start=check_bounds(bounds, comm.size)[comm.rank])
            except Exception as error:  # one rank's positions may lie beyond its table: an IndexError
                ring.refuse(error, bounds)
                raise
        attended = ring(q, k, v, is_causal=is_causal, key_padding_mask=real, bounds=bounds)
        return self.joined(attended), None

    def _asked_bounds(self, comm: Comm, length: int) -> tuple[int, ...]:
        """Where the shards start and end, as the ranks tell each other."""
        if torch.compiler.is_compiling():
            raise ValueError("bounds: expected positions under torch.compile where there is a rotary, got None")
        return asked_bounds(comm, "RingMultiheadDilatedAttention", length)
