"""How far apart the three semantics are on the same weights: one attention layer, and a 12-layer slide encoder.

    python bench_semantics.py                             3,000 tiles, 12 layers, float32
    python bench_semantics.py --tiles 1100 --layers 2

The semantics are three functions of the same weights. This measures the price of taking one for another: the relative
difference |a - b| / |b| (Euclidean norms) of the first layer's attention output and of the slide's embedding, with
random weights. Each is first compared with the float64 oracle of its own semantics. Writes JSON and a Markdown page
(default: docs/benchmarks).
"""

from __future__ import annotations

import argparse
import json
from itertools import permutations
from pathlib import Path

import torch
from repository import load
from torch import Tensor

from dilated_core import DilatedPattern, dilated_attention, measure, reference

gigapath = load("examples/gigapath.py")

PATTERN = DilatedPattern.gigapath()
SEMANTICS = ("paper", "torchscale", "grouped")
CHECKED_ROWS = 16
TOLERANCE = 1e-5


def check(qkv: list[Tensor], semantics: str) -> float:
    """Largest deviation from the float64 oracle in rows drawn from the whole length; too large raises."""
    branches = (PATTERN.segment_lengths, PATTERN.dilation_rates)
    rows = torch.randint(qkv[0].shape[1], (CHECKED_ROWS,), generator=torch.Generator().manual_seed(0)).unique()
    found = dilated_attention(*qkv, *branches, semantics=semantics)[:, rows].double()
    exact, _ = reference.dilated_attention(
        *(tensor.double() for tensor in qkv), *branches, rows=rows, semantics=semantics
    )
    deviation = ((found - exact).abs().max() / exact.abs().max()).item()
    if not deviation <= TOLERANCE:
        raise SystemExit(f"{semantics} deviates from the oracle by {deviation:.1e}; nothing is reported")
    return deviation


@torch.inference_mode()
def run(tiles: int, layers: int) -> dict[str, object]:
    """Outputs of every semantics, and the differences of every ordered pair."""
    torch.manual_seed(0)
    slide = gigapath.random_slide(tiles)
    weights = gigapath.GigaPathSlideEncoder(num_layers=layers).state_dict()
    deviations: dict[str, float] = {}
    outputs: dict[str, dict[str, Tensor]] = {"attention": {}, "embedding": {}}
    for semantics in SEMANTICS:
        model = gigapath.GigaPathSlideEncoder(num_layers=layers, semantics=semantics).eval()
        model.load_state_dict(weights)
        layer = model.encoder.layers[0]
        rows = layer.self_attn_layer_norm(model.tokens(*slide))
        projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        heads = (layer.self_attn.num_heads, layer.self_attn.head_dim)
        deviations[semantics] = check([project(rows).unflatten(-1, heads) for project in projections], semantics)
        outputs["attention"][semantics] = layer.self_attn(rows)[0]
        outputs["embedding"][semantics] = model(*slide)
    differences = {
        part: {f"{a}, {b}": ((of[a] - of[b]).norm() / of[b].norm()).item() for a, b in permutations(SEMANTICS, 2)}
        for part, of in outputs.items()
    }
    return {"tiles": tiles, "layers": layers, "deviation_from_oracle": deviations, "relative_difference": differences}


def report(result: dict[str, object], environment: dict[str, object]) -> str:
    """The page that lands beside the JSON."""
    lines = ["| computed | instead of | one attention layer's output | slide embedding |", "|---|---|---|---|"]
    attention, embedding = (result["relative_difference"][part] for part in ("attention", "embedding"))
    lines += [f"| {pair.replace(', ', ' | ')} | {attention[pair]:.1%} | {embedding[pair]:.1%} |" for pair in attention]
    deviations = ", ".join(f"{name} {found:.1e}" for name, found in result["deviation_from_oracle"].items())
    return (
        "# How far apart the semantics are\n\n"
        f"{environment['date']}, torch {environment['torch']}, {environment['processor']}.\n"
        f"Prov-GigaPath's slide encoder with {result['layers']} layers and random weights, {result['tiles']:,} random "
        f"tiles, float32, segments {list(PATTERN.segment_lengths)}, rates {list(PATTERN.dilation_rates)}.\n\n"
        "The same weights under another semantics are another function. Relative difference, in Euclidean norms, of "
        "the first layer's attention output (after its norm and projection) and of the slide's embedding:\n\n"
        + "\n".join(lines)
        + f"\n\nLargest deviation of each from its own float64 oracle, in the same run: {deviations}.\n"
        f"\nRaw data: [semantics.json](semantics.json). Command, from the repository's root: "
        f"`python packages/factory/benchmarks/{environment['command']}`.\n"
    )


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu; elsewhere there is nothing to compare")
    parser.add_argument("--tiles", type=int, default=3000)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        print(f"a comparison on the CPU; nothing to do on {arguments.device}")
        return
    result = run(arguments.tiles, arguments.layers)
    environment = measure.environment()
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "semantics.json").write_text(
        json.dumps({"environment": environment, **result}, indent=1) + "\n"
    )
    (arguments.output / "semantics.md").write_text(report(result, environment))
    print(report(result, environment))


if __name__ == "__main__":
    main()
