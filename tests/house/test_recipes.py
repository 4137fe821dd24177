"""What the recipes claim beyond their python blocks: quoted output, commands at full size, what goes wrong and how."""

from __future__ import annotations

import asyncio
import importlib
import re
import shlex
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dilated_core import DilatedPattern, dilated_attention
from dilated_memory_pool import MemoryPool
from dilated_pattern_cache import PatternCache
from dilated_ring import make_plan

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "docs" / "recipes"
SECONDS = 60  # for anything that another thread is to do


def page(name: str) -> str:
    return (RECIPES / f"{name}.md").read_text(encoding="utf-8")


def example(folder: str, name: str) -> ModuleType:
    path = str(ROOT / folder)
    if path not in sys.path:
        sys.path.insert(0, path)
    return importlib.import_module(name)


# ------------------------------------------------------------------------------------------------ gigapath


def gigapath() -> Any:
    return example("examples", "gigapath")


def quoted(name: str, start: str) -> str:
    """The message in the page's table that begins so, which the page must hold."""
    [found] = re.findall(rf"^\| `({re.escape(start)}[^`]*)`", page(name), re.MULTILINE)
    return str(found)


def test_tiles_off_the_grid_are_refused_as_the_page_says() -> None:
    encoder = gigapath().GigaPathSlideEncoder(num_layers=1, embed_dim=32, num_heads=4, tile_dim=8)
    with pytest.raises(ValueError, match=re.escape(quoted("gigapath", "coords:"))):
        encoder(torch.zeros(1, 1, 8), torch.tensor([[[-256, 0]]]))


def test_another_file_than_a_checkpoint_is_refused_as_the_page_says(tmp_path: Path) -> None:
    torch.save({"weights": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=re.escape(quoted("gigapath", "checkpoint:"))):
        gigapath().load_slide_encoder(tmp_path / "other.pth")


def test_a_slide_of_185363_tiles_is_refused_and_one_less_is_not() -> None:
    assert "from 185,363 tiles on" in page("gigapath")
    pattern = DilatedPattern.gigapath()
    branches = pattern.segment_lengths, pattern.dilation_rates

    def plan(tiles: int) -> None:
        make_plan(1 + tiles, *branches, heads=16, world_size=1, semantics="torchscale")  # the slide's token is one more

    plan(185_362)
    with pytest.raises(ValueError, match=r"segment_lengths\[3\]: semantics=\"torchscale\""):
        plan(185_363)
    row = torch.empty(1, 185_364, 1, 1)
    with pytest.raises(ValueError, match=r"segment_lengths\[3\]: semantics=\"torchscale\""):
        dilated_attention(row, row, row, *branches, semantics="torchscale")


# ------------------------------------------------------------------------------------------------ million tokens


def test_the_plan_that_the_page_shows_is_the_plan() -> None:
    text = page("million-tokens")
    plan = make_plan(
        2**20, [2048, 8192, 32768, 131072, 2**20], [1, 4, 16, 64, 512], heads=16, world_size=16, is_causal=True
    )
    [shown] = re.findall(r"```text\n(1,048,576 tokens.*?)```", text, re.DOTALL)
    first, last = shown.split("\n...\n")
    described = plan.describe(torch.bfloat16, head_dim=64).strip()
    assert described.startswith(first)
    assert described.endswith(last.strip())


def test_with_eight_ranks_only_the_widest_branch_crosses() -> None:
    plan = make_plan(
        2**20, [2048, 8192, 32768, 131072, 2**20], [1, 4, 16, 64, 512], heads=16, world_size=8, is_causal=True
    )
    assert plan.exchanges == ("none", "none", "none", "none", "heads")


def test_the_model_of_the_command_at_full_size_takes_a_million_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = page("million-tokens").replace("\\\n", " ")
    [command] = re.findall(r"^torchrun --nnodes .*", joined, re.MULTILINE)
    words = shlex.split(command)
    script = words.index("train_longnet.py")
    monkeypatch.setenv("WORLD_SIZE", str(4 * 8))
    monkeypatch.setattr(sys, "argv", words[script:])
    train_longnet: Any = example("packages/ring/examples", "train_longnet")
    arguments = train_longnet.parse()
    assert arguments.context == 2**20
    # One narrow layer stands for all: what a position does depends on the width of a head alone.
    arguments.embed_dim, arguments.heads, arguments.layers = 64, 1, 1
    model = train_longnet.make_model(arguments)
    assert model.layers[0].self_attn.rotary.longest(torch.float32) >= 2**20


# ------------------------------------------------------------------------------------------------ a cache in a service


def computed_by(threads: int, ask: Any, started: threading.Barrier) -> list[Any]:
    def together(_: int) -> Any:
        started.wait(SECONDS)
        return ask()

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(together, range(threads)))


def test_lru_cache_computes_for_every_thread_that_asks_at_once_and_pattern_cache_for_one() -> None:
    threads = 8
    calls: list[str] = []
    inside = threading.Barrier(threads)

    @lru_cache
    def dear() -> str:
        calls.append("lru_cache")
        inside.wait(SECONDS)  # nobody is done before all have begun
        return "answer"

    computed_by(threads, dear, threading.Barrier(threads))
    assert calls == ["lru_cache"] * threads

    cache: PatternCache[str, str] = PatternCache()
    waiting = threading.Event()

    def once() -> str:
        calls.append("PatternCache")
        waiting.wait(0.05)
        return "answer"

    answers = computed_by(threads, lambda: cache.get_or_create("key", once), threading.Barrier(threads))
    assert answers == ["answer"] * threads
    assert calls.count("PatternCache") == 1


def test_when_the_client_that_computes_goes_away_one_that_waits_takes_over() -> None:
    cache: PatternCache[str, str] = PatternCache()
    calls: list[int] = []

    async def main() -> list[str]:
        first_is_in = asyncio.Event()

        async def compute(number: int) -> str:
            calls.append(number)
            first_is_in.set()
            if number == 0:
                await asyncio.Event().wait()  # for ever
            return f"by {number}"

        def ask(number: int) -> asyncio.Task[str]:
            return asyncio.create_task(cache.aget_or_create("key", lambda: compute(number)))

        first = ask(0)
        await first_is_in.wait()
        others = [ask(number) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        first.cancel()
        return await asyncio.wait_for(asyncio.gather(*others), SECONDS)

    answers = asyncio.run(main())
    assert len(calls) == 2
    assert answers == [f"by {calls[1]}"] * 3


def test_what_is_taken_out_during_its_computation_is_not_kept() -> None:
    cache: PatternCache[str, str] = PatternCache()

    def compute() -> str:
        with ThreadPoolExecutor(1) as another:
            another.submit(cache.pop, "key", None).result(SECONDS)
        return "old"

    assert cache.get_or_create("key", compute) == "old"
    assert "key" not in cache


def test_bytes_are_weighed_and_text_is_not_unless_size_of_says_so() -> None:
    plain: PatternCache[str, object] = PatternCache()
    plain["bytes"], plain["text"] = bytes(1000), "a" * 1000
    assert plain.nbytes == 1000
    weighed: PatternCache[str, str] = PatternCache(size_of=len)
    weighed["text"] = "a" * 1000
    assert weighed.nbytes == 1000


# ------------------------------------------------------------------------------------------------ reuse the pool


def test_an_expression_makes_its_result_outside_of_the_pool_and_out_does_not() -> None:
    numpy = pytest.importorskip("numpy")
    from dilated_memory_pool.interop.numpy import empty

    pool = MemoryPool("host")
    array = empty(pool, 1000, "float32")
    array[...] = 1
    held = pool.statistics().requested_bytes
    _ = array / 255
    assert pool.statistics().requested_bytes == held
    result = empty(pool, 1000, "float32")
    assert numpy.divide(array, 255, out=result) is result
    assert pool.statistics().requested_bytes == 2 * held


def test_what_a_compiled_function_makes_inside_is_not_the_pools() -> None:
    numba, numpy = pytest.importorskip("numba"), pytest.importorskip("numpy")
    from dilated_memory_pool.interop.numpy import empty

    pool = MemoryPool("host")
    array = empty(pool, 1000, "float32")
    array[...] = 3

    @numba.njit
    def doubled(values: Any) -> Any:
        made = numpy.empty_like(values)
        for index in range(values.size):
            made[index] = 2 * values[index]
        return made

    result = doubled(array)
    assert result[0] == 6
    assert pool.statistics().requested_bytes == array.nbytes


def test_a_pool_of_the_host_is_not_shared_with_cupy_and_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=re.escape(quoted("reuse-the-pool", "share_with_cupy"))):
        MemoryPool("host").share_with_cupy()
