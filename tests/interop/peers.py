"""How the peers are imported and run here: their own code, on a CPU, without what only their other parts need."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

PEERS = ("dilated_attention_pytorch", "fairscale", "gigapath", "huggingface_hub", "timm", "torchscale", "xformers")


@contextlib.contextmanager
def only(*folders: Path, stand_ins: Mapping[str, Mapping[str, object]]) -> Iterator[None]:
    """Inside: peers are imported afresh, from `folders` first, and `stand_ins` are modules of these contents."""
    path = list(sys.path)
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] in PEERS}
    for name in kept:
        del sys.modules[name]
    sys.path[:0] = [str(folder) for folder in folders]
    try:
        for name, contents in stand_ins.items():
            parent, _, last = name.rpartition(".")
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(contents)
            if parent:
                setattr(sys.modules.setdefault(parent, ModuleType(parent)), last, sys.modules[name])
        yield
    finally:
        sys.path[:] = path
        for name in [name for name in sys.modules if name.split(".")[0] in PEERS]:
            del sys.modules[name]
        sys.modules.update(kept)


def same(value: object, *_: object, **__: object) -> object:
    """Stands for wrappers and decorators that are not wanted here."""
    return value


# What torchscale imports on its way to an encoder: a wrapper for activation checkpointing and one for sharding, both
# off by default, and stochastic depth, off in evaluation.
TORCHSCALE_NEEDS: dict[str, dict[str, object]] = {
    "fairscale": {},
    "fairscale.nn": {"checkpoint_wrapper": same, "wrap": same},
    "timm": {"create_model": None},
    "timm.models": {},
    "timm.models.layers": {"drop_path": same},
    "timm.models.registry": {"register_model": same},
    "huggingface_hub": {},
}


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    bias: None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """flash-attn's as torchscale calls it: (batch, seq, heads, head_dim) to out, and lse (batch, heads, seq)."""
    assert dropout == 0.0
    assert bias is None
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or 1.0 / math.sqrt(q.shape[-1]))
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1).detach()


def imported(name: str) -> ModuleType:
    """A peer's module; torchscale's attention then calls `flash` where it would call the GPU's."""
    module = importlib.import_module(name)
    attention = sys.modules.get("torchscale.component.multihead_attention")
    if attention is not None:
        attention.flash_attn_func = flash  # type: ignore[attr-defined]
    return module


def deviations(
    ours: nn.Module, peer: nn.Module, inputs: Tensor, ours_options: dict[str, object], peer_options: dict[str, object]
) -> dict[str, float]:
    """Of the output and of every gradient under one random cotangent, relative to the peer's largest magnitude."""
    cotangent = torch.randn_like(inputs)
    results = []
    for module, options in ((ours, ours_options), (peer, peer_options)):
        leaf = inputs.clone().requires_grad_()
        out, _ = module(leaf, leaf, leaf, **options)
        named = dict(module.named_parameters())
        gradients = torch.autograd.grad(out, [leaf, *named.values()], cotangent)
        results.append({"out": out.detach(), "input": gradients[0], **dict(zip(named, gradients[1:], strict=True))})
    found, expected = results
    assert set(found) == set(expected)
    # A gradient may vanish (a key's bias moves all scores of a row alike, a row with one key has no choice): how small
    # is nothing is then told by the values' gradient, which does not.
    floor = 0.1 * max(expected[name].abs().max().item() for name in expected if name.startswith("v_proj"))
    return {name: deviation(found[name], expected[name], 0.0 if name == "out" else floor) for name in expected}


def deviation(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the expected's largest magnitude, or over `floor` where that is larger."""
    return ((found - expected).abs().max() / max(expected.abs().max().item(), floor)).item()
