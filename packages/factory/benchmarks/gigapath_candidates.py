"""Who attends in bench_gigapath, in which precision and over what: the kernels, torchscale's way, and the definition.

All put the same encoder (examples/gigapath.py) around their attention, with the same weights, over the same slides: so
a difference in time or in results is one of the attention alone. The definition is never timed: it is what is right.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from repository import load
from torch import Tensor, nn

from dilated_core import DilatedPattern, dilated_attention, kernels, reference

gigapath = load("examples/gigapath.py")
formula = load("packages/dilated-core/benchmarks/torchscale_formula.py")

PATTERN = DilatedPattern.gigapath()
SEMANTICS = "torchscale"
HEADS, HEAD_DIM = 16, 48
AUTO, PEER = "auto", "torchscale"

# (batch, seq, heads, head_dim) three times, to the same.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Row = dict[str, Any]


class Precision(NamedTuple):
    """Attributes: weights: their dtype, and the tiles'; autocast: that of matrix products, None for no cast."""

    weights: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def of_attention(self) -> torch.dtype:
        """The dtype of query, key and value."""
        return self.autocast or self.weights

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """What a user calls the model in."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)


# Prov-GigaPath's own inference is autocast to float16.
PRECISIONS = {
    "bf16": Precision(torch.bfloat16),
    "fp16-autocast": Precision(torch.float32, torch.float16),
    "bf16-autocast": Precision(torch.float32, torch.bfloat16),
    "fp32": Precision(torch.float32),
}


def by_kernel(name: str) -> Attention:
    """dilated_attention as the encoder calls it."""
    return partial(
        dilated_attention,
        segment_lengths=PATTERN.segment_lengths,
        dilation_rates=PATTERN.dilation_rates,
        semantics=SEMANTICS,
        kernel=name,
    )


def by_definition(query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None = None) -> Tensor:
    """The reference in float64, all scores at once."""
    out, _ = reference.dilated_attention(
        *(tensor.double() for tensor in (query, key, value)),
        PATTERN.segment_lengths,
        PATTERN.dilation_rates,
        semantics=SEMANTICS,
        rows=rows,
    )
    return out


def written_down(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torchscale's way by dilated-core's comparison formula."""
    return formula.torchscale_attention(query, key, value, PATTERN.segment_lengths, PATTERN.dilation_rates)


def from_checkout(path: Path, device: torch.device) -> Attention:
    """torchscale's own DilatedAttention without its projections; on a CPU on PyTorch's flash operator."""

    def flash(q, k, v, dropout=0.0, bias=None, softmax_scale=None, is_causal=False):
        rows = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*rows, is_causal=is_causal)
        return out.transpose(1, 2), lse

    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    dilated = importlib.import_module("torchscale.component.dilated_attention").DilatedAttention
    if device.type == "cpu":
        sys.modules["torchscale.component.multihead_attention"].flash_attn_func = flash
    args = SimpleNamespace(
        segment_length=list(PATTERN.segment_lengths),
        dilated_ratio=list(PATTERN.dilation_rates),
        flash_attention=True,
        multiway=False,
        seq_parallel=False,
        xpos_rel_pos=False,
    )
    module = dilated(args, HEADS * HEAD_DIM, HEADS, self_attention=True)
    module.q_proj = module.k_proj = module.v_proj = module.out_proj = nn.Identity()

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        joined, _ = module(query.flatten(-2), key.flatten(-2), value.flatten(-2))
        return joined.unflatten(-1, (HEADS, HEAD_DIM))

    return attention


def peer_words(device: torch.device, dtype: torch.dtype, checkout: Path | None) -> tuple[bool, str]:
    """Whether torchscale's way can run, and what it is then, or why not."""
    if device.type == "cpu":
        code = "dilated-core's comparison formula" if checkout is None else "microsoft/torchscale's own code"
        return True, f"{code}, on PyTorch's CPU flash operator"
    if checkout is None:
        return False, "its own code, which needs flash_attn on a card, is asked for by --torchscale"
    if dtype == torch.float32:
        return False, "flash_attn, which it needs on a card, takes float16 and bfloat16"
    if find_spec("flash_attn") is None:
        return False, "flash_attn, which it needs on a card, is not installed here"
    return True, "microsoft/torchscale's own code, on flash_attn"


def chosen_kernels(device: torch.device, dtype: torch.dtype, asked: list[str] | None) -> tuple[list[str], Row]:
    """Kernels to measure, "auto" first, and of the others why not.

    Args:
        asked: names; None for "auto", and on a card all others that run but "math", which forms the scores.
    """
    auto = kernels.choose(AUTO, device, dtype, HEAD_DIM).name
    found, left_out = [AUTO] if asked is None or AUTO in asked else [], {}
    for name, refusal in kernels.survey(device, dtype, HEAD_DIM).items():
        if refusal is not None:
            left_out[name] = refusal
        elif name == auto and AUTO in found:
            continue  # it is measured as that
        elif asked is not None and name not in asked:
            left_out[name] = "it was not asked for (--kernels)"
        elif asked is None and (device.type == "cpu" or name == "math"):
            left_out[name] = "by default, on a CPU auto alone, and on a card all that do not form the scores"
        else:
            found.append(name)
    return found, left_out


def attention_of(name: str, device: torch.device, checkout: Path | None) -> Attention:
    """A candidate's attention: of a kernel, or torchscale's, by its own code where a checkout of it is given."""
    if name != PEER:
        return by_kernel(name)
    return written_down if checkout is None else from_checkout(checkout, device)


class Around(nn.Module):
    """A layer's projections and norm around another attention."""

    def __init__(self, layer: nn.Module, attention: Attention) -> None:
        super().__init__()
        self.layer, self.attention = layer, attention

    def heads(self, rows: Tensor) -> list[Tensor]:
        """Query, key and value, (batch, seq, heads, head_dim) each."""
        projections = (self.layer.q_proj, self.layer.k_proj, self.layer.v_proj)
        return [project(rows).unflatten(-1, (HEADS, HEAD_DIM)) for project in projections]

    def forward(self, rows: Tensor, key_padding_mask: None = None) -> tuple[Tensor, None]:
        """(batch, seq, embed_dim) to the same; nothing is padded here."""
        joined = self.attention(*self.heads(rows)).flatten(-2)
        return self.layer.out_proj(self.layer.inner_attn_ln(joined)), None


def encoder_of(weights: Mapping[str, Tensor], kernel: str = AUTO, attention: Attention | None = None) -> nn.Module:
    """The encoder with these very weights, attending by a kernel, or by another attention altogether."""
    layers = len({name.split(".")[2] for name in weights if name.startswith("encoder.layers.")})
    with torch.device("meta"):
        encoder = gigapath.GigaPathSlideEncoder(num_layers=layers, semantics=SEMANTICS, kernel=kernel).eval()
    encoder.load_state_dict(weights, assign=True)
    if attention is not None:
        for layer in encoder.encoder.layers:
            layer.self_attn = Around(layer.self_attn, attention)
    return encoder


def slide_of(tiles: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings (1, tiles, TILE_DIM) and coordinates (1, tiles, 2) of a square: random, for a size always the same."""
    side = math.isqrt(tiles - 1) + 1
    place = torch.arange(tiles, device=device)
    coords = torch.stack((place % side, place // side), dim=-1) * gigapath.TILE_PIXELS
    generator = torch.Generator(device).manual_seed(tiles)
    return torch.randn(1, tiles, gigapath.TILE_DIM, generator=generator, device=device, dtype=dtype), coords[None]


def states(model: nn.Module, slide: tuple[Tensor, Tensor]) -> Tensor:
    """All rows behind the last norm, (seq, embed_dim): the first is the slide's embedding."""
    return model.norm(model.encoder(model.tokens(*slide)))[0]


def states_by_definition(weights: Mapping[str, Tensor], slide: tuple[Tensor, Tensor]) -> Tensor:
    """The same in float64, of these weights, attending by the definition."""
    exact = encoder_of({name: tensor.double() for name, tensor in weights.items()}, attention=by_definition)
    return states(exact, (slide[0].double(), slide[1]))
