"""Layouts of blocks: how long they take to build and to combine, how much memory, how many bytes stay.

    python bench_layouts.py                          16k to 4M tokens, blocks of 128
    python bench_layouts.py --tokens 16384 1048576
    python bench_layouts.py --quick                  16k tokens, one round

Every pattern is first compared with a slow definition, block by block, at a small size; then each size is measured in a
process of its own, where some rows of what was built are compared with the definition again. Writes JSON and a Markdown
page (default: docs/benchmarks/block_sparse_layouts.*). A layout lies in CPU memory.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from dilated_block_sparse.layout import BlockLayout
from dilated_core import measure

BLOCK = 128
TOKENS = [1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22]
SMALL = 37  # blocks of the check
ROUNDS = 3
LENGTHS, RATES = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)  # LongNet's
GOAL_PATTERN, GOAL_TOKENS, GOAL_BYTES, GOAL_SECONDS = "local + global", 1 << 20, 100e6, 5.0


def stride_of(blocks: int) -> int:
    """The sparsest stride."""
    return max(math.isqrt(blocks // 2), 1)


class Pattern(NamedTuple):
    """How a pattern is built, and what it is.

    Attributes:
        build: tokens -> the layout.
        live: (row, column, blocks) -> whether a block is live. Of patterns by lot: whether it is without the lots.
        lots: blocks of each row that are drawn by lot.
    """

    build: Callable[[int], BlockLayout]
    live: Callable[[int, int, int], bool]
    lots: int = 0


def is_hierarchical(row: int, column: int, blocks: int) -> bool:
    """Window 4, branching 4, until a level reaches from end to end."""
    group = 1
    while True:
        if (column + 1) % group == 0 and abs(row - column) <= 4 * group:
            return True
        if 4 * group >= blocks - 1:
            return False
        group *= 4


# LongNet's rates are finer than a block here, and its lengths whole blocks: each branch has the blocks of a segment.
PATTERNS = {
    "local + global": Pattern(
        lambda n: BlockLayout.local(n, 4) | BlockLayout.global_(n, 2, 1),
        lambda i, j, n: abs(i - j) <= 4 or j < 2 or i < 1,
    ),
    "dilated": Pattern(
        lambda n: BlockLayout.dilated(n, 256, 8), lambda i, j, n: i // 256 == j // 256 and (i - j) % 8 == 0
    ),
    "strided": Pattern(
        lambda n: BlockLayout.strided(n, stride_of(-(-n // BLOCK))),
        lambda i, j, n: abs(i - j) < stride_of(n) or (i - j) % stride_of(n) == 0,
    ),
    "hierarchical": Pattern(lambda n: BlockLayout.hierarchical(n, 4), is_hierarchical),
    "longnet": Pattern(
        lambda n: BlockLayout.longnet(n, LENGTHS, RATES),
        lambda i, j, n: any(i * BLOCK // length == j * BLOCK // length for length in LENGTHS),
    ),
    "random": Pattern(lambda n: BlockLayout.random(n, 16), lambda i, j, n: False, 16),
    "bigbird": Pattern(lambda n: BlockLayout.bigbird(n, 1, 2, 3), lambda i, j, n: abs(i - j) <= 1 or j < 2 or i < 2, 3),
}


def check(pattern: Pattern, layout: BlockLayout, rows: range) -> int:
    """Compare rows of a layout with the definition. Returns how many blocks were compared; raises where one differs."""
    layout.validate()
    blocks = layout.kv_blocks
    for row in rows:
        found = set(layout.row(row))
        base = {column for column in range(blocks) if pattern.live(row, column, blocks)}
        if not base <= found or len(found) != min(len(base) + pattern.lots, blocks):
            raise SystemExit(f"layouts: row {row} of {layout} is not what its definition says")
    return len(rows) * blocks


def resident() -> int:
    """Bytes that the process holds in memory now; elsewhere than on Linux, the most that it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return most_resident()
    return pages * resource.getpagesize()


def most_resident() -> int:
    """Bytes that the process held in memory at most."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def child(name: str, tokens: int, rounds: int) -> dict[str, object]:
    """Measure one pattern at one size, in this process alone."""
    torch.set_num_threads(1)
    pattern = PATTERNS[name]
    pattern.build(SMALL * BLOCK).causal().T.key()  # what a first use loads is no part of the figures
    before = resident()
    layout = pattern.build(tokens)
    peak = max(most_resident() - before, 0)
    step = max(layout.q_blocks // 3, 1)
    compared = check(pattern, layout, range(0, layout.q_blocks, step))
    seconds: dict[str, list[float]] = {}
    other = BlockLayout.local(tokens, 2)
    for _ in range(rounds):
        # A copy each: key and transpose are kept once they are known.
        copy = BlockLayout(layout.indptr, layout.indices, tokens, tokens, block_size=layout.block_size)
        for part, run in {
            "build": lambda: pattern.build(tokens),
            "key": copy.key,
            "transpose": lambda copy=copy: copy.T,
            "union": lambda: layout | other,
            "intersection": lambda: layout & other,
            "difference": lambda: layout - other,
            "causal": layout.causal,
        }.items():
            seconds.setdefault(part, []).append(timed(run))
    return {
        "pattern": name,
        "tokens": tokens,
        "q_blocks": layout.q_blocks,
        "live": layout.live,
        "density": layout.density,
        "bytes": layout.indptr.nbytes + layout.indices.nbytes,
        "peak_bytes": peak,
        "blocks_compared": compared,
        "seconds": seconds,
    }


def measured(name: str, tokens: int, rounds: int) -> dict[str, object]:
    """What ``child`` gives, from a process of its own."""
    command = [sys.executable, __file__, "--child", name, str(tokens), str(rounds)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if ran.returncode:
        raise SystemExit(f"layouts: {name} at {tokens} tokens failed\n{ran.stderr}")
    row: dict[str, object] = json.loads(ran.stdout.splitlines()[-1])
    return row


def goal_of(row: dict[str, object]) -> bool | None:
    """Whether the goal is met, where there is one."""
    if (row["pattern"], row["tokens"]) != (GOAL_PATTERN, GOAL_TOKENS):
        return None
    return row["peak_bytes"] < GOAL_BYTES and max(row["seconds"]["build"]) < GOAL_SECONDS


def table(rows: list[dict[str, object]]) -> str:
    """The figures as Markdown."""
    parts = ("key", "transpose", "union", "intersection", "difference", "causal")
    head = ["pattern", "tokens", "blocks", "live", "density", "build, ms (range)", "peak, MB", "layout, MB"]
    lines = [[*head, *(f"{part}, ms" for part in parts)]]
    for row in rows:
        build = [1e3 * second for second in row["seconds"]["build"]]
        goal = {None: "", True: " (goal met)", False: " (GOAL MISSED)"}[goal_of(row)]
        lines.append(
            [
                row["pattern"] + goal,
                f"{row['tokens']:,}",
                f"{row['q_blocks']:,}",
                f"{row['live']:,}",
                f"{row['density']:.3%}",
                f"**{statistics.median(build):.3g}** ({min(build):.3g} to {max(build):.3g})",
                f"{row['peak_bytes'] / 1e6:.1f}",
                f"{row['bytes'] / 1e6:.2f}",
                *(f"{1e3 * statistics.median(row['seconds'][part]):.3g}" for part in parts),
            ]
        )
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(rows: list[dict[str, object]], environment: dict[str, object], compared: int) -> str:
    """The Markdown page."""
    return (
        "# Layouts of blocks\n\n"
        f"{environment['date']}, Python {environment['python']}, torch {environment['torch']}, "
        f"{environment['processor']}, {environment['cores']} cores, one thread.\n\n"
        f"Blocks of {BLOCK}. *Build*: from numbers to a checked layout, the median of rounds in one process, and their "
        "range. *Peak*: the most that a fresh process held in memory after its first build, less what it held before "
        "it. *Layout*: the bytes that stay. The algebra's other side is a local window of 2. "
        f"The goal: *{GOAL_PATTERN}* at {GOAL_TOKENS:,} tokens below {GOAL_BYTES / 1e6:.0f} MB "
        f"and {GOAL_SECONDS:.0f} s.\n\n"
        f"Checked in this run: every pattern at {SMALL} blocks against its definition, block by block ({compared:,} "
        "blocks), and some rows of every layout below "
        f"({sum(row['blocks_compared'] for row in rows):,} blocks).\n\n"
        f"{table(rows)}\n\n"
        "local + global: window 4, 2 columns, 1 row. dilated: segments of 256 blocks, rate 8. strided: the sparsest "
        "stride, √(blocks / 2). hierarchical: window 4, branching 4. longnet: "
        f"lengths {list(LENGTHS)}, rates {list(RATES)}. random: 16 blocks a row. bigbird: window 1, 2 global, "
        "3 random.\n"
        f"\nRaw data: [block_sparse_layouts.json](block_sparse_layouts.json). Command, from the repository's root: "
        f"`python packages/block-sparse/benchmarks/{environment['command']}`.\n"
    )


def main() -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=list(PATTERNS))
    parser.add_argument("--quick", action="store_true", help="16k tokens, one round")
    parser.add_argument("--device", default="cpu", help="cpu; a layout lies in CPU memory")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, tokens, rounds = arguments.child
        print(json.dumps(child(name, int(tokens), int(rounds))))
        return
    if arguments.device != "cpu":
        print(f"a layout lies in CPU memory; nothing to do on {arguments.device}")
        return
    sizes = arguments.tokens or (TOKENS[:1] if arguments.quick else TOKENS)
    if min(sizes) < 1:
        parser.error(f"--tokens: expected positive numbers, got {sizes}")
    chosen = [PATTERNS[name] for name in arguments.patterns]
    compared = sum(check(pattern, pattern.build(SMALL * BLOCK), range(SMALL)) for pattern in chosen)
    print(f"checked: {compared:,} blocks of {len(chosen)} patterns\n\n" + table([]))
    rows = []
    for name in arguments.patterns:
        for tokens in sizes:
            rows.append(measured(name, tokens, 1 if arguments.quick else ROUNDS))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    environment = measure.environment()
    goals = {"pattern": GOAL_PATTERN, "tokens": GOAL_TOKENS, "bytes": GOAL_BYTES, "seconds": GOAL_SECONDS}
    written = {"environment": environment, "block_size": BLOCK, "goal": goals, "layouts": rows}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "block_sparse_layouts.json").write_text(json.dumps(written, indent=1) + "\n")
    (arguments.output / "block_sparse_layouts.md").write_text(page(rows, environment, compared))


if __name__ == "__main__":
    main()
