"""The torchscale way to compute dilated attention, written plainly on the same flash operator: what we compare with.

Per branch: cut into segments, give each block of ceil(heads / rate) heads one phase, copy the kept rows into a dense
tensor, attend, copy the result back to full length beside an lse that is very low elsewhere; then one softmax over the
branches' lse (with its gradient stopped) weighs the full-length results. Rows that do not fill the last segment or
the last dilation step are zeros that are attended. Written from the published description, for the benchmark only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class _Flash(torch.autograd.Function):
    """PyTorch's CPU flash operator with its lse, differentiable in out (as the formula needs it)."""

    @staticmethod
    def forward(ctx, query, key, value):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        query, key, value, out, lse = ctx.saved_tensors
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, lse, 0.0, False
        )


def phase_of_head(head: Tensor, heads: int, rate: int) -> Tensor:
    """torchscale's phase: consecutive heads share one (the paper's is ``head % rate``)."""
    return head // -(-heads // rate)


def torchscale_attention(
    query: Tensor, key: Tensor, value: Tensor, segment_lengths: Sequence[int], dilation_rates: Sequence[int]
) -> Tensor:
    """(batch, seq, heads, head_dim) each -> output like query; not causal."""
    outs, lses = [], []
    for segment_length, rate in zip(segment_lengths, dilation_rates, strict=True):
        out, lse = _branch(query, key, value, min(segment_length, query.shape[1]), rate)
        outs.append(out)
        lses.append(lse)
    with torch.no_grad():
        weights = torch.softmax(torch.stack(lses), dim=0).to(query.dtype)
    return sum(weight.unsqueeze(-1) * out for weight, out in zip(weights, outs, strict=True))


def _branch(query: Tensor, key: Tensor, value: Tensor, segment_length: int, rate: int) -> tuple[Tensor, Tensor]:
    """One branch at full length: out (batch, seq, heads, head_dim) and lse (batch, seq, heads)."""
    batch, seq, heads, head_dim = query.shape
    sparse = [_to_sparse(tensor, segment_length, rate) for tensor in (query, key, value)]
    out, lse = _Flash.apply(*(tensor.transpose(1, 2) for tensor in sparse))
    if rate == 1:
        full_out = out.transpose(1, 2).reshape(batch, -1, heads, head_dim)
        return full_out[:, :seq], lse.transpose(1, 2).reshape(batch, -1, heads)[:, :seq]
    rows = out.shape[2]
    full_out = out.new_zeros(out.shape[0], heads, rows, rate, head_dim)
    full_lse = lse.new_full((out.shape[0], heads, rows, rate), -1e8)
    for head in range(heads):
        phase = int(phase_of_head(torch.tensor(head), heads, rate))
        full_out[:, head, :, phase] = out[:, head]
        full_lse[:, head, :, phase] = lse[:, head]
    full_out = full_out.flatten(2, 3)[:, :, :segment_length].transpose(1, 2)
    full_lse = full_lse.flatten(2, 3)[:, :, :segment_length].transpose(1, 2)
    return full_out.reshape(batch, -1, heads, head_dim)[:, :seq], full_lse.reshape(batch, -1, heads)[:, :seq]


def _to_sparse(tensor: Tensor, segment_length: int, rate: int) -> Tensor:
    """(batch, seq, heads, head_dim) -> (batch * segments, rows, heads, head_dim), each head at its phase."""
    _batch, seq, heads, head_dim = tensor.shape
    tensor = F.pad(tensor, (0, 0, 0, 0, 0, -seq % segment_length)).reshape(-1, segment_length, heads, head_dim)
    if rate == 1:
        return tensor
    tensor = F.pad(tensor, (0, 0, 0, 0, 0, -segment_length % rate))
    tensor = tensor.unflatten(1, (-1, rate))
    phases = phase_of_head(torch.arange(heads), heads, rate)
    return torch.stack([tensor[:, :, phase, head] for head, phase in enumerate(phases.tolist())], dim=2)
