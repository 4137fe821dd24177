"""Record what three workloads ask a cache for: the traces that bench_policies replays.

    python record_traces.py                 under a minute; writes traces/*.json beside this file
    python record_traces.py --quick --output somewhere

The sequences of requests are synthetic: lengths are drawn from the distributions stated below, from a seed. Costs and
sizes are not: each value is really made, several times, and its bytes are counted as the cache counts them.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import recording
import torch
import traces
from layouts import block_layout
from torch.nn.attention.flex_attention import create_block_mask
from traces import Recorder

from dilated_pattern_cache import BlockLayoutKey, BlockMaskKey, DilatedIndexKey, DilatedPatternCache
from dilated_pattern_cache.indices import dilated_indices

CACHE_BYTES = 256 * 2**20  # of the cache that serves while a trace is recorded
BLOCK = 128
LONGNET = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)
GIGAPATH = (1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16)
WINDOW = 1024


# ------------------------------------------------------------------------------------------------ what is asked for


def ask_indices(recorder: Recorder, tokens: int, pattern: Any, heads: int) -> None:
    """Dilated indices of all branches of a layer; its other layers have the same."""
    lengths, rates = pattern
    key = DilatedIndexKey(tokens, lengths, rates, heads)
    recorder.get_or_create(key, partial(dilated_indices, key))


def ask_layout(recorder: Recorder, tokens: int, seed: int = 0) -> None:
    """A block layout as BigBird's."""
    options: Any = {"window": 3, "global_columns": 2, "random": 3, "seed": seed}
    key = BlockLayoutKey(tokens, "bigbird", options=options)
    recorder.get_or_create(key, partial(block_layout, -(-tokens // BLOCK), **options))


def ask_mask(recorder: Recorder, tokens: int) -> None:
    """FlexAttention's block mask, causal and with a window."""
    options: Any = {"window": WINDOW}
    key = BlockMaskKey(tokens, tokens, "causal", options=options)
    recorder.get_or_create(key, partial(create_block_mask, seen, None, None, tokens, tokens, device="cpu"))


def seen(batch: Any, head: Any, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """The mask function of ``ask_mask``."""
    return (row >= column) & (row - column < WINDOW)


def up_to(length: float, step: int, least: int, most: int) -> int:
    """``length``, padded to the next multiple of ``step``, within bounds."""
    return step * math.ceil(min(most, max(least, length)) / step)


# ------------------------------------------------------------------------------------------------ workloads


def slides(recorder: Recorder, draw: random.Random, requests: int) -> None:
    """Whole-slide images, one after another.

    Tiles a slide: log-normal, median 10,000, sigma 0.9, from 1,000 to 200,000, padded to one of 8 lengths a doubling.
    For each slide the indices of GigaPath's dilated pattern, 16 heads, and a block layout.
    """
    for _ in range(requests):
        tiles = min(200_000, max(1_000, draw.lognormvariate(math.log(10_000), 0.9)))
        doubling = 2 ** math.floor(math.log2(tiles))
        tokens = up_to(tiles, doubling // 8, 1_000, 262_144)
        ask_indices(recorder, tokens, GIGAPATH, 16)
        ask_layout(recorder, tokens)


def curriculum(recorder: Recorder, draw: random.Random, requests: int) -> None:
    """Training on longer and longer sequences, with evaluations in between.

    Five stages, up to 2,048, 4,096, 8,192, 16,384 and 32,768 tokens; lengths are even over the upper half of a stage,
    padded to one of 16 in it. After every 25 steps an evaluation at 12 fixed lengths from 1,024 to 65,536. For each
    batch the indices of LongNet's pattern, 8 heads, and a block layout of one of two layers, which differ in seed.
    """
    evaluated = [1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 65536]
    for step in range(requests):
        stage = 2048 << (5 * step // requests)
        lengths = [up_to(draw.uniform(stage / 2, stage), stage // 32, stage // 2, stage)]
        if step % 25 == 24:
            lengths += evaluated
        for tokens in lengths:
            ask_indices(recorder, tokens, LONGNET, 8)
            for seed in (0, 1):
                ask_layout(recorder, tokens, seed)


def service(recorder: Recorder, draw: random.Random, requests: int) -> None:
    """A service for prompts and documents.

    Of the requests 85 % are prompts: log-normal, median 600 tokens, sigma 0.8, up to 4,096, padded to multiples of
    128, a block mask each. 12 % are reports: even from 4,096 to 16,384, multiples of 1,024, a block layout and
    LongNet's indices, 8 heads. 3 % are documents: 65,536 to 262,144, even over the logarithm, multiples of 16,384,
    LongNet's indices, 8 heads, and a layout.
    """
    for _ in range(requests):
        kind = draw.random()
        if kind < 0.85:
            ask_mask(recorder, up_to(draw.lognormvariate(math.log(600), 0.8), 128, 128, 4096))
            continue
        if kind < 0.97:
            tokens = up_to(draw.uniform(4096, 16384), 1024, 4096, 16384)
        else:
            tokens = up_to(65536 * 4 ** draw.random(), 16384, 65536, 262_144)
        ask_indices(recorder, tokens, LONGNET, 8)
        ask_layout(recorder, tokens)


WORKLOADS: dict[str, tuple[Callable[[Recorder, random.Random, int], None], int]] = {
    "slides": (slides, 2000),
    "curriculum": (curriculum, 1500),
    "service": (service, 4000),
}


def main() -> None:
    """Record and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few requests each, to see that it works")
    parser.add_argument(
        "--output", type=Path, default=traces.FOLDER, metavar="FOLDER", help="where to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(
        1
    )  # a second one helps little with tensors this small, and makes times depend on who else runs
    for name, (workload, requests) in WORKLOADS.items():
        recorder = Recorder(DilatedPatternCache(max_entries=None, max_bytes=CACHE_BYTES))
        workload(recorder, random.Random(arguments.seed), 12 if arguments.quick else requests)
        about = " ".join((workload.__doc__ or "").split())
        trace = recorder.trace(name, about)
        path = trace.save(recording.environment() | {"seed": arguments.seed}, arguments.output)
        print(
            f"{path}: {len(trace.keys)} keys, {len(trace.lookups):,} look-ups, {trace.footprint / 2**20:.1f} MiB in "
            f"all, {sum(key.seconds for key in trace.keys):.2f} s to make each once"
        )


if __name__ == "__main__":
    main()
