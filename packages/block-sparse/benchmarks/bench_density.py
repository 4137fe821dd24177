"""Block-sparse attention against dense attention: does the time follow the blocks that are kept?

    python bench_density.py                     8,192 and 16,384 tokens, one thread; bfloat16 and the sweep at 8,192
    python bench_density.py --suites float32 --tokens 2048 --repeats 1 --output results

Efficiency = dense time x density / sparse time: 1 where a kept pair costs what it costs in dense attention. Dense is
PyTorch's scaled_dot_product_attention, in turns with the others in the same process. Where a compiled FlexAttention
runs (on a CPU: float32 forward), it is timed beside ours, its compilation not counted. Before anything is timed, output
and gradients of every candidate are compared with the float64 definition, in blocks of rows from the whole length.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dilated_block_sparse import BlockLayout, block_sparse_attention, flex, reference
from dilated_block_sparse.plan import make_plan
from dilated_core import measure

BATCH, HEADS, HEAD_DIM = 1, 8, 64
CHECKED_BLOCKS = 3
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2}  # of the largest magnitude
SWEEP = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 1.0)
SUITES = ("float32", "sweep", "bfloat16")
ENOUGH = 40.0  # seconds of one candidate, after which it sits out


@dataclass(frozen=True)
class Goal:
    """Least efficiency. Attributes: forward; both: of forward and backward together; None for no goal."""

    forward: float | None = None
    both: float | None = None


@dataclass(frozen=True)
class Case:
    """One layout. Attributes: name; make: from tokens; is_causal; goals in float32 and in bfloat16."""

    name: str
    make: Callable[[int], BlockLayout]
    is_causal: bool = False
    goal: Goal = Goal()
    goal_half: Goal = Goal()


def local(tokens: int) -> BlockLayout:
    """A quarter of all blocks, around the diagonal."""
    return BlockLayout.local(tokens, max(1, tokens // 128 // 8))


def dilated(tokens: int) -> BlockLayout:
    """Every eighth block."""
    return BlockLayout.dilated(tokens, max(8, tokens // 128), 8)


def random(tokens: int, ratio: float, rows: int = 128, heads: int = 1) -> BlockLayout:
    """So many blocks of 128 keys for every block of rows, drawn."""
    kept = max(1, round(tokens // 128 * ratio))
    return BlockLayout.random(tokens, kept, seed=0, block_size=(rows, 128), heads=heads)


def combined(tokens: int) -> BlockLayout:
    """Local, dilated and global: about 15 % at 8,192 and 16,384 tokens."""
    blocks = tokens // 128
    return (
        BlockLayout.local(tokens, max(1, blocks // 32))
        | BlockLayout.dilated(tokens, max(8, blocks // 2), 8)
        | BlockLayout.global_(tokens, 1, 1)
    )


def bigbird(tokens: int) -> BlockLayout:
    """BigBird's proportions, cut to what a causal row may see."""
    blocks = tokens // 128
    return BlockLayout.bigbird(tokens, max(1, blocks // 32), 1, max(1, blocks // 16), seed=0).causal()


CASES = (
    Case("dilated, every 8th block", dilated, goal=Goal(0.85)),
    Case("local window, 25 %", local, goal=Goal(0.70)),
    Case("dilated, local and global", combined, goal=Goal(0.80)),
    Case("random 10 %, blocks of 128 x 128", partial(random, ratio=0.1), goal=Goal(0.55, 0.60), goal_half=Goal(0.55)),
    Case(
        "random 10 %, 512 x 128",
        partial(random, ratio=0.1, rows=512),
        goal=Goal(0.75, 0.80),
        goal_half=Goal(0.65),
    ),
    Case("random 10 %, a layout a head", partial(random, ratio=0.1, heads=HEADS)),
    Case("BigBird, causal", bigbird, is_causal=True),
)


@dataclass(frozen=True)
class Row:
    """One row of the table: times in seconds, medians; memory in bytes beyond the results."""

    suite: str
    case: str
    tokens: int
    dtype: str
    layout: str
    density: float
    deviation: float
    plan_seconds: float
    dense: tuple[float, float]
    sparse: tuple[float, float]
    spread: tuple[float, float]
    flex: float | None
    extra_memory: tuple[float, float]
    goal: tuple[float | None, float | None]

    @property
    def efficiency(self) -> tuple[float, float]:
        """Of the forward, and of forward and backward together."""
        return tuple(d * self.density / s for d, s in zip(self.dense, self.sparse, strict=True))  # type: ignore[return-value]


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensors(tokens: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """query, key, value and a cotangent."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(4, BATCH, tokens, HEADS, HEAD_DIM, generator=generator)
    return list(made.to(dtype).to(device).unbind())


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What PyTorch has."""
    rows = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(*rows).transpose(1, 2)


def both(attention: Attention, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """A forward and its backward."""
    *qkv, cotangent = inputs
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    return torch.autograd.grad(attention(*leaves), leaves, cotangent)


def check(case: Case, layout: BlockLayout, inputs: list[Tensor]) -> float:
    """Largest deviation from the definition of out, dq, dk and dv, over some blocks of rows; too large raises."""
    rows = layout.block_size[0]
    worst = 0.0
    for block in torch.linspace(0, layout.q_blocks - 1, CHECKED_BLOCKS).long().unique().tolist():
        chosen = slice(block * rows, min((block + 1) * rows, layout.q_len))
        *qkv, some = inputs
        cotangent = torch.zeros_like(some)
        cotangent[:, chosen] = some[:, chosen]
        leaves = [tensor.detach().requires_grad_() for tensor in qkv]
        out = block_sparse_attention(*leaves, layout, is_causal=case.is_causal)
        results = (out[:, chosen], *torch.autograd.grad(out, leaves, cotangent))
        exact_leaves = [tensor.double().requires_grad_() for tensor in qkv]
        exact, _ = reference.block_sparse_attention(*exact_leaves, layout, is_causal=case.is_causal, rows=chosen)
        wanted = (exact, *torch.autograd.grad(exact, exact_leaves, some[:, chosen].double()))
        for result, value in zip(results, wanted, strict=True):
            worst = max(worst, ((result.double() - value).abs().max() / value.abs().max()).item())
    if not worst <= TOLERANCES[inputs[0].dtype]:
        raise SystemExit(f"{case.name}: deviates from the definition by {worst}; nothing is reported")
    return worst


def flex_forward(
    case: Case, layout: BlockLayout, inputs: list[Tensor], expected: Tensor
) -> Callable[[], Tensor] | None:
    """Compiled FlexAttention on the same layout, in its own order of dimensions, checked; None where it cannot run."""
    asked: dict[str, Any] = {"has_mask": False, "dropout": False, "has_bias": False, "needs_grad": False}
    reason = flex.refusal(inputs[0], inputs[1], layout, is_causal=case.is_causal, **asked)
    if reason is not None:
        print(f"  no FlexAttention: {reason}")
        return None
    qkv = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs[:3]]
    run = partial(flex.compiled(layout, is_causal=case.is_causal), *qkv)
    deviation = ((run() - expected).abs().max() / expected.abs().max()).item()
    if not deviation <= 2 * TOLERANCES[inputs[0].dtype]:
        raise SystemExit(f"{case.name}: FlexAttention deviates from ours by {deviation}; nothing is reported")
    return run


def suite(
    name: str, cases: tuple[Case, ...], tokens: int, dtype: torch.dtype, device: torch.device, repeats: int, peer: bool
) -> Iterator[Row]:
    """Measure all cases of one length and dtype in turns with dense attention."""
    inputs = tensors(tokens, dtype, device)
    qkv = inputs[:3]
    size = inputs[0].numel() * inputs[0].element_size()
    candidates: dict[str, Callable[[], object]] = {
        "dense": lambda: dense_attention(*qkv),
        "dense, both": lambda: both(dense_attention, inputs),
    }
    checked: dict[str, tuple[BlockLayout, float, float, tuple[float, float]]] = {}
    for case in cases:
        layout = case.make(tokens)
        start = time.perf_counter()
        make_plan(layout, is_causal=case.is_causal, half=dtype != torch.float32)
        planned = time.perf_counter() - start
        deviation = check(case, layout, inputs)
        attention = partial(block_sparse_attention, layout=layout, is_causal=case.is_causal)
        run, run_both = partial(attention, *qkv), partial(both, attention, inputs)
        candidates[case.name], candidates[f"{case.name}, both"] = run, run_both
        lse = size // inputs[0].element_size() // HEAD_DIM * 4
        memory = (
            (measure.peak_memory(run, device) - size - lse) / size,
            # The backward holds the forward's results and three gradients.
            (measure.peak_memory(run_both, device) - 4 * size - lse) / size,
        )
        checked[case.name] = layout, deviation, planned, memory
        peer_run = flex_forward(case, layout, inputs, run()) if peer else None
        if peer_run is not None:
            candidates[f"{case.name}, flex"] = peer_run
        print(f"  {case.name}: checked, deviation {deviation:.1e}, {layout}", flush=True)
    with torch.no_grad():
        forwards = {key: run for key, run in candidates.items() if not key.endswith("both")}
        timings = measure.interleaved(forwards, repeats=repeats, enough=ENOUGH)
    timings |= measure.interleaved(
        {key: run for key, run in candidates.items() if key.endswith("both")}, repeats=repeats, enough=ENOUGH
    )
    for case in cases:
        layout, deviation, planned, memory = checked[case.name]
        goal = case.goal if dtype == torch.float32 else case.goal_half
        forward, whole = timings[case.name], timings[f"{case.name}, both"]
        flex_timing = timings.get(f"{case.name}, flex")
        live = layout.density
        if case.is_causal:
            live = causal_density(layout)
        yield Row(
            name,
            case.name,
            tokens,
            str(dtype).removeprefix("torch."),
            repr(layout),
            live,
            deviation,
            planned,
            (timings["dense"].median, timings["dense, both"].median),
            (forward.median, whole.median),
            (forward.spread, whole.spread),
            None if flex_timing is None else flex_timing.median,
            memory,
            (goal.forward, goal.both),
        )


def causal_density(layout: BlockLayout) -> float:
    """Live pairs below the diagonal, over all pairs of the square: blocks on the diagonal count half."""
    diagonal = BlockLayout.local(layout.q_len, 0, block_size=layout.block_size)
    return layout.density - 0.5 * (layout & diagonal).density


# ------------------------------------------------------------------------------------------------ the page


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    header = (
        "| layout | tokens | dtype | density | deviation | forward: times faster than dense | "
        "efficiency (spread) | goal | "
        "forward+backward: times faster | efficiency (spread) | goal | times faster than FlexAttention | "
        "extra memory, of the output | plan, ms |"
    )
    lines = [header, "|" + "---|" * 14]
    for row in rows:
        cells = [row.case, f"{row.tokens:,}", row.dtype, f"{row.density:.1%}", f"{row.deviation:.1e}"]
        for part in (0, 1):
            goal = row.goal[part]
            efficiency = row.efficiency[part]
            verdict = "" if goal is None else f"{goal:.2f} {'met' if efficiency >= goal else 'missed'}"
            faster = row.dense[part] / row.sparse[part]
            cells += [f"{faster:.2f}", f"{efficiency:.2f} ({row.spread[part]:.0%})", verdict]
        cells.append("" if row.flex is None else f"{row.flex / row.sparse[0]:.2f}")
        cells.append(f"{row.extra_memory[0]:.2f}, {row.extra_memory[1]:.2f}")
        cells.append(f"{row.plan_seconds * 1e3:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Speed over density of the sweep, against what density alone allows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    density = [row.density for row in rows]
    for part, name in enumerate(("forward", "forward + backward")):
        axes.plot(density, [row.dense[part] / row.sparse[part] for row in rows], marker="o", ms=4, label=name)
    axes.plot(density, [1 / value for value in density], color="0.6", ls="--", label="1 / density")
    axes.axhline(1.0, color="0.3", lw=0.8)
    flexed = [row for row in rows if row.flex is not None]
    if flexed:
        speed = [row.dense[0] / row.flex for row in flexed if row.flex is not None]
        axes.plot([row.density for row in flexed], speed, marker="s", ms=4, label="FlexAttention, forward")
    axes.set(xscale="log", yscale="log", xlabel="density", ylabel="times faster than dense attention")
    axes.set_title(f"Random blocks of 128 x 128, {rows[0].tokens:,} tokens, {rows[0].dtype}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def redraw(record: Path, folder: Path) -> list[Path]:
    """Draw the picture of a recorded run again; nothing is measured."""
    recorded = [row for row in json.loads(record.read_text())["rows"] if row["suite"] == "sweep"]
    path = folder / "block_sparse_density.png"
    draw([Row(**{name: value for name, value in row.items() if name != "efficiency"}) for row in recorded], path)
    return [path]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suites", nargs="+", choices=("float32", "sweep", "bfloat16"), default=["float32", "sweep", "bfloat16"]
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: %(default)s)")
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda[:index] (default: %(default)s)"
    )
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out: it compiles for every shape")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    options.output = measure.results_folder(options.output, options.device)
    torch.set_num_threads(options.threads)
    sweep = tuple(Case(f"random {ratio:.0%}", partial(random, ratio=ratio)) for ratio in SWEEP)
    rows: list[Row] = []
    for name in options.suites:
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        cases = sweep if name == "sweep" else CASES
        for tokens in options.tokens if name == "float32" else options.tokens[:1]:
            print(f"{name}, {tokens} tokens", flush=True)
            peer = not options.no_flex and name != "bfloat16"
            rows += suite(name, cases, tokens, dtype, options.device, options.repeats, peer)
    options.output.mkdir(parents=True, exist_ok=True)
    environment = measure.environment()
    found = [asdict(row) | {"efficiency": row.efficiency} for row in rows]
    path = options.output / "block_sparse_density.json"
    path.write_text(json.dumps({"environment": environment, "rows": found}, indent=1) + "\n")
    parts = [page_head(environment, options)]
    parts += [f"## {name}\n\n" + table([row for row in rows if row.suite == name]) for name in options.suites]
    swept = [row for row in rows if row.suite == "sweep"]
    if swept:
        draw(swept, options.output / "block_sparse_density.png")
        parts.append("![Speed over density](block_sparse_density.png)")
    parts.append(
        "Raw data: [block_sparse_density.json](block_sparse_density.json). Command, from the repository's root: "
        f"`python packages/block-sparse/benchmarks/{environment['command']}`."
    )
    page = "\n\n".join(parts) + "\n"
    (options.output / "block_sparse_density.md").write_text(page)
    print(page)


def page_head(environment: dict[str, object], options: argparse.Namespace) -> str:
    """What the page says before its tables."""
    return (
        "# Block-sparse attention against dense attention\n\n"
        f"{environment['date']}, torch {environment['torch']}, {environment['processor']} "
        f"({environment['cpu_capability']}), {options.threads} thread, {options.device}. "
        f"Batch {BATCH}, {HEADS} heads of {HEAD_DIM}.\n\n"
        "*Efficiency*: dense time x density / sparse time, medians of runs in turns, and interquartile range over the "
        "median. Dense is `scaled_dot_product_attention` over all pairs, also beside a causal layout, whose density "
        "counts the pairs that are seen. *Extra memory*: beyond the results, in outputs: of the forward, and of both. "
        "Each row's output and gradients were compared with the float64 definition first. FlexAttention: compiled, "
        "forward only, as it has no backward on a CPU; its compilation is not counted."
    )


if __name__ == "__main__":
    main()
