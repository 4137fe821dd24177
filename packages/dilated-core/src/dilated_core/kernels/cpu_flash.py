"""Flash attention on the CPU, through PyTorch's own operator. The one file that touches the private CPU operator.

What was found by running it (torch 2.13; the tests also pass on 2.11): it takes strided and overlapping q, k, v without
copying; a last stride other than 1 is silently wrong; empty inputs crash the process; results lie in memory as (batch,
seq, heads, head_dim). The callers give it last stride 1 and no empties.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from dilated_core.kernels.math import Math
from dilated_core.kernels.problem import Problem


class CPUFlash:
    """``aten::_scaled_dot_product_flash_attention_for_cpu`` and its backward."""

    name = "cpu_flash"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot run here: not a CPU, or an operator that is missing or does not do what is expected of it."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        return _fault(dtype)

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of the tile."""
        query, key, value, is_causal, scale = problem
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, scale=scale
        )
        return out, lse

    def backward(self, problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value."""
        query, key, value, is_causal, scale = problem
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, lse, 0.0, is_causal, scale=scale
        )
        return grads


@cache
def _fault(dtype: torch.dtype) -> str | None:
    """Try the private operator once a dtype, on strided input and with a merged lse, against the math kernel."""
    aten = torch.ops.aten
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ):
        if not hasattr(aten, name):
            return f"this torch ({torch.__version__}) has no aten::{name}"
    try:
        # Real tensors on a real CPU, also where the caller builds on another device or with fake tensors: what is
        # found here is remembered.
        with torch.no_grad(), _disable_current_modes():
            return _difference(dtype)
    except RuntimeError as error:
        return f"the operator fails here: {error}"


def _difference(dtype: torch.dtype) -> str | None:
    values = torch.linspace(-1, 1, 4 * 5 * 2 * 8, dtype=torch.float64, device="cpu").sin().to(dtype)
    query, key, value, grad_out = values.view(4, 1, 5, 2, 8).transpose(2, 3).unbind(0)
    flash, exact = CPUFlash(), Math()
    problem = Problem(query, key, value, is_causal=True, scale=0.5)
    out, lse = flash.forward(problem)
    results = (out, lse, *flash.backward(problem, grad_out, out, lse + 0.25))
    expected = (*exact.forward(problem), *exact.backward(problem, grad_out, out, lse + 0.25))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.05)
    for result, wanted in zip(results, expected, strict=True):
        if not torch.allclose(result.double(), wanted.double(), rtol=tolerance, atol=tolerance):
            return "the operator's results differ from the definition"
    return None
