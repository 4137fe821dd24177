"""The Triton kernel, in Triton's interpreter, against the oracle: forward, every gradient, all options, small shapes.

What the interpreter cannot show is shown elsewhere: that it compiles (test_triton_compile), and on a card (test_cuda).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from core_cases import LAYOUTS, Case, assert_close, cases, oracle, packed, run
from hypothesis import given, settings
from torch import Tensor

from dilated_core import (
    DilatedKVCache,
    attend,
    decode_step,
    dilated_attention,
    kernels,
    reference,
)
from dilated_core.kernels.triton import blocks, launch, tuning
from dilated_core.kernels.triton import kernel as triton_kernel
from dilated_core.kernels.triton.schedule import Branches, cell_length, make_tables, row_order
from dilated_core.kernels.triton.tuning import tune

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("with a card the programs are compiled: see test_cuda", allow_module_level=True)

CPU = torch.device("cpu")
# Tiles are of 16 rows here, and keys are walked 16 at a time: several tiles, ragged ends, tiles of mixed membership.
MIXED = Case(1, 37, 3, 8, (8, 20, 90), (1, 3, 4))
SMALL = replace(MIXED, seq=21)


def _check(case: Case, dtype: torch.dtype = torch.float32) -> None:
    results = run(case, dtype, kernel="triton", with_lse=True)
    assert_close(case, dtype, results, oracle(case, dtype, with_lse=True))


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 1, 1, (1,), (1,)),
        Case(2, 7, 3, 4, (7,), (1,)),
        Case(1, 16, 4, 8, (4, 8, 16), (1, 2, 4)),
        Case(1, 29, 3, 3, (6, 64), (4, 7)),
        Case(1, 50, 1, 8, (50, 50), (1, 1)),
        Case(2, 31, 2, 8, (5, 12), (1, 5)),
        Case(1, 50, 2, 16, (16, 36), (2, 3)),
        MIXED,
    ],
    ids=str,
)
def test_agrees_with_the_oracle(case: Case, is_causal: bool) -> None:
    _check(replace(case, is_causal=is_causal))


@pytest.mark.parametrize(
    ("semantics", "is_causal", "mask", "batch", "heads", "kv_heads"),
    [
        ("paper", False, "random", 1, 4, 2),
        ("paper", True, "right", 2, 2, 1),
        ("torchscale", False, "none", 1, 2, None),
        ("torchscale", False, "random", 1, 4, 2),
        ("torchscale", True, "right", 2, 2, 1),
        ("grouped", False, "right", 2, 4, 2),
        ("grouped", True, "none", 1, 2, 1),
    ],
)
def test_options_agree_with_the_oracle(
    semantics: str, is_causal: bool, mask: str, batch: int, heads: int, kv_heads: int | None
) -> None:
    """As few programs as show each option: every head and batch row is one more for each tile."""
    case = replace(SMALL, batch=batch, heads=heads, is_causal=is_causal, mask=mask, kv_heads=kv_heads)
    _check(case.meaning(semantics))


@pytest.mark.parametrize("semantics", ["paper", "torchscale", "grouped"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_packed_sequences_agree_with_the_oracle(semantics: str, is_causal: bool) -> None:
    mask = "random" if is_causal else "none"
    _check(packed(replace(SMALL, heads=2, semantics=semantics, is_causal=is_causal, mask=mask), [5, 1, 0, 19]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_half_precision(dtype: torch.dtype, is_causal: bool) -> None:
    _check(replace(SMALL, head_dim=16, heads=2, kv_heads=1, is_causal=is_causal), dtype)


@pytest.mark.parametrize("head_dim", [16, 48, 72, 256])
def test_head_dims(head_dim: int) -> None:
    _check(replace(SMALL, heads=1, head_dim=head_dim))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "plain"])
def test_layouts(layout: str) -> None:
    _check(replace(SMALL, heads=2, layout=layout))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0])
def test_scales(scale: float) -> None:
    _check(replace(SMALL, heads=1, scale=scale))


@settings(max_examples=3)
@given(case=cases(options=True))
def test_any_small_problem(case: Case) -> None:
    heads = min(case.heads, 2)
    kv_heads = None if case.kv_heads is None or heads % case.kv_heads else case.kv_heads
    _check(replace(case, batch=1, seq=min(case.seq, 33), heads=heads, kv_heads=kv_heads).meaning(case.semantics))


@pytest.mark.fuzz
@settings(settings.get_profile("fuzz"), max_examples=300)  # the interpreter takes seconds for each
@given(case=cases(options=True))
def test_many_problems(case: Case) -> None:
    _check(case)


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_results_do_not_depend_on_the_order_of_rows(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(branches: Tensor, phases: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
        assert len(bounds) == 1
        return torch.stack([torch.randperm(bounds[0][1]).int() for _ in range(phases.shape[1])])

    case = replace(SMALL, heads=2, is_causal=is_causal)
    monkeypatch.setattr("dilated_core.kernels.triton.schedule.row_order", shuffled)
    triton_kernel._recent_tables.cache_clear()
    _check(case)
    triton_kernel._recent_tables.cache_clear()


def test_the_order_brings_rows_of_the_same_branches_together() -> None:
    branches = torch.tensor([[8, 2], [4, 1], [8, 4]])
    phases = torch.tensor([[0, 1], [0, 0], [0, 3]])
    order = row_order(branches, phases, [(0, 8), (8, 14)])
    assert order.tolist() == [
        [2, 0, 1, 3, 7, 5, 4, 6, 10, 8, 9, 11, 13, 12],
        [1, 3, 0, 2, 6, 4, 7, 5, 9, 11, 8, 10, 12, 13],
    ]


def test_few_rows_with_many_keys_are_grouped_over_several_of_the_shortest_segments() -> None:
    assert cell_length([(1024, 1), (185363, 8), (1048576, 16)], longest=1048576) == 2048  # 128 rows of rate 16
    assert cell_length([(1024, 1), (185363, 8), (1048576, 16)], longest=32768) == 1024  # they meet 2,048 keys
    assert cell_length([(2048, 1), (32768, 12)], longest=32768) == 2048  # 170 rows of rate 12
    assert cell_length([(32768, 12)], longest=100_000) == 32768


def test_heads_of_equal_phases_share_an_order() -> None:
    tables = make_tables(Branches(((4, 1), (8, 2)), ((0, 0, 0), (0, 1, 0))), [(0, 9)], CPU)
    assert tables.order is not None
    assert tables.order.shape == (2, 9)
    assert tables.head_class is not None
    assert tables.head_class.tolist() == [0, 1, 0]


def test_a_pattern_without_dilation_needs_no_order() -> None:
    assert make_tables(Branches(((4, 1), (8, 1)), ((0,), (0,))), [(0, 9)], CPU).order is None


def test_tables_are_kept_in_the_store_of_the_caller() -> None:
    class Store:
        def __init__(self) -> None:
            self.kept: dict[object, object] = {}

        def get_or_create(self, key: object, create: object) -> object:
            if key not in self.kept:
                self.kept[key] = create()  # type: ignore[operator]
            return self.kept[key]

    store = Store()
    query = torch.randn(1, 9, 2, 8, requires_grad=True)
    for _ in range(2):
        out = dilated_attention(query, query, query, [4, 8], [1, 2], kernel="triton", patterns=store)
        torch.autograd.grad(out, query, torch.randn_like(out))
    assert len(store.kept) == 1


def test_what_padding_holds_has_no_influence() -> None:
    query, key, value, cotangent = torch.randn(4, 1, 21, 1, 8).unbind()
    real = torch.arange(21)[None] < 13
    results = []
    for filler in (0.0, float("nan")):
        leaves = [query, *(tensor.masked_fill(~real[:, :, None, None], filler) for tensor in (key, value))]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = dilated_attention(*leaves, [4, 16], [1, 2], key_padding_mask=real, kernel="triton")
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    for zeros, nans in zip(*results, strict=True):
        assert torch.equal(zeros, nans)


def test_rates_beyond_every_length() -> None:
    query = torch.randn(1, 5, 2, 8)
    for rate in (7, 2**31 - 1, 2**32):
        ours, exact = (
            dilated_attention(query, query, query, [2**33], [rate], kernel=name) for name in ("triton", "math")
        )
        assert torch.allclose(ours, exact, atol=1e-6)


def test_bits_are_the_same_at_every_run() -> None:
    case = replace(SMALL, heads=2, kv_heads=1)
    first, second = (run(case, torch.float32, kernel="triton", with_lse=True) for _ in range(2))
    for once, again in zip(first.each(), second.each(), strict=True):
        assert torch.equal(once, again)


def test_empty_inputs() -> None:
    for shape in ((0, 5, 2, 8), (1, 0, 2, 8)):
        query = torch.randn(shape, requires_grad=True)
        out = dilated_attention(query, query, query, [4], [2], kernel="triton")
        assert torch.autograd.grad(out.sum(), query)[0].shape == out.shape == shape


@pytest.mark.parametrize(("rows", "keys"), [(3, 20), (20, 3), (1, 130)])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_one_tile_of_any_lengths(rows: int, keys: int, masked: bool) -> None:
    """The last has so few rows that the keys are split over several programs."""
    query = torch.randn(2, rows, 2, 8, requires_grad=True)
    key, value = (torch.randn(2, keys, 2, 8, requires_grad=True) for _ in range(2))
    real = torch.rand(2, keys) < 0.5 if masked else None
    if real is not None:
        real[1] = False
    grads = torch.randn(2, rows, 2, 8), torch.randn(2, 2, rows)
    results = []
    for dtype, kernel in ((torch.float32, "triton"), (torch.float64, "math")):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (query, key, value)]
        out, lse = attend(*leaves, key_padding_mask=real, kernel=kernel)
        no_key = lse == -torch.inf
        found = torch.autograd.grad(
            [out, lse], leaves, [grads[0].to(dtype), grads[1].to(dtype).masked_fill(no_key, 0.0)]
        )
        results.append([out, lse.masked_fill(no_key, 0.0), no_key.double(), *found])
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 2e-5 * max(1.0, exact.abs().max().item())


def test_splits_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    query, (key, value) = torch.randn(1, 2, 1, 8), torch.randn(2, 1, 130, 1, 8)
    problem = kernels.Problem(*(tensor.transpose(1, 2) for tensor in (query, key, value)), is_causal=False, scale=1.0)
    assert launch.useful_splits(triton_kernel._tile_work(problem), 4, fewest_blocks=4) == 2
    split = attend(query, key, value, kernel="triton")
    monkeypatch.setattr(triton_kernel, "_processors", lambda device: 0)
    whole = attend(query, key, value, kernel="triton")
    assert not torch.equal(split.out, whole.out)
    for one, other in zip(split, whole, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_decoding() -> None:
    query, key, value = torch.randn(3, 1, 23, 2, 8).unbind()
    cache = DilatedKVCache([4, 16], [1, 2], batch_size=1, num_heads=2, head_dim=8)
    outs = [
        decode_step(*(tensor[:, start:stop] for tensor in (query, key, value)), cache, kernel="triton")
        for start, stop in ((0, 20), (20, 21), (21, 23))
    ]
    exact, _ = reference.dilated_attention(query, key, value, [4, 16], [1, 2], is_causal=True)
    assert torch.allclose(torch.cat(outs, 1), exact, atol=1e-5)


def test_compiled_into_one_graph() -> None:
    def loss(query: Tensor) -> Tensor:
        return dilated_attention(query, query, query, [4, 8], [1, 2], kernel="triton").square()

    query = torch.randn(1, 9, 2, 8, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    cotangent = torch.randn(1, 9, 2, 8)
    [expected], [found] = (torch.autograd.grad(run(query), query, cotangent) for run in (loss, compiled))
    assert torch.allclose(found, expected)


def test_tuning_keeps_the_fastest_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "tuned_file", lambda: tmp_path / "kept" / "blocks.json")
    blocks.tuned_blocks.cache_clear()
    monkeypatch.setattr(tuning, "HEADS", 1)
    monkeypatch.setattr(tuning, "REPEATS", 1)
    small = blocks.Blocks(16, 32, 4, 1)
    trials = tune("cpu", head_dims=[8], dtypes=[torch.float32], passes=["forward"], candidates=[small], seq_len=16)
    fastest = min(trials, key=lambda trial: trial.seconds or 0)
    assert small in {trial.blocks for trial in trials}
    for _ in range(2):
        assert blocks.tuned_blocks(CPU) == {("forward", 8, torch.float32): fastest.blocks}
        blocks.tuned_blocks.cache_clear()  # as in the next process


def test_tuning_keeps_nothing_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "tuned_file", lambda: tmp_path / "blocks.json")
    calls = iter(range(10))

    def problem(*arguments: object) -> object:
        return lambda tried: [torch.ones(3) + next(calls)]

    monkeypatch.setattr(tuning, "_problem", problem)
    with pytest.raises(RuntimeError, match="differ by more than rounding"):
        tune("cpu", head_dims=[8], dtypes=[torch.float32], candidates=[blocks.INTERPRETED])
    assert not (tmp_path / "blocks.json").exists()


def test_it_is_never_chosen_unasked() -> None:
    assert not triton_kernel.Triton().recommended()


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "needs", "reason"),
    [
        ("meta", torch.float32, 64, kernels.Needs(), "it runs on CUDA (on the CPU in Triton's interpreter"),
        ("cpu", torch.float64, 64, kernels.Needs(), "not torch.float64"),
        ("cpu", torch.float32, 264, kernels.Needs(), "a head_dim up to 256, not 264"),
        ("cpu", torch.float32, 64, kernels.Needs(dropout=True), "it drops no probabilities"),
    ],
)
def test_refusals(device: str, dtype: torch.dtype, head_dim: int, needs: kernels.Needs, reason: str) -> None:
    refusal = triton_kernel.Triton().refusal(torch.device(device), dtype, head_dim, needs)
    assert refusal is not None
    assert reason in refusal


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r'kernel: "triton" cannot run .* with head_dim 8 on cpu'):
        dilated_attention(*torch.randn(3, 1, 4, 1, 8).unbind(), [4], [1], kernel="triton")
