"""Which kernels exist, which can run a request, and which one ``kernel="auto"`` takes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dilated_core.kernels.cpu_flash import CPUFlash
from dilated_core.kernels.cpu_matmul import CPUMatmul
from dilated_core.kernels.cuda import CUDACuDNN, CUDAEfficient, CUDAFlash
from dilated_core.kernels.flash_attention_3 import CUDAFlash3
from dilated_core.kernels.flash_attention_4 import CUDAFlash4
from dilated_core.kernels.math import Math
from dilated_core.kernels.needs import NO_NEEDS, Needs
from dilated_core.kernels.problem import Problem
from dilated_core.kernels.triton import Triton


class Kernel(Protocol):
    """Attends one tile, whose tensors are (batch, heads, rows, head_dim), see Problem.

    ``lse`` is (batch, heads, rows), natural log, float32 (float64 for float64 inputs), -inf where a row has no key.
    """

    @property
    def name(self) -> str:
        """The word that ``kernel=`` takes."""

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs) -> str | None:
        """Why this kernel cannot run such tensors here; None where it can.

        Args:
            device, dtype, head_dim: of query, key and value.
            needs: what else is asked for.
        """

    def recommended(self) -> bool:
        """Whether "auto" should take it, here and now, where it does not refuse."""

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of the tile.

        Args:
            problem: the tile; the kernel does not refuse it.
        """

    def backward(self, problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value, in their dtype or a more precise one.

        ``out`` and ``lse`` may be those of a larger softmax that this tile was merged into: with P = exp(S - lse) and
        D = rowsum(grad_out * out) this is then the exact gradient of the joint softmax.

        Args:
            problem: the tile.
            grad_out, out: (batch, heads, rows, head_dim).
            lse: (batch, heads, rows); +inf in a row with no key, which makes its weights 0.
        """


# In order of preference: the first that does not refuse is "auto". Flash before cuDNN until both have been measured.
# Triton and the flash packages recommend themselves to nobody until a card has measured them. So they stand after
# PyTorch's own kernels, as if "auto" asked them too, and before the kernel that refuses nothing.
_TABLE: tuple[Kernel, ...] = (
    CPUMatmul(),
    CPUFlash(),
    CUDAFlash(),
    CUDACuDNN(),
    CUDAEfficient(),
    Triton(),
    CUDAFlash3(),
    CUDAFlash4(),
    Math(),
)


def table() -> tuple[Kernel, ...]:
    """All kernels, in the order in which ``kernel="auto"`` asks them."""
    return _TABLE


def survey(device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs = NO_NEEDS) -> dict[str, str | None]:
    """Say of every kernel, in order of preference, why it cannot run such tensors; None where it can.

    Args:
        device, dtype, head_dim: of query, key and value.
        needs: what else is asked for; nothing by default.

    Returns:
        name -> reason or None. "auto" takes the first with None, if it is one that recommends itself.

    >>> survey(torch.device("cpu"), torch.float32, 64)["math"] is None
    True
    """
    return {kernel.name: kernel.refusal(device, dtype, head_dim, needs) for kernel in _TABLE}


def choose(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs = NO_NEEDS) -> Kernel:
    """Return the kernel called ``name``, or for "auto" the first recommended one that can run such tensors.

    Args:
        name: of a kernel, or "auto".
        device, dtype, head_dim: of query, key and value.
        needs: what else is asked for; nothing by default.

    Raises:
        ValueError: an unknown name, or a kernel that cannot run them; the message says why.

    >>> choose("math", torch.device("cpu"), torch.float64, 3).name
    'math'
    """
    for kernel in _TABLE:
        if name == kernel.name or (name == "auto" and kernel.recommended()):
            reason = kernel.refusal(device, dtype, head_dim, needs)
            if reason is None:
                return kernel
            if name != "auto":
                raise ValueError(f'kernel: "{name}" cannot run {dtype} with head_dim {head_dim} on {device}: {reason}')
    raise ValueError(f"kernel: expected one of {['auto', *(kernel.name for kernel in _TABLE)]}, got {name!r}")
