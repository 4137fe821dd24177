"""Prov-GigaPath's slide encoder on a CPU: our attention against torchscale's way with a CPU flash in place.

On a GPU, which torchscale's own code needs flash-attn for, ours alone: its layers over 100,000 tiles, in bfloat16.

    python bench_gigapath.py                              12 layers, 10,000 tiles, float32
    python bench_gigapath.py --tiles 1500 --layers 2 --repeats 1
    python bench_gigapath.py --device cuda                12 layers, 100,000 tiles, bfloat16, ours alone
    python bench_gigapath.py --torchscale PATH            a checkout of microsoft/torchscale runs its own code

The two encoders are one model (examples/gigapath.py) with the same weights; only what happens between the projections
of the attention differs. torchscale itself needs a GPU there; the peer does what it does on PyTorch's CPU flash
operator, either as dilated-core's benchmarks write it down or, given a checkout, by torchscale's own code. Before
anything is timed, one layer's attention is compared with the float64 oracle in rows drawn from the whole slide, and the
two embeddings with each other; a deviation above 1e-5 ends the run. Writes JSON and a Markdown page (default:
docs/benchmarks).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from repository import load
from torch import Tensor, nn

from dilated_core import DilatedPattern, dilated_attention, measure, reference

gigapath = load("examples/gigapath.py")
formula = load("packages/dilated-core/benchmarks/torchscale_formula.py")

PATTERN = DilatedPattern.gigapath()
CHECKED_ROWS = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
GOAL = 1.5
# On a GPU: tiles, and seconds for all layers.
CARD_TILES, CARD_GOAL = 100_000, 2.0

# (batch, seq, heads, head_dim) three times, to the same.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """dilated_attention as the encoder calls it."""
    return dilated_attention(query, key, value, PATTERN.segment_lengths, PATTERN.dilation_rates, semantics="torchscale")


def written_down(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torchscale's way by dilated-core's comparison formula."""
    return formula.torchscale_attention(query, key, value, PATTERN.segment_lengths, PATTERN.dilation_rates)


def from_checkout(path: Path, heads: int, head_dim: int) -> Attention:
    """torchscale's own DilatedAttention without its projections, on PyTorch's CPU flash operator."""

    def flash(q, k, v, dropout=0.0, bias=None, softmax_scale=None, is_causal=False):
        rows = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*rows, is_causal=is_causal)
        return out.transpose(1, 2), lse

    sys.path.insert(0, str(path))
    dilated = importlib.import_module("torchscale.component.dilated_attention").DilatedAttention
    sys.modules["torchscale.component.multihead_attention"].flash_attn_func = flash
    args = SimpleNamespace(
        segment_length=list(PATTERN.segment_lengths),
        dilated_ratio=list(PATTERN.dilation_rates),
        flash_attention=True,
        multiway=False,
        seq_parallel=False,
        xpos_rel_pos=False,
    )
    module = dilated(args, heads * head_dim, heads, self_attention=True)
    module.q_proj = module.k_proj = module.v_proj = module.out_proj = nn.Identity()

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        joined, _ = module(query.flatten(-2), key.flatten(-2), value.flatten(-2))
        return joined.unflatten(-1, (heads, head_dim))

    return attention


class Around(nn.Module):
    """A layer's projections and norm around another attention."""

    def __init__(self, layer: nn.Module, attention: Attention) -> None:
        super().__init__()
        self.layer, self.attention = layer, attention

    def heads(self, rows: Tensor) -> list[Tensor]:
        """Query, key and value, (batch, seq, heads, head_dim) each."""
        projections = (self.layer.q_proj, self.layer.k_proj, self.layer.v_proj)
        return [project(rows).unflatten(-1, (self.layer.num_heads, self.layer.head_dim)) for project in projections]

    def forward(self, rows: Tensor, key_padding_mask: None = None) -> tuple[Tensor, None]:
        """(batch, seq, embed_dim) to the same; nothing is padded here."""
        joined = self.attention(*self.heads(rows)).flatten(-2)
        return self.layer.out_proj(self.layer.inner_attn_ln(joined)), None


def encoder_with(model: nn.Module, attention: Attention) -> nn.Module:
    """The same weights in an encoder whose layers attend by ``attention``."""
    other = gigapath.GigaPathSlideEncoder(num_layers=len(model.encoder.layers)).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    for layer in other.encoder.layers:
        layer.self_attn = Around(layer.self_attn, attention)
    return other


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the expected's largest magnitude; above TOLERANCE it ends the run."""
    difference = ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    tolerance = TOLERANCE[found.dtype]
    if not difference <= tolerance:
        raise SystemExit(f"a deviation of {difference:.1e}, above {tolerance}; nothing is reported")
    return difference


def oracle_rows(qkv: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Positions drawn from the whole length, and what the float64 definition gives there."""
    seq = qkv[0].shape[1]
    rows = torch.randint(seq, (CHECKED_ROWS,), generator=torch.Generator().manual_seed(0)).unique()
    exact, _ = reference.dilated_attention(
        *(tensor.double() for tensor in qkv),
        PATTERN.segment_lengths,
        PATTERN.dilation_rates,
        rows=rows,
        semantics="torchscale",
    )
    return rows, exact


@torch.inference_mode()
def run(tiles: int, layers: int, repeats: int, checkout: Path | None) -> dict[str, object]:
    """Checks, then times."""
    torch.manual_seed(0)
    model = gigapath.GigaPathSlideEncoder(num_layers=layers).eval()
    attention = model.encoder.layers[0].self_attn
    peer = written_down if checkout is None else from_checkout(checkout, attention.num_heads, attention.head_dim)
    slide = gigapath.random_slide(tiles)
    first = Around(attention, ours)
    qkv = first.heads(model.encoder.layers[0].self_attn_layer_norm(model.tokens(*slide)))
    rows, exact = oracle_rows(qkv)
    deviations = {
        "ours, one attention, from the oracle": deviation(ours(*qkv)[:, rows], exact),
        "torchscale's way, one attention, from the oracle": deviation(peer(*qkv)[:, rows], exact),
    }
    other = encoder_with(model, peer)
    deviations["the two embeddings"] = deviation(model(*slide), other(*slide))
    candidates = {
        "encoder": {"ours": lambda: model(*slide), "torchscale": lambda: other(*slide)},
        "attention": {"ours": lambda: ours(*qkv), "torchscale": lambda: peer(*qkv)},
    }
    memory = {
        part: {name: measure.peak_memory(call) for name, call in calls.items()} for part, calls in candidates.items()
    }
    # The checks have warmed all up.
    times = {part: measure.interleaved(calls, repeats=repeats, warmup=0) for part, calls in candidates.items()}
    return {
        "tiles": tiles,
        "layers": layers,
        "threads": torch.get_num_threads(),
        "peer": "comparison formula" if checkout is None else "microsoft/torchscale's own code",
        "deviation": deviations,
        "seconds": {part: {name: timing.seconds for name, timing in of.items()} for part, of in times.items()},
        "median": {part: {name: timing.median for name, timing in of.items()} for part, of in times.items()},
        "spread": {part: {name: timing.spread for name, timing in of.items()} for part, of in times.items()},
        "speedup": {part: of["torchscale"].median / of["ours"].median for part, of in times.items()},
        "peak_bytes": memory,
        "goal": GOAL,
    }


@torch.inference_mode()
def run_on_card(tiles: int, layers: int, repeats: int, device: torch.device) -> dict[str, object]:
    """Checks, then times: the layers alone, as tile positions are computed on the CPU, once a slide."""
    torch.manual_seed(0)
    model = gigapath.GigaPathSlideEncoder(num_layers=layers).eval().to(device, torch.bfloat16)
    embeds, coords = gigapath.random_slide(tiles)
    tokens = model.tokens(embeds.to(device, torch.bfloat16), coords)
    first = model.encoder.layers[0]
    qkv = Around(first.self_attn, ours).heads(first.self_attn_layer_norm(tokens))
    rows, exact = oracle_rows([tensor.cpu() for tensor in qkv])
    found = deviation(ours(*qkv)[:, rows.to(device)].cpu(), exact)
    calls = {"layers": lambda: model.encoder(tokens), "attention of one": lambda: ours(*qkv)}
    memory = {name: measure.peak_memory(call, device) for name, call in calls.items()}
    times = measure.interleaved(calls, repeats=repeats)
    return {
        "tiles": tiles,
        "layers": layers,
        "deviation": {"ours, one attention, from the oracle": found},
        "seconds": {name: timing.seconds for name, timing in times.items()},
        "median": {name: timing.median for name, timing in times.items()},
        "spread": {name: timing.spread for name, timing in times.items()},
        "peak_bytes": memory,
        "goal_seconds": CARD_GOAL,
    }


def report_of_card(result: dict[str, object], environment: dict[str, object]) -> str:
    """The page that lands beside the JSON."""
    lines = ["| | s (spread) | memory, MiB |", "|---|---|---|"]
    for name, median in result["median"].items():
        memory = result["peak_bytes"][name] / 2**20
        lines.append(f"| {name} | {median:.4f} ({result['spread'][name]:.0%}) | {memory:,.0f} |")
    met = "met" if result["median"]["layers"] < CARD_GOAL else "not met"
    return (
        "# Prov-GigaPath's slide encoder on a GPU\n\n"
        f"{environment['date']}, torch {environment['torch']}, {', '.join(environment['cuda']) or 'no GPU'}.\n"
        f"{result['layers']} layers over {result['tiles']:,} random tiles, random weights, bfloat16, inference; "
        f"segments {list(PATTERN.segment_lengths)}, rates {list(PATTERN.dilation_rates)}, 16 heads of 48, "
        'semantics "torchscale".\n\n'
        f"The goal for all layers is {CARD_GOAL:g} s: **{met}**. Times are medians, the spread is the interquartile "
        "range over the median; memory is the peak beside weights and tokens. One attention was compared with the "
        f"float64 oracle first: {result['deviation']['ours, one attention, from the oracle']:.1e}.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def report(result: dict[str, object], environment: dict[str, object]) -> str:
    """The page that lands beside the JSON."""
    names = {"encoder": f"encoder, {result['layers']} layers", "attention": "attention of one layer alone"}
    lines = [
        "| | ours, s (spread) | torchscale's way, s (spread) | faster | memory, MiB: ours, torchscale's way |",
        "|---|---|---|---|---|",
    ]
    for part, name in names.items():
        median, spread, memory = (result[figure][part] for figure in ("median", "spread", "peak_bytes"))
        times = [f"{median[who]:.3f} ({spread[who]:.0%})" for who in ("ours", "torchscale")]
        mebibytes = ", ".join(f"{memory[who] / 2**20:,.0f}" for who in ("ours", "torchscale"))
        lines.append(f"| {name} | {times[0]} | {times[1]} | **{result['speedup'][part]:.2f}** | {mebibytes} |")
    checked = "\n".join(f"- {name}: {found:.1e}" for name, found in result["deviation"].items())
    return (
        "# Prov-GigaPath's slide encoder on a CPU\n\n"
        f"{environment['date']}, torch {environment['torch']}, {environment['processor']} "
        f"({environment['cpu_capability']}), {result['threads']} threads.\n"
        f"{result['tiles']:,} random tiles, random weights, float32, inference; segments "
        f"{list(PATTERN.segment_lengths)}, rates {list(PATTERN.dilation_rates)}, 16 heads of 48, "
        'semantics "torchscale".\n\n'
        f"The peer is torchscale's way of computing the same attention ({result['peer']}) on PyTorch's CPU flash "
        "operator, in the same encoder with the same weights. Times are medians of interleaved repeats, the spread is "
        "the interquartile range over the median; memory is the peak of tensors beside weights and tiles. "
        f"The goal for the whole encoder is {GOAL}.\n\n" + "\n".join(lines) + "\n\n"
        "Checked in the same run, largest difference over largest magnitude:\n\n" + checked + "\n"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="on cuda ours alone, there is nothing to compare")
    parser.add_argument("--tiles", type=int, help="(default: 10,000 on a CPU, 100,000 on a GPU)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--torchscale", type=Path, help="a checkout of github.com/microsoft/torchscale; needs einops")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    if device.type == "cpu":
        result = run(arguments.tiles or 10_000, arguments.layers, arguments.repeats, arguments.torchscale)
    else:
        result = run_on_card(arguments.tiles or CARD_TILES, arguments.layers, arguments.repeats, device)
    environment = measure.environment()
    page = report(result, environment) if device.type == "cpu" else report_of_card(result, environment)
    folder = measure.results_folder(arguments.output, device)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gigapath.json").write_text(json.dumps({"environment": environment, **result}, indent=1) + "\n")
    (folder / "gigapath.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
