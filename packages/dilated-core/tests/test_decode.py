"""Decoding with a cache: every output row is that row of the full causal call, and memory stays within its bound."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from core_cases import FORWARD_TOLERANCE, deviation
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dilated_core import reference
from dilated_core.decode import DilatedKVCache, decode_step
from dilated_core.decode.lanes import plan_lanes, rows_before
from dilated_core.decode.store import FIRST_ROWS
from dilated_core.plan import head_phases

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@dataclass(frozen=True)
class Talk:
    """A sequence of tokens to decode; its id reads like B2-N63-H4-KV2-D8-w(8,32)-r(1,4)-paper."""

    batch: int
    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    semantics: str = "paper"
    seed: int = 0

    def __str__(self) -> str:
        numbers = f"B{self.batch}-N{self.seq}-H{self.heads}-KV{self.kv_heads}-D{self.head_dim}"
        w, r = (",".join(map(str, values)) for values in (self.segment_lengths, self.dilation_rates))
        return f"{numbers}-w({w})-r({r})-{self.semantics}"

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """Standard normal query, key and value, the same values in every dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        shapes = [(self.batch, self.seq, count, self.head_dim) for count in heads]
        query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return query.to(dtype), key.to(dtype), value.to(dtype)

    def cache(self, dtype: torch.dtype = torch.float64, **options: object) -> DilatedKVCache:
        """An empty one."""
        return DilatedKVCache(
            self.segment_lengths,
            self.dilation_rates,
            batch_size=self.batch,
            num_heads=self.heads,
            head_dim=self.head_dim,
            kv_heads=self.kv_heads,
            semantics=self.semantics,
            dtype=dtype,
            **options,  # type: ignore[arg-type]
        )

    def oracle(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All rows by the definition, in float64."""
        key, value = (tensor.repeat_interleave(self.heads // self.kv_heads, dim=2) for tensor in (key, value))
        pattern = self.segment_lengths, self.dilation_rates
        qkv = query.double(), key.double(), value.double()
        return reference.dilated_attention(*qkv, *pattern, is_causal=True, semantics=self.semantics)[0]


def decode(cache: DilatedKVCache, tensors: Sequence[Tensor], chunks: Sequence[int], **options: object) -> Tensor:
    """The outputs of all chunks; after each, the memory is within its bound."""
    outs, position = [], 0
    for count in chunks:
        outs.append(decode_step(*(t[:, position : position + count] for t in tensors), cache, **options))  # type: ignore[arg-type]
        position += count
        assert cache.nbytes <= cache.max_nbytes
    return torch.cat(outs, dim=1)


# Primes and raggedness, w > N, r that does not divide w, more phases than heads, places that no branch covers, grouped
# heads whose lanes several heads share unevenly.
TALKS = [
    Talk(1, 1, 1, 1, 1, (1,), (1,)),
    Talk(2, 13, 3, 3, 4, (7,), (1,)),
    Talk(1, 37, 4, 4, 8, (4, 8, 16), (1, 2, 4)),
    Talk(2, 31, 5, 5, 8, (5, 12), (1, 5)),
    Talk(1, 29, 3, 1, 3, (6, 64), (4, 7)),
    Talk(2, 53, 12, 3, 8, (11, 25, 200), (2, 3, 9)),
    Talk(1, 41, 24, 8, 4, (20,), (6,)),
    Talk(1, 40, 5, 5, 8, (4, 8, 18), (1, 2, 3), "torchscale"),
    Talk(2, 43, 12, 4, 8, (12, 24, 43), (2, 3, 7), "torchscale"),
    Talk(1, 47, 7, 7, 8, (5, 12, 50), (1, 3, 4), "grouped"),
    Talk(2, 23, 8, 2, 8, (6, 11), (2, 3), "grouped"),
    Talk(1, 19, 2, 2, 8, (6, 11, 7), (2, 3, 1), "grouped"),
]


@st.composite
def talks(draw: st.DrawFn) -> Talk:
    """Any small one that its semantics allow."""
    seq = draw(st.integers(1, 70))
    kv_heads = draw(st.integers(1, 4))
    semantics = draw(st.sampled_from(["paper", "torchscale", "grouped"]))
    lengths, rates = [], []
    for _ in range(draw(st.integers(1, 4))):
        rate = draw(st.integers(1, 12))
        length = draw(st.integers(rate, 90))
        if semantics == "torchscale" and length < seq:
            length -= length % rate
        lengths.append(length)
        rates.append(rate)
    return Talk(
        batch=draw(st.integers(1, 3)),
        seq=seq,
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 3, 8])),
        segment_lengths=tuple(lengths),
        dilation_rates=tuple(rates),
        semantics=semantics,
        seed=draw(st.integers(0, 2**20)),
    )


@st.composite
def chunkings(draw: st.DrawFn, seq: int) -> list[int]:
    """Ways to cut ``seq`` tokens into steps, single tokens and empty steps among them."""
    chunks = []
    while sum(chunks) < seq:
        longest = seq - sum(chunks)
        chunks.append(draw(st.one_of(st.just(1), st.integers(0, longest))))
    return chunks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("talk", TALKS, ids=str)
def test_token_by_token(talk: Talk, dtype: torch.dtype) -> None:
    tensors = talk.tensors(dtype)
    cache = talk.cache(dtype)
    out = decode(cache, tensors, [1] * talk.seq)
    assert out.dtype == dtype
    assert deviation(out, talk.oracle(*tensors)) <= FORWARD_TOLERANCE[dtype]
    assert cache.lengths == (talk.seq,) * talk.batch


@pytest.mark.parametrize("talk", TALKS, ids=str)
def test_every_prompt_length(talk: Talk) -> None:
    tensors = talk.tensors()
    oracle = talk.oracle(*tensors)
    for prompt in range(talk.seq + 1):
        steps = [prompt] + [1] * min(2, talk.seq - prompt)
        steps.append(talk.seq - sum(steps))
        out = decode(talk.cache(), tensors, steps)
        assert deviation(out, oracle) <= FORWARD_TOLERANCE[torch.float64], f"prompt of {prompt}"


@given(data=st.data())
def test_any_chunking(data: st.DataObject) -> None:
    talk = data.draw(talks())
    chunks = data.draw(chunkings(talk.seq))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    tensors = talk.tensors(dtype)
    out = decode(talk.cache(dtype), tensors, chunks)
    assert deviation(out, talk.oracle(*tensors)) <= FORWARD_TOLERANCE[dtype]


@given(data=st.data())
def test_rows_of_different_lengths(data: st.DataObject) -> None:
    """Each batch row takes its own number of tokens a step; padding at the right holds NaN."""
    talk = data.draw(talks())
    tensors = talk.tensors()
    oracle = talk.oracle(*tensors)
    cache = talk.cache()
    for _ in range(data.draw(st.integers(1, 6))):
        before = cache.lengths
        left = [talk.seq - position for position in before]
        longest = data.draw(st.integers(0, max(left)))
        counts = [data.draw(st.integers(0, min(longest, rest))) for rest in left]
        step = [torch.full((talk.batch, longest, *t.shape[2:]), math.nan, dtype=t.dtype) for t in tensors]
        for row, (position, count) in enumerate(zip(before, counts, strict=True)):
            for padded, tensor in zip(step, tensors, strict=True):
                padded[row, :count] = tensor[row, position : position + count]
        lengths = torch.tensor(counts) if data.draw(st.booleans()) else counts
        out = decode_step(*step, cache, lengths=lengths)  # type: ignore[misc]
        for row, (position, count) in enumerate(zip(before, counts, strict=True)):
            expected = oracle[row, position : position + count]
            assert deviation(out[row, :count], expected) <= FORWARD_TOLERANCE[torch.float64]
            assert (out[row, count:] == 0).all()
        assert cache.lengths == tuple(a + b for a, b in zip(before, counts, strict=True))
        assert cache.nbytes <= cache.max_nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("talk", TALKS, ids=str)
def test_half_precision(talk: Talk, dtype: torch.dtype) -> None:
    tensors = talk.tensors(dtype)
    out = decode(talk.cache(dtype), tensors, [talk.seq // 3, 1, 0, 1, talk.seq])
    assert out.dtype == dtype
    assert deviation(out, talk.oracle(*tensors)) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("steps", [[41], [1] * 41, [7, 1, 20, 1, 12]], ids=["prompt", "tokens", "chunks"])
def test_options_reach_the_kernel(steps: list[int]) -> None:
    talk = Talk(1, 41, 4, 2, 8, (8, 16), (1, 3))
    tensors = talk.tensors()
    out = decode(talk.cache(), tensors, steps, scale=0.7, kernel="math")
    query, key, value = tensors
    assert deviation(out, talk.oracle(query * (0.7 * math.sqrt(8)), key, value)) <= FORWARD_TOLERANCE[torch.float64]


def test_strided_inputs() -> None:
    talk = Talk(2, 31, 4, 4, 8, (8, 16), (1, 2))
    strided = [tensor.transpose(1, 3).contiguous().transpose(1, 3) for tensor in talk.tensors()]
    assert strided[0].stride(-1) != 1
    out = decode(talk.cache(), strided, [9, 1, 1, 13, 7])
    assert deviation(out, talk.oracle(*strided)) <= FORWARD_TOLERANCE[torch.float64]


@pytest.mark.parametrize("batch", [0, 2])
def test_no_rows_and_no_tokens(batch: int) -> None:
    talk = Talk(batch, 3, 2, 2, 4, (4,), (1,))
    cache = talk.cache()
    assert decode(cache, talk.tensors(), [0, 0]).shape == (batch, 0, 2, 4)
    assert cache.nbytes == cache.live_rows == 0
    assert decode(cache, talk.tensors(), [2, 1]).shape == (batch, 3, 2, 4)


def test_a_bad_token_does_not_outlive_its_segment() -> None:
    """NaN in one token reaches the rows that attend it, and leaves with its segment."""
    talk = Talk(1, 24, 2, 2, 4, (8,), (2,))  # half of the places are on no grid
    tensors = talk.tensors()
    oracle = talk.oracle(*tensors)
    for tensor in tensors:
        tensor[:, 3] = math.nan
    out = decode(talk.cache(), tensors, [1] * 24)
    reached = out.isnan().all(-1)
    assert reached.nonzero().tolist() == [[0, 3, 1], [0, 5, 1], [0, 7, 1]]
    assert deviation(out[~reached], oracle[~reached]) <= FORWARD_TOLERANCE[torch.float64]


def test_autocast_casts_nothing() -> None:
    talk = Talk(1, 30, 4, 4, 8, (8, 16), (1, 2))
    tensors = talk.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for kernel in ("auto", "math"):
            out = decode(talk.cache(torch.float32), tensors, [11, 1, 18], kernel=kernel)
            assert deviation(out, talk.oracle(*tensors)) <= FORWARD_TOLERANCE[torch.float32]


def test_inside_and_outside_inference_mode() -> None:
    talk = Talk(1, 60, 4, 4, 8, (16, 32), (1, 2))
    tensors = talk.tensors()
    with torch.inference_mode():
        cache = talk.cache()
        first = decode(cache, tensors, [20, 1, 1])
    rest = decode(cache, [tensor[:, 22:] for tensor in tensors], [1, 17, 1, 1])
    cache.reorder([0])
    with torch.inference_mode():
        last = decode(cache, [tensor[:, 42:] for tensor in tensors], [1, 17])
    assert deviation(torch.cat([first, rest, last], 1), talk.oracle(*tensors)) <= FORWARD_TOLERANCE[torch.float64]


def test_compiled_code_breaks_its_graph_and_runs() -> None:
    talk = Talk(1, 20, 2, 2, 4, (8,), (2,))
    tensors = talk.tensors()
    cache = talk.cache()

    def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return decode_step(query, key, value, cache) * 2

    compiled = torch.compile(model, backend="eager")
    outs = [compiled(*(tensor[:, row : row + 1] for tensor in tensors)) for row in range(20)]
    assert deviation(torch.cat(outs, 1), 2 * talk.oracle(*tensors)) <= FORWARD_TOLERANCE[torch.float64]


# ------------------------------------------------------------------------------------------------ memory


def test_memory_stops_growing_once_segments_close() -> None:
    talk = Talk(2, 150, 6, 3, 4, (24, 50), (2, 5))
    cache = talk.cache()
    tensors = talk.tensors()
    kept = []
    for row in range(talk.seq):
        decode_step(*(tensor[:, row : row + 1] for tensor in tensors), cache)
        kept.append(cache.nbytes)
    assert kept == sorted(kept)
    assert kept[0] > 0
    assert set(kept[50:]) == {cache.max_nbytes}


def test_bound_in_bytes() -> None:
    """2 * batch * head_dim * itemsize * sum of lanes * rows a lane, by hand."""
    cache = DilatedKVCache([8, 21], [1, 4], batch_size=3, num_heads=6, kv_heads=2, head_dim=5, dtype=torch.bfloat16)
    # Rate 1: a lane each key head. Rate 4: phases 0 1 2 3 0 1 of heads 0 to 5, key heads 0 0 0 1 1 1: 6 pairs.
    assert cache.max_nbytes == 2 * 3 * 5 * 2 * (2 * 8 + 6 * 6)


def test_a_segment_longer_than_all_tokens_costs_nothing() -> None:
    talk = Talk(1, 50, 2, 2, 4, (1 << 40,), (1 << 20,))
    cache = talk.cache()
    out = decode(cache, talk.tensors(), [9] + [1] * 41)
    assert deviation(out, talk.oracle(*talk.tensors())) <= FORWARD_TOLERANCE[torch.float64]
    assert cache.nbytes == 2 * 2 * FIRST_ROWS * 4 * 8  # one row is kept


def test_prompt_keeps_only_the_open_segments() -> None:
    talk = Talk(1, 64, 4, 4, 8, (8, 32), (1, 2))
    cache = talk.cache()
    decode(cache, talk.tensors(), [64])
    assert cache.nbytes == cache.live_rows == 0
    decode_step(*(tensor[:, :1] for tensor in talk.tensors()), cache)
    assert cache.live_rows == 4 + 2  # position 64: every head in branch 0, heads 0 and 2 in branch 1


@given(talk=talks())
def test_live_rows(talk: Talk) -> None:
    """By the definition: the distinct (branch, key head, position) that some query head has in the open segment."""
    cache = talk.cache()
    decode(cache, talk.tensors(), [talk.seq])
    live = set()
    for branch, (w, r) in enumerate(zip(talk.segment_lengths, talk.dilation_rates, strict=True)):
        phases = head_phases(talk.semantics, branch, len(talk.dilation_rates), r, talk.heads)
        for head, phase in enumerate(phases):
            for position in range(talk.seq // w * w, talk.seq):
                if position % w % r == phase:
                    live.add((branch, head * talk.kv_heads // talk.heads, position))
    assert cache.live_rows == talk.batch * len(live)


@given(talk=talks())
def test_lanes_hold_every_head_once(talk: Talk) -> None:
    plans = plan_lanes(talk.segment_lengths, talk.dilation_rates, talk.semantics, talk.heads, talk.kv_heads)
    for branch, plan in enumerate(plans):
        found: dict[int, int] = {}
        lanes: list[int] = []
        for phase, bundles in sorted(plan.bundles.items()):
            for bundle in bundles:
                lanes += range(bundle.lanes.start, bundle.lanes.stop)
                share = len(bundle.heads) // len(bundle.kv_heads)
                for index, head in enumerate(bundle.heads):
                    assert bundle.kv_heads[index // share] == head * talk.kv_heads // talk.heads
                    assert head not in found
                    found[head] = phase
        assert lanes == list(range(plan.lanes))
        phases = head_phases(talk.semantics, branch, len(plans), plan.rate, talk.heads)
        assert found == {head: phase for head, phase in enumerate(phases) if phase is not None}
        assert plan.lanes * plan.rows <= talk.kv_heads * (plan.segment_length + plan.rate)


@given(offset=st.integers(0, 60), rate=st.integers(1, 20), data=st.data())
def test_rows_before(offset: int, rate: int, data: st.DataObject) -> None:
    phase = data.draw(st.integers(0, rate - 1))
    assert rows_before(offset, phase, rate) == len(range(phase, offset, rate))


class Recorder:
    """An allocator that remembers what it was asked for."""

    def __init__(self) -> None:
        self.given: list[tuple[tuple[int, ...], torch.dtype, torch.device]] = []

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.given.append((tuple(size), dtype, device))
        return torch.empty(size, dtype=dtype, device=device)


def test_rows_come_from_the_allocator() -> None:
    recorder = Recorder()
    talk = Talk(1, 40, 2, 2, 4, (32,), (1,))
    cache = talk.cache(allocator=recorder)
    assert not recorder.given
    out = decode(cache, talk.tensors(), [1] * 40)
    assert deviation(out, talk.oracle(*talk.tensors())) <= FORWARD_TOLERANCE[torch.float64]
    cpu = torch.device("cpu")
    assert recorder.given == [((2, 1, 2, rows, 4), torch.float64, cpu) for rows in (16, 32)]


# ------------------------------------------------------------------------------------------------ reset and reorder


def test_reset() -> None:
    talk = Talk(3, 30, 4, 2, 8, (8, 20), (1, 3))
    cache = talk.cache()
    tensors = talk.tensors()
    oracle = talk.oracle(*tensors)
    decode(cache, [tensor.flip(1) for tensor in tensors], [13, 1])
    cache.reset()
    assert cache.lengths == (0, 0, 0)
    assert deviation(decode(cache, tensors, [11, 1, 18]), oracle) <= FORWARD_TOLERANCE[torch.float64]
    cache.reset([1])
    assert cache.lengths == (30, 0, 30)
    out = decode_step(*(tensor[:, :5] for tensor in tensors), cache, lengths=[0, 5, 0])
    assert deviation(out[1], oracle[1, :5]) <= FORWARD_TOLERANCE[torch.float64]
    cache.reset(torch.tensor([0, 2]))
    assert cache.lengths == (0, 5, 0)


@pytest.mark.parametrize("indices", [[0, 1, 2], [2, 0, 1], [1, 1, 0], torch.tensor([2, 2, 2])], ids=str)
def test_reorder(indices: list[int] | Tensor) -> None:
    """Rows of different lengths, as beams are: each goes on from the one it was told to."""
    talk = Talk(3, 40, 4, 2, 8, (8, 20), (1, 3))
    cache = talk.cache()
    tensors = talk.tensors()
    prompts = [7, 17, 13]
    decode_step(*(tensor[:, :17] for tensor in tensors), cache, lengths=prompts)
    cache.reorder(indices)
    chosen = [int(index) for index in indices]
    assert cache.lengths == tuple(prompts[row] for row in chosen)
    moved = [tensor[chosen] for tensor in tensors]
    for row in range(3):  # put each row's next tokens first
        for tensor in moved:
            tensor[row] = tensor[row].roll(-prompts[chosen[row]], 0)
    outs = [decode_step(*(tensor[:, i : i + 1] for tensor in moved), cache) for i in range(20)]
    oracle = talk.oracle(*tensors)
    for row, source in enumerate(chosen):
        expected = oracle[source, prompts[source] : prompts[source] + 20]
        assert deviation(torch.cat(outs, 1)[row], expected) <= FORWARD_TOLERANCE[torch.float64]


# ------------------------------------------------------------------------------------------------ bad input

CACHE = {"segment_lengths": [2, 4], "dilation_rates": [1, 2], "batch_size": 2, "num_heads": 4, "head_dim": 8}
CACHE_FAULTS = {
    "swapped": ({"segment_lengths": [1, 2], "dilation_rates": [2, 4]}, ValueError, "were the two lists swapped"),
    "batch negative": ({"batch_size": -1}, ValueError, "batch_size: expected an int of at least 0, got -1"),
    "batch a float": ({"batch_size": 2.0}, TypeError, "batch_size: expected an int of at least 0, got 2.0"),
    "no heads": ({"num_heads": 0}, ValueError, "num_heads: expected a positive int, got 0"),
    "no width": ({"head_dim": 0}, ValueError, "head_dim: expected a positive int, got 0"),
    "kv heads no divisor": ({"kv_heads": 3}, ValueError, "kv_heads: expected a divisor of num_heads = 4, got 3"),
    "kv heads a string": ({"kv_heads": "2"}, TypeError, "kv_heads: expected a positive int"),
    "semantics unknown": ({"semantics": "magic"}, ValueError, "semantics: expected one of"),
    "dtype of ints": ({"dtype": torch.int64}, TypeError, "dtype: expected float64, float32, .* got torch.int64"),
    "dtype a string": ({"dtype": "float32"}, TypeError, "dtype: expected float64, float32, .* got 'float32'"),
    "allocator a number": ({"allocator": 3}, TypeError, "allocator: expected an object with empty"),
}
X = torch.zeros(2, 6, 4, 8)
STEP = {"query": X, "key": X, "value": X}
STEP_FAULTS = {
    "no tensor": ({"query": None}, TypeError, "query: expected a torch.Tensor, got NoneType"),
    "no cache": ({"cache": {}}, TypeError, "cache: expected a DilatedKVCache, got dict"),
    "another length": ({"key": X[:, :5], "value": X[:, :5]}, ValueError, "key: expected the seq of query, 6, got 5"),
    "another dtype": (
        {"query": X.double(), "key": X.double(), "value": X.double()},
        TypeError,
        "query: expected the dtype of the cache, torch.float32, got torch.float64",
    ),
    "another device": (
        {"query": X.to("meta"), "key": X.to("meta"), "value": X.to("meta")},
        ValueError,
        "query: expected the device of the cache, cpu, got meta",
    ),
    "another batch": (
        {"query": X[:1], "key": X[:1], "value": X[:1]},
        ValueError,
        r"query: expected the cache's \(batch, seq, heads, head_dim\) = \(2, seq, 4, 8\), got \(1, 6, 4, 8\)",
    ),
    "fewer heads": (
        {"query": X[:, :, :2], "key": X[:, :, :2], "value": X[:, :, :2]},
        ValueError,
        r"query: expected the cache's .* \(2, seq, 4, 8\), got \(2, 6, 2, 8\)",
    ),
    "fewer kv heads": (
        {"key": X[:, :, :2], "value": X[:, :, :2]},
        ValueError,
        r"key: expected the cache's .* \(2, seq, 4, 8\), got \(2, 6, 2, 8\)",
    ),
    "grad": ({"key": X.clone().requires_grad_()}, ValueError, "key: expected a tensor that does not require grad"),
    "scale a string": ({"scale": "1"}, TypeError, "scale: expected a float or None"),
    "kernel unknown": ({"kernel": "magic"}, ValueError, "kernel: expected one of"),
    "kernel impossible": ({"kernel": "cuda_flash"}, ValueError, 'kernel: "cuda_flash" cannot run'),
    "lengths a number": ({"lengths": 6}, TypeError, "lengths: expected ints or a 1-D integer tensor, got 6"),
    "lengths of floats": ({"lengths": [1, 2.0]}, TypeError, r"lengths\[1\]: expected an int of at least 0, got 2.0"),
    "lengths a float tensor": ({"lengths": torch.ones(2)}, TypeError, "lengths: expected ints .* torch.float32"),
    "lengths a bool tensor": ({"lengths": torch.ones(2).bool()}, TypeError, "lengths: expected ints .* torch.bool"),
    "lengths of 2 dims": ({"lengths": torch.ones(1, 2).int()}, TypeError, r"lengths: expected ints .*shape \(1, 2\)"),
    "too few lengths": ({"lengths": [6]}, ValueError, "lengths: expected 2, one a batch row, got 1"),
    "a length too long": ({"lengths": [6, 7]}, ValueError, r"lengths\[1\]: expected at most 6, got 7"),
    "a length below 0": ({"lengths": [6, -1]}, ValueError, r"lengths\[1\]: expected an int of at least 0, got -1"),
}


@pytest.mark.parametrize(("change", "error", "message"), CACHE_FAULTS.values(), ids=CACHE_FAULTS)
def test_bad_cache(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DilatedKVCache(**{**CACHE, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(("change", "error", "message"), STEP_FAULTS.values(), ids=STEP_FAULTS)
def test_bad_step(change: dict[str, object], error: type[Exception], message: str) -> None:
    cache = DilatedKVCache(**CACHE)  # type: ignore[arg-type]
    decode_step(**STEP, cache=cache)
    kept = cache.lengths, cache.nbytes
    with pytest.raises(error, match=message):
        decode_step(**{**STEP, "cache": cache, **change})  # type: ignore[arg-type]
    assert (cache.lengths, cache.nbytes) == kept


def test_grad_is_refused_only_where_it_would_be_lost() -> None:
    cache = DilatedKVCache(**CACHE)  # type: ignore[arg-type]
    leaf = X.clone().requires_grad_()
    with torch.no_grad():
        assert not decode_step(leaf, leaf, leaf, cache).requires_grad


def test_torchscale_refuses_a_second_ragged_segment() -> None:
    """Before anything changes: the cache goes on as long as the length allows."""
    talk = Talk(1, 10, 2, 2, 4, (7,), (2,), "torchscale")
    tensors = talk.tensors()
    cache = talk.cache()
    out = decode(cache, tensors, [5, 1])
    for count in (2, 4):
        with pytest.raises(ValueError, match=r'segment_lengths\[0\]: semantics="torchscale" needs a multiple'):
            decode_step(*(tensor[:, 6 : 6 + count] for tensor in tensors), cache)
    last = decode_step(*(tensor[:, 6:7] for tensor in tensors), cache)
    oracle = Talk(1, 7, 2, 2, 4, (7,), (2,), "torchscale").oracle(*(tensor[:, :7] for tensor in tensors))
    assert deviation(torch.cat([out, last], 1), oracle) <= FORWARD_TOLERANCE[torch.float64]


@pytest.mark.parametrize("method", ["reset", "reorder"])
@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (1, TypeError, "expected ints or a 1-D integer tensor, got 1 of type int"),
        ("01", TypeError, "expected ints or a 1-D integer tensor, got '01'"),
        ([0, 2], ValueError, r"\[1\]: expected at most 1, got 2"),
        ([0, True], TypeError, r"\[1\]: expected an int of at least 0, got True"),
    ],
)
def test_bad_rows(method: str, rows: object, error: type[Exception], message: str) -> None:
    cache = DilatedKVCache(**CACHE)  # type: ignore[arg-type]
    name = {"reset": "rows", "reorder": "indices"}[method]
    with pytest.raises(error, match=name + ".*" + message):
        getattr(cache, method)(rows)


def test_bad_reorder_count() -> None:
    with pytest.raises(ValueError, match="indices: expected 2, one a batch row, got 1"):
        DilatedKVCache(**CACHE).reorder([0])  # type: ignore[arg-type]


def test_repr() -> None:
    cache = DilatedKVCache(**CACHE)  # type: ignore[arg-type]
    decode_step(**STEP, cache=cache, lengths=[3, 6])
    assert repr(cache).startswith("DilatedKVCache(segment_lengths=[2, 4], dilation_rates=[1, 2], batch_size=2,")
    assert f"lengths=[3, 6], nbytes={cache.nbytes}, max_nbytes={cache.max_nbytes})" in repr(cache)


# ------------------------------------------------------------------------------------------------ the benchmark


def test_decode_benchmark(tmp_path: Path) -> None:
    sizes = ["--lengths", "300", "700", "--repeats", "2", "--output", str(tmp_path)]
    script = str(BENCHMARKS / "bench_decode.py")
    ran = subprocess.run([sys.executable, script, *sizes], capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [300, 700]
    for row in rows:
        assert 0 < max(row["deviation_from_definition"].values()) < 2e-6
        assert set(row["seconds"]) == {"ours", "kernels", "dense"}
        assert row["bytes_allocated"] <= row["bytes_at_most"]
    page = (tmp_path / "decode.md").read_text()
    assert "\n| 300 |" in page
    assert "\n| 700 |" in page
