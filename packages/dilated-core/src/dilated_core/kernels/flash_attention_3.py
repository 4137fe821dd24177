"""FlashAttention-3 where its package is installed. The one file that touches it, and what the adapter of 4 shares.

Written from the package's source (the folder hopper of Dao-AILab/flash-attention, August 2026) and from how torch 2.11
and 2.13 call it (torch.nn.attention, "FA3"): importing ``flash_attn_interface`` registers the operators
``flash_attn_3::fwd`` and ``flash_attn_3::bwd``. They take (batch, rows, heads, head_dim) with last stride 1; lse is
(batch, heads, rows), natural log, float32, and read as if contiguous. What they do not check is seen to here: they read
16 bytes at a time, and a launch that fails ends the process. An lse of +inf gives weights of 0: the backward pads its
own rows with it.

The backward adds up the gradient of the queries in no fixed order unless it is told to be deterministic, which it
cannot be above head_dim 192. Builds of 7 January to 17 September 2025 do not listen (their pull request 1893).
Not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from dilated_core.kernels.needs import NO_DROPOUT, Needs
from dilated_core.kernels.problem import Problem

# Bytes that these kernels read at a time: where a row starts must be a multiple of it.
ALIGNMENT = 16
# A launch has one program a batch row in its third dimension, which CUDA ends here.
LARGEST_BATCH = 65535
# The widest head_dim by the major number of the compute capability.
WIDEST = {9: 192}
NOT_INSTALLED = (
    "flash_attn_interface is not installed (PyPI has no FlashAttention-3: take it from "
    "https://download.pytorch.org/whl/flash-attn-3/ or build the folder hopper of Dao-AILab/flash-attention)"
)


class CUDAFlash3:
    """``flash_attn_3::fwd`` and ``flash_attn_3::bwd``, for Hopper. Forward and backward are deterministic."""

    name = "cuda_flash3"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs) -> str | None:
        """Why it cannot run here: device, dtype, head_dim, compute capability, or no package."""
        return package_refusal(device, dtype, head_dim, needs, WIDEST) or _fault()

    def recommended(self) -> bool:
        """Never, until it has been measured on a card."""
        return False

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of the tile."""
        query, key, value = as_read(*problem[:3])
        out, lse, *_ = torch.ops.flash_attn_3.fwd(
            query, key, value, softmax_scale=problem.scale, is_causal=problem.is_causal, num_splits=1
        )
        return out.transpose(1, 2), lse

    def backward(self, problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value."""
        query, key, value, grad_out, out = as_read(*problem[:3], grad_out, out)
        grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]
        grad_query, grad_key, grad_value = grads
        torch.ops.flash_attn_3.bwd(
            grad_out, query, key, value, out, lse.detach().contiguous(), dq=grad_query, dk=grad_key, dv=grad_value,
            softmax_scale=problem.scale, is_causal=problem.is_causal, deterministic=True,
        )  # fmt: skip
        return grad_query.transpose(1, 2), grad_key.transpose(1, 2), grad_value.transpose(1, 2)


def package_refusal(
    device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs, widest: Mapping[int, int]
) -> str | None:
    """What both packages refuse; ``widest`` is the largest head_dim by the compute capability's major number."""
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}"
    if not torch.cuda.is_available():
        return "CUDA is not available here"
    if torch.version.hip is not None:  # whose cards have other capabilities by the same numbers
        return "it runs on NVIDIA's cards, not on AMD's"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {dtype}"
    if needs.mask:
        return "it takes no key padding mask"
    if needs.dropout:
        return NO_DROPOUT
    major, minor = torch.cuda.get_device_capability(device)
    if major not in widest:
        runs_on = " and ".join(f"{number}.x" for number in widest)
        return f"it runs on compute capability {runs_on}, the device has {major}.{minor}"
    if head_dim % 8 or head_dim > widest[major]:
        return f"it takes a head_dim that is a multiple of 8 up to {widest[major]}, not {head_dim}"
    return None


def as_read(*tensors: Tensor) -> list[Tensor]:
    """(batch, heads, rows, head_dim) tensors as both packages read them: (batch, rows, heads, head_dim), aligned.

    Views, but for tensors whose rows start where 16 bytes cannot be read at once, or repeat: those are copied. The
    strides of a dimension of size 1 count too, as the packages hand them on.

    Raises:
        ValueError: more batch rows than one launch takes.

    >>> [tuple(tensor.shape) for tensor in as_read(torch.zeros(2, 3, 5, 8))]
    [(2, 5, 3, 8)]
    """
    if len(tensors[0]) > LARGEST_BATCH:
        raise ValueError(
            f"query: expected at most {LARGEST_BATCH} batch rows (batch times segments) for this kernel, "
            f"got {len(tensors[0])}"
        )
    return [_aligned(tensor.detach().transpose(1, 2)) for tensor in tensors]


def _aligned(tensor: Tensor) -> Tensor:
    elements = ALIGNMENT // tensor.element_size()
    *strides, last = tensor.stride()
    fits = last == 1 and tensor.data_ptr() % ALIGNMENT == 0 and all(step and step % elements == 0 for step in strides)
    # clone, as contiguous() leaves the strides of dimensions of size 1 alone
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


@cache
def _fault() -> str | None:
    try:
        import flash_attn_interface  # noqa: F401 - registers the operators
    except ModuleNotFoundError as error:
        if error.name == "flash_attn_interface":
            return NOT_INSTALLED
        return f"flash_attn_interface cannot be imported: {error}"
    except Exception as error:  # whatever a package built for another torch or another CUDA says
        return f"flash_attn_interface cannot be imported: {error}"
    for name in ("fwd", "bwd"):
        if not hasattr(torch.ops.flash_attn_3, name):
            return f"the installed flash_attn_interface registers no operator flash_attn_3::{name}"
    return None
