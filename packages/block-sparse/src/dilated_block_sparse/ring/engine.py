"""One rank's share of a block-sparse attention, forward and backward, without autograd.

Forward: the keys that others keep leave; while they travel, the rows attend the rank's own keys, then those that come,
and the two partials are merged in float32 (float64 for float64). Backward: the same two parts again, with the merged
out and lse; the gradients of gathered keys go back to who owns them while the own part is worked on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dilated_block_sparse import engine
from dilated_block_sparse.engine import Extras, Options
from dilated_block_sparse.ring.exchange import Arrivals, start
from dilated_block_sparse.ring.rank_plan import Part, RankPlan
from dilated_core.partial import accumulation_dtype, merge_in_place
from dilated_core.resources import OF_QKV, BufferKind, Resources
from dilated_ring.comm import Comm, Purpose


class Keys(NamedTuple):
    """Keys that rows attend.

    Attributes:
        key, value: (batch, tokens, kv_heads, head_dim).
        real: (batch, tokens), bool, True where a key is no padding; None for all.
    """

    key: Tensor
    value: Tensor
    real: Tensor | None

    def after(self, count: int) -> Keys:
        """The same after ``count`` keys of padding."""
        if count == 0:
            return self
        key, value = (_after(tensor, count) for tensor in (self.key, self.value))
        real = key.new_ones(key.shape[:2], dtype=torch.bool)
        real[:, :count] = False
        if self.real is not None:
            real[:, count:] = self.real
        return Keys(key, value, real)


class Results(NamedTuple):
    """What came of a forward, merged, and the gradients of it.

    Attributes:
        grad_out, out: like query.
        grad_lse, lse: (batch, heads, rows); grad_lse None where nothing arrives through lse.
    """

    grad_out: Tensor
    grad_lse: Tensor | None
    out: Tensor
    lse: Tensor

    def after(self, count: int) -> Results:
        """The same after ``count`` rows that have no key, to which nothing arrives."""
        if count == 0:
            return self
        grad_lse = None if self.grad_lse is None else F.pad(self.grad_lse, (count, 0))
        lse = F.pad(self.lse, (count, 0), value=-math.inf)
        return Results(_after(self.grad_out, count), grad_lse, _after(self.out, count), lse)


class Rank:
    """One rank at work on one call: its rows of the query, its own keys."""

    def __init__(
        self, comm: Comm, plan: RankPlan, query: Tensor, own: Keys, options: Options, resources: Resources
    ) -> None:
        self.comm, self.plan, self.options, self.resources = comm, plan, options, resources
        self.query, self.own = query, own

    # -------------------------------------------------------------------------------------------- forward

    def forward(self) -> tuple[Tensor, Tensor, Keys | None]:
        """out like query, lse (batch, heads, rows), and the keys that were gathered, None for none."""
        gather = self._start_gather("forward")
        partial = self._attend(self.plan.own, self.own.after(self.plan.keys_before))
        gathered = gather()
        more = self._attend(self.plan.far, gathered)
        if partial is None or more is None:
            out, lse = partial or more or self._nothing()
            return out.contiguous(), lse, gathered
        dtype = accumulation_dtype(self.query.dtype)
        out, lse = partial[0].to(dtype).transpose(1, 2), partial[1]
        merge_in_place(out, lse, more[0].transpose(1, 2), more[1])
        return out.transpose(1, 2).to(self.query.dtype).contiguous(), lse, gathered

    def _start_gather(self, phase: str) -> Callable[[], Keys | None]:
        """Send others the keys that they need; what is returned waits for those that this rank needs."""
        plan, own = self.plan, self.own
        if not plan.travels:
            return lambda: None
        size = (own.key.shape[0], plan.tokens, *own.key.shape[2:])
        dtype, device = own.key.dtype, own.key.device
        into = [self.resources.empty(size, dtype=dtype, device=device, kind=kind) for kind in OF_QKV[1:]]
        if not plan.complete:  # what is dead in some heads, or lies here, does not come
            for tensor in into:
                tensor.zero_()
        purpose = Purpose("keys and values", phase)
        waits = [start(self.comm, self.resources, own[:2], plan.lent, into, plan.gathered, purpose)]
        real = None
        if own.real is not None:
            # As bytes, which all backends send; 0 where nothing comes.
            real = self.resources.empty(size[:2], dtype=torch.uint8, device=device, kind="mask").zero_()
            purpose = Purpose("padding", phase)
            sent = [own.real.to(torch.uint8)]
            waits.append(start(self.comm, self.resources, sent, plan.lent_mask, [real], plan.gathered_mask, purpose))

        def gather() -> Keys | None:
            for wait in waits:
                wait()
            if plan.tokens == 0:
                return None
            key, value = into
            if real is not None:
                return Keys(key, value, real.bool())
            present = plan.present
            return Keys(key, value, None if present is None else present.to(key.device).expand(size[:2]))

        return gather

    def _attend(self, part: Part | None, keys: Keys | None) -> tuple[Tensor, Tensor] | None:
        """out and lse of one part; None where there is nothing to attend."""
        if part is None or keys is None:
            return None
        options = self.options._replace(is_causal=part.is_causal)
        before, extras = self.plan.rows_before, Extras(keys.real)
        query = _after(self.query, before)
        out, lse = engine.forward(query, keys.key, keys.value, extras, part.layout, options, self.resources)
        return out[:, before:], lse[:, :, before:]

    def _nothing(self) -> tuple[Tensor, Tensor]:
        """Results of rows that have no key."""
        batch, rows, heads, _ = self.query.shape
        dtype, device = accumulation_dtype(self.query.dtype), self.query.device
        out = self.resources.empty(self.query.shape, dtype=self.query.dtype, device=device, kind="output").zero_()
        lse = self.resources.empty((batch, heads, rows), dtype=dtype, device=device, kind="output")
        return out, lse.fill_(-math.inf)

    # -------------------------------------------------------------------------------------------- backward

    def backward(self, results: Results, gathered: Keys | None, *, refetch: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value.

        Args:
            results: of the forward.
            gathered: what the forward gathered.
            refetch: whether to gather it again instead.
        """
        results = results.after(self.plan.rows_before)
        own_keys = self.own.after(self.plan.keys_before)
        if refetch:  # keys travel while the own part is worked on
            gather = self._start_gather("backward")
            own = self._differentiate(self.plan.own, own_keys, results)
            far = self._differentiate(self.plan.far, gather(), results)
            sums, wait = self._start_return(far)
        else:  # gradients travel while the own part is worked on
            far = self._differentiate(self.plan.far, gathered, results)
            sums, wait = self._start_return(far)
            own = self._differentiate(self.plan.own, own_keys, results)
        if own is not None:
            for total, grad in zip(sums, own[1:], strict=True):
                total.copy_(grad[:, self.plan.keys_before :])
        wait()
        dtype = self.query.dtype
        grad_key, grad_value = (total.to(dtype) for total in sums)
        parts = [part[0] for part in (own, far) if part is not None]
        if len(parts) < 2:
            return parts[0].to(dtype) if parts else torch.zeros_like(self.query), grad_key, grad_value
        return parts[0].to(accumulation_dtype(dtype)).add_(parts[1]).to(dtype), grad_key, grad_value

    def _differentiate(self, part: Part | None, keys: Keys | None, results: Results) -> tuple[Tensor, ...] | None:
        """Gradients of query, key and value by one part; None where there was nothing to attend."""
        if part is None or keys is None:
            return None
        options = self.options._replace(is_causal=part.is_causal)
        before = self.plan.rows_before
        grad_query, grad_key, grad_value, _ = engine.backward(
            results.grad_out,
            results.grad_lse,
            _after(self.query, before),
            keys.key,
            keys.value,
            results.out,
            results.lse,
            Extras(keys.real),
            part.layout,
            options,
            self.resources,
        )
        return grad_query[:, before:], grad_key, grad_value

    def _start_return(self, far: tuple[Tensor, ...] | None) -> tuple[list[Tensor], Arrivals]:
        """Sums of the own keys' gradients, zero, and a wait that adds to them what others made of these keys."""
        plan, key = self.plan, self.own.key
        dtype, device = accumulation_dtype(key.dtype), key.device
        # The gradients, or yet to be rounded.
        kinds: tuple[BufferKind, ...] = OF_QKV[1:] if dtype == key.dtype else ("temp", "temp")
        sums = [self.resources.empty(key.shape, dtype=dtype, device=device, kind=kind).zero_() for kind in kinds]
        if not plan.travels:
            return sums, lambda: None
        grads = [key[:, :0]] * 2 if far is None else [grad.to(key.dtype) for grad in far[1:]]
        purpose = Purpose("gradients of keys and values", "backward")
        return sums, start(self.comm, self.resources, grads, plan.gathered, sums, plan.lent, purpose, add=True)


def _after(tensor: Tensor, count: int) -> Tensor:
    """(batch, tokens, heads, head_dim) after ``count`` tokens of zeros."""
    return F.pad(tensor, (0, 0, 0, 0, count, 0)) if count else tensor
