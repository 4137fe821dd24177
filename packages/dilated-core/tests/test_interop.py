"""interop.torchscale.convert: the same function of the same weights, and nothing else of the model touched.

The peer is written here from its description alone, one place at a time, so that it shares nothing with what it checks.
"""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from core_cases import deviation
from torch import Tensor, nn
from torch.nn import functional as F

import dilated_core
from dilated_core import DilatedKVCache
from dilated_core.interop.torchscale import CACHE_KEY, TorchscaleDilatedAttention, convert

LENGTHS, RATES = (8, 16), (1, 2)


def plain_dilated(q: Tensor, k: Tensor, v: Tensor, lengths, rates, is_causal: bool) -> Tensor:
    """torchscale's function for (batch, seq, heads, head_dim): padded places are zeros that are keys like any other."""
    batch, seq, heads, head_dim = q.shape
    longer = [F.pad(x, (0, 0, 0, 0, 0, max(*lengths, *rates))) for x in (q, k, v)]
    outs = torch.zeros(len(lengths), *q.shape, dtype=q.dtype)
    lses = torch.full((len(lengths), batch, seq, heads), -1e8, dtype=q.dtype)
    for branch, (w, r) in enumerate(zip(lengths, rates, strict=True)):
        w = min(w, seq)
        for start in range(0, seq, w):
            for head in range(heads):
                phase = head // math.ceil(heads / r)
                places = torch.arange(start + phase, start + math.ceil(w / r) * r, r)
                rows = [x[:, places, head] for x in longer]
                scores = rows[0] @ rows[1].transpose(1, 2) / math.sqrt(head_dim)
                if is_causal:
                    later = torch.ones(len(places), len(places), dtype=torch.bool).triu(1)
                    scores = scores.masked_fill(later, -math.inf)
                out, lse = torch.softmax(scores, -1) @ rows[2], torch.logsumexp(scores, -1)
                real = places[places < seq]
                outs[branch, :, real, head] = out[:, : len(real)]
                lses[branch, :, real, head] = lse[:, : len(real)]
    share = torch.softmax(lses, 0).detach()
    return (share[..., None] * outs).sum(0)


class XPOS(nn.Module):
    """torchscale's positions: scales counted from the middle, rotation from the start."""

    def __init__(self, head_dim: int, scale_base: int) -> None:
        super().__init__()
        self.scale_base = scale_base
        self.register_buffer("scale", (torch.arange(0, head_dim, 2) / head_dim + 0.4) / 1.4)

    def forward(self, x: Tensor, offset: int = 0, downscale: bool = False) -> Tensor:
        length, pairs = x.shape[1] + offset, len(self.scale)
        turned = torch.empty_like(x)
        for row in range(x.shape[1]):
            position = offset + row
            size = self.scale ** ((position - (length + 1) // 2) / self.scale_base)
            angle = (position * (1.0 / 10000 ** (torch.arange(pairs) / pairs))).double()
            unit = torch.polar((1 / size if downscale else size).double(), angle)
            pair = torch.view_as_complex(x[:, row].double().reshape(len(x), pairs, 2))
            turned[:, row] = torch.view_as_real(pair * unit).flatten(1)
        return turned


class DilatedAttention(nn.Module):
    """A module that looks like torchscale's from outside."""

    def __init__(
        self, embed_dim=24, num_heads=3, lengths=LENGTHS, rates=RATES, xpos=False, subln=True, dropout=0.0, **settings
    ) -> None:
        super().__init__()
        self.args = SimpleNamespace(segment_length=lengths, dilated_ratio=rates, **settings)
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(embed_dim, embed_dim) for _ in range(4))
        self.inner_attn_ln = nn.LayerNorm(embed_dim) if subln else None
        self.dropout_module = nn.Dropout(dropout)
        self.xpos = XPOS(self.head_dim, 64) if xpos else None

    def forward(self, query, key, value, incremental_state=None, key_padding_mask=None, is_causal=False, **ignored):
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, self.head_dim))
            for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        if self.xpos is not None:
            q, k = (
                self.xpos(x.transpose(1, 2).flatten(0, 1), downscale=down).unflatten(0, x.shape[0:3:2]).transpose(1, 2)
                for x, down in ((q, False), (k, True))
            )
        joined = plain_dilated(q, k, v, self.args.segment_length, self.args.dilated_ratio, is_causal).flatten(-2)
        return self.out_proj(joined if self.inner_attn_ln is None else self.inner_attn_ln(joined)), None


class Layer(nn.Module):
    """What holds it in a model."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention

    def forward(self, x: Tensor, **options) -> Tensor:
        return x + self.self_attn(x, x, x, **options)[0]


def pair(**settings) -> tuple[Layer, Layer]:
    """The same model twice, in float64: as it was, and converted."""
    kept, changed = Layer(DilatedAttention(**settings)).double(), Layer(DilatedAttention(**settings)).double()
    changed.load_state_dict(kept.state_dict())
    assert convert(changed) is changed
    return kept, changed


# ---------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"xpos": True},
        {"subln": False, "num_heads": 4},
        {"lengths": [5, 12, 100], "rates": [1, 3, 7], "num_heads": 4},
        {"embed_dim": 40, "num_heads": 5, "lengths": [4, 8], "rates": [2, 4]},
        {"lengths": [64], "rates": [1]},
    ],
    ids=["plain", "xpos", "no-subln", "ragged", "uncovered", "dense"],
)
@pytest.mark.parametrize("seq", [1, 23, 24])
def test_outputs_and_every_gradient_are_the_peers(seq: int, settings: dict, is_causal: bool) -> None:
    kept, changed = pair(**settings)
    x = torch.randn(2, seq, settings.get("embed_dim", 24), dtype=torch.float64)
    cotangent = torch.randn_like(x)
    results = []
    for model in (changed, kept):
        leaf = x.clone().requires_grad_()
        out = model(leaf, is_causal=is_causal)
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(out, [leaf, *named.values()], cotangent)
        results.append({"out": out, **dict(zip(["input", *named], gradients, strict=True))})
    ours, peers = results
    for name, expected in peers.items():
        # A k_proj.bias moves all scores of a row alike where no zero key is attended: its gradient is then rounding.
        assert deviation(ours[name], expected, floor=1e-2) < 1e-11, name


@pytest.mark.parametrize("chunks", [[1] * 29, [13, 1, 1, 1, 7, 6]], ids=["one-by-one", "prompt-and-chunks"])
@pytest.mark.parametrize("xpos", [False, True], ids=["no-positions", "xpos"])
def test_decoding_is_the_causal_call_row_by_row(xpos: bool, chunks: list[int]) -> None:
    # 29 rows: past the first segments of both branches, where torchscale itself stops.
    kept, changed = pair(xpos=xpos, num_heads=3)
    changed.eval()
    x = torch.randn(2, sum(chunks), 24, dtype=torch.float64)
    state: dict = {}
    with torch.no_grad():
        steps = [changed(rows, incremental_state=state, is_causal=True) for rows in x.split(chunks, dim=1)]
        expected = kept(x, is_causal=True)
    assert deviation(torch.cat(steps, 1), expected) < 1e-12
    assert set(state) == {CACHE_KEY}
    assert isinstance(state[CACHE_KEY], DilatedKVCache)


def test_a_first_step_starts_anew() -> None:
    _, changed = pair(xpos=True)
    changed.eval()
    state: dict = {}
    x = torch.randn(1, 11, 24, dtype=torch.float64)
    with torch.no_grad():
        first = changed(x, incremental_state=state, is_causal=True, is_first_step=True)
        again = changed(x, incremental_state=state, is_causal=True, is_first_step=True)
    assert torch.equal(first, again)


def test_a_padding_mask_is_honoured_and_an_empty_one_costs_nothing() -> None:
    _, changed = pair(lengths=[32], rates=[1])
    x = torch.randn(2, 10, 24, dtype=torch.float64)
    padding = torch.zeros(2, 10, dtype=torch.bool)
    assert torch.equal(changed(x, key_padding_mask=padding), changed(x))
    padding[1, 7:] = True
    masked = changed(x, key_padding_mask=padding)
    short = changed(x[1:, :7])
    assert deviation(masked[1:, :7], short) < 1e-12
    assert deviation(masked[:1], changed(x[:1])) < 1e-12


def test_dropout_acts_in_training_only() -> None:
    _, changed = pair(dropout=0.5)
    x = torch.randn(1, 20, 24, dtype=torch.float64)
    assert not torch.equal(changed(x), changed(x))
    changed.eval()
    assert torch.equal(changed(x), changed(x))


def test_a_module_without_a_dropout_takes_its_settings() -> None:
    model = Layer(DilatedAttention(attention_dropout=0.5))
    del model.self_attn.dropout_module
    convert(model)
    x = torch.randn(1, 20, 24)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_it_traces_as_one_graph_and_follows_autocast() -> None:
    model = convert(Layer(DilatedAttention())).eval()
    x = torch.randn(2, 20, 24)
    padding = torch.zeros(2, 20, dtype=torch.bool)
    with torch.no_grad():
        traced = torch.compile(model, fullgraph=True, backend="eager")(x, key_padding_mask=padding)
        assert deviation(traced, model(x)) < 1e-5
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half, _ = convert(DilatedAttention(xpos=True))(x, x, x)
    assert half.dtype == torch.bfloat16


def test_semantics_and_kernel_are_the_callers() -> None:
    model = Layer(DilatedAttention()).double()
    x = torch.randn(1, 23, 24, dtype=torch.float64)
    torchscale = convert(model)(x)
    paper = convert(model, semantics="paper", kernel="math")(x)
    assert (model.self_attn.semantics, model.self_attn.kernel) == ("paper", "math")
    assert deviation(paper, torchscale) > 1e-4


# ---------------------------------------------------------------------------------------------------- nothing else


def test_parameters_keys_mode_and_hooks_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(Layer(DilatedAttention(xpos=True)) for _ in range(3))}).bfloat16()
    model.eval()
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    calls = []
    attention = model["layers"][1].self_attn
    handle = attention.register_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    with caplog.at_level(logging.INFO, logger="dilated_core"):
        assert convert(model) is model
    assert caplog.messages == ["converted 3 DilatedAttention modules of ModuleDict"]
    after = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert list(after.items()) == list(before.items())
    assert not any(module.training for module in model.modules())
    x = torch.randn(1, 9, 24, dtype=torch.bfloat16)
    assert model["layers"][1](x).dtype == torch.bfloat16
    assert calls == [TorchscaleDilatedAttention]
    handle.remove()
    model["layers"][1](x)
    assert len(calls) == 1


def test_one_module_in_two_places_becomes_one_module_in_two_places() -> None:
    shared = DilatedAttention()
    model = nn.ModuleList([Layer(shared), Layer(shared)])
    convert(model)
    assert isinstance(model[0].self_attn, TorchscaleDilatedAttention)
    assert model[0].self_attn is model[1].self_attn


def test_a_root_is_returned_converted_and_converting_again_changes_nothing() -> None:
    attention = DilatedAttention().double()
    x = torch.randn(1, 12, 24, dtype=torch.float64)
    expected, _ = attention(x, x, x)
    converted = convert(attention)
    assert isinstance(converted, TorchscaleDilatedAttention)
    again = convert(converted)
    assert deviation(again(x, x, x)[0], expected) < 1e-12
    assert list(again.state_dict()) == list(DilatedAttention().state_dict())


def test_dense_attention_with_the_same_parts_is_left_alone() -> None:
    dense = type("MultiheadAttention", (DilatedAttention,), {})()
    model = nn.ModuleList([dense, DilatedAttention()])
    convert(model)
    assert model[0] is dense


class NumpyInteger:
    """An integer that is no int, as numpy's are not."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize(
    "lengths",
    ["[8, 16]", "8,16", "[np.int64(8), np.int64(16)]", " [ numpy.int32(8) , 16 ] ", (8, 16), [NumpyInteger(8), 16]],
    ids=["text", "bare", "numpy-2", "mixed", "tuple", "numpy"],
)
def test_lengths_may_be_written_in_many_ways(lengths: object) -> None:
    model = convert(Layer(DilatedAttention(lengths=lengths, rates="[1, 2]")))
    assert model.self_attn.pattern.segment_lengths == (8, 16)
    assert model.self_attn.pattern.dilation_rates == (1, 2)


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": "[8, __import__('os')]"}, r"self_attn: args\.segment_length: expected a list of whole numbers"),
        ({"lengths": "[]", "rates": "[]"}, r"self_attn: args\.segment_length"),
        ({"lengths": [8]}, r"self_attn: .* one rate a segment length"),
        ({"lengths": 8}, r"self_attn: args\.segment_length"),
        ({"rates": [1, 2.5]}, r"self_attn: args\.dilated_ratio\[1\]"),
        ({"rates": [1, 0]}, r"self_attn: args\.dilated_ratio\[1\]"),
        ({"rates": [1, 17]}, r"self_attn: dilation_rates\[1\]"),
        ({"seq_parallel": True}, r"self_attn: expected args\.seq_parallel"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused_by_path(settings: dict, message: str) -> None:
    model = Layer(DilatedAttention(**settings))
    with pytest.raises(ValueError, match=message):
        convert(model)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = nn.ModuleList([Layer(DilatedAttention()), Layer(DilatedAttention(lengths=[8]))])
    with pytest.raises(ValueError, match=r"1\.self_attn"):
        convert(model)
    assert type(model[0].self_attn) is DilatedAttention


def test_cross_attention_and_replaced_forwards_are_refused() -> None:
    cross = Layer(DilatedAttention())
    cross.self_attn.encoder_decoder_attention = True
    with pytest.raises(ValueError, match="expected self-attention"):
        convert(cross)
    wrapped = Layer(DilatedAttention())
    wrapped.self_attn.forward = wrapped.self_attn.forward
    with pytest.raises(ValueError, match="set on the instance"):
        convert(wrapped)


def test_the_bridges_come_with_the_package() -> None:
    assert dilated_core.interop.torchscale.convert is convert
    assert "interop" in dilated_core.__all__  # what is listed there is imported there, or ruff says so


def test_a_model_without_any_and_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found no .* in this Linear; looked for .*q_proj.*dilated_ratio"):
        convert(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got str"):
        convert("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="semantics"):
        convert(Layer(DilatedAttention()), semantics="longnet")
    with pytest.raises(ValueError, match="kernel"):
        convert(Layer(DilatedAttention()), kernel="fastest")


def test_calls_that_cannot_be_honoured_are_refused() -> None:
    attention = convert(DilatedAttention(xpos=True).double())
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match="attn_mask"):
        attention(x, x, x, attn_mask=torch.zeros(9, 9))
    with pytest.raises(ValueError, match="rel_pos"):
        attention(x, x, x, rel_pos=torch.zeros(9, 9))
    with pytest.raises(ValueError, match=r"key: expected .*self-attention"):
        attention(x, x[:, :5], x[:, :5])
    with pytest.raises(ValueError, match="key_padding_mask"):
        attention(x, x, x, key_padding_mask=torch.zeros(9, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="incremental_state: expected is_causal"):
        attention(x, x, x, incremental_state={})
    padding = torch.ones(2, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"incremental_state: expected is_causal.*a mask that hides keys"):
        attention(x, x, x, incremental_state={}, key_padding_mask=padding, is_causal=True)


def test_decoding_refuses_dropout_and_positions_that_overflow() -> None:
    _, changed = pair(dropout=0.1)
    x = torch.randn(1, 3, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected eval mode"):
        changed(x, incremental_state={}, is_causal=True)
    model = convert(Layer(DilatedAttention(xpos=True))).half()
    with pytest.raises(ValueError, match="too far for XPOS"):
        model(torch.zeros(1, 600, 24, dtype=torch.float16), incremental_state={}, is_causal=True)
