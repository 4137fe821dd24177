"""The modules: equal to the function and to nn.MultiheadAttention where both are defined; names, init, options."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dilated_core import DilatedAttention, MultiheadDilatedAttention, dilated_attention

PATTERN = ([8, 16], [1, 3])


def test_module_is_the_function() -> None:
    query, key, value = torch.randn(3, 2, 29, 4, 8).unbind()
    for options in ({}, {"is_causal": True}, {"fused": False}, {"kernel": "math"}):
        module = DilatedAttention(*PATTERN, softmax_scale=0.2, **options)  # type: ignore[arg-type]
        expected = dilated_attention(query, key, value, *PATTERN, scale=0.2, **options)  # type: ignore[call-overload]
        assert torch.equal(module(query, key, value), expected)
    causal = dilated_attention(query, key, value, *PATTERN, is_causal=True)
    assert torch.equal(DilatedAttention(*PATTERN)(query, key, value, is_causal=True), causal)


@pytest.mark.parametrize("is_causal", [False, True])
def test_multihead_equals_torch_where_both_are_defined(is_causal: bool) -> None:
    """One segment, rate 1, no layer norm: nn.MultiheadAttention with the same weights, in float64."""
    ours = MultiheadDilatedAttention(24, 3, [64], [1], layer_norm=False, dtype=torch.float64)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for projection in (ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj):
            nn.init.normal_(projection.bias)
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = torch.randn(2, 37, 24, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(37, dtype=torch.float64) if is_causal else None
    expected, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(ours(x, is_causal=is_causal)[0], expected, rtol=0, atol=1e-12)


def test_state_dict_names_are_torchscales() -> None:
    names = set(MultiheadDilatedAttention(16, 4, *PATTERN).state_dict())
    parts = ("q_proj", "k_proj", "v_proj", "out_proj", "inner_attn_ln")
    assert names == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}


def test_gamma_scales_value_and_output_only() -> None:
    def spread(gamma: float) -> dict[str, float]:
        torch.manual_seed(0)
        module = MultiheadDilatedAttention(64, 4, *PATTERN, gamma_init=gamma)
        return {name: getattr(module, name).weight.std().item() for name in ("q_proj", "k_proj", "v_proj", "out_proj")}

    one, three = spread(1.0), spread(3.0)
    ratio = {name: three[name] / one[name] for name in one}
    assert ratio == pytest.approx({"q_proj": 1, "k_proj": 1, "v_proj": 3, "out_proj": 3})


def test_kv_heads_and_rotary() -> None:
    class Double(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * query, key

    module = MultiheadDilatedAttention(32, 4, *PATTERN, kv_heads=2, rotary=Double())
    assert module.k_proj.weight.shape == (16, 32)
    x = torch.randn(1, 20, 32)
    same = copy.deepcopy(module)
    same.rotary = None
    with torch.no_grad():
        same.q_proj.weight.mul_(2)
    torch.testing.assert_close(module(x)[0], same(x)[0])


def test_bfloat16_and_autocast() -> None:
    module = MultiheadDilatedAttention(32, 4, *PATTERN)
    x = torch.randn(2, 40, 32)
    exact = module(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(x)[0]
    low = module.bfloat16()(x.bfloat16())[0]
    assert mixed.dtype == low.dtype == torch.bfloat16
    for out in (mixed, low):
        assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_repr_says_what_it_is() -> None:
    assert "segment_lengths=[8, 16], dilation_rates=[1, 3]" in repr(MultiheadDilatedAttention(16, 4, *PATTERN))


# ------------------------------------------------------------------------------------------- living in PyTorch

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "state_dict": lambda module: loaded(module.state_dict()),
}


def loaded(state: dict[str, Tensor]) -> nn.Module:
    """A module of other weights, until it loads the state."""
    module = MultiheadDilatedAttention(32, 4, *PATTERN, dropout=0.2, kv_heads=2)
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_computes_the_same(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    module = MultiheadDilatedAttention(32, 4, *PATTERN, dropout=0.2, kv_heads=2).eval()
    twin = duplicate(module).eval()
    sequence = torch.randn(2, 20, 32)
    assert torch.equal(twin(sequence)[0], module(sequence)[0])
    assert repr(twin) == repr(module)
    assert {*twin.parameters()}.isdisjoint(module.parameters())


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_changes_no_gradient(dropout: float, use_reentrant: bool, fused: bool) -> None:
    """With dropout too: its seed comes from the random state that checkpoint restores."""
    module = MultiheadDilatedAttention(32, 4, *PATTERN, dropout=dropout, fused=fused)
    sequence, cotangent = torch.randn(2, 20, 32, requires_grad=True), torch.randn(2, 20, 32)
    padding = torch.arange(20).expand(2, 20) > 16
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(3)
        arguments = (sequence, None, None, padding)
        out, _ = checkpoint(module, *arguments, use_reentrant=use_reentrant) if recompute else module(*arguments)
        out.backward(cotangent)
        leaves = [sequence, *module.parameters()]
        gradients.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
@pytest.mark.parametrize("where", ["fake", "meta"])
def test_a_forward_and_backward_without_data(where: str, fused: bool) -> None:
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        module = MultiheadDilatedAttention(32, 4, *PATTERN, dropout=0.1, fused=fused)
        sequence = torch.empty(2, 20, 32, requires_grad=True)
        out, _ = module(sequence, key_padding_mask=torch.empty(2, 20, dtype=torch.bool))
        out.backward(torch.empty_like(out))
    assert sequence.grad is not None
    assert out.shape == sequence.grad.shape == sequence.shape


def test_weights_may_come_after_the_module() -> None:
    """Deferred initialisation: built on meta, given memory, initialised, as if built at once."""
    expected = MultiheadDilatedAttention(32, 4, *PATTERN)
    module = MultiheadDilatedAttention(32, 4, *PATTERN, device="meta").to_empty(device="cpu")
    for each in (expected, module):
        torch.manual_seed(4)
        each.reset_parameters()
    for name, parameter in expected.named_parameters():
        assert torch.equal(module.get_parameter(name), parameter), name
