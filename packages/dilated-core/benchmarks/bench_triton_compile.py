"""What the compiler makes of the Triton programs for cards that need not be here: registers, spills, memory, occupancy.

    python bench_triton_compile.py
    python bench_triton_compile.py --cards 90 --head-dims 64 128 --precisions bfloat16

Nothing is timed and nothing runs on a GPU. Every program is compiled for every card, head_dim and precision, with the
blocks that ``kernels/triton/blocks.py`` chooses there: once plain, and once with all options that cost registers.
Writes JSON and a Markdown table (default: docs/benchmarks). Exits with 1 where a block does not fit its card.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from dilated_core import measure

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the test and this script compile by the same module

from triton_compile import SHARED_PER_BLOCK, Case, Compiled, compile_cases

PROGRAMS = ("forward", "grad_query", "grad_key_value")
PRECISIONS: dict[str, dict[str, object]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "tf32": {"dtype": "float32", "tf32": True},
    "float32": {"dtype": "float32"},
}
OPTIONS: dict[str, dict[str, bool]] = {
    "none": {},
    "all": {"is_causal": True, "masked": True, "packed": True, "grouped": True},
}
HEADER = (
    "| program | card | head_dim | precision | options | rows x others | warps | stages | registers | stack, bytes "
    "| spills in loops | shared, bytes | of | blocks a multiprocessor | warps a multiprocessor |\n" + "|---" * 15 + "|"
)


def line(row: dict[str, object], made: Compiled) -> str:
    """A row as Markdown."""
    rows, others, warps, stages = made.blocks
    fitting = row["blocks_per_processor"]
    cells = [
        row["program"], f"sm_{row['arch']}", row["head_dim"], row["precision"], row["options"],
        f"{rows} x {others}", warps, stages, made.registers, made.stack, made.loop_spills,
        f"{made.shared:,}", f"{row['shared_limit']:,}", fitting, fitting * warps,
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def report(lines: list[str], environment: dict[str, object]) -> str:
    """The page that lands beside the JSON."""
    table = "\n".join([HEADER, *lines])
    return (
        '# What the compiler makes of the kernel "triton"\n\n'
        f"{environment['date']}, triton {environment['triton']}. Not yet measured on a GPU: these are the compiler's "
        "figures, found without one.\n\n"
        "Registers are of a thread, at most 255. The stack is where registers are spilled to, in bytes of a thread; "
        "spills in loops are the instructions that do so in the loops over blocks, where they cost. The last two "
        "columns say how many blocks, and warps, a multiprocessor holds at once (64 warps at most). Options: all means "
        "causal, with a padding mask, packed sequences and shared key heads; none means none of these; rows are "
        f"ordered in both.\n\n{table}\n"
        f"\nRaw data: [triton_compile.json](triton_compile.json). Command, from the repository's root: "
        f"`python packages/dilated-core/benchmarks/{environment['command']}`.\n"
    )


def main() -> None:
    """Compile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu; with a card there is nothing more to learn")
    parser.add_argument("--cards", type=int, nargs="+", default=list(SHARED_PER_BLOCK), choices=list(SHARED_PER_BLOCK))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[16, 48, 64, 128, 256])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    if torch.device(arguments.device).type != "cpu":
        print(f"this compiles for cards without one; nothing to do on {arguments.device}")
        return
    environment = {**measure.environment(), "triton": version("triton")}
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    lines: list[str] = []
    print(HEADER)
    for program, arch, head_dim in itertools.product(arguments.programs, arguments.cards, arguments.head_dims):
        labels = list(itertools.product(arguments.precisions, OPTIONS))
        cases = [
            Case(program, arch, head_dim, **PRECISIONS[precision], **OPTIONS[options]) for precision, options in labels
        ]
        with tempfile.TemporaryDirectory() as cache:
            found = list(compile_cases(cases, Path(cache), processes=arguments.processes))
        for (precision, options), (case, made) in zip(labels, found, strict=True):
            rows.append(
                {
                    "program": program,
                    "arch": arch,
                    "head_dim": head_dim,
                    "precision": precision,
                    "options": options,
                    **made._asdict(),
                    "shared_limit": SHARED_PER_BLOCK[arch],
                    "blocks_per_processor": made.blocks_per_processor(case.arch),
                }
            )
            lines.append(line(rows[-1], made))
            print(lines[-1], flush=True)
        results = {"environment": environment, "rows": rows}
        (arguments.output / "triton_compile.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.output / "triton_compile.md").write_text(report(lines, environment))
    if any(row["blocks_per_processor"] == 0 for row in rows):
        raise SystemExit("a block does not fit its card: see the rows with 0 blocks a multiprocessor")


if __name__ == "__main__":
    main()
