"""The share of planning in a forward of attention: planned at every call, and kept in a cache.

    python bench_planning.py                    8,192 tokens, under two minutes
    python bench_planning.py --quick
    python bench_planning.py --device cuda

Writes JSON and a Markdown page (default: docs/benchmarks). The block-sparse forward is compared with dense attention
under the dense mask; forwards with a kept plan are bit for bit those without. On a GPU the plan is made there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import recording
import torch
import torch.nn.functional as F
from layouts import BlockLayout, block_layout
from recording import Record, enough, interleaved, looped, require, settle, shown, timed
from torch import Tensor

from dilated_core import dilated_attention
from dilated_core.plan import make_tiles
from dilated_pattern_cache import BlockLayoutKey, DilatedPatternCache

GOAL = 0.01
# Of fp32. A GPU's fused kernels make a product of fp32 from several of TF32.
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}
HEADS, HEAD_DIM, BLOCK = 4, 64, 128
LAYOUT = {"window": 3, "global_columns": 2, "random": 3, "seed": 0}
LENGTHS, RATES = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)  # LongNet's


# ------------------------------------------------------------------------------------------------ block-sparse


class BlockPlan(NamedTuple):
    """What a block-sparse forward must know beside q, k and v.

    Attributes:
        layout: which blocks each row of blocks attends to.
        gather: (rows, width), those blocks, padded with block 0.
        real: (rows, 1, width * BLOCK), bool, False where a key is of the padding.
    """

    layout: BlockLayout
    gather: Tensor
    real: Tensor


def make_plan(tokens: int, device: torch.device) -> BlockPlan:
    """The layout, and how to gather by it."""
    layout = block_layout(tokens // BLOCK, **LAYOUT, device=device)
    widths = layout.starts.diff()
    width = int(widths.max())
    real = torch.arange(width, device=device) < widths[:, None]
    gather = torch.zeros(real.shape, dtype=torch.int64, device=device)
    gather[real] = layout.columns
    return BlockPlan(layout, gather, real.repeat_interleave(BLOCK, 1)[:, None])


def find_plan(cache: DilatedPatternCache, tokens: int, device: torch.device) -> BlockPlan:
    """The plan from the cache. The key is made at each call, as a module would."""
    key = BlockLayoutKey(tokens, "bigbird", block_size=BLOCK, options=LAYOUT)  # type: ignore[arg-type]
    plan: BlockPlan = cache.get_or_create(key, lambda: make_plan(tokens, device))
    return plan


def attend(qkv: Tensor, plan: BlockPlan) -> Tensor:
    """Every block of queries attends to its blocks of keys. ``qkv``: (3, heads, tokens, head_dim)."""
    q, k, v = qkv.unflatten(2, (-1, BLOCK))
    k, v = (tensor[:, plan.gather].flatten(2, 3) for tensor in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=plan.real).flatten(1, 2)


def is_dense_attention(qkv: Tensor, out: Tensor, layout: BlockLayout) -> bool:
    """Whether dense attention under the dense mask gives the same, a head at a time."""
    mask = layout.dense().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    worst = 0.0
    for head in range(qkv.shape[1]):
        q, k, v = qkv[:, None, head : head + 1]
        dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        worst = max(worst, (dense[0, 0] - out[head]).abs().max().item())
    return worst <= TOLERANCE[qkv.device.type]


# ------------------------------------------------------------------------------------------------ measuring


class Forward(NamedTuple):
    """Attributes: without, kept: the forward, planned at each call and with the plan kept; plan, find: its planning."""

    name: str
    cache: DilatedPatternCache
    without: Callable[[], Tensor]
    kept: Callable[[], Tensor]
    plan: Callable[[], Any]
    find: Callable[[], Any]


def block_sparse(tokens: int, device: torch.device) -> Forward:
    """The forward above."""
    cache = DilatedPatternCache()
    qkv = torch.randn(3, HEADS, tokens, HEAD_DIM, device=device)
    plan, find = partial(make_plan, tokens, device), partial(find_plan, cache, tokens, device)
    tolerance = TOLERANCE[device.type]
    require(is_dense_attention(qkv, attend(qkv, plan()), plan().layout), f"dense attention, within {tolerance}")
    return Forward("block-sparse", cache, lambda: attend(qkv, plan()), lambda: attend(qkv, find()), plan, find)


def dilated(tokens: int, device: torch.device) -> Forward:
    """dilated_core's forward. Its planning is asked for by the very key that the forward asks for."""
    cache = DilatedPatternCache()
    q, k, v = torch.randn(3, 1, tokens, HEADS, HEAD_DIM, device=device)
    plan = partial(make_tiles, LENGTHS, RATES, tokens, HEADS, chosen=range(HEADS))
    without = partial(dilated_attention, q, k, v, LENGTHS, RATES)
    kept = partial(without, patterns=cache)
    kept()
    [key] = cache
    lookups = cache.info().hits + cache.info().misses
    require(lookups == 1, f"a forward asks once for its plan, it asked {lookups} times")
    require(cache[key] == plan(), "the plan is that of make_tiles")
    return Forward("dilated_core", cache, without, kept, plan, partial(cache.get_or_create, key, plan))


def time_forwards(record: Record, tokens: int, device: torch.device, rounds: int, seconds: float) -> None:
    """Both forwards."""
    section = record.section(
        "planning",
        f"Planning in a forward at {tokens:,} tokens",
        f"{HEADS} heads of {HEAD_DIM}, fp32, forward only. *Block-sparse*: blocks of {BLOCK}, a window of 3, 2 global "
        "columns and 3 random blocks in each row; the plan is the layout, the index to gather by and the mask of its "
        "padding; the attention gathers the blocks and calls PyTorch's own; the key is made at each call. "
        "*dilated_core*: `dilated_attention` with LongNet's pattern, its `patterns=` a cache. *Cold*: planned at every "
        "call, the share of that forward; *warm*: found in the cache, the share of that forward. "
        f"The goal is a share below {GOAL:.0%} once warm.",
        "block-sparse attention against dense attention under the dense mask, fp32, within "
        f"{TOLERANCE[device.type]:g}; forwards "
        "with a kept plan are bit for bit those without; all that was asked for after the first was a hit",
        [
            "forward",
            "planned at every call, ms (spread)",
            "plan kept, ms (spread)",
            "planning cold, ms (spread)",
            "planning warm, us (spread)",
            "share cold",
            "share warm",
            "goal met",
        ],
    )
    for make in (block_sparse, dilated):
        forward = make(tokens, device)
        same = torch.equal(forward.without(), forward.kept())
        require(same, f"{forward.name} gives the same with a kept plan")
        loops = {
            "without": looped("call()", call=forward.without),
            "kept": looped("call()", call=forward.kept),
            "cold": looped("call()", call=forward.plan),
            "warm": looped("call()", call=forward.find),
        }
        settle(loops["kept"], 20 * seconds)
        numbers = {name: 1 if name in ("without", "kept") else enough(loop, seconds) for name, loop in loops.items()}
        before = forward.cache.info()
        row = interleaved({name: partial(timed, loop, numbers[name]) for name, loop in loops.items()}, rounds)
        after = forward.cache.info()
        due = (rounds + 1) * (numbers["kept"] + numbers["warm"])
        require((after.misses, after.hits - before.hits) == (1, due), f"one miss and {due} hits: {after}")
        median = row["median"]
        share = {"cold": median["cold"] / median["without"], "warm": median["warm"] / median["kept"]}
        met = share["warm"] < GOAL
        named = {"forward": forward.name, "tokens": tokens, "calls_a_sample": numbers}
        section.add(
            {**named, **row, "share": share, "goal": GOAL, "goal_met": met},
            forward.name,
            shown(row, "without", 1e-3),
            shown(row, "kept", 1e-3),
            shown(row, "cold", 1e-3),
            shown(row, "warm"),
            f"{share['cold']:.3%}",
            f"**{share['warm']:.4%}**",
            "yes" if met else "no",
        )


def main() -> None:
    """Measure, print and write."""
    arguments = recording.parse(__doc__)
    torch.manual_seed(0)
    record = Record("planning", "The share of planning in a forward", arguments)
    tokens, rounds, seconds = (1024, 2, 1e-4) if arguments.quick else (8192, 15, 0.01)
    time_forwards(record, tokens, arguments.device, rounds, seconds)


if __name__ == "__main__":
    main()
