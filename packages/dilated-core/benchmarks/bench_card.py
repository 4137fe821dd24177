"""Dilated attention on a card: every kernel that runs there beside dense attention, and which one is fastest.

    python bench_card.py --device cuda                    8k to 1M tokens, both patterns, head_dim 64 and 128
    python bench_card.py --device cuda --sizes 32768 --patterns paper --kernels triton cuda_flash
    python bench_card.py --device cuda --tune             first search block sizes for the Triton kernel: minutes
    python bench_card.py --device cpu --sizes 512 --heads 2 --dtype fp32 --repeats 2

Writes card.json and card.md (default: a folder below docs/benchmarks for each card) after every row. The same command
goes on with the rows that are there, if they are of the same code, versions, card and settings; --fresh measures all
again. The exit status is 1 where a candidate deviates from the definition or one of our kernels raised.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import card_page
import torch
from card_cases import BATCH, DTYPES, PATTERNS, Case, check_definition
from card_measuring import DeviceLostError, ceilings, measure_case

import dilated_core
from dilated_core import kernels, measure

SIZES = [8192, 32768, 131072, 524288, 1048576]
# Of the environment: figures taken with another of these are of another run.
SAME = ("torch", "cuda", "cuda_runtime", "cudnn", "processor")


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """The rows that are asked for, short ones first: a run that is cut short has all of them."""
    for seq in sorted(set(arguments.sizes)):
        for pattern in arguments.patterns:
            for head_dim in arguments.head_dims:
                for way in arguments.passes:
                    yield Case(
                        pattern,
                        seq,
                        arguments.heads,
                        head_dim,
                        DTYPES[arguments.dtype],
                        arguments.causal,
                        way == "backward",
                    )


def settings_of(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What all rows of a run share. JSON-ready."""
    on_cuda = device.type == "cuda"
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_cuda else "CPU",
        "device_bytes": torch.cuda.get_device_properties(device).total_memory if on_cuda else None,
        "batch": BATCH,
        "heads": arguments.heads,
        "dtype": arguments.dtype,
        "is_causal": arguments.causal,
        "kernels": arguments.kernels,
        "longest_dense": arguments.dense_up_to,
        "tuned_blocks": _tuned(device, DTYPES[arguments.dtype]),
        "code": _digest(),
    }


def _tuned(device: torch.device, dtype: torch.dtype) -> dict[str, list[int]]:
    """Block sizes of the Triton kernel that were tuned on this machine, and are not those of the code."""
    if kernels.survey(device, dtype, 64)["triton"] is not None:
        return {}
    from dilated_core.kernels.triton.blocks import tuned_blocks

    found = tuned_blocks(device).items()
    return {f"{which}, head_dim {head_dim}, {of}": list(blocks) for (which, head_dim, of), blocks in found}


def tune(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Search block sizes for the Triton kernel, which takes the fastest from then on; all trials. JSON-ready."""
    dtype = DTYPES[arguments.dtype]
    if refusal := kernels.survey(device, dtype, min(arguments.head_dims))["triton"]:
        raise SystemExit(f"--tune: the Triton kernel cannot run here: {refusal}")
    from dilated_core.kernels.triton import tuning

    return [
        {
            "pass": trial.which,
            "head_dim": trial.head_dim,
            "blocks": list(trial.blocks),
            "seconds": trial.seconds,
            "why": trial.why,
        }
        for trial in tuning.tune(device, head_dims=arguments.head_dims, dtypes=[dtype])
    ]


def _digest() -> str:
    """Of everything that a figure depends on here."""
    package = Path(dilated_core.__file__).parent
    sources = [*sorted(package.rglob("*.py")), *sorted(Path(__file__).parent.glob("*card*.py"))]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def begin(path: Path, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Results with no row, or those of an earlier run that this one goes on with."""
    environment, settings = measure.environment(), settings_of(arguments, device)
    if path.exists() and not arguments.fresh:
        earlier: dict[str, Any] = json.loads(path.read_text())
        same = earlier["settings"] == settings and all(
            earlier["environment"].get(name) == environment[name] for name in SAME
        )
        print(f"{len(earlier['rows'])} rows of {path} are {'kept' if same else 'of another run, and measured again'}")
        if same:
            return earlier
    return {"environment": environment, "settings": settings, "ceilings": [], "tuning": [], "rows": []}


def write(folder: Path, results: dict[str, Any]) -> None:
    """After every row, so that a run cut short keeps what it measured."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (folder / "card.md").write_text(card_page.page(results))


def run(arguments: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """Measure what is not there yet."""
    trials = tune(arguments, device) if arguments.tune else []
    results = begin(folder / "card.json", arguments, device)
    rows = results["rows"]
    ceiling = ceilings(device, DTYPES[arguments.dtype])
    results["ceilings"].append(ceiling)
    if trials:
        results["tuning"] = trials
        print("\n".join(card_page.tuning(trials)), flush=True)
        write(folder, results)
    there = [{name: row[name] for name in ("pattern", "seq", "head_dim", "pass")} for row in rows]
    print(f"ceilings: {ceiling.flops / 1e12:.4g} TFLOP/s, {ceiling.bandwidth / 1e12:.4g} TB/s\n{card_page.HEADER}")
    for case in cases(arguments):
        if case.key in there:
            continue
        row = measure_case(
            case,
            device,
            ceiling,
            names=arguments.kernels,
            longest_dense=arguments.dense_up_to,
            repeats=arguments.repeats,
            enough=arguments.enough,
        )
        rows.append(row)
        rows.sort(key=lambda one: (one["pattern"] != "paper", one["head_dim"], one["pass"] == "backward", one["seq"]))
        print(f"{card_page.label(row)}\n" + "\n".join(card_page.lines(row)), flush=True)
        write(folder, results)
    results["ceilings"].append(ceilings(device, DTYPES[arguments.dtype]))
    write(folder, results)
    return results


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cuda[:index]; cpu only at --sizes that are named")
    parser.add_argument("--sizes", type=int, nargs="+", help="tokens (default: 8192 to 1048576)")
    parser.add_argument("--patterns", choices=PATTERNS, nargs="+", default=list(PATTERNS))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--passes", choices=["forward", "backward"], nargs="+", default=["forward", "backward"])
    parser.add_argument(
        "--kernels",
        choices=[kernel.name for kernel in kernels.table()],
        nargs="+",
        help="(default: all that run; on a card without math)",
    )
    parser.add_argument("--dense-up-to", type=int, default=131072, metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds (default: %(default)s)")
    parser.add_argument("--enough", type=float, default=2.0, help="seconds of timed runs after which one is enough")
    parser.add_argument("--tune", action="store_true", help="search block sizes for the Triton kernel before")
    parser.add_argument("--fresh", action="store_true", help="measure all rows again")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu" and arguments.sizes is None:
        print("this measures a card; on a CPU it only runs to see that it works, at sizes that are named (--sizes)")
        return
    arguments.sizes = arguments.sizes or SIZES
    if min(arguments.sizes) < 2 or arguments.repeats < 1:
        parser.error("--sizes, --repeats: expected at least 2 tokens and one repeat")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    folder = measure.results_folder(arguments.output, device)
    torch.manual_seed(0)
    check_definition(device)
    try:
        results = run(arguments, device, folder)
    except DeviceLostError as error:
        raise SystemExit(f"the device is lost, and what was measured before is written: {error}") from error
    print(f"\n{card_page.fastest(results['rows'])}\n\n{folder / 'card.md'}")
    wrong = card_page.failures(results["rows"])
    if wrong:
        raise SystemExit("wrong, or not run:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
