"""Converted modules against torchscale's own code: PyPI's dense attention, and a checkout's dilated attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peers import TORCHSCALE_NEEDS, deviation, deviations, imported, only
from torch import nn

from dilated_core.interop.torchscale import TorchscaleDilatedAttention, convert

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp64", "fp32"])
Within = Callable[[str, float, float], None]
CAUSAL = pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])


def settings(lengths: list[int], rates: list[int], *, xpos: bool = False, multiway: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        segment_length=lengths,
        dilated_ratio=rates,
        xpos_rel_pos=xpos,
        xpos_scale_base=512,
        multiway=multiway,
        layernorm_eps=1e-5,
        flash_attention=True,
        seq_parallel=False,
    )


def build(kind: type[nn.Module], args: SimpleNamespace, embed_dim: int, heads: int, subln: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return kind(args, embed_dim, heads, self_attention=True, subln=subln)


# ------------------------------------------------------------------------------------------ PyPI's 0.3.0, dense


@pytest.fixture(scope="module")
def dense() -> Iterator[type[nn.Module]]:
    """0.3.0's MultiheadAttention under the other name: one segment of rate 1 is the same function."""
    pytest.importorskip("torchscale", reason="needs torchscale 0.3.0")
    with only(stand_ins=TORCHSCALE_NEEDS):
        attention = imported("torchscale.component.multihead_attention").MultiheadAttention
        yield type("DilatedAttention", (attention,), {})


@DTYPES
@CAUSAL
@pytest.mark.parametrize("xpos", [False, True], ids=["no-positions", "xpos"])
@pytest.mark.parametrize("subln", [False, True], ids=["no-subln", "subln"])
def test_one_segment_is_dense_attention(
    dense: type[nn.Module], subln: bool, xpos: bool, is_causal: bool, dtype: torch.dtype, within: Within
) -> None:
    args = settings([64], [1], xpos=xpos)
    peer, ours = (build(dense, args, 48, 6, subln).to(dtype) for _ in range(2))
    ours = convert(ours)
    x = torch.randn(2, 37, 48, dtype=dtype)
    mask = torch.full((37, 37), -math.inf, dtype=dtype).triu(1) if is_causal else None
    worst = deviations(ours, peer, x, {"is_causal": is_causal}, {"attn_mask": mask})
    # 0.3.0 takes its softmax in float32 whatever the dtype.
    for name, found in worst.items():
        what = "output" if name == "out" else "gradients"
        within(f"torchscale 0.3.0, dense attention, {what}", found, TOLERANCE[torch.float32])


@pytest.mark.parametrize("xpos", [False, True], ids=["no-positions", "xpos"])
def test_steps_are_torchscales_steps(dense: type[nn.Module], xpos: bool, within: Within) -> None:
    args = settings([64], [1], xpos=xpos)
    peer, ours = (build(dense, args, 48, 6) for _ in range(2))
    ours = convert(ours).eval()
    peer.eval()
    x = torch.randn(2, 23, 48)
    theirs: dict[str, object] = {}
    state: dict[str, object] = {}
    with torch.no_grad():
        for row in x.split(1, dim=1):
            expected, _ = peer(row, row, row, incremental_state=theirs)
            found, _ = ours(row, row, row, incremental_state=state, is_causal=True)
            within("torchscale 0.3.0, dense decoding", deviation(found, expected), TOLERANCE[torch.float32])


# ------------------------------------------------------------------------------------------ the main branch, dilated


@pytest.fixture(scope="module")
def dilated(torchscale_checkout: Path) -> Iterator[ModuleType]:
    with only(torchscale_checkout, stand_ins=TORCHSCALE_NEEDS):
        yield imported("torchscale.component.dilated_attention")


GRID = [
    # batch, seq, heads, segment lengths, rates
    (1, 64, 4, [16, 32, 64], [1, 2, 4]),
    (2, 61, 4, [16, 32, 64], [1, 2, 4]),
    (3, 61, 5, [16, 32, 64], [1, 2, 4]),
    (2, 97, 6, [12, 24, 96], [1, 3, 4]),
    (1, 50, 3, [10, 200], [2, 7]),
    (2, 7, 4, [16, 32], [1, 4]),
    (1, 1, 2, [16, 32], [1, 4]),
    (1, 1501, 16, [1024, 5792, 32768, 185363, 1048576], [1, 2, 4, 8, 16]),
]


@DTYPES
@CAUSAL
@pytest.mark.parametrize("xpos", [False, True], ids=["no-positions", "xpos"])
@pytest.mark.parametrize("case", GRID, ids=lambda case: "B{}-N{}-H{}-w{}-r{}".format(*case).replace(" ", ""))
def test_outputs_and_every_gradient_are_torchscales(
    dilated: ModuleType, case: tuple, xpos: bool, is_causal: bool, dtype: torch.dtype, within: Within
) -> None:
    batch, seq, heads, lengths, rates = case
    args = settings(lengths, rates, xpos=xpos)
    peer, ours = (build(dilated.DilatedAttention, args, heads * 8, heads).to(dtype) for _ in range(2))
    ours = convert(ours)
    x = torch.randn(batch, seq, heads * 8, dtype=dtype)
    worst = deviations(ours, peer, x, {"is_causal": is_causal}, {"is_causal": is_causal})
    for name, found in worst.items():
        what = "output" if name == "out" else "gradients"
        within(f"torchscale main, dilated attention, {what}, {str(dtype)[6:]}", found, TOLERANCE[dtype])


def test_multiway_projections_are_called_as_they_are(dilated: ModuleType, within: Within) -> None:
    args = settings([16, 32], [1, 2], multiway=True)
    peer, ours = (build(dilated.DilatedAttention, args, 32, 4).double() for _ in range(2))
    for module in (*peer.modules(), *ours.modules()):
        if hasattr(module, "split_position"):
            module.split_position = 11
    ours = convert(ours)
    x = torch.randn(1, 40, 32, dtype=torch.float64)
    for found in deviations(ours, peer, x, {}, {}).values():
        within("torchscale main, multiway, output and gradients, float64", found, TOLERANCE[torch.float64])


def test_where_torchscale_misplaces_segments_ours_refuses(dilated: ModuleType) -> None:
    ours = convert(build(dilated.DilatedAttention, settings([9], [2]), 32, 4))
    x = torch.randn(1, 40, 32)
    with pytest.raises(ValueError, match="torchscale"):
        ours(x, x, x)


# ------------------------------------------------------------------------------------------ whole models


@pytest.fixture(scope="module")
def longnet(torchscale_checkout: Path) -> Iterator[SimpleNamespace]:
    with only(torchscale_checkout, stand_ins=TORCHSCALE_NEEDS):
        models, configs = imported("torchscale.model.LongNet"), imported("torchscale.architecture.config")
        yield SimpleNamespace(models=models, configs=configs)


COMMON = {
    "segment_length": "[16, 32]",
    "dilated_ratio": "[1, 2]",
    "flash_attention": True,
    "dropout": 0.0,
    "vocab_size": 50,
}


def test_a_longnet_encoder_converts(longnet: SimpleNamespace, within: Within) -> None:
    torch.manual_seed(0)
    config = longnet.configs.EncoderConfig(
        encoder_embed_dim=32, encoder_attention_heads=4, encoder_ffn_embed_dim=64, encoder_layers=3, **COMMON
    )
    model = longnet.models.LongNetEncoder(config).double().eval()
    x = torch.randn(2, 45, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(src_tokens=None, token_embeddings=x)["encoder_out"]
        found = convert(model)(src_tokens=None, token_embeddings=x)["encoder_out"]
    assert sum(isinstance(module, TorchscaleDilatedAttention) for module in model.modules()) == 3
    within("torchscale main, LongNetEncoder, float64", deviation(found, expected), TOLERANCE[torch.float64])


def test_a_longnet_decoder_converts_and_decodes(longnet: SimpleNamespace, within: Within) -> None:
    torch.manual_seed(0)
    config = longnet.configs.DecoderConfig(
        decoder_embed_dim=32,
        decoder_attention_heads=4,
        decoder_ffn_embed_dim=64,
        decoder_layers=3,
        xpos_rel_pos=True,
        **COMMON,
    )
    model = longnet.models.LongNetDecoder(config, embed_tokens=nn.Embedding(50, 32)).double().eval()
    tokens = torch.randint(50, (2, 45))
    state: dict[object, object] = {"is_first_step": True}
    with torch.no_grad():
        expected, _ = model(tokens)
        found, _ = convert(model)(tokens)
        steps = [model(tokens[:, :20], incremental_state=state)[0]]
        state["is_first_step"] = False
        # torchscale's decoder takes all tokens so far and embeds the last.
        steps += [model(tokens[:, : seen + 1], incremental_state=state)[0] for seen in range(20, 45)]
    within("torchscale main, LongNetDecoder, float64", deviation(found, expected), TOLERANCE[torch.float64])
    stepped = deviation(torch.cat(steps, 1), expected)
    within("torchscale main, LongNetDecoder, our steps, float64", stepped, TOLERANCE[torch.float64])
