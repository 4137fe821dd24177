"""The plan: bytes are those on the wire, ranges are what queries meet, and nothing in it grows with the length."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dilated_core import AuxRequest, DilatedPattern, reference
from dilated_core.plan import SEMANTICS
from dilated_ring import RingPlan, dilated_ring_attention, make_plan
from dilated_ring.comm import Comm, RecordingComm, run_ranks
from dilated_ring.plan import Traffic, check_bounds, even_bounds
from dilated_ring.plan.sharding import even_part

MIB = 2**20
GIGAPATH, PAPER = DilatedPattern.gigapath(), DilatedPattern.longnet()


@dataclass(frozen=True)
class Sizes:
    """What a plan depends on."""

    bounds: tuple[int, ...]
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    kv_heads: int
    blocks: int
    is_causal: bool
    semantics: str
    exchange: str

    @property
    def plan(self) -> RingPlan:
        return make_plan(
            self.bounds,
            self.segment_lengths,
            self.dilation_rates,
            self.kv_heads * self.blocks,
            kv_heads=self.kv_heads,
            is_causal=self.is_causal,
            semantics=self.semantics,
            exchange=self.exchange,
        )


@st.composite
def sizes(draw: st.DrawFn, *, longest: int = 60, exchange: str | None = None) -> Sizes:
    seq = draw(st.integers(1, longest))
    cuts = draw(st.lists(st.integers(0, seq), max_size=6))
    pattern = draw(st.lists(st.tuples(st.integers(1, longest + 20), st.integers(1, 9)), min_size=1, max_size=3))
    semantics = draw(st.sampled_from(SEMANTICS))
    lengths = [max(length, rate) for length, rate in pattern]
    if semantics == "torchscale":  # it takes several segments of a multiple of the rate only
        rates = [rate for _, rate in pattern]
        lengths = [
            length if length >= seq else -(-length // rate) * rate for length, rate in zip(lengths, rates, strict=True)
        ]
    return Sizes(
        (0, *sorted(cuts), seq),
        tuple(lengths),
        tuple(rate for _, rate in pattern),
        draw(st.integers(1, 5)),
        draw(st.sampled_from([1, 1, 2, 3])),
        draw(st.booleans()),
        semantics,
        exchange or draw(st.sampled_from(["auto", "gather", "heads"])),
    )


# ------------------------------------------------------------------------------------------------ bytes


def wire(each: Sizes, batch: int, head_dim: int, dtype: torch.dtype, options: dict[str, bool]) -> list[RecordingComm]:
    """What was on the wire in a forward and backward of all ranks."""
    masked, refetch, with_lse = (options[name] for name in ("masked", "refetch", "with_lse"))

    def work(comm: Comm) -> RecordingComm:
        recording = RecordingComm(comm)
        low, high = each.bounds[comm.rank : comm.rank + 2]
        heads = each.kv_heads * each.blocks
        query, key, value = (
            torch.randn(batch, high - low, count, head_dim).to(dtype).requires_grad_()
            for count in (heads, each.kv_heads, each.kv_heads)
        )
        out, aux = dilated_ring_attention(
            query,
            key,
            value,
            each.segment_lengths,
            each.dilation_rates,
            group=recording,
            is_causal=each.is_causal,
            semantics=each.semantics,
            exchange=each.exchange,
            enable_gqa=each.blocks > 1,
            key_padding_mask=torch.ones(batch, high - low, dtype=torch.bool) if masked else None,
            refetch=refetch,
            return_aux=AuxRequest(lse=with_lse),
        )
        # Where others may use their lse, a rank that does not sends zeros for its gradient.
        results = [out, aux.lse] if with_lse and comm.rank else [out]
        torch.autograd.grad(results, [query, key, value], [torch.randn_like(result) for result in results])
        return recording

    return run_ranks(len(each.bounds) - 1, work)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    sizes(),
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.fixed_dictionaries({name: st.booleans() for name in ("masked", "refetch", "with_lse")}),
)
def test_the_bytes_are_those_on_the_wire(
    each: Sizes, batch: int, head_dim: int, dtype: torch.dtype, options: dict[str, bool]
) -> None:
    plan = each.plan
    recorded = wire(each, batch, head_dim, dtype, options)
    for phase in ("forward", "backward"):
        figures = plan.bytes(dtype, head_dim, batch=batch, phase=phase, **options)
        for rank, branch in product(range(plan.world_size), range(len(plan.branches))):
            records = [
                record
                for record in recorded[rank].records
                if (record.purpose.phase, record.purpose.branch) == (phase, branch)
            ]
            assert figures.received[rank][branch] == sum(sum(record.received) for record in records), (phase, rank)
            assert figures.sent[rank][branch] == sum(sum(record.sent) for record in records), (phase, rank)
        matrix = plan.matrix(dtype, head_dim, batch=batch, phase=phase, **options)
        for rank, comm in enumerate(recorded):
            records = [record for record in comm.records if record.purpose.phase == phase]
            assert matrix[rank] == [sum(record.sent[peer] for record in records) for peer in range(plan.world_size)]


@given(sizes(longest=400))
def test_what_is_sent_is_received_whichever_way_it_is_summed(each: Sizes) -> None:
    plan = each.plan
    for phase in ("forward", "backward"):
        figures = plan.bytes(torch.bfloat16, 8, phase=phase)
        assert figures.total == sum(map(sum, figures.sent))
        assert figures.of(figures.busiest) == max(map(figures.of, range(plan.world_size)))
        whole = plan.matrix(torch.bfloat16, 8, phase=phase)
        branches = [plan.matrix(torch.bfloat16, 8, phase=phase, branch=branch.number) for branch in plan.branches]
        assert whole == [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*branches, strict=True)]
        for rank in range(plan.world_size):
            assert sum(row[rank] for row in whole) == figures.of(rank)
            assert sum(whole[rank]) == sum(figures.sent[rank])
            assert whole[rank][rank] == 0


@given(st.integers(2, 9), st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.sampled_from(["gather", "heads"]))
def test_an_aligned_segment_costs_what_the_formula_says(
    ranks: int, rate: int, rows: int, times: int, exchange: str
) -> None:
    # Every rank holds as many rows of each head, and attends as many heads.
    held, heads = rate * rows, ranks * rate * times
    plan = make_plan(ranks * held, [ranks * held], [rate], heads, ranks, exchange=exchange)
    row, lse = 8 * 2, 4
    forward, backward = (plan.bytes(torch.bfloat16, 8, phase=phase) for phase in ("forward", "backward"))
    whole = (ranks - 1) * rows * heads
    for rank in range(ranks):
        if exchange == "gather":
            assert forward.of(rank) == backward.of(rank) == 2 * whole * row
        else:
            assert forward.of(rank) == whole // ranks * (4 * row + lse)
            assert backward.of(rank) == whole // ranks * (5 * row + lse)


def most(figures: Traffic) -> float:
    return figures.of(figures.busiest) / MIB


def test_published_patterns_cost_what_was_found_before_there_was_code() -> None:
    def forward(pattern: DilatedPattern, ranks: int, exchange: str = "auto") -> Traffic:
        plan = make_plan(MIB, pattern.segment_lengths, pattern.dilation_rates, 16, ranks, exchange=exchange)
        return plan.bytes(torch.bfloat16, 64)

    assert most(forward(PAPER, 64)) == pytest.approx(5.33, abs=0.01)
    assert forward(PAPER, 8).total == 0
    gathered, chosen = forward(GIGAPATH, 8, "gather"), forward(GIGAPATH, 8)
    assert gathered.total / 8 / MIB == pytest.approx(313, abs=0.5)
    widest = [branches[4] / MIB for branches in gathered.received]
    assert widest == [224] * 8
    # The widest branch by heads, the others gathered: 313 - 224 + 56 on average, and the lses.
    by_heads = [branches[4] / MIB for branches in chosen.received]
    assert by_heads == [pytest.approx(56 * (1 + 4 / 128 / 4))] * 8
    assert gathered.total / 8 / MIB - 224 + 56 == pytest.approx(145, abs=0.5)
    assert chosen.total / 8 / MIB < 145
    assert most(chosen) == pytest.approx(174.2, abs=0.1)


# ------------------------------------------------------------------------------------------------ ranges


def met(each: Sizes, branch: int, rank: int) -> set[tuple[int, int]]:
    """(key head, position) of each key that the rank's queries meet in segments that leave its shard."""
    low, high = each.bounds[rank : rank + 2]
    lengths, rates = ([1] * len(each.segment_lengths) for _ in range(2))  # other branches reach a row itself only
    lengths[branch], rates[branch] = each.segment_lengths[branch], each.dilation_rates[branch]
    seen = reference.multiplicity(
        each.bounds[-1],
        each.kv_heads * each.blocks,
        lengths,
        rates,
        is_causal=each.is_causal,
        semantics=each.semantics,
        rows=torch.arange(low, high),
    )
    found = seen.any(1).unflatten(0, (each.kv_heads, each.blocks)).any(1)
    return {(head, position) for head, position in found.nonzero().tolist() if not low <= position < high}


def sends_some_keys_twice(each: Sizes, branch: int) -> bool:
    """What Branch.key_blocks says of it."""
    heads, blocks = each.kv_heads * each.blocks, each.blocks
    if each.semantics == "torchscale":
        alike = -(-heads // each.dilation_rates[branch])
        return alike % blocks != 0 and blocks % alike != 0
    if each.semantics == "grouped":
        share, more = divmod(heads, len(each.segment_lengths))
        first = branch * share + min(branch, more)
        last = first + share + (branch < more)
        return (first % blocks != 0 or last % blocks != 0) and first // blocks != (last - 1) // blocks
    return False


@settings(max_examples=200)
@given(sizes(exchange="gather"))
@example(Sizes((0, 9, 10, 20), (20,), (4,), 4, 1, False, "paper", "gather"))  # a shard that has rows of one phase only
@example(Sizes((0, 9, 10, 20), (20,), (4,), 4, 1, True, "paper", "gather"))
def test_gathered_ranges_are_the_keys_that_queries_meet(each: Sizes) -> None:
    plan = each.plan
    for rank in range(plan.world_size):
        got: Counter[tuple[int, int, int]] = Counter()
        for rows in plan.ranges(rank):
            assert rows.tensor == "keys"
            assert rows.source != rank
            low, high = plan.bounds[rows.source : rows.source + 2]
            assert low <= rows.start < rows.stop <= high
            assert rows.positions[-1] == rows.stop - 1
            length = plan.branches[rows.branch].segment_length
            assert (rows.start % length - rows.phase) % rows.step == 0
            got.update((rows.branch, head, position) for head in rows.heads for position in rows.positions)
        for branch in range(len(plan.branches)):
            keys = {(head, position): count for (of, head, position), count in got.items() if of == branch}
            assert set(keys) == met(each, branch, rank), (rank, branch)
            if not sends_some_keys_twice(each, branch):
                assert set(keys.values()) <= {1}, (rank, branch)


@pytest.mark.parametrize(
    ("each", "times"),
    [
        # Phases 00 01 11 of query heads in pairs: both blocks send the first and the last key head's rows.
        (Sizes((0, 8, 16), (16,), (2,), 3, 2, False, "torchscale", "gather"), [2, 1, 2]),
        # Heads 0 to 2 of 6 are the first branch's: the second block has them of one key head only.
        (Sizes((0, 8, 16), (16, 1), (1, 1), 3, 2, False, "grouped", "gather"), [2, 1]),
    ],
    ids=["torchscale", "grouped"],
)
def test_some_keys_travel_twice_where_blocks_differ_in_part(each: Sizes, times: list[int]) -> None:
    assert sends_some_keys_twice(each, 0)
    sent: Counter[int] = Counter()
    for rows in each.plan.ranges(0):
        sent.update({head: len(rows.positions) for head in rows.heads})
    positions = {
        head: len({position for rows in each.plan.ranges(0) if head in rows.heads for position in rows.positions})
        for head in sent
    }
    assert [sent[head] / positions[head] for head in sorted(sent)] == times


@settings(max_examples=100)
@given(sizes(exchange="heads"))
def test_by_heads_every_row_of_a_head_is_at_one_rank(each: Sizes) -> None:
    plan = each.plan
    for branch in plan.branches:
        for crossing in plan.crossings(branch.number):
            shares = [head for part in crossing.parts for head in crossing.share(part.rank)]
            assert shares == list(branch.members)
    for rank in range(plan.world_size):
        queries: dict[tuple[int, int], set[int]] = {}
        keys: dict[tuple[int, int], set[int]] = {}
        for rows in plan.ranges(rank):
            places = queries if rows.tensor == "queries" else keys
            for head in rows.heads:
                found = places.setdefault((rows.branch, head), set())
                if rows.tensor == "queries":
                    assert not found & set(rows.positions)
                found.update(rows.positions)
        low, high = plan.bounds[rank : rank + 2]
        for branch in plan.branches:
            phases = reference._phases(branch.number, len(plan.branches), branch.rate, plan.heads, plan.semantics, None)
            for crossing in plan.crossings(branch.number):
                if not crossing.held_by(rank):
                    continue
                span = range(crossing.start, crossing.start + crossing.length)
                for head in crossing.share(rank):
                    for query_head in range(head * each.blocks, (head + 1) * each.blocks):
                        expected = {
                            position
                            for position in span
                            if (position - span.start) % branch.rate == phases[0][query_head]
                            and phases[1][query_head]
                            and not low <= position < high
                        }
                        assert queries.get((branch.number, query_head), set()) & set(span) == expected
                        assert keys.get((branch.number, head), set()) >= expected


@given(sizes(longest=200))
def test_ranges_and_bytes_count_the_same_rows(each: Sizes) -> None:
    plan = each.plan
    figures = plan.bytes(torch.float32, 1)
    for rank in range(plan.world_size):
        for branch in plan.branches:
            rows = {"queries": 0, "keys": 0}
            for found in plan.ranges(rank):
                if found.branch == branch.number:
                    rows[found.tensor] += len(found.positions) * len(found.heads)
            received = 4 * (rows["queries"] + 2 * rows["keys"])
            lent = 0
            if plan.exchanges[branch.number] == "heads":
                lent = sum(
                    len(found.positions) * len(found.heads)
                    for peer in range(plan.world_size)
                    for found in plan.ranges(peer)
                    if (found.branch, found.source, found.tensor) == (branch.number, rank, "queries")
                )
            assert figures.received[rank][branch.number] == received + lent * (4 + 4)


# ------------------------------------------------------------------------------------------------ work and peers


@settings(max_examples=100)
@given(sizes())
def test_pairs_are_those_that_meet(each: Sizes) -> None:
    plan = each.plan
    pairs = plan.pairs()
    seen = reference.multiplicity(
        plan.seq_len,
        plan.heads,
        plan.segment_lengths,
        plan.dilation_rates,
        is_causal=each.is_causal,
        semantics=each.semantics,
    )
    assert sum(map(sum, pairs)) == int(seen.sum())
    if "heads" not in plan.exchanges:
        of_ranks = [int(seen[:, low:high].sum()) for low, high in pairwise(plan.bounds)]
        assert [sum(of_branches) for of_branches in pairs] == of_ranks


@given(sizes(longest=200))
def test_peers_are_those_with_bytes_between_them(each: Sizes) -> None:
    plan = each.plan
    forward, backward = (plan.matrix(torch.float32, 4, phase=phase) for phase in ("forward", "backward"))
    ranks = range(plan.world_size)
    for rank in ranks:
        peers = plan.peers(rank)
        assert peers.sends_to == tuple(peer for peer in ranks if forward[rank][peer])
        assert peers.receives_from == tuple(peer for peer in ranks if forward[peer][rank])
        assert {peer for peer in ranks if backward[rank][peer]} <= {*peers.sends_to, *peers.receives_from}


# ------------------------------------------------------------------------------------------------ the choice


@given(sizes(longest=300))
def test_auto_takes_what_brings_the_busiest_rank_fewer_rows(each: Sizes) -> None:
    def busiest(exchange: str, branch: int) -> int:
        # Of rows so long that their lses do not count.
        plan = Sizes(**{**vars(each), "exchange": exchange}).plan
        return max(received[branch] // (4 << 20) for received in plan.bytes(torch.float32, 1 << 20).received)

    auto = Sizes(**{**vars(each), "exchange": "auto"}).plan
    for branch, exchange in enumerate(auto.exchanges):
        if exchange == "none":
            assert busiest("gather", branch) == busiest("heads", branch) == 0
        else:
            by_heads = busiest("heads", branch) < busiest("gather", branch)
            assert exchange == ("heads" if by_heads else "gather")


def test_an_exchange_can_be_told() -> None:
    for told in ("gather", "heads"):
        plan = make_plan(64, [8, 64], [1, 2], 4, 8, exchange=told)
        assert plan.exchanges == ("none", told)


def test_two_equal_halves_are_gathered() -> None:
    assert make_plan(64, [64], [1], 4, 2).exchanges == ("gather",)
    assert make_plan(66, [66], [1], 6, 3).exchanges == ("heads",)


# ------------------------------------------------------------------------------------------------ sizes


def test_nothing_in_a_plan_grows_with_the_length() -> None:
    # 2^60 positions: anything of their number would not fit into any memory.
    lengths, rates = (1 << 20, 1 << 50, 1 << 60), (1, 1 << 30, 1 << 45)
    plan = make_plan(1 << 60, lengths, rates, 16, 1000)
    assert plan.bytes(torch.bfloat16, 64).total > 0
    assert sum(map(sum, plan.pairs())) == DilatedPattern(lengths, rates).pairs(1 << 60, 16)
    assert len(plan.for_rank(500).routes) == 3
    assert len(list(plan.ranges(500))) < 100_000
    assert len(plan.describe()) < 10_000


def test_a_billion_tokens_on_1024_ranks() -> None:
    plan = make_plan(1 << 30, GIGAPATH.segment_lengths, GIGAPATH.dilation_rates, 16, 1024)
    assert plan.exchanges == ("none", "heads", "none", "heads", "none")
    assert most(plan.bytes(torch.bfloat16, 64)) < 250
    # Only the neighbours: a segment of 185,363 lies on two shards of a million at most.
    assert plan.peers(512) == ((511, 513), (511, 513))


@given(st.integers(0, 50), st.integers(1, 9))
def test_one_shard_of_many_is_where_their_bounds_say(length: int, parts: int) -> None:
    bounds = even_bounds(length, parts)
    assert [even_part(length, parts, number) for number in range(parts)] == [
        slice(low, high) for low, high in pairwise(bounds)
    ]


def test_empty_sequences_and_shards_are_planned() -> None:
    nothing = make_plan(0, [8], [2], 2, 3)
    assert nothing.exchanges == ("none",)
    assert nothing.bytes(torch.float32, 4).total == 0
    assert "0 tokens on 3 ranks of 0" in nothing.describe()
    gaps = make_plan((0, 0, 5, 5, 8, 8), [8], [1], 2)
    assert gaps.peers(2) == ((), ())
    assert gaps.peers(1) == ((3,), (3,))


# ------------------------------------------------------------------------------------------------ names


def test_equal_plans_have_one_key() -> None:
    plan = make_plan(100, [8, 32], [1, 4], 4, 3)
    same = make_plan((0, 34, 67, 100), (8, 32), (1, 4), 4)
    assert plan == same
    assert plan.key == same.key
    assert hash(plan) == hash(same)
    kind, digest = plan.key
    assert kind == "dilated_ring.plan"
    assert re.fullmatch("[0-9a-f]{32}", digest)


def test_different_plans_have_different_keys() -> None:
    plans = [
        make_plan(100, [8, 32], [1, 4], 4, 3),
        make_plan(101, [8, 32], [1, 4], 4, 3),
        make_plan(100, [8, 32], [1, 4], 4, 4),
        make_plan((0, 33, 67, 100), [8, 32], [1, 4], 4),
        make_plan(100, [8, 31], [1, 4], 4, 3),
        make_plan(100, [8, 32], [1, 2], 4, 3),
        make_plan(100, [8, 32], [1, 4], 8, 3),
        make_plan(100, [8, 32], [1, 4], 4, 3, kv_heads=2),
        make_plan(100, [8, 32], [1, 4], 4, 3, is_causal=True),
        make_plan(100, [8, 32], [1, 4], 4, 3, semantics="torchscale"),
        make_plan(100, [8, 32], [1, 4], 4, 3, exchange="heads"),
    ]
    assert len({plan.key for plan in plans}) == len(plans)


# ------------------------------------------------------------------------------------------------ in words


def test_a_description_says_what_crosses_and_why() -> None:
    page = make_plan(MIB, GIGAPATH.segment_lengths, GIGAPATH.dilation_rates, 16, 8).describe()
    assert page.startswith(
        "1,048,576 tokens on 8 ranks of 131,072; 16 heads of 64, bfloat16, not causal, semantics paper\n"
    )
    lines = [re.split(r"  +", line.strip()) for line in page.splitlines()]
    assert ["2", "32,768", "4", "32", "0", "1", "none", "every segment lies in one shard"] in lines
    assert ["3", "185,363", "8", "6", "5", "2 to 3", "heads", "104.3 MiB; by gather 117.0 MiB"] in lines
    assert ["1", "131,072", "174.2 MiB", "143.9 MiB", "191.1 MiB", "205.9 MiB", "#" * 30] in lines
    assert "Rank 1 receives most, 174.2 MiB forward; a dense ring would bring it 3.5 GiB." in page
    assert "Rank 1 computes most, 1.12 times the mean." in page
    assert max(map(len, page.splitlines())) <= 120


def test_a_description_of_many_ranks_is_a_page() -> None:
    page = make_plan(1 << 24, GIGAPATH.segment_lengths, GIGAPATH.dilation_rates, 16, 1024).describe()
    assert len(page.splitlines()) < 50
    assert "and ranks 38-1023: forward, 33.5 MiB to 82.5 MiB in each" in page


@given(sizes())
def test_every_plan_can_be_described(each: Sizes) -> None:
    assert each.plan.describe(torch.float64, 3).count("\n") >= 8


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"world_size": None}, ValueError, "world_size: expected a number of ranks beside a length, got None"),
        ({"world_size": 0}, ValueError, "world_size: expected a positive int, got 0"),
        ({"sequence": -1}, ValueError, "sequence: expected an int of at least 0, got -1"),
        ({"sequence": "80"}, TypeError, "bounds: expected a sequence of positions, got str"),
        ({"sequence": [0, 4, 3]}, ValueError, r"bounds: expected positions that rise from 0 .*, got \[0, 4, 3\]"),
        ({"sequence": [1, 4]}, ValueError, r"bounds: expected positions that rise from 0 .*, got \[1, 4\]"),
        ({"sequence": [0, 4, 80]}, ValueError, r"bounds: expected world_size \+ 1 = 5 positions, got 3"),
        ({"sequence": [0, 4, 6, 8.0, 9]}, TypeError, r"bounds\[3\]: expected an int of at least 0, got 8.0"),
        ({"heads": 0}, ValueError, "heads: expected a positive int, got 0"),
        ({"kv_heads": 3}, ValueError, "kv_heads: expected a divisor of the 4 heads, got 3"),
        ({"is_causal": 1}, TypeError, "is_causal: expected a bool, got 1"),
        ({"semantics": "longnet"}, ValueError, "semantics: expected one of .*, got 'longnet'"),
        ({"exchange": "ring"}, ValueError, "exchange: expected one of .*, got 'ring'"),
        ({"dilation_rates": [1, 16]}, ValueError, r"dilation_rates\[1\]: expected at most .* = 8, got 16"),
        ({"semantics": "torchscale", "dilation_rates": [1, 3]}, ValueError, r"segment_lengths\[1\]: .* multiple of"),
    ],
)
def test_bad_arguments_of_a_plan(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"sequence": 80, "segment_lengths": [4, 8], "dilation_rates": [1, 2], "heads": 4, "world_size": 4}
    with pytest.raises(error, match=message):
        make_plan(**{**good, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": torch.int64}, TypeError, r"dtype: expected one of \['torch.float64', .*, got torch.int64"),
        ({"head_dim": 0}, ValueError, "head_dim: expected a positive int, got 0"),
        ({"batch": -1}, ValueError, "batch: expected an int of at least 0, got -1"),
        ({"phase": "both"}, ValueError, "phase: expected one of .*, got 'both'"),
        ({"masked": None}, TypeError, "masked: expected a bool, got None"),
    ],
)
def test_bad_arguments_of_bytes(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    plan = make_plan(80, [8], [1], 4, 3)
    for function in (plan.bytes, plan.matrix):
        with pytest.raises(error, match=message):
            function(**{"dtype": torch.float32, "head_dim": 8, **arguments})  # type: ignore[operator]


def test_ranks_and_branches_that_are_not_there() -> None:
    plan = make_plan(80, [8], [1], 4, 3)
    for ask in (plan.for_rank, plan.peers, lambda rank: list(plan.ranges(rank))):
        with pytest.raises(ValueError, match="rank: expected a number below 3, got 3"):
            ask(3)
    with pytest.raises(ValueError, match="branch: expected a number below 1, got 1"):
        plan.matrix(torch.float32, 8, branch=1)


def test_bounds_are_returned_as_a_tuple() -> None:
    assert check_bounds([0, 0, 7], 2) == (0, 0, 7)


# ------------------------------------------------------------------------------------------------ benchmark


@pytest.mark.slow
def test_the_benchmark_checks_and_computes(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "bench_traffic.py"
    sizes = ["--tokens", "65536", "1048576", "--ranks", "8", "64"]
    command = [sys.executable, str(script), *sizes, "--output", str(tmp_path), "--no-plot"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    results = json.loads((tmp_path / "ring_traffic.json").read_text())
    assert len(results["checks"]) == 6
    found = {(row["pattern"], row["tokens"], row["ranks"]): row["forward"] for row in results["traffic"]}
    assert found["paper", MIB, 8]["ours"] == 0
    assert found["paper", MIB, 64]["ring"] == 4032 * MIB
    assert found["paper", MIB, 64]["torchscale"] // MIB == 336
    assert found["GigaPath", MIB, 8]["torchscale"] == 672 * MIB
    assert {row["ranks"] for row in results["scaling"]} == {1, 8, 64}
    page = (tmp_path / "ring_traffic.md").read_text()
    assert "| paper | 1M | 64 | 5.3 MiB | 10.7 MiB | 336.2 MiB (another grid) | 3.9 GiB | **756** |" in page


def test_each_branch_can_be_told_how_it_gets_its_rows() -> None:
    plan = make_plan(64, [64, 64, 4], [2, 4, 1], heads=4, world_size=4, exchange=["heads", "gather", "auto"])
    assert plan.exchanges == ("heads", "gather", "none")


@pytest.mark.parametrize(
    ("exchange", "kind", "message"),
    [
        (["heads"], ValueError, "exchange: expected one for each of the 2 branches, got 1"),
        (["heads", "ring"], ValueError, r"exchange\[1\]: expected one of \['auto', 'gather', 'heads'\], got 'ring'"),
        (1, TypeError, "exchange: expected one of"),
    ],
)
def test_a_wrong_exchange_is_named(exchange: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make_plan(8, [8, 8], [1, 2], heads=2, world_size=2, exchange=exchange)  # type: ignore[arg-type]
