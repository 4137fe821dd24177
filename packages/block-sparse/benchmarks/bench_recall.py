"""Recall of the true attention mass against density, on the activations of a LongNetLM that has just learned.

    python bench_recall.py                                   a minute of training, then about two of measuring
    python bench_recall.py --seconds 20 --tokens 2048        a quick look
    python bench_recall.py --output results --no-plot        elsewhere, without the picture

A small causal LongNetLM learns the bytes of Python's standard library, with one segment over the whole context, so that
its attention is dense: what a block-sparse layer would replace. Queries, keys and values of every layer are then taken
on held-out text, and every selector chooses blocks by them, row by row the same number. What they keep is weighed
exactly: recall is exp(lse_kept - lse_all) of each row, error is |out - dense out| / |dense out|.

Checked first, in the same run: recall on a short piece against a dense float64 softmax; and each recall against the sum
of the kept blocks' true masses, which is computed another way. Writes JSON, a Markdown page and a picture (default:
docs/benchmarks/block_sparse_recall.*); needs dilated-factory, and matplotlib for the picture. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dilated_block_sparse.adaptive import (
    BlockScorer,
    Recall,
    attend_layout,
    attention_recall,
    block_masses,
    block_scores,
    distillation_loss,
    select_blocks,
)
from dilated_block_sparse.layout import BlockLayout
from dilated_core import AuxRequest, attend, measure
from dilated_factory import LongNetLM
from dilated_factory.demo.corpus import load_corpus
from dilated_factory.demo.settings import FULL
from dilated_factory.demo.training import BYTE_VALUES, Precision, TrainingRecord, Windows, evaluate, train

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the blocks that a row sees
MASSES = (0.5, 0.7, 0.9, 0.97)  # predicted by a selector
SHOWN = 1 / 4
LENGTH_WARM_UP = ((0.3, 512), (0.55, 1024), (0.75, 2048))
DISTILL_WINDOWS, DISTILL_STEPS, DISTILL_RATE = 4, 60, 2e-2
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-4}
LOW = 0.05  # the quantile of rows that is told beside the mean

# Name -> how it is told. All keep each row's own block; all but "random" the one before and the first, too.
SELECTORS = {
    "oracle": "the truly heaviest blocks, by dense attention: what a selector can reach at most",
    "scorer": "BlockScorer, distilled on training text, one a layer",
    "moments": "block_scores, the default",
    "mean": 'block_scores(pool="mean")',
    "bound": 'block_scores(pool="bound")',
    "first": 'block_scores(query_pool="first"): looks at nothing after a row',
    "bigbird": "the rest at random",
    "local": "the nearest blocks",
    "random": "without the first block and the one before; all but the own at random",
}
BY_MASS = ("oracle", "scorer", "moments", "mean")  # those that predict masses, asked for a mass too
COLOURS = {
    "oracle": "#222222",
    "scorer": "#0072b2",
    "moments": "#009e73",
    "mean": "#d55e00",
    "bound": "#cc79a7",
    "first": "#e69f00",
    "bigbird": "#56b4e9",
    "local": "#888888",
    "random": "#bbbbbb",
}


@dataclass(frozen=True)
class Activations:
    """What one layer's attention was given on one window: (1, tokens, heads, head_dim) each."""

    query: Tensor
    key: Tensor
    value: Tensor


# ------------------------------------------------------------------------------------------------ the model


def learn(tokens: int, seconds: float, seed: int, device: torch.device) -> tuple[LongNetLM, Windows, Windows, dict]:
    """A trained model, its training and held-out text, and what is to be told of it."""
    corpus = load_corpus()
    settings = replace(
        FULL,
        context=tokens,
        segment_lengths=(tokens,),
        dilation_rates=(1,),
        length_warm_up=tuple((share, length) for share, length in LENGTH_WARM_UP if length < tokens),
        held_out_checks=1,
    )
    texts = [Windows(text, tokens, device) for text in (corpus.training, corpus.held_out)]
    torch.manual_seed(seed)
    sizes = settings.embed_dim, settings.num_heads, settings.num_layers
    model = LongNetLM(BYTE_VALUES, *sizes, settings.segment_lengths, settings.dilation_rates, device=device)
    record, precision = TrainingRecord(), Precision("float32", {}, device.type)
    train(model, *texts, settings, precision, seconds, seed, record, lambda _: None)
    model.eval()
    told = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": settings.num_layers,
        "heads": settings.num_heads,
        "head_dim": settings.embed_dim // settings.num_heads,
        "seconds": seconds,
        "steps": len(record.steps),
        "bytes_read": record.steps[-1].bytes_read,
        "held_out_bits_per_byte": evaluate(model, texts[1], precision, windows=8),
    }
    return model, *texts, told


@torch.no_grad()
def activations(model: LongNetLM, tokens: Tensor) -> list[Activations]:
    """What the attention of every layer is given on these tokens."""
    taken: list[Activations] = []

    def take(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        taken.append(Activations(*(tensor.contiguous() for tensor in arguments[:3])))

    hooks = [layer.self_attn.attention.register_forward_pre_hook(take) for layer in model.layers]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    if len(taken) != len(model.layers):
        raise SystemExit(f"activations: expected those of {len(model.layers)} layers, got {len(taken)}")
    return taken


def spread(text: Windows, count: int) -> Iterable[Tensor]:
    """``count`` windows of a text, spread evenly."""
    available = len(text.bytes) // text.context
    for index in range(count):
        yield text.at(available * index // count * text.context)[0]


def distil(windows: list[Activations], block_size: int) -> tuple[BlockScorer, dict[str, float]]:
    """A scorer of one layer that has learned the true masses of these windows."""
    heads, head_dim = windows[0].query.shape[2:]
    scorer = BlockScorer(heads, head_dim, device=windows[0].query.device)
    optimizer = torch.optim.Adam(scorer.parameters(), lr=DISTILL_RATE)
    masses = [block_masses(each.query, each.key, block_size=block_size, is_causal=True) for each in windows]
    losses = []
    for step in range(DISTILL_STEPS):
        each = windows[step % len(windows)]
        scores = scorer(each.query, each.key, block_size=block_size, is_causal=True)
        loss = distillation_loss(scores, masses[step % len(windows)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = losses[: len(windows)], losses[-len(windows) :]
    return scorer.eval(), {"kl_first": math.fsum(first) / len(first), "kl_last": math.fsum(last) / len(last)}


# ------------------------------------------------------------------------------------------------ the check


def check(each: Activations, block_size: int, tokens: int = 512) -> float:
    """Recall on the first tokens against a dense softmax, in float64; what is wrong ends the run."""
    query, key = each.query[:, :tokens].double(), each.key[:, :tokens].double()
    kept = select_blocks(
        block_scores(query, key, block_size=block_size, is_causal=True),
        query.shape[1],
        query.shape[1],
        block_size=block_size,
        keep=0.5,
        is_causal=True,
    )
    layout = BlockLayout.from_blocks(kept[0].cpu(), query.shape[1], query.shape[1], block_size=block_size)
    recall = attention_recall(query, key, layout, is_causal=True)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(query.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    expected = (weights * layout.to_dense().to(query.device)).sum(-1)
    deviation = float((recall.rows - expected).abs().max())
    if not deviation <= TOLERANCE[torch.float64]:
        raise SystemExit(f"recall, deviation from the dense softmax: {deviation}; nothing is reported")
    return deviation


# ------------------------------------------------------------------------------------------------ recall


def tables(each: Activations, masses: Tensor, scorer: BlockScorer, block_size: int, seed: int) -> dict[str, Tensor]:
    """The scores of every selector, (1, heads, blocks, blocks)."""
    options = {"block_size": block_size, "is_causal": True}
    pooled = {pool: block_scores(each.query, each.key, pool=pool, **options) for pool in ("mean", "moments", "bound")}
    place = torch.arange(masses.shape[-1], device=masses.device)
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(masses.shape, generator=generator).to(masses)
    with torch.no_grad():
        learned = scorer(each.query, each.key, **options)
    return {
        "oracle": masses.log(),
        "scorer": learned,
        **pooled,
        "first": block_scores(each.query, each.key, query_pool="first", **options),
        "bigbird": chance,
        "local": (place - place[:, None]).to(masses).expand_as(masses),
        "random": chance,
    }


def select(name: str, scores: Tensor, tokens: int, block_size: int, budget: dict[str, float]) -> Tensor:
    """The blocks that a selector keeps, bool (1, heads, blocks, blocks)."""
    sink, window = (0, 0) if name == "random" else (1, 1)
    return select_blocks(
        scores, tokens, tokens, block_size=block_size, sink=sink, window=window, is_causal=True, **budget
    )


@torch.no_grad()
def weigh(each: Activations, scorer: BlockScorer, block_size: int, seed: int) -> list[dict[str, object]]:
    """Recall and error of every selector at every budget, of one layer on one window."""
    tokens = each.query.shape[1]
    masses = block_masses(each.query, each.key, block_size=block_size, is_causal=True)
    dense = attend(each.query, each.key, each.value, is_causal=True)
    seen = masses.shape[1] * sum(range(1, masses.shape[2] + 1))
    rows: list[dict[str, object]] = []
    for name, scores in tables(each, masses, scorer, block_size, seed).items():
        budgets = [{"keep": share} for share in SHARES]
        budgets += [{"mass": mass} for mass in MASSES if name in BY_MASS]
        for budget in budgets:
            kept = select(name, scores, tokens, block_size, budget)
            layout = BlockLayout.from_blocks(kept[0].cpu(), tokens, tokens, block_size=block_size)
            asked = AuxRequest(lse=True)
            out, aux = attend_layout(each.query, each.key, each.value, layout, is_causal=True, return_aux=asked)
            lse = aux.lse
            recall = Recall((lse - dense.lse).exp())
            difference = float((recall.mean - weighted(masses, kept, tokens, block_size)).abs().max())
            if not difference <= TOLERANCE[torch.float32]:
                raise SystemExit(
                    f"{name}, {budget}: recall differs from the masses by {difference}; nothing is reported"
                )
            rows.append(
                {
                    "selector": name,
                    **budget,
                    "density": float(kept.sum()) / seen,
                    "recall": recall.mean.tolist(),
                    "recall_low": recall.quantile(LOW).tolist(),
                    "recall_minimum": recall.minimum.tolist(),
                    "error": float((out - dense.out).norm() / dense.out.norm()),
                    "difference_from_masses": difference,
                }
            )
    return rows


def weighted(masses: Tensor, kept: Tensor, tokens: int, block_size: int) -> Tensor:
    """Mean recall a head, (heads,), by the masses of kept blocks: another way to the same number."""
    lengths = torch.full((masses.shape[2],), float(block_size), device=masses.device)
    lengths[-1] = tokens - block_size * (len(lengths) - 1)
    return ((masses * kept).sum(-1) * lengths).sum((0, 2)) / tokens


def gathered(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows of several windows joined: means, and the least of minima, for each layer, selector and budget."""
    groups: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for row in rows:
        groups.setdefault((row["layer"], row["selector"], row.get("keep"), row.get("mass")), []).append(row)
    joined = []
    for same in groups.values():
        per_head = {
            name: [combine(values) for values in zip(*(row[name] for row in same), strict=True)]
            for name, combine in (("recall", mean), ("recall_low", mean), ("recall_minimum", min))
        }
        numbers = {name: mean(row[name] for row in same) for name in ("density", "error")}
        worst = {"difference_from_masses": max(row["difference_from_masses"] for row in same)}
        joined.append({**same[0], **per_head, **numbers, **worst})
    return joined


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    values = list(values)
    return math.fsum(values) / len(values)


# ------------------------------------------------------------------------------------------------ the page


def overall(rows: list[dict[str, object]], selector: str, budget: str, value: float) -> dict[str, float]:
    """One selector at one budget, over all layers and heads."""
    same = [row for row in rows if row["selector"] == selector and row.get(budget) == value]
    return {
        "density": mean(row["density"] for row in same),
        "recall": mean(share for row in same for share in row["recall"]),
        "worst_head": min(share for row in same for share in row["recall"]),
        "low": mean(share for row in same for share in row["recall_low"]),
        "error": mean(row["error"] for row in same),
    }


def table(rows: list[dict[str, object]], selectors: Iterable[str], budget: str, values: Iterable[float]) -> str:
    """Markdown: selectors against budgets, over all layers and heads."""
    values = list(values)
    lines = [
        "| selector | " + " | ".join(f"{budget} {value:g}" for value in values) + " |",
        "|---" * (len(values) + 1) + "|",
    ]
    for name in selectors:
        cells = []
        for value in values:
            each = overall(rows, name, budget, value)
            shares = f"**{each['recall']:.3f}** ({each['worst_head']:.3f}); {each['error']:.2f}"
            cells.append(f"{each['density']:.1%}: {shares}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def layer_table(rows: list[dict[str, object]], layers: int) -> str:
    """Markdown: selectors against layers, at one share."""
    lines = [
        "| selector | " + " | ".join(f"layer {layer}" for layer in range(layers)) + " |",
        "|---" * (layers + 1) + "|",
    ]
    for name in SELECTORS:
        same = [row for row in rows if row["selector"] == name and row.get("keep") == SHOWN]
        cells = [", ".join(f"{share:.3f}" for share in row["recall"]) + f"; {row['error']:.2f}" for row in same]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(results: dict[str, object], environment: dict[str, object], picture: str | None) -> str:
    """The page that lands beside the JSON."""
    model, sizes, rows = results["model"], results["sizes"], results["rows"]
    worst = max(row["difference_from_masses"] for row in rows)
    selectors = "".join(f"- *{name}*: {told}.\n" for name, told in SELECTORS.items())
    text = (
        "# Recall of the true attention mass against density\n\n"
        f"{environment['date']}, {environment['processor'] or environment['machine']}, torch {environment['torch']}. "
        f"A causal LongNetLM of {model['parameters']:,} parameters ({model['layers']} layers, {model['heads']} heads "
        f"of {model['head_dim']}) has learned Python's standard library for {model['seconds']:g} s "
        f"({model['bytes_read'] / 1e6:.1f} MB read, {model['held_out_bits_per_byte']:.2f} bits a byte held out). "
        f"Its queries, keys and values are taken on {sizes['windows']} held-out windows of {sizes['tokens']:,} bytes; "
        f"blocks of {sizes['block_size']}, causal. A model that has learned for so short a time attends mostly nearby "
        "and broadly: read the order of the selectors, and measure your own model with `attention_recall`.\n\n"
        "Checked in this run: recall against a dense float64 softmax (largest deviation "
        f"{results['deviation_from_dense_softmax']:.1e}), and each recall against the sum of the kept blocks' true "
        f"masses (largest difference {worst:.1e}, float32).\n\n"
        "Each entry: density (kept blocks over blocks a causal row sees): **mean recall** over rows, heads, layers and "
        "windows (mean of the worst head); relative error of the output.\n\n"
        f"## The same number of blocks a row\n\n{table(rows, SELECTORS, 'keep', SHARES)}\n\n{selectors}"
        "\nThe first block, a row's own and the one before it are always kept (sink=1, window=1), and count. Density "
        "is above the share where these are more than it, and where a share of few blocks is rounded up.\n\n"
        "## As many blocks as a predicted mass asks for\n\n"
        f"{table(rows, BY_MASS, 'mass', MASSES)}\n\n"
        "What a selector predicts is not what is there: compare mean recall with the mass asked for.\n\n"
        f"## Layer by layer\n\nRecall of each head; relative error of the layer's output, at a share of {SHOWN:g}.\n\n"
        f"{layer_table(rows, model['layers'])}\n"
    )
    if picture is not None:
        text += f"\n![Recall and output error against density, layer by layer]({picture})\n"
    return text + (
        "\nRaw data: [block_sparse_recall.json](block_sparse_recall.json). Command, from the repository's root: "
        f"`python packages/block-sparse/benchmarks/{environment['command']}`.\n"
    )


def draw(results: dict[str, object], path: Path) -> None:
    """Recall and output error against density, a column a layer; a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    model, sizes, rows = results["model"], results["sizes"], results["rows"]
    layers = model["layers"]
    figure = Figure(figsize=(3.6 * layers, 7.2), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, layers, sharex=True, sharey="row", squeeze=False)
    for layer in range(layers):
        recall, error = panels[:, layer]
        for place, name in enumerate(SELECTORS):
            own = [row for row in rows if row["layer"] == layer and row["selector"] == name and "keep" in row]
            density = [row["density"] for row in own]
            style = {
                "color": COLOURS[name],
                "marker": "" if name == "oracle" else "o",
                "markersize": 4,
                # The oracle is a broad band behind the others, for the best of them lie on it.
                "linewidth": 6 if name == "oracle" else 1.6,
                "alpha": 0.3 if name == "oracle" else 1.0,
                "zorder": 2 if name == "oracle" else 4 - place / 10,
                "linestyle": "--" if name in ("bigbird", "local", "random") else "-",
                "label": name,
            }
            recall.plot(density, [mean(row["recall"]) for row in own], **style)
            error.plot(density, [row["error"] for row in own], **style)
        recall.set_title(f"layer {layer}", loc="left", fontsize=10)
        recall.yaxis.set_major_formatter(PercentFormatter(1.0))
        error.set_xlabel("density: kept blocks of those a row sees", fontsize=9)
        for axes in (recall, error):
            axes.set_xscale("log", base=2)
            axes.set_xticks(SHARES, [f"1/{round(1 / share)}" for share in SHARES])
            axes.minorticks_off()
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
    panels[0, 0].set_ylim(None, 1.02)
    panels[0, 0].set_ylabel("recall of the true attention mass, mean")
    panels[1, 0].set_ylim(0, None)
    panels[1, 0].set_ylabel("relative error of the layer's output")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower left", ncols=9
    )
    figure.suptitle(
        f"Which blocks to keep: LongNetLM, {model['seconds']:g} s of training, {sizes['tokens']:,} held-out bytes, "
        f"blocks of {sizes['block_size']}, causal",
        x=0.01,
        ha="left",
        fontsize=12,
        color="#222222",
    )
    figure.savefig(path, format="png")


def redraw(record: Path, folder: Path) -> list[Path]:
    """Draw the picture of a recorded run again; nothing is learned or measured."""
    path = folder / "block_sparse_recall.png"
    draw(json.loads(record.read_text()), path)
    return [path]


def main() -> None:
    """Learn, check, weigh, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of training")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=2, help="held-out windows that are weighed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:index] (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    parser.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw the picture too")
    arguments = parser.parse_args()
    if arguments.tokens < 2 * arguments.block_size or arguments.block_size < 1 or arguments.windows < 1:
        parser.error("--tokens, --block-size, --windows: expected at least two blocks of tokens, and one window")
    device = torch.device(arguments.device)
    arguments.output = measure.results_folder(arguments.output, device)
    block_size, windows = arguments.block_size, arguments.windows

    model, training, held_out, told = learn(arguments.tokens, arguments.seconds, arguments.seed, device)
    print(
        f"learned {told['bytes_read']:,} bytes: {told['held_out_bits_per_byte']:.2f} bits a byte held out", flush=True
    )
    learned = [activations(model, tokens) for tokens in spread(training, DISTILL_WINDOWS)]
    scorers, losses = zip(*(distil(list(layer), block_size) for layer in zip(*learned, strict=True)), strict=True)
    for layer, loss in enumerate(losses):
        print(f"scorer of layer {layer}: KL {loss['kl_first']:.3f} -> {loss['kl_last']:.3f} nats", flush=True)

    rows: list[dict[str, object]] = []
    deviations = []
    for number, tokens in enumerate(spread(held_out, windows)):
        for layer, each in enumerate(activations(model, tokens)):
            deviations.append(check(each, block_size))
            seed = arguments.seed + 1000 * number + layer
            rows += [{"layer": layer, **row} for row in weigh(each, scorers[layer], block_size, seed)]
    results: dict[str, object] = {
        "model": told,
        "sizes": {"tokens": arguments.tokens, "block_size": block_size, "windows": windows, "seed": arguments.seed},
        "distillation": list(losses),
        "deviation_from_dense_softmax": max(deviations),
        "rows": gathered(rows),
    }
    print(f"recall against a dense float64 softmax: largest deviation {max(deviations):.1e}\n")
    print(table(results["rows"], SELECTORS, "keep", SHARES))
    print(table(results["rows"], BY_MASS, "mass", MASSES), flush=True)

    environment = measure.environment()
    arguments.output.mkdir(parents=True, exist_ok=True)
    picture = arguments.output / "block_sparse_recall.png" if arguments.plot else None
    if picture is not None:
        draw(results, picture)
    written = {"environment": environment, **results}
    (arguments.output / "block_sparse_recall.json").write_text(json.dumps(written, indent=1) + "\n")
    (arguments.output / "block_sparse_recall.md").write_text(page(results, environment, picture and picture.name))


if __name__ == "__main__":
    main()
