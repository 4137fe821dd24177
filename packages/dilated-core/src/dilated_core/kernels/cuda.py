"""PyTorch's CUDA attention operators: flash, cuDNN and memory-efficient. The one file that touches them.

Written from the operators' signatures and their documented layouts of lse: flash (batch, heads, seq); efficient the
same, padded to a multiple of 32 rows; cuDNN with a trailing 1. Dropout is never asked for here, so the random state
that the backward operators demand is a placeholder.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dilated_core.kernels.needs import NO_DROPOUT, Needs
from dilated_core.kernels.problem import Problem

# The efficient kernels read lse in whole blocks of this many rows (kAlignLSE in their source).
EFFICIENT_LSE_ALIGNMENT = 32
# Elements from one row of a bias to the next must be a multiple of this (16 bytes of half precision, with room).
EFFICIENT_BIAS_ALIGNMENT = 16
# The largest head_dim the flash kernels are built for.
FLASH_MAX_HEAD_DIM = 256
# cuDNN is not asked for more than this: a cautious limit, until cards have been measured.
CUDNN_MAX_HEAD_DIM = 128
# Compute capability that the half-precision kernels need: Ampere.
AMPERE = (8, 0)


def _half_precision_refusal(
    device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs, max_head_dim: int
) -> str | None:
    """The refusals that flash and cuDNN share."""
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}"
    if not torch.cuda.is_available():
        return "CUDA is not available here"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {dtype}"
    if head_dim % 8 or head_dim > max_head_dim:
        return f"it takes a head_dim that is a multiple of 8 up to {max_head_dim}, not {head_dim}"
    if needs.mask:
        return "it takes no key padding mask"
    if needs.dropout:
        return NO_DROPOUT
    capability = torch.cuda.get_device_capability(device)
    if capability < AMPERE:
        return f"it needs compute capability 8.0, the device has {capability[0]}.{capability[1]}"
    return None


class CUDAFlash:
    """``aten::_scaled_dot_product_flash_attention`` (FlashAttention-2) and its backward."""

    name = "cuda_flash"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs) -> str | None:
        """Why it cannot run here: device, dtype, head_dim or compute capability."""
        return _half_precision_refusal(device, dtype, head_dim, needs, FLASH_MAX_HEAD_DIM)

    def recommended(self) -> bool:
        """Always."""
        return True

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of the tile."""
        query, key, value, is_causal, scale, *_ = problem
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scale
        )
        return out, lse

    def backward(self, problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value."""
        query, key, value, is_causal, scale, *_ = problem
        state = torch.empty(2, dtype=torch.uint64, device=query.device)
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad_out, query, key, value, out, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0,
            is_causal, state, state[:0], scale=scale,
        )  # fmt: skip
        return grads


class CUDACuDNN:
    """``aten::_scaled_dot_product_cudnn_attention`` and its backward."""

    name = "cuda_cudnn"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs) -> str | None:
        """Why it cannot run here: device, dtype, head_dim, compute capability, or cuDNN itself missing."""
        reason = _half_precision_refusal(device, dtype, head_dim, needs, CUDNN_MAX_HEAD_DIM)
        if reason is None and not torch.backends.cudnn.is_available():
            return "cuDNN is not available here"
        return reason

    def recommended(self) -> bool:
        """Always."""
        return True

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of the tile."""
        query, key, value, is_causal, scale, *_ = problem
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, is_causal, False, scale=scale
        )
        return out, lse.view(query.shape[:-1])

    def backward(self, problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value."""
        query, key, value, is_causal, scale, *_ = problem
        state = torch.zeros((), dtype=torch.int64, device=query.device)
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, query, key, value, out, lse.contiguous().unsqueeze(-1), state, state, None, None, None,
            query.shape[2], key.shape[2], 0.0, is_causal, scale=scale,
        )  # fmt: skip
        return grads


class CUDAEfficient:
    """``aten::_scaled_dot_product_efficient_attention`` and its backward: also float32, also older cards."""

    name = "cuda_efficient"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs) -> str | None:
        """Why it cannot run here: device, dtype or head_dim."""
        if device.type != "cuda":
            return f"it runs on CUDA, not on {device.type}"
        if not torch.cuda.is_available():
            return "CUDA is not available here"
        if dtype == torch.float64:
            return "it takes float32, float16 and bfloat16, not torch.float64"
        if needs.dropout:
            return NO_DROPOUT
        alignment = 4 if dtype == torch.float32 else 8  # rows of 16 bytes
        if head_dim % alignment:
            return f"it takes a head_dim that is a multiple of {alignment} in {dtype}, not {head_dim}"
        return None

    def recommended(self) -> bool:
        """Always."""
        return True

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of the tile."""
        query, key, value, is_causal, scale, *_ = problem
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, _aligned_bias(problem), True, 0.0, is_causal, scale=scale
        )
        lse = lse[:, :, : query.shape[2]]
        has_key = problem.rows_with_a_key()
        if has_key is not None:  # whatever the operator gives a row with no key
            lse = lse.masked_fill(~has_key, -math.inf)
            out = out.masked_fill(~has_key.unsqueeze(-1), 0.0)
        return out, lse

    def backward(self, problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value."""
        query, key, value, is_causal, scale, *_ = problem
        state = torch.zeros((), dtype=torch.int64, device=query.device)
        # +inf in the padding is what the forward writes there: weight 0. With nothing to pad, F.pad keeps the strides,
        # and the operator reads rows one after the other.
        lse = F.pad(lse, (0, -lse.shape[-1] % EFFICIENT_LSE_ALIGNMENT), value=float("inf")).contiguous()
        grad_query, grad_key, grad_value, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad_out, query, key, value, _aligned_bias(problem), out, lse, state, state, 0.0, [True, True, True, False],
            is_causal, scale=scale,
        )  # fmt: skip
        return grad_query, grad_key, grad_value


def _aligned_bias(problem: Problem) -> Tensor | None:
    """The mask as a bias (batch, heads, rows, keys) whose rows start where the efficient kernels can read them."""
    bias = problem.bias()
    if bias is None:
        return None
    keys = bias.shape[-1]
    bias = F.pad(bias, (0, -keys % EFFICIENT_BIAS_ALIGNMENT))[..., :keys]
    return bias.expand(-1, -1, problem.query.shape[2], -1)
