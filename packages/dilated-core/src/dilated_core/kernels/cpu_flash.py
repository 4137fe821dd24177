"""Flash attention on the CPU, through PyTorch's own operator. The one file that touches the private CPU operator.

What was found by running it (torch 2.13; the tests also pass on 2.11): it takes strided and overlapping q, k, v without
copying; a last stride other than 1 is silently wrong; empty inputs crash the process; results lie in memory as (batch,
seq, heads, head_dim). The callers give it last stride 1 and no empties. It takes a mask as a bias on the scores; a row
that the bias leaves no key gets lse 0, which is set right here. No dropout.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from dilated_core.kernels.math import Math
from dilated_core.kernels.needs import NO_DROPOUT, Needs
from dilated_core.kernels.problem import Problem


class CPUFlash:
    """``aten::_scaled_dot_product_flash_attention_for_cpu`` and its backward."""

    name = "cpu_flash"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs) -> str | None:
        """Why it cannot run here: not a CPU, or an operator that is missing or does not do what is expected of it."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        return NO_DROPOUT if needs.dropout else _fault(dtype)

    def recommended(self) -> bool:
        """Always."""
        return True

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of the tile."""
        query, key, value, is_causal, scale, *_ = problem
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=problem.bias(), scale=scale
        )
        has_key = problem.rows_with_a_key()
        if has_key is not None:  # the operator gives lse 0 to a row with no key
            lse.masked_fill_(~has_key, -math.inf)
            out.masked_fill_(~has_key.unsqueeze(-1), 0.0)
        return out, lse

    def backward(self, problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value."""
        query, key, value, is_causal, scale, *_ = problem
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, lse, 0.0, is_causal, attn_mask=problem.bias(), scale=scale
        )
        return grads


@cache
def _fault(dtype: torch.dtype) -> str | None:
    """Try the private operator once a dtype, strided, masked and with a merged lse, against the math kernel."""
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
    real = torch.tensor([False, True, False, True, True], device="cpu").expand(1, 2, 5)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.05)
    for keys in (None, real):
        problem = Problem(query, key, value, is_causal=True, scale=0.5, real=keys)
        out, lse = flash.forward(problem)
        joined = lse.masked_fill(lse == -math.inf, math.inf) + 0.25
        results = (out, lse, *flash.backward(problem, grad_out, out, joined))
        expected = (*exact.forward(problem), *exact.backward(problem, grad_out, out, joined))
        for result, wanted in zip(results, expected, strict=True):
            if not torch.allclose(result.double(), wanted.double(), rtol=tolerance, atol=tolerance):
                return "the operator's results differ from the definition"
    return None
