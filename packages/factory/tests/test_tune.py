"""`dilated tune`: its rules on made-up figures, its budget by a made-up clock, and the real thing at small sizes."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_core.measure import Timing
from dilated_factory import Hardware, Policy, Profile, create_dilated_attention
from dilated_factory.cli import main
from dilated_factory.profile import AUTO, NEVER_BYTES, VARIABLE, KernelRule, load
from dilated_factory.tuning import blocks, pools, session, text, tune
from dilated_factory.tuning import budget as budgets
from dilated_factory.tuning.budget import FEWEST, MOST, Budget, OutOfTime, foresee
from dilated_factory.tuning.cells import TOLERANCES
from dilated_factory.tuning.probe import Probe
from dilated_factory.tuning.rules import (
    Figure,
    fastest_block_size,
    gains,
    kernel_rules,
    pool_min_bytes,
    pool_thresholds,
    smallest_from_which,
)

MIB = 2**20
SMALL = {"dtypes": ("float32",), "heads": 2, "head_dim": 16, "lengths": (128, 256)}


# ---------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (Figure(0.97), Figure(1.0), True),
        (Figure(0.985), Figure(1.0), False),
        (Figure(1.0), Figure(1.0), False),
        (Figure(1.1), Figure(1.0), False),
        (Figure(0.9, spread=0.15), Figure(1.0), False),
        (Figure(0.9), Figure(1.0, spread=0.15), False),
        (Figure(0.8, spread=0.1), Figure(1.0, spread=0.15), False),
        (Figure(0.7, spread=0.1), Figure(1.0, spread=0.15), True),
    ],
)
def test_a_gain_is_above_two_percent_and_above_both_spreads_together(
    one: Figure, other: Figure, expected: bool
) -> None:
    assert gains(one, other) is expected


@pytest.mark.parametrize(
    ("holds", "expected"),
    [
        ({}, None),
        ({1: True}, 1),
        ({1: True, 2: False}, None),
        ({1: False, 2: True}, 2),
        ({1: True, 2: False, 4: True, 8: True}, 4),
        ({8: True, 4: True, 1: False}, 4),
    ],
)
def test_a_threshold_holds_at_every_larger_size(holds: dict[int, bool], expected: int | None) -> None:
    assert smallest_from_which(holds, bool) == expected


def by_bytes(**ratios: tuple[float, float]) -> dict[int, dict[str, Figure]]:
    """Times of the two modes, where torch.empty takes 1."""
    return {
        int(name[1:]) * MIB: {"torch": Figure(1.0), "lightweight": Figure(light), "full": Figure(full)}
        for name, (light, full) in ratios.items()
    }


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({}, None),
        (by_bytes(_1=(0.5, 0.5), _32=(0.5, 0.5)), None),
        (by_bytes(_1=(1.0, 1.0), _32=(0.9, 0.9), _64=(0.5, 0.5)), 32 * MIB),
        (by_bytes(_1=(0.9, 0.9), _32=(0.96, 0.9), _64=(0.95, 0.95)), 64 * MIB),
        (by_bytes(_1=(0.9, 0.9), _32=(0.9, 0.9), _64=(0.96, 0.5)), NEVER_BYTES),
        (by_bytes(_1=(0.5, 0.5), _64=(0.5, 0.5)), 1 * MIB),
        ({64 * MIB: {"torch": Figure(1.0)}}, NEVER_BYTES),
        ({64 * MIB: {"torch": Figure(1.0), "full": Figure(0.5)}}, 64 * MIB),
    ],
    ids=["nothing", "too small to say", "from 32", "5 % exactly", "never", "always", "no mode", "one mode"],
)
def test_the_size_from_which_a_pool_serves(figures: dict[int, dict[str, Figure]], expected: int | None) -> None:
    assert pool_min_bytes(figures) == expected


def passes(light: float = 1.0, full: float = 1.0, *, training: tuple[float, float] = (1.0, 1.0), spread: float = 0.0):
    """One length's times of the modes, where no pool takes 1."""
    return {
        "forward": {"off": Figure(1.0, spread), "lightweight": Figure(light), "full": Figure(full)},
        "training": {"off": Figure(1.0), "lightweight": Figure(training[0]), "full": Figure(training[1])},
    }


LONG = 65536


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({}, None),
        ({1024: passes(), LONG: passes()}, (None, None)),
        ({1024: passes(), 4096: passes(0.9, 0.9), LONG: passes(0.9, 0.9)}, (None, 4096)),
        ({4096: passes(0.9, 1.0), 8192: passes(0.9, 0.8), LONG: passes(0.9, 0.8)}, (4096, 8192)),
        ({4096: passes(0.9, 1.0), LONG: passes(0.9, 1.0)}, (4096, None)),
        ({4096: passes(0.5, 0.9), LONG: passes(0.5, 0.9)}, (4096, None)),
        ({4096: passes(0.9, 0.9), 8192: passes(), LONG: passes(0.9, 0.9)}, (None, LONG)),
        ({LONG: passes(training=(0.9, 0.9))}, (None, LONG)),
        ({LONG: passes(0.5, 0.5, training=(1.1, 1.1))}, (None, None)),
        ({LONG: passes(1.05, 1.05, spread=0.2, training=(0.9, 0.9))}, (None, None)),
        ({LONG: passes(0.9, 0.9, spread=0.2)}, (None, None)),
        ({LONG: passes(0.985, 0.985)}, (None, None)),
        ({LONG: {}}, (None, None)),
        ({LONG: {"forward": {"off": Figure(1.0), "full": Figure(0.5)}}}, (None, LONG)),
        ({LONG: {"forward": {"lightweight": Figure(1.0), "full": Figure(0.5)}}}, (None, None)),
        ({1024: passes(), 4096: passes()}, (None, 8192)),
        ({1024: passes(), 2048: passes()}, (4096, 8192)),
        ({1024: passes(), 2048: passes(0.9, 0.9)}, (None, 2048)),
        ({1024: passes(), 2048: passes(0.9)}, (2048, 8192)),
    ],
    ids=[
        "nothing",
        "no gain",
        "full is as good from the start",
        "one after the other",
        "full gains nothing",
        "full is slower than lightweight",
        "a hole ends it",
        "in training alone",
        "faster in one pass and slower in the other",
        "slower in one pass within the spread",
        "within the spread",
        "below two percent",
        "all were wrong",
        "lightweight was wrong",
        "off was wrong",
        "not measured from 8,192",
        "not measured from 4,096",
        "measured before the policy's",
        "lightweight before the policy's",
    ],
)
def test_the_lengths_from_which_a_pool_wins(figures: dict[int, Any], expected: tuple[int | None, int | None]) -> None:
    found = pool_thresholds(figures, Policy())
    assert found == expected
    Profile("here", "cpu", pool_thresholds=found).policy(Policy())  # in an order that a policy takes


def kernels(usual: str, spread: float = 0.0, **seconds: float) -> tuple[str, dict[str, Figure]]:
    return usual, {name: Figure(one, spread) for name, one in seconds.items()}


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ({}, ()),
        ({1024: kernels("a", a=1.0, b=2.0)}, ()),
        ({1024: kernels("a", a=1.0, b=0.99)}, ()),
        ({1024: kernels("a", 0.3, a=1.0, b=0.8)}, ()),
        ({1024: kernels("a", a=1.0, b=0.8)}, ((1024, "b"), (2048, AUTO))),
        ({1024: kernels("a", 0.05, a=1.0, b=0.8)}, ()),
        ({1024: kernels("a", a=1.0, b=0.8), 2048: kernels("a", a=1.0, b=0.7)}, ((1024, "b"), (4096, AUTO))),
        (
            {1024: kernels("a", 0.05, a=1.0, b=0.8), 2048: kernels("a", 0.05, a=1.0, b=0.7)},
            ((1024, "b"), (4096, AUTO)),
        ),
        ({1024: kernels("a", a=1.0, b=0.8), 2048: kernels("a", a=1.0, b=1.7)}, ((1024, "b"), (2048, AUTO))),
        (
            {2048: kernels("a", a=1.0, c=0.5), 1024: kernels("a", a=1.0, b=0.8)},
            ((1024, "b"), (2048, "c"), (4096, AUTO)),
        ),
        ({1024: kernels("a", a=1.0), 2048: kernels("a", a=1.0, b=0.8)}, ((2048, "b"), (4096, AUTO))),
        ({1024: kernels("a", b=3.0, c=2.0)}, ((1024, "c"), (2048, AUTO))),
        ({1024: kernels("a")}, ()),
    ],
    ids=[
        "nothing",
        "auto is the fastest",
        "below two percent",
        "within the spread",
        "one",
        "one, not far above the spread",
        "neighbours agree",
        "neighbours agree, not far above the spread",
        "auto again",
        "another from there",
        "not from the start",
        "auto was wrong",
        "all were wrong",
    ],
)
def test_the_kernels_by_length(lengths: dict[int, Any], expected: tuple[tuple[int, str], ...]) -> None:
    rules = kernel_rules({"float32": lengths, "bfloat16": {}})
    assert rules == tuple(KernelRule("float32", length, kernel) for length, kernel in expected)


def test_a_rule_ends_where_auto_is_the_fastest_again() -> None:
    rules = kernel_rules({"float32": {1024: kernels("a", a=1.0, b=0.8), 4096: kernels("a", a=1.0, b=1.7)}})
    profile = Profile("here", "cpu", kernels=rules)
    found = {length: profile.kernel("float32", length) for length in (1023, 1024, 4095, 4096)}
    assert found == {1023: None, 1024: "b", 4095: "b", 4096: None}
    assert profile.kernel("bfloat16", 1024) is None


def test_candidates_that_are_equal_rarely_win() -> None:
    chance = random.Random(0)
    lengths = [2**power for power in range(10, 17)]
    wins = {"kernels": 0, "thresholds": 0, "bytes": 0}
    for turn in range(200):
        noise = (0.03, 0.05, 0.1)[turn % 3]

        def figure(noise: float = noise) -> Figure:
            timing = Timing(tuple(max(0.5, chance.gauss(1, noise)) for _ in range(FEWEST)))
            return Figure(timing.median, timing.spread)

        by_length = {length: ("a", {name: figure() for name in "abc"}) for length in lengths}
        wins["kernels"] += bool(kernel_rules({"float32": by_length, "bfloat16": by_length}))
        modes = ("off", "lightweight", "full")
        by_tokens = {
            length: {kind: {mode: figure() for mode in modes} for kind in ("forward", "training")} for length in lengths
        }
        wins["thresholds"] += pool_thresholds(by_tokens, Policy()) != (None, None)
        figures = {2**power: {mode: figure() for mode in ("torch", *modes[1:])} for power in range(16, 29)}
        wins["bytes"] += pool_min_bytes(figures) != NEVER_BYTES
    assert max(wins.values()) <= 10, wins  # 5 %


def test_a_block_size_is_told_only_where_there_was_a_choice() -> None:
    assert fastest_block_size({}) is None
    assert fastest_block_size({(64, 64): Figure(1.0)}) is None
    assert fastest_block_size({(64, 64): Figure(1.0), (256, 128): Figure(0.5), (128, 128): Figure(2.0)}) == (256, 128)


# --------------------------------------------------------------------------------------------------- the budget


@pytest.mark.parametrize(
    ("taken", "size", "expected"),
    [
        ([], 8, None),
        ([(1024, 1.0)], 4096, 4.0),
        ([(1024, 1.0), (2048, 2.0)], 4096, 4.0),
        ([(1024, 1.0), (2048, 4.0)], 4096, 16.0),
        ([(1024, 1.0), (2048, 100.0)], 4096, 400.0),
        ([(1024, 1.0), (2048, 0.5)], 4096, 1.0),
        ([(64, 1.0), (64, 2.0)], 64, 2.0),
        ([(64, 0.0), (128, 0.0)], 256, 0.0),
    ],
)
def test_what_a_size_takes_is_foreseen_from_smaller_ones(
    taken: list[tuple[int, float]], size: int, expected: float | None
) -> None:
    assert foresee(taken, size) == pytest.approx(expected) if expected is not None else foresee(taken, size) is None


def test_a_budget_refuses_what_does_not_fit_and_never_the_first() -> None:
    now = [0.0]
    budget = Budget(10.0, clock=lambda: now[0])
    assert budget.refusal("a", 1024) is None
    budget.note("a", 1024, 4.0)
    now[0] = 4.0
    assert budget.left == 6.0
    assert budget.refusal("a", 1536) is None
    assert budget.refusal("a", 2048) == "it would take about 8.0 s, and 6.0 s were left for this part"
    assert budget.refusal("b", 2048) is None
    now[0] = 20.0
    assert budget.refusal("b", 2048) is None
    now[0] = 20.1  # more than twice its time
    assert budget.refusal("b", 2048) is not None
    assert budget.refusal("a", 1) is None or "0.0 s were left" in budget.refusal("a", 1)


def test_rounds_are_as_many_as_there_is_time_for() -> None:
    budget = Budget(8.0, clock=lambda: 0.0)
    assert [budget.rounds(seconds) for seconds in (0.0, 0.01, 0.25, 2.0)] == [MOST, MOST, 8, FEWEST]
    with pytest.raises(OutOfTime, match=r"it would take about 50\.0 s, and 8\.0 s were left"):
        budget.rounds(10.0)


def test_a_first_cell_that_is_much_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "GRACE_SECONDS", 1e-9)
    profile = tune("cpu", budget_seconds=1e-6, **SMALL)
    cells = profile.measurements[1:]
    assert {one["part"] for one in cells} == {"pool_bytes", "pool_tokens", "kernels", "block_size"}
    assert not any("figures" in one for one in cells)
    assert (profile.pool_min_bytes, profile.pool_thresholds, profile.kernels) == (None, None, ())
    assert "Decided" in text.render(profile, Policy())


# ------------------------------------------------------------------------------------------------ the real thing


@pytest.fixture(scope="module")
def tuned() -> tuple[Profile, list[tuple[int, int, str]]]:
    told: list[tuple[int, int, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "BYTES", pools.BYTES[:6])  # to 2 MiB: the others take as many seconds as all the rest
        # There is time for everything on any machine.
        profile = tune("cpu", budget_seconds=1e6, progress=lambda *step: told.append(step), **SMALL)
    return profile, told


def test_a_tiny_run_measures_every_part_and_says_what_it_left_out(tuned: tuple[Profile, Any]) -> None:
    profile, _ = tuned
    parts = {one["part"] for one in profile.measurements}
    assert parts == {"setting", "pool_bytes", "pool_tokens", "kernels", "block_size"}
    assert profile.hardware == Hardware.detect("cpu").key()
    assert profile.objection(profile.hardware) is None
    for one in profile.measurements[1:]:
        assert ("figures" in one) != ("left_out" in one), one
        for name, figure in one.get("figures", {}).items():
            assert figure["seconds"] > 0, (one, name)
            assert figure["spread"] >= 0, (one, name)
        if "deviations" in one:
            assert set(one["figures"]) <= set(one["deviations"])
            assert all(0 <= deviation < TOLERANCES[torch.float32] for deviation in one["deviations"].values())
    assert any(one["part"] == "kernels" and "figures" in one for one in profile.measurements)
    # At these sizes no tensor has a mebibyte, so no pool serves any, and none can have won.
    assert all("figures" not in one for one in profile.measurements if one["part"] == "pool_tokens")
    assert profile.pool_thresholds == (4096, 8192)
    smallest = next(one for one in profile.measurements if one["part"] == "pool_bytes")
    assert smallest["bytes"] == 65536
    assert set(smallest["figures"]) == {"torch", "lightweight", "full"}


def test_the_pool_is_timed_where_it_serves_tensors() -> None:
    steps: list[str] = []
    probe = Probe(torch.device("cpu"), Hardware.detect("cpu"), 8, 8, steps.append)
    figures = pools.pool_by_tokens(probe, Budget(1e6), [32, 256], "float32", min_bytes=8192)
    assert figures[32] == {}
    assert {name: set(modes) for name, modes in figures[256].items()} == {
        "forward": {"off", "lightweight", "full"},
        "training": {"off", "lightweight", "full"},
    }
    left_out = [one["left_out"] for one in probe.measurements if one["tokens"] == 32]
    assert left_out == ["no tensor is large enough for a pool to serve it"]
    assert steps == ["pool: 32 tokens", "pool: 256 tokens"]


def test_progress_is_told_from_the_first_to_the_last(tuned: tuple[Profile, list[tuple[int, int, str]]]) -> None:
    _, told = tuned
    total = told[0][1]
    assert [done for done, _, _ in told] == list(range(1, total + 1))
    assert {of for _, of, _ in told} == {total}
    assert all(words for _, _, words in told)


def test_progress_goes_on_to_the_end_where_block_sizes_are_left_out() -> None:
    told: list[str] = []
    little = replace(Hardware.detect("cpu"), memory_total=1)
    assert blocks.block_sizes(Probe(torch.device("cpu"), little, 1, 8, told.append), Budget(1.0), [64], "float32") == {}
    assert len(told) == len(blocks.SIZES)


def test_what_was_measured_is_saved_loaded_and_followed(
    tuned: tuple[Profile, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, _ = tuned
    # What is decided depends on the machine; a decision of one's own shows that it is followed.
    decided = replace(profile, pool_thresholds=(None, 128), kernels=(KernelRule("float32", 128, "math"),))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "profile.json"))
    place = decided.save()
    assert replace(load(place), path="") == decided
    assert load(place).measurements == decided.measurements
    attention = create_dilated_attention("improved", [64], [1], sequence_length=128)
    attention(*torch.zeros(3, 1, 128, 2, 16))
    assert attention.decision.profile == str(place)
    assert (attention.decision.pool_mode, attention.decision.kernel) == ("full", "math")


@pytest.mark.parametrize("fault", ["wrong", "gradient", "nan", "fails"])
def test_a_candidate_that_is_wrong_is_dropped_with_its_figure(fault: str) -> None:
    probe = Probe(torch.device("cpu"), Hardware.detect("cpu"), 2, 8, lambda words: None)
    example = probe.example(64, torch.float32)
    from dilated_core import dilated_attention
    from dilated_factory.tuning.probe import PATTERN

    def right(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return dilated_attention(query, key, value, PATTERN.segment_lengths, PATTERN.dilation_rates)

    def wrong(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if fault == "fails":
            raise RuntimeError("no such\n  engine")
        if fault == "gradient":
            return right(query, key.detach() + 0 * key, value)
        return right(query, key, value) * (math.nan if fault == "nan" else 1.001)

    figures, dropped = example.check({"right": right, "wrong": wrong})
    assert set(figures) == {"right"}
    expected = {"fails": "it fails: no such engine", "nan": "wrong: it deviates from the definition by nan"}
    assert dropped["wrong"].startswith(expected.get(fault, "wrong: it deviates from the definition by "))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_kernel_is_within_the_tolerance_of_its_dtype(dtype: torch.dtype) -> None:
    from dilated_core import kernels as table
    from dilated_factory import SharedResources

    probe = Probe(torch.device("cpu"), Hardware.detect("cpu"), 2, 16, lambda words: None)
    example = probe.example(300, dtype)
    usable = [name for name, no in table.survey(torch.device("cpu"), dtype, 16).items() if no is None]
    resources = SharedResources()
    candidates = {name: probe.attention(300, resources, kernel=name) for name in usable}
    figures, dropped = example.check(candidates)
    assert dropped == {}
    assert set(figures) == set(usable)


def test_what_holds_too_much_memory_is_left_out() -> None:
    little = replace(Hardware.detect("cpu"), memory_total=8 * MIB)
    probe = Probe(torch.device("cpu"), little, 2, 16, lambda words: None)
    assert probe.too_large(MIB) is None
    assert probe.too_large(2 * MIB) == "it holds 2 MiB, above an eighth of the memory"
    assert Probe(torch.device("cpu"), replace(little, memory_total=None), 2, 16, print).too_large(2**60) is None


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"device": "tpu"}, ValueError, r"device: expected cpu or cuda\[:index\], got 'tpu'"),
        ({"device": "meta"}, ValueError, r"device: expected cpu or cuda\[:index\], got 'meta'"),
        ({"device": 3.5}, TypeError, "device: expected"),
        ({"device": "cuda:99"}, ValueError, "device: expected a device that is here, got 'cuda:99'"),
        ({"budget_seconds": 0}, ValueError, "budget_seconds: expected a positive number, got 0"),
        ({"budget_seconds": math.inf}, ValueError, "budget_seconds: expected"),
        ({"budget_seconds": math.nan}, ValueError, "budget_seconds: expected"),
        ({"budget_seconds": "60"}, TypeError, "budget_seconds: expected"),
        ({"dtypes": "float32"}, TypeError, "dtypes: expected names"),
        ({"dtypes": []}, TypeError, "dtypes: expected names"),
        ({"dtypes": [torch.float32]}, TypeError, "dtypes: expected names"),
        ({"dtypes": ["int8"]}, ValueError, "dtypes: expected some of .* got 'int8'"),
        ({"heads": 0}, ValueError, "heads: expected a positive int, got 0"),
        ({"head_dim": 1.5}, TypeError, "head_dim: expected a positive int, got 1.5"),
        ({"lengths": []}, ValueError, "lengths: expected one or more"),
        ({"lengths": "1024"}, TypeError, "lengths: expected a positive int"),
        ({"lengths": [1024, -1]}, ValueError, "lengths: expected a positive int, got -1"),
        ({"progress": 5}, TypeError, "progress: expected"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_any_work(
    changes: dict[str, Any], error: type[Exception], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        pytest.fail("it began to measure")

    monkeypatch.setattr(session.pools, "pool_by_bytes", work)
    with pytest.raises(error, match=match):
        tune(**changes)


# ----------------------------------------------------------------------------------------------------- the text


def made_up() -> Profile:
    def cell(part: str, seconds: dict[str, float], **what: Any) -> dict[str, Any]:
        figures = {name: {"seconds": one, "spread": 0.01} for name, one in seconds.items()}
        return {"part": part, **what, "rounds": 5, "figures": figures}

    no_time = "it would take about 40.0 s, and 3.0 s were left for this part"
    by_length: dict[int, float] = {4096: 1.0, 8192: 1.0, 16384: 0.8, 32768: 0.7}
    return Profile(
        "cpu AMD EPYC, AVX512, 24 GiB, 2 threads",
        "cpu",
        versions={"torch": "2.13.0"},
        pool_min_bytes=32 * MIB,
        pool_thresholds=(None, 16384),
        kernels=(KernelRule("float32", 4096, "math"),),
        block_size=(128, 128),
        measurements=(
            cell("pool_bytes", {"torch": 0.1, "lightweight": 0.05, "full": 0.04}, bytes=64 * MIB),
            {"part": "pool_bytes", "bytes": 128 * MIB, "left_out": no_time},
            *(
                cell("pool_tokens", {"off": one, "lightweight": 1.2, "full": one * ratio}, dtype="float32")
                | {"tokens": length, "pass": "forward"}
                for length, ratio in by_length.items()
                for one in (1.0,)
            ),
            {"part": "pool_tokens", "dtype": "float32", "tokens": 65536, "left_out": no_time},
            cell("kernels", {"cpu_flash": 1234.5, "math": 0.5}, dtype="float32", tokens=4096, auto="cpu_flash")
            | {"dropped": {"cpu_matmul": "wrong: it deviates from the definition by 1.0e-01, above 1e-04"}},
            cell("block_size", {"128x128": 0.5}, tokens=8192, dtype="float32", pairs={"128x128": 1000}),
        ),
    )


def test_the_page_holds_figures_and_decisions_in_eighty_columns() -> None:
    page = text.render(made_up(), Policy())
    assert max(map(len, page.splitlines())) <= 80
    for part in (
        "  64 MiB       100.00        2.00x  2.50x",
        "left out: 128 MiB: there was no time (--budget)",
        "left out: 65,536 tokens: there was no time (--budget)",
        "dropped: cpu_matmul in float32 from 4,096 tokens: wrong: it deviates from the definition by 1.0e-01",
        "lightweight from 4,096 tokens, full from 8,192 tokens",
        "full from 16,384 tokens",
        "from 32 MiB (built in: 1 MiB)",
        "math from 4,096 in float32",
        "128 x 128 is the fastest; told, not applied",
    ):
        assert " ".join(part.split()) in " ".join(page.split()), part


def test_the_page_says_where_the_profile_wins_over_the_policy() -> None:
    # The policy has lightweight at 4,096 (1.2 times slower than off) and full from 8,192, which gains nothing there.
    page = text.render(made_up(), Policy())
    assert "where the profile wins  4,096 forward 1.20x\n" in page
    assert "where it loses" not in page
    nothing = replace(made_up(), pool_thresholds=None)
    assert "where the profile wins  nowhere" in text.render(nothing, Policy())


def test_the_page_tells_never_and_no_finding_apart() -> None:
    assert "torch.empty was as fast at every size" in text.render(
        replace(made_up(), pool_min_bytes=NEVER_BYTES), Policy()
    )
    assert "no finding; from 1 MiB" in text.render(replace(made_up(), pool_min_bytes=None), Policy())


def test_a_page_without_measurements_is_a_page() -> None:
    assert "Decided" in text.render(Profile("here", "cpu"), Policy())


# -------------------------------------------------------------------------------------------------- the command

OPTIONS = ["tune", "--device", "cpu", "--budget", "0.5", "--lengths", "64,128", "--dtypes", "float32", "--heads", "1"]
OPTIONS += ["--head-dim", "8"]


def test_the_command_prints_tables_and_writes_the_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "deep" / "profile.json"
    monkeypatch.setenv(VARIABLE, str(place))
    assert main(OPTIONS) == 0
    captured = capsys.readouterr()
    assert f"Written to {place}\nThe factory uses it from now on" in captured.out
    assert "Decided" in captured.out
    assert "100%" in captured.err
    assert load(place).device_type == "cpu"


def test_json_is_the_profile_and_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "profile.json"
    assert main([*OPTIONS, "--json", "--dry-run", "--output", str(place)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("path") is None
    assert not place.exists()
    place.write_text(json.dumps(printed))
    assert load(place).hardware == Hardware.detect("cpu").key()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--device", "tpu"], "device: expected cpu or cuda"),
        (["--lengths", "0"], "lengths: expected a positive int"),
        (["--dtypes", "int8"], "dtypes: expected some of"),
    ],
)
def test_bad_words_are_a_line_and_status_two(
    words: list[str], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "--output", str(tmp_path / "profile.json"), *words]) == 2
    captured = capsys.readouterr()
    assert match in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("words", [["--budget", "0"], ["--budget", "soon"], ["--lengths", "1,x"]], ids=" ".join)
def test_words_that_cannot_be_read_are_a_usage_error(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tune", *words])
    assert ended.value.code == 2


def test_a_place_that_cannot_be_written_is_found_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "profile.json"):
        assert main(["tune", "--output", str(place)]) == 1
        assert "the profile cannot be written" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_run_writes_nothing_and_says_so(tmp_path: Path) -> None:
    place = tmp_path / "profile.json"
    command = [sys.executable, "-m", "dilated_factory", "tune", "--budget", "600", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--output", str(place)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, VARIABLE: "off"},
    )
    last_resort = threading.Timer(240, process.kill)
    last_resort.start()
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("dilated tune ")  # it measures
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        last_resort.cancel()
        process.kill()
    assert process.returncode == 130
    assert out == ""
    assert err.endswith("dilated tune: interrupted, nothing was written\n")
    assert list(tmp_path.iterdir()) == []
