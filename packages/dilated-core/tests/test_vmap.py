"""torch.func: vmap, grad and functional_call are right; what has no derivative says so."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

from dilated_core import MultiheadDilatedAttention, attend, dilated_attention

PATTERN = ([4, 8], [1, 3])
SIZE = 3  # of the dimension mapped over
SHAPES = {"query": (2, 11, 4, 8), "key": (2, 11, 2, 8), "value": (2, 11, 2, 8), "mask": (2, 11)}


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return dilated_attention(query, key, value, *PATTERN, is_causal=True, key_padding_mask=mask, enable_gqa=True)


def results(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """out, dq, dk, dv."""
    cotangent = torch.linspace(-1, 1, query.numel(), dtype=query.dtype).view(query.shape)
    gradients = grad(lambda *qkv: (attention(*qkv, mask) * cotangent).sum(), argnums=(0, 1, 2))(query, key, value)
    return attention(query, key, value, mask), *gradients


def stacked(name: str, dim: int | None) -> Tensor:
    """A tensor of that name with a dimension of SIZE at ``dim``."""
    shape = list(SHAPES[name])
    if dim is not None:
        shape.insert(dim, SIZE)
    values = torch.randn(shape, dtype=torch.float64)
    return values > -1 if name == "mask" else values


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_vmap_is_a_loop(masked: bool) -> None:
    """Output and gradients, for every choice of what is mapped over, at several places."""
    choices = list(product((None, 0, 4), (None, 1), (None, 2), (None, 0, 2) if masked else (None,)))
    for dims in choices[1:]:  # the first maps over nothing
        tensors = [stacked(name, dim) for name, dim in zip(SHAPES, dims, strict=True)]
        inputs = tensors if masked else [*tensors[:3], None]
        loop = []
        for index in range(SIZE):
            parts = [x if x is None or d is None else x.select(d, index) for x, d in zip(inputs, dims, strict=True)]
            loop.append(results(*parts))
        for name, mapped, *each in zip(("out", "dq", "dk", "dv"), vmap(results, dims)(*inputs), *loop, strict=True):
            torch.testing.assert_close(mapped, torch.stack(each), rtol=0, atol=1e-12, msg=f"{name} of in_dims {dims}")


def test_vmap_nests() -> None:
    query, key, value = torch.randn(3, 2, 3, 1, 11, 4, 8, dtype=torch.float64).unbind()
    twice = vmap(vmap(lambda *qkv: dilated_attention(*qkv, *PATTERN)))(query, key, value)
    flat = (tensor.flatten(0, 2) for tensor in (query, key, value))
    torch.testing.assert_close(twice.flatten(0, 2), dilated_attention(*flat, *PATTERN), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"cu_seqlens": torch.tensor([0, 4, 11])}, {"dropout_p": 0.1}], ids=str)
def test_vmap_refuses_what_it_cannot_fold(options: dict[str, object]) -> None:
    query, key, value = torch.randn(3, SIZE, 1, 11, 4, 8).unbind()
    with pytest.raises(ValueError, match=r"torch.func.vmap: packed sequences and dropout cannot be mapped over"):
        vmap(lambda *qkv: dilated_attention(*qkv, *PATTERN, **options), randomness="different")(query, key, value)


def test_functional_call_and_gradients_per_sample() -> None:
    module = MultiheadDilatedAttention(32, 4, *PATTERN, kv_heads=2, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    samples, cotangent = torch.randn(2, 3, 11, 32, dtype=torch.float64).unbind()

    def loss(parameters: dict[str, Tensor], sample: Tensor, cotangent: Tensor) -> Tensor:
        return (functional_call(module, parameters, (sample[None],))[0][0] * cotangent).sum()

    each = vmap(grad(loss), (None, 0, 0))(parameters, samples, cotangent)
    for index in range(len(samples)):
        out = module(samples[index][None])[0]
        expected = torch.autograd.grad(out, list(parameters.values()), cotangent[index][None])
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(each[name][index], gradient, rtol=0, atol=1e-12, msg=name)


# ------------------------------------------------------------------------------------------- not defined

torchs_own_warning = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "fused": lambda x: dilated_attention(x, x, x, *PATTERN),
    "composed": lambda x: dilated_attention(x, x, x, *PATTERN, fused=False),
    "attend": lambda x: attend(x, x, x).out,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_second_derivatives_raise(call: Callable[[Tensor], Tensor]) -> None:
    """Not a wrong number, and not a zero."""
    query = torch.randn(1, 7, 2, 8, requires_grad=True)
    out = call(query)
    (gradient,) = torch.autograd.grad(out, query, torch.randn_like(out), create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not defined"):
        torch.autograd.grad(gradient, query, torch.randn_like(gradient))


@torchs_own_warning
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_forward_mode_raises(call: Callable[[Tensor], Tensor]) -> None:
    """An operator without a rule for it would lose the tangent without a word."""
    query = torch.randn(1, 7, 2, 8)
    refusal = pytest.raises(NotImplementedError, match=r"query: forward-mode derivatives .* are not defined")
    with refusal:
        jvp(call, (query,), (query,))
    with refusal, forward_ad.dual_level():
        call(forward_ad.make_dual(query, query))


@torchs_own_warning
def test_hessian_raises() -> None:
    query = torch.randn(1, 7, 2, 8)
    with pytest.raises(NotImplementedError):
        hessian(lambda x: dilated_attention(x, x, x, *PATTERN).sum())(query)
