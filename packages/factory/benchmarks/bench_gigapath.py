"""Prov-GigaPath's slide encoder: its layers over 10,000 to a million tiles, by every kernel that runs here.

    python bench_gigapath.py                              a CPU: 10,000 tiles in float32, beside torchscale's way
    python bench_gigapath.py --tiles 1500 --layers 2 --repeats 1
    python bench_gigapath.py --device cuda                a card: 10k, 100k and 1M tokens, half precision and float32
    python bench_gigapath.py --device cuda --tiles 100000 --precisions bf16 --kernels auto triton
    python bench_gigapath.py --torchscale PATH            a checkout of microsoft/torchscale runs its own code

All candidates are one model (examples/gigapath.py) with the same weights; only what happens between the projections of
the attention differs. On a CPU torchscale's way runs on PyTorch's flash operator, as dilated-core's benchmarks write it
down or, given a checkout, by torchscale's own code; on a card that code needs flash_attn, and is left out without it.

Before a candidate is timed, its encoder is compared with a float64 one that attends by the definition, over a small
slide, and its attention of one layer with the definition in rows drawn from the whole slide. Writes gigapath.json and
gigapath.md after every row (default: docs/benchmarks, on a card a folder below it). The same command goes on with the
rows that are there, if they are of the same code, versions and settings; --fresh measures all again. The exit status is
1 where a candidate deviates or one of ours raised.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gigapath_candidates import (
    AUTO,
    HEAD_DIM,
    HEADS,
    PATTERN,
    PEER,
    PRECISIONS,
    Around,
    Row,
    attention_of,
    by_definition,
    chosen_kernels,
    encoder_of,
    formula,
    gigapath,
    peer_words,
    slide_of,
    states,
    states_by_definition,
)
from gigapath_page import GOAL_LAYERS, HEADER, failures, goals, lines, page
from repository import ROOT, load
from torch import Tensor

from dilated_core import kernels, measure
from dilated_factory import shared_resources

cases = load("packages/dilated-core/benchmarks/card_cases.py")
measuring = load("packages/dilated-core/benchmarks/card_measuring.py")

# Of the slide that is compared with the definition row by row: it forms all scores.
SMALL_TILES = {"cpu": 400, "cuda": 2000}
# Rows of one layer's attention that are compared, over the whole slide.
CHECKED_ROWS = 8
# Largest deviation of all rows behind the last layer: roundings add up. Another semantics deviates by 0.7.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# A timed run takes at least so many seconds: shorter calls are repeated in a row.
SHORTEST = 0.01

Calls = dict[str, Callable[[], Tensor]]


def drawn_rows(seq: int, device: torch.device) -> Tensor:
    """The slide's token, the last tile, and others from the whole length."""
    between = torch.randint(seq, (CHECKED_ROWS - 2,), generator=torch.Generator().manual_seed(seq))
    return torch.cat([torch.tensor([0, seq - 1]), between]).unique().to(device)


def weigh(call: Callable[[], object], device: torch.device) -> int:
    """Peak of its memory beside weights and inputs, with what the factory's pools reserve for it."""
    pools = shared_resources()
    pools.trim()
    peak = measure.peak_memory(call, device)
    # PyTorch counts what pools draw from PyTorch itself.
    return peak + (0 if pools.backend(device).name == "torch" else _reserved(device))


def _reserved(device: torch.device) -> int:
    numbers = shared_resources().statistics().items()
    return sum(one.reserved_bytes for (place, _), one in numbers if torch.device(place).type == device.type)


class Bench:
    """What one row measures.

    Args:
        weights: of the encoder, float32, on the CPU.
        tiles: of the slide.
        name: of PRECISIONS.
        settings: the command's.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], tiles: int, name: str, device: torch.device, settings: argparse.Namespace
    ) -> None:
        self.tiles, self.name, self.device, self.settings = tiles, name, device, settings
        self.precision = PRECISIONS[name]
        self.attends = self.precision.of_attention
        self.weights = {key: tensor.to(device, self.precision.weights) for key, tensor in weights.items()}

    def within(self, call: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """The call, in the precision's context each time, as a user makes it."""

        def run() -> Any:
            with self.precision.context(self.device):
                return call(*arguments)

        return run

    def measure(self) -> Row:
        """Candidates checked, weighed and timed in turns. JSON-ready.

        Raises:
            card_measuring.DeviceLostError: an error that no later work on the device survives.
        """
        names, left_out = chosen_kernels(self.device, self.attends, self.settings.kernels)
        runs, words = peer_words(self.device, self.attends, self.settings.torchscale)
        if runs:
            names.append(PEER)
        else:
            left_out[PEER] = words
        row: Row = {
            "tiles": self.tiles,
            "precision": self.name,
            "layers": self.settings.layers,
            "auto": kernels.choose(AUTO, self.device, self.attends, HEAD_DIM).name,
            "peer": words if runs else None,
            "left_out": left_out,
            "attention_flops": PATTERN.flops(self.tiles + 1, HEADS, HEAD_DIM),
        }
        right = measuring.attempt(self.device, self._prepare)
        if "why" in right:
            return {**row, "candidates": dict.fromkeys(names, right)}
        results: Row = {}
        calls: dict[str, Calls] = {}
        for name in names:
            results[name] = measuring.attempt(self.device, partial(self._look_at, name, right, calls))
        for part in ("layers", "slide", "attention"):
            own = {name: parts[part] for name, parts in calls.items() if part in parts and "why" not in results[name]}
            timings = measuring.attempt(self.device, partial(self._times, own))
            for name in own:
                results[name].setdefault(part, {}).update(timings if "why" in timings else timings[name])
        return {**row, "candidates": results}

    def _prepare(self) -> Row:
        """What the candidates get, and what they are compared with."""
        slide = slide_of(self.tiles, self.device, self.precision.weights)
        small = slide_of(min(self.tiles, SMALL_TILES[self.device.type]), self.device, self.precision.weights)
        model = encoder_of(self.weights)
        tokens = self.within(model.tokens, *slide)()
        layer = model.encoder.layers[0]
        around = Around(layer.self_attn, by_definition)
        qkv = self.within(lambda: around.heads(layer.self_attn_layer_norm(tokens)))()
        rows = drawn_rows(tokens.shape[1], self.device)
        return {
            "slide": slide,
            "small": small,
            "tokens": tokens,
            "qkv": qkv,
            "rows": rows,
            "attention": by_definition(*qkv, rows=rows)[0].flatten(0, 1),
            "states": states_by_definition(self.weights, small),
        }

    def _look_at(self, name: str, right: Row, calls: dict[str, Calls]) -> Row:
        """Deviations and memory of a candidate, whose calls are added to ``calls``; "why" where it deviates.

        Args:
            right: of ``_prepare``; the first right candidate adds what its layers give over the whole slide.
        """
        attention = attention_of(name, self.device, self.settings.torchscale)
        model = encoder_of(self.weights, attention=attention) if name == PEER else encoder_of(self.weights, name)
        own: Calls = {
            "layers": self.within(model.encoder, right["tokens"]),
            "attention": self.within(attention, *right["qkv"]),
        }
        if name in (AUTO, PEER):  # what comes before the layers is the same for all
            own["slide"] = self.within(model, *right["slide"])
        rows = right["rows"]
        hidden = own["layers"]()[0, rows].double()
        attended = own["attention"]()[0, rows].flatten(0, 1)
        tolerance = TOLERANCE[self.attends]
        checks = {
            "attention": (attended, right["attention"], True, cases.TOLERANCE[self.attends]),
            "encoder": (self.within(states, model, right["small"])(), right["states"], False, tolerance),
            # Both may deviate from what nobody can afford to compute.
            "whole slide": (hidden, right.get("hidden", hidden), False, 2 * tolerance),
        }
        result: Row = {"deviation": {}}
        for check, (found, exact, by_row, allowed) in checks.items():
            one = cases.deviation(found, exact, by_row=by_row)
            result["deviation"][check] = one if math.isfinite(one) else None
            if not one <= allowed:
                return {**result, "why": f"{check}: it deviates by {one:.1e}, allowed are {allowed:.0e}"}
        right.setdefault("hidden", hidden)
        calls[name] = own
        return {**result, "layers": {"peak_bytes": weigh(own["layers"], self.device)}}

    def _times(self, calls: Calls) -> Row:
        on_card = self.device.type == "cuda"
        timings = measure.interleaved(
            calls,
            repeats=self.settings.repeats,
            warmup=1 if on_card else 0,  # on a CPU the checks have warmed all up
            enough=self.settings.enough if on_card else math.inf,
            shortest=SHORTEST if on_card else 0.0,
        )
        return {
            name: {"seconds": one.seconds, "median": one.median, "spread": one.spread} for name, one in timings.items()
        }


# ------------------------------------------------------------------------------------------------ the run


# Tiles, by device: with the slide's token the last is a million tokens, and the grid of positions holds no more.
TILES = {"cpu": [10_000], "cuda": [10_000, 100_000, 999_999]}
MOST_TILES = gigapath.GRID_SIDE**2
BY_DEFAULT = {"cpu": ["fp32"], "cuda": ["bf16", "fp16-autocast", "fp32"]}
REPEATS = {"cpu": 3, "cuda": 7}
# Beyond so many tiles only the first precision is measured on a card: others take minutes.
ALL_UP_TO = 100_000
# Of the environment: figures taken with another of these are of another run.
SAME = ("torch", "cuda", "cuda_runtime", "cudnn", "processor", "threads")


def settings_of(arguments: argparse.Namespace, device: torch.device) -> Row:
    """What all rows of a run share. JSON-ready."""
    sources = sorted(ROOT.glob("packages/*/src/**/*.py"))
    sources += sorted(Path(__file__).parent.glob("*gigapath*.py"))  # this file and what it is split into
    sources += [Path(str(module.__file__)) for module in (gigapath, formula, cases, measuring)]
    return {
        "device_type": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "layers": arguments.layers,
        "kernels": arguments.kernels,
        "torchscale": None if arguments.torchscale is None else "a checkout",
        "code": hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16],
    }


def begin(path: Path, arguments: argparse.Namespace, device: torch.device) -> Row:
    """Results with no row, or those of an earlier run that this one goes on with."""
    environment, settings = measure.environment(), settings_of(arguments, device)
    if path.exists() and not arguments.fresh:
        earlier: Row = json.loads(path.read_text())
        same = earlier.get("settings") == settings and all(
            earlier["environment"].get(name) == environment[name] for name in SAME
        )
        print(f"what is in {path} is {'kept' if same else 'of another run, and measured again'}")
        if same:
            return earlier | {"left_out": []}
    return {"environment": environment, "settings": settings, "left_out": [], "rows": []}


def write(folder: Path, results: Row) -> None:
    """After every row, so that a run cut short keeps what it measured."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gigapath.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (folder / "gigapath.md").write_text(page(results))


@torch.inference_mode()
def run(arguments: argparse.Namespace, device: torch.device, folder: Path) -> Row:
    """Measure what is not there yet, short slides first: a run that is cut short has all of them."""
    results = begin(folder / "gigapath.json", arguments, device)
    rows = results["rows"]
    there = {(row["tiles"], row["precision"]) for row in rows}
    torch.manual_seed(0)
    weights = gigapath.GigaPathSlideEncoder(num_layers=arguments.layers).state_dict()
    print(HEADER)
    for tiles in sorted(set(arguments.tiles)):
        for name in arguments.precisions:
            if (tiles, name) in there:
                continue
            if device.type == "cuda" and tiles > arguments.all_up_to and name != arguments.precisions[0]:
                results["left_out"].append(f"{tiles:,} tiles, {name}: only the first precision (--all-up-to)")
                continue
            rows.append(Bench(weights, tiles, name, device, arguments).measure())
            print("\n".join(lines(rows[-1])), flush=True)
            rows.sort(key=lambda one: (one["tiles"], list(PRECISIONS).index(one["precision"])))
            write(folder, results)
    write(folder, results)
    return results


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:index]")
    parser.add_argument("--tiles", type=int, nargs="+", help="(default: 10,000; on a card also 100,000 and 999,999)")
    parser.add_argument("--precisions", choices=PRECISIONS, nargs="+", help="(default: fp32; on a card three)")
    parser.add_argument(
        "--kernels",
        choices=[AUTO, *(kernel.name for kernel in kernels.table())],
        nargs="+",
        help="(default: auto; on a card all others that run, too, without math)",
    )
    parser.add_argument("--layers", type=int, default=GOAL_LAYERS)
    parser.add_argument("--repeats", type=int, help="(default: 3; on a card 7)")
    parser.add_argument(
        "--enough", type=float, default=2.0, help="seconds of timed runs after which a card's are enough"
    )
    parser.add_argument(
        "--all-up-to",
        type=int,
        default=ALL_UP_TO,
        metavar="TILES",
        help="on a card: beyond it the first precision alone",
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch (default: %(default)s)"
    )
    parser.add_argument("--torchscale", type=Path, help="a checkout of github.com/microsoft/torchscale; needs einops")
    parser.add_argument("--fresh", action="store_true", help="measure all rows again")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type not in TILES:
        parser.error(f"--device: expected cpu or cuda[:index], got {device}")
    arguments.tiles = arguments.tiles or TILES[device.type]
    arguments.precisions = arguments.precisions or BY_DEFAULT[device.type]
    arguments.repeats = arguments.repeats or REPEATS[device.type]
    if not 1 <= min(arguments.tiles) <= max(arguments.tiles) <= MOST_TILES:
        parser.error(f"--tiles: expected 1 to {MOST_TILES:,}, the places of the grid, got {arguments.tiles}")
    if arguments.layers < 1 or arguments.repeats < 1 or arguments.threads < 1:
        parser.error("--layers, --repeats, --threads: expected at least 1")
    torch.set_num_threads(arguments.threads)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    folder = measure.results_folder(arguments.output, device)
    try:
        results = run(arguments, device, folder)
    except measuring.DeviceLostError as error:
        raise SystemExit(f"the device is lost, and what was measured before is written: {error}") from error
    print("\n".join(["", *goals(results["rows"], device.type), "", str(folder / "gigapath.md")]))
    if wrong := list(failures(results["rows"])):
        raise SystemExit("wrong, or not run:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
