"""FlashAttention-4 where its package is installed. The one file that touches it.

Written from the source of flash-attn-4 4.0.0b36 (``flash_attn.cute.interface``; the arguments used here are the same
in b10, b20 and b28) and from how torch 2.11 and 2.13 call it (torch.nn.attention, "FA4"). It takes (batch, rows, heads,
head_dim) with last stride 1 and reads 16 bytes at a time; lse is (batch, heads, rows), natural log, float32. The
forward returns out, lse and, in later versions, more. An lse of +inf gives weights of 0: the backward pads its own rows
with it. Programs are compiled at the first call of a dtype and a head_dim, which takes a while, not of a length.

The backward is deterministic where it is told to be; on compute capability 9.0, version b3 refuses that. More than
head_dim 128 is not asked for: there the package's own tests take no gradient with values as wide as keys, or not on
every card. Not yet measured on a GPU.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dilated_core.kernels.flash_attention_3 import as_read, package_refusal
from dilated_core.kernels.needs import Needs
from dilated_core.kernels.problem import Problem

# The widest head_dim by the major number of the compute capability: Hopper and Blackwell.
WIDEST = {9: 128, 10: 128}
NOT_INSTALLED = 'flash_attn.cute is not installed (pip install "dilated-core[flash]")'
# What is asked of the package beside the tensors. Older ones lack some of it.
ARGUMENTS = {
    "_flash_attn_fwd": ("softmax_scale", "causal", "return_lse"),
    "_flash_attn_bwd": ("softmax_scale", "causal", "deterministic", "dq", "dk", "dv"),
}


class CUDAFlash4:
    """``_flash_attn_fwd`` and ``_flash_attn_bwd`` of flash-attn-4. Forward and backward are deterministic."""

    name = "cuda_flash4"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs) -> str | None:
        """Why it cannot run here: device, dtype, head_dim, compute capability, or no package."""
        return package_refusal(device, dtype, head_dim, needs, WIDEST) or _fault()

    def recommended(self) -> bool:
        """Never, until it has been measured on a card."""
        return False

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of the tile."""
        query, key, value = as_read(*problem[:3])
        with torch.cuda.device_of(query):  # the package compiles for, and launches on, the current device
            out, lse, *_ = _interface()._flash_attn_fwd(
                query, key, value, softmax_scale=problem.scale, causal=problem.is_causal, return_lse=True
            )
        return out.transpose(1, 2), lse

    def backward(self, problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value."""
        query, key, value, grad_out, out = as_read(*problem[:3], grad_out, out)
        grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]
        grad_query, grad_key, grad_value = grads
        with torch.cuda.device_of(query):
            _interface()._flash_attn_bwd(
                query, key, value, out, grad_out, lse.detach().contiguous(), dq=grad_query, dk=grad_key, dv=grad_value,
                softmax_scale=problem.scale, causal=problem.is_causal, deterministic=True,
            )  # fmt: skip
        return grad_query.transpose(1, 2), grad_key.transpose(1, 2), grad_value.transpose(1, 2)


def _interface() -> ModuleType:
    from flash_attn.cute import interface

    module: ModuleType = interface
    return module


@cache
def _fault() -> str | None:
    try:
        module = _interface()
    except ModuleNotFoundError as error:
        if error.name in ("flash_attn", "flash_attn.cute"):
            return NOT_INSTALLED
        return f"flash_attn.cute cannot be imported: {error}"
    except Exception as error:  # whatever a package says that does not fit this machine
        return f"flash_attn.cute cannot be imported: {error}"
    for name, arguments in ARGUMENTS.items():
        if not hasattr(module, name):
            return f"the installed flash_attn.cute has no {name}"
        taken = inspect.signature(getattr(module, name)).parameters
        missing = [argument for argument in arguments if argument not in taken]
        if missing:
            return f"the installed flash_attn.cute is another version: its {name} takes no {', '.join(missing)}"
    return None
