"""torch.compile and torch.export: one graph for all lengths, saved and loaded, equal to what runs uncompiled."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dilated_core import DilatedAttention, MultiheadDilatedAttention, attend

PATTERN = ([8, 16], [1, 3])
EMBED, HEADS = 40, 5
LENGTHS = (33, 57, 64, 101, 16, 130, 7, 48)


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> None:
    torch._dynamo.reset()
    counters.clear()


def mask(seq: int) -> Tensor:
    """(1, seq), True at every fifth position."""
    return torch.arange(seq).view(1, seq) % 5 == 0


def offsets(seq: int) -> Tensor:
    """One to five packed sequences, the first of them empty where there are several."""
    return torch.tensor([0, *range(0, 2 * (seq % 5), 2), seq])


# name -> (options of the module, extra arguments of a call of that length). Masks are True where both senses are hard:
# neither all real nor all padding.
Arguments = Callable[[int], dict[str, Tensor]]
VARIANTS: dict[str, tuple[dict[str, object], Arguments]] = {
    "plain": ({}, lambda seq: {}),
    "causal": ({"is_causal": True}, lambda seq: {}),
    "mask": ({}, lambda seq: {"key_padding_mask": mask(seq)}),
    "packed": ({}, lambda seq: {"cu_seqlens": offsets(seq)}),
    "grouped": ({"semantics": "grouped"}, lambda seq: {}),
    # 9 and 18 are multiples of 3, which torchscale needs; of the lengths some are multiples and some are not.
    "torchscale": (
        {"semantics": "torchscale", "segment_lengths": [9, 18]},
        lambda seq: {"key_padding_mask": mask(seq)},
    ),
}


def core(heads: int, **options: object) -> tuple[nn.Module, Callable[[int], list[Tensor]]]:
    """DilatedAttention, and its inputs of a length."""
    module = DilatedAttention(**{"segment_lengths": PATTERN[0], "dilation_rates": PATTERN[1]} | options)  # type: ignore[arg-type]
    shapes = [(HEADS, 8), (heads, 8), (heads, 8)]
    return module, lambda seq: [torch.randn(1, seq, *shape, requires_grad=True) for shape in shapes]


def multihead(heads: int, **options: object) -> tuple[nn.Module, Callable[[int], list[Tensor]]]:
    """MultiheadDilatedAttention, and its input of a length."""
    options = {"segment_lengths": PATTERN[0], "dilation_rates": PATTERN[1], "kv_heads": heads} | options
    module = MultiheadDilatedAttention(EMBED, HEADS, **options)  # type: ignore[arg-type]
    return module, lambda seq: [torch.randn(1, seq, EMBED, requires_grad=True)]


def compare(module: nn.Module, compiled: Callable[..., object], inputs: list[Tensor], extra: dict[str, Tensor]) -> None:
    """Output and every gradient, under a random cotangent and the same random numbers."""
    leaves = [*inputs, *module.parameters()]
    results = []
    for call in (module, compiled):
        torch.manual_seed(1)
        out = call(*inputs, **extra)
        out = out[0] if isinstance(out, tuple) else out
        assert isinstance(out, Tensor)
        cotangent = torch.linspace(-1, 1, out.numel()).view(out.shape)
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=2e-5)


# ------------------------------------------------------------------------------------------- compile

DROPPING = {core: {"attention_dropout": 0.3}, multihead: {"dropout": 0.3}}


@pytest.mark.parametrize("variant", [*VARIANTS, "dropout", "gqa"])
@pytest.mark.parametrize("make", [core, multihead])
def test_two_graphs_serve_every_length(make: Callable[..., tuple[nn.Module, Arguments]], variant: str) -> None:
    """One for the first length, one for a second and all others: torch.compile's own way to learn what is dynamic."""
    options, extra = VARIANTS.get(variant, ({}, lambda seq: {}))
    if variant == "dropout":
        options = DROPPING[make]
    if variant == "gqa" and make is core:
        options = {"enable_gqa": True}
    module, inputs = make(1 if variant == "gqa" else HEADS, **options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seq in LENGTHS[:2]:
        compare(module, compiled, inputs(seq), extra(seq))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seq in LENGTHS[2:]:
            compare(module, compiled, inputs(seq), extra(seq))
    assert counters["stats"]["unique_graphs"] == 2


def test_inductor_gives_the_same_gradients() -> None:
    # Without biases: each of their gradients is one more kernel of C++, which costs seconds.
    module, inputs = multihead(1, is_causal=True, bias=False)
    compare(module, torch.compile(module, fullgraph=True), inputs(33), {"key_padding_mask": mask(33)})


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_the_composition_compiles_too(dynamic: bool | None) -> None:
    """Whole, but a graph a length: its tiles are unrolled in it."""
    module, inputs = multihead(HEADS, fused=False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    compare(module, compiled, inputs(13), {"key_padding_mask": mask(13)})


def test_compiles_under_autocast() -> None:
    module = MultiheadDilatedAttention(EMBED, HEADS, *PATTERN)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    sequence = torch.randn(2, 33, EMBED)
    with torch.autocast("cpu", torch.bfloat16):
        eager, traced = module(sequence)[0], compiled(sequence)[0]
    assert eager.dtype == traced.dtype == torch.bfloat16
    torch.testing.assert_close(traced, eager, rtol=0, atol=0.02)


def test_dropout_is_drawn_anew_at_every_call() -> None:
    module, inputs = multihead(HEADS, dropout=0.5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    (sequence,) = inputs(33)
    assert not torch.equal(compiled(sequence)[0], compiled(sequence)[0])


def test_attend_compiles() -> None:
    query, key = torch.randn(1, 5, 2, 8), torch.randn(1, 9, 2, 8)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, key), attend(query, key, key))


# ------------------------------------------------------------------------------------------- export


def export(
    module: nn.Module, extra: dict[str, Tensor], dynamic: dict[str, dict[int, object]], strict: bool
) -> io.BytesIO:
    """The module at 33 tokens, exported for 2 to 4096 of them and saved."""
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(
        module,
        (torch.randn(1, 33, EMBED),),
        extra,
        dynamic_shapes={"query": {1: length}} | {name: dynamic.get(name, {1: length}) for name in extra},
        strict=strict,
    )
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    return saved


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.11, of what it loads
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_exports_with_dynamic_length(variant: str, strict: bool) -> None:
    options, extra = VARIANTS[variant]
    module, inputs = multihead(HEADS, **options)
    dynamic: dict[str, dict[int, object]] = {"cu_seqlens": {0: torch.export.Dim("offsets", min=2)}}
    loaded = torch.export.load(export(module, extra(33), dynamic, strict)).module()
    for seq in (2, 57, 64):
        (sequence,) = inputs(seq)
        torch.testing.assert_close(loaded(sequence, **extra(seq))[0], module(sequence, **extra(seq))[0])


LOAD = """
import sys, torch
import dilated_core  # registers the operator that the program calls; nothing else of it is needed
folder = sys.argv[1]
sequence, padding, expected = (torch.load(f"{folder}/{name}.pt") for name in ("sequence", "padding", "out"))
out, _ = torch.export.load(f"{folder}/program.pt").module()(sequence, key_padding_mask=padding)
torch.testing.assert_close(out, expected)
"""


def test_an_exported_program_runs_in_another_process(tmp_path: Path) -> None:
    module, inputs = multihead(HEADS)
    saved = export(module, {"key_padding_mask": mask(33)}, {}, strict=False)
    (tmp_path / "program.pt").write_bytes(saved.getvalue())
    (sequence,) = inputs(70)
    out = module(sequence, key_padding_mask=mask(70))[0]
    for name, tensor in (("sequence", sequence), ("padding", mask(70)), ("out", out)):
        torch.save(tensor.detach(), tmp_path / f"{name}.pt")
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
