"""ring_attention in a ring: against the oracle on ranks that are threads and on processes, and what its errors say."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_cases import Way, check, dense, errors_of, joined, problems, run, run_rank
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_processes
from ring_cases import MASKS, Case, assert_close, deviation, oracle
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_core import AuxRequest, attend
from dilated_ring.comm import Comm, Purpose, RecordingComm, Transfer, run_ranks
from dilated_ring.dense import Team, ring_attention, shard, unshard
from dilated_ring.dense.engine import meet
from dilated_ring.dense.ring import make_route
from dilated_ring.dense.sharding import gather_pieces, pieces_of
from dilated_ring.errors import DisagreementError, PeerError
from dilated_ring.plan import even_bounds

causal_or_not = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
both_balances = pytest.mark.parametrize("balance", ["contiguous", "head_tail"])
some_ranks = pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
rings = st.builds(Way, st.integers(1, 6), st.just(1), st.sampled_from(["contiguous", "head_tail"]))


# ------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@both_balances
@causal_or_not
@some_ranks
@pytest.mark.parametrize("seq", [1, 5, 97])
def test_forward_and_gradients(seq: int, ranks: int, is_causal: bool, balance: str, dtype: torch.dtype) -> None:
    check(dense(2, seq, 3, 8, is_causal=is_causal), Way(ranks, balance=balance), dtype, with_lse=False)


@both_balances
@causal_or_not
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("ranks", "kv_heads"),
    [(2, 1), (3, None), (3, 1), (5, 2)],
    ids=["2-one-key", "3-own-keys", "3-one-key", "5-shared-keys"],
)
def test_every_combination_of_options(
    ranks: int, kv_heads: int | None, mask: str, is_causal: bool, balance: str
) -> None:
    """With cotangents of out and of lse. "right" pads a whole batch row, "shards" whole shards where contiguous."""
    bounds = even_bounds(41, ranks)
    case = dense(3, 41, 6, 5, bounds=bounds, kv_heads=kv_heads, mask=mask, is_causal=is_causal)
    check(case, Way(ranks, balance=balance))


@settings(max_examples=50)
@given(problem=problems(rings))
def test_any_problem(problem: tuple[Case, Way]) -> None:
    check(*problem)


@settings(max_examples=20)
@given(problem=problems(rings))
def test_any_problem_float32(problem: tuple[Case, Way]) -> None:
    check(*problem, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@both_balances
@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "is_causal": True}, {"mask": "random"}], ids=str)
def test_half_precision(options: dict[str, Any], balance: str, dtype: torch.dtype) -> None:
    check(dense(2, 211, 4, 32, **options), Way(3, balance=balance), dtype, with_lse=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_sums_do_not_grow_with_the_ring(dtype: torch.dtype) -> None:
    """Sums are in float32: 16 ranks round their results once, as one rank does, but for each tile's own rounding."""
    case = dense(1, 256, 2, 32)
    exact = oracle(case, dtype)
    alone, many = (run(case, Way(ranks), dtype, with_lse=False) for ranks in (1, 16))
    for name in ("out", "dq", "dk", "dv"):
        expected = getattr(exact, name)
        assert deviation(getattr(many, name), expected) <= 2 * deviation(getattr(alone, name), expected), name


@pytest.mark.parametrize("kernel", ["math", "cpu_flash"])
def test_any_kernel(kernel: str) -> None:
    check(dense(2, 23, 4, 8, kv_heads=2, is_causal=True, mask="random"), Way(3), kernel=kernel)


@pytest.mark.parametrize("ring_size", [1, 2, 3, 7, 23, 64])
@causal_or_not
@pytest.mark.parametrize("mask", ["none", "right"])
def test_one_device_takes_keys_in_chunks(ring_size: int, is_causal: bool, mask: str) -> None:
    case = dense(2, 23, 4, 8, kv_heads=2, is_causal=is_causal, mask=mask)
    results = run_rank(case, torch.float64, None, Way(1), 0, with_lse=True, ring_size=ring_size)
    assert_close(case, torch.float64, results, oracle(case, torch.float64, with_lse=True))


@both_balances
@pytest.mark.parametrize("shape", [(0, 9, 2, 4), (2, 0, 2, 4), (1, 9, 0, 4)], ids=["batch", "seq", "heads"])
def test_nothing_to_attend(shape: tuple[int, ...], balance: str) -> None:
    whole = torch.randn(shape, dtype=torch.float64)

    def work(comm: Comm) -> list[Tensor]:
        leaves = [shard(whole, comm.rank, 3, balance=balance).detach().requires_grad_() for _ in range(3)]
        out = ring_attention(*leaves, group=comm, balance=balance)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    for rank, results in enumerate(run_ranks(3, work)):
        expected = shard(whole, rank, 3, balance=balance).shape
        assert all(result.shape == expected and not result.any() for result in results)


def test_lse_where_no_loss_uses_the_output_and_the_other_way_round() -> None:
    case = dense(1, 13, 2, 4, is_causal=True)
    query, key, value, cotangent = case.problem(torch.float64)
    weight = case.lse_cotangent()

    def loss(rank: int, out: Tensor, lse: Tensor, at: slice) -> Tensor:
        return (out * cotangent[:, at]).sum() if rank else (lse * weight[:, :, at]).sum()

    whole = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out, lse = attend(*whole, is_causal=True)
    bounds = even_bounds(13, 3)
    shards = [slice(*bounds[rank : rank + 2]) for rank in range(3)]
    total = sum(loss(rank, out[:, at], lse[:, :, at], at) for rank, at in enumerate(shards))
    assert isinstance(total, Tensor)
    expected = torch.autograd.grad(total, whole)

    def work(comm: Comm) -> tuple[Tensor, ...]:
        at = shards[comm.rank]
        leaves = [tensor[:, at].clone().requires_grad_() for tensor in (query, key, value)]
        out, aux = ring_attention(*leaves, group=comm, is_causal=True, return_aux=AuxRequest(lse=True))
        assert aux.lse is not None
        return torch.autograd.grad(loss(comm.rank, out, aux.lse, at), leaves)

    for name, found, wanted in zip("qkv", zip(*run_ranks(3, work), strict=True), expected, strict=True):
        assert deviation(torch.cat(found, 1), wanted) < 1e-12, name


def test_gradients_of_some_inputs_only() -> None:
    case, way = dense(1, 13, 2, 4), Way(3)
    query, key, value, cotangent = case.problem(torch.float64)

    def work(comm: Comm) -> Tensor:
        q, k, v, weight = (shard(tensor, comm.rank, 3).detach() for tensor in (query, key, value, cotangent))
        (grad,) = torch.autograd.grad(ring_attention(q, k.requires_grad_(), v, group=comm), k, weight)
        return grad

    found = torch.cat(run_ranks(3, work), 1)
    assert deviation(found, run(case, way, with_lse=False).dk) < 1e-12


def test_autocast_decides_the_dtype() -> None:
    def work(comm: Comm) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ring_attention(*torch.randn(3, 1, 5, 2, 8).unbind(), group=comm)

    assert all(out.dtype == torch.bfloat16 for out in run_ranks(2, work))


def test_results_share_no_memory() -> None:
    leaves = [torch.randn(1, 6, 2, 4).requires_grad_() for _ in range(3)]
    for arguments in ({"ring_size": 2}, {"group": run_ranks(1, lambda comm: comm)[0]}):
        out = ring_attention(*leaves, **arguments)  # type: ignore[call-overload]
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert len({tensor.untyped_storage().data_ptr() for tensor in (out, *grads)}) == 4


@pytest.mark.parametrize("mode", ["ring", "all_to_all"])
@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives_are_refused(power: int, mode: str) -> None:
    """Also where the gradient of the output is a constant, and beside a first derivative."""

    def work(comm: Comm) -> None:
        leaves = [torch.randn(1, 6, 2, 4, requires_grad=True) for _ in range(3)]
        out = ring_attention(*leaves, group=comm, mode=mode)
        grads = torch.autograd.grad(out.pow(power).sum(), leaves, create_graph=True)
        for grad in grads:
            with pytest.raises(RuntimeError, match="ring_attention: second derivatives are not defined"):
                torch.autograd.grad(out.sum() + grad.square().sum(), leaves)

    run_ranks(1, work)


# ------------------------------------------------------------------------------------------------ shards and tiles


@both_balances
@given(length=st.integers(0, 40), ranks=st.integers(1, 9), dim=st.integers(-2, 1))
def test_shards_put_together_are_the_whole(balance: str, length: int, ranks: int, dim: int) -> None:
    shape = [3, 3]
    shape[dim] = length
    whole = torch.arange(3.0 * length).reshape(shape)
    shards = [shard(whole, rank, ranks, dim=dim, balance=balance) for rank in range(ranks)]
    assert torch.equal(unshard(shards, dim=dim, balance=balance), whole)
    bounds = (0, *accumulate(part.shape[dim] for part in shards))
    positions = torch.arange(length)
    for part, pieces in zip(shards, pieces_of(bounds, balance), strict=True):
        own = torch.cat([positions[start:stop] for start, stop in pieces] or [positions[:0]])
        assert torch.equal(part, whole.index_select(dim, own))


@both_balances
def test_shards_pass_gradients(balance: str) -> None:
    whole = torch.randn(2, 11, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 11, dtype=torch.float64)
    together = unshard([shard(whole, rank, 3, balance=balance) for rank in range(3)], balance=balance)
    (grad,) = torch.autograd.grad(together, whole, weight)
    assert torch.equal(grad, weight)


@st.composite
def two_shards(draw: st.DrawFn) -> tuple[Any, Any]:
    """Two shards of one team, or of a sequence and one of its chunks."""
    length, ranks = draw(st.integers(0, 40)), draw(st.integers(1, 6))
    width = draw(st.sampled_from([each for each in range(1, ranks + 1) if ranks % each == 0]))
    balance = draw(st.sampled_from(["contiguous", "head_tail"]))
    shards = pieces_of(_bounds(length, ranks, balance), balance)
    rows = [gather_pieces(shards[at : at + width])[0] for at in range(0, ranks, width)]
    one, other = draw(st.sampled_from(rows)), draw(st.sampled_from(rows))
    return (((0, length),) if length and draw(st.booleans()) else one), other


def _bounds(length: int, ranks: int, balance: str) -> tuple[int, ...]:
    whole = torch.arange(length)
    return (0, *accumulate(len(shard(whole, rank, ranks, dim=0, balance=balance)) for rank in range(ranks)))


@settings(max_examples=300)
@given(shards=two_shards(), is_causal=st.booleans())
def test_tiles_hold_every_pair_that_meets_once(shards: tuple[Any, Any], is_causal: bool) -> None:
    queries, keys = ([at for start, stop in pieces for at in range(start, stop)] for pieces in shards)
    found = [
        (queries[tile.rows][row], keys[tile.keys][key])
        for tile in meet(*shards, is_causal)
        for row in range(len(queries[tile.rows]))
        for key in range(len(keys[tile.keys]))
        if not tile.is_causal or key <= row
    ]
    expected = [(query, key) for query in queries for key in keys if not is_causal or key <= query]
    assert sorted(found) == expected
    assert all(len(queries[tile.rows]) and len(keys[tile.keys]) for tile in meet(*shards, is_causal))


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_head_and_tail_make_causal_work_equal(ranks: int) -> None:
    """At every hop after the first each rank attends as many pairs as any other: two chunks' worth."""
    chunk = 5
    shards = pieces_of(_bounds(2 * chunk * ranks, ranks, "head_tail"), "head_tail")
    for hop in range(1, ranks):
        for rank in range(ranks):
            tiles = meet(shards[rank], shards[(rank - hop) % ranks], is_causal=True)
            work = sum((tile.rows.stop - tile.rows.start) * (tile.keys.stop - tile.keys.start) for tile in tiles)
            assert [tile.is_causal for tile in tiles] == [False]
            assert work == 2 * chunk**2


@settings(max_examples=100)
@given(lengths=st.lists(st.integers(0, 3), min_size=1, max_size=7), is_causal=st.booleans())
def test_keys_go_as_far_as_they_are_needed(lengths: list[int], is_causal: bool) -> None:
    shards, ranks = pieces_of((0, *accumulate(lengths)), "contiguous"), len(lengths)
    for source, last in enumerate(make_route(shards, is_causal).last):
        needed = [hop for hop in range(1, ranks) if meet(shards[(source + hop) % ranks], shards[source], is_causal)]
        assert last == max(needed, default=0)


# ------------------------------------------------------------------------------------------------ traffic and memory


def traffic(ranks: int, *, is_causal: bool, balance: str = "contiguous", mask: bool = False) -> dict[str, int]:
    """Bytes received by all ranks, by what they were; shards of 4 positions, 2 key heads, head_dim 8, float32."""

    def work(comm: Comm) -> list[Any]:
        recording = RecordingComm(comm)
        query = torch.randn(1, 4, 4, 8, requires_grad=True)
        key, value = torch.randn(2, 1, 4, 2, 8).unbind()
        real = torch.ones(1, 4, dtype=torch.bool) if mask else None
        options: dict[str, Any] = {"is_causal": is_causal, "balance": balance, "key_padding_mask": real}
        ring_attention(query, key, value, group=recording, enable_gqa=True, **options).sum().backward()
        return recording.records

    found: dict[str, int] = {}
    for records in run_ranks(ranks, work):
        for record in records:
            name = f"{record.purpose.what}, {record.purpose.phase}"
            found[name] = found.get(name, 0) + sum(record.received)
    return found


SHARD = 2 * 4 * 2 * 8 * 4  # bytes of a shard's keys and values, or of their gradients


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize(("is_causal", "balance"), [(False, "contiguous"), (False, "head_tail"), (True, "head_tail")])
def test_keys_visit_every_other_rank_and_gradients_come_home(ranks: int, is_causal: bool, balance: str) -> None:
    found = traffic(ranks, is_causal=is_causal, balance=balance)
    assert found["keys and values, forward"] == ranks * (ranks - 1) * SHARD
    assert found["keys and values, backward"] == ranks * (ranks - 1) * SHARD
    assert found["gradients of keys and values, backward"] == ranks * ranks * SHARD


def test_keys_of_contiguous_shards_do_not_go_where_no_row_may_see_them() -> None:
    ranks = 5
    found = traffic(ranks, is_causal=True)
    hops = sum(range(ranks))
    assert found["keys and values, forward"] == hops * SHARD
    assert found["gradients of keys and values, backward"] == (hops + ranks - 1) * SHARD


def test_a_mask_travels_as_a_byte_a_key() -> None:
    found = traffic(3, is_causal=False, mask=True)
    assert found["keys and values, forward"] == 3 * 2 * (SHARD + 4)


def test_verified_bounds_are_not_asked_for() -> None:
    def work(comm: Comm) -> list[str]:
        recording = RecordingComm(comm)
        query = torch.randn(1, 3, 1, 4, requires_grad=True)
        ring_attention(query, query, query, group=recording, bounds=(0, 3, 6), verify=False).sum().backward()
        return [record.purpose.phase for record in recording.records]

    assert run_ranks(2, work) == [["forward", "backward", "backward", "backward"]] * 2


class Watched:
    """A Comm that notes when transfers of keys start, and when they are waited for."""

    def __init__(self, comm: Comm, events: list[str]) -> None:
        self.comm, self.events = comm, events
        self.rank, self.size, self.device = comm.rank, comm.size, comm.device

    def exchange(
        self,
        received: Tensor,
        sent: Tensor,
        received_counts: Sequence[int],
        sent_counts: Sequence[int],
        purpose: Purpose,
    ) -> Transfer:
        transfer = self.comm.exchange(received, sent, received_counts, sent_counts, purpose)
        if purpose.what != "keys and values":
            return transfer
        self.events.append("start")
        return WatchedTransfer(transfer, self.events)

    def give_up(self) -> None:
        self.comm.give_up()


class WatchedTransfer:
    def __init__(self, transfer: Transfer, events: list[str]) -> None:
        self.transfer, self.events = transfer, events

    def wait(self) -> None:
        self.events.append("wait")
        self.transfer.wait()


class Attended(TorchDispatchMode):
    """Notes when a kernel attends."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.events.append("attend")
        return func(*args, **(kwargs or {}))


def test_the_next_keys_are_on_their_way_while_these_are_attended() -> None:
    def work(comm: Comm) -> list[str]:
        events: list[str] = []
        query = torch.randn(1, 4, 2, 8)
        with Attended(events):
            ring_attention(query, query, query, group=Watched(comm, events), kernel="cpu_flash")
        return events

    hop = ["start", "attend", "wait"]
    assert run_ranks(3, work) == [[*hop, *hop, "attend"]] * 3


@pytest.mark.parametrize(("ring_size", "tiles"), [(1, 1), (3, 3), (7, 4)])
def test_one_device_attends_a_chunk_of_keys_at_a_time(ring_size: int, tiles: int) -> None:
    """No more chunks than there are keys."""
    events: list[str] = []
    query = torch.randn(1, 4, 2, 8)
    with Attended(events):
        ring_attention(query, query, query, ring_size=ring_size, kernel="cpu_flash")
    assert events == ["attend"] * tiles


class Counting:
    """An allocator that knows the most bytes that it had out at a time."""

    def __init__(self) -> None:
        self.held = self.peak = 0

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = torch.empty(size, dtype=dtype, device=device)
        storage = tensor.untyped_storage()
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(tensor, self.give_back, storage.nbytes())
        return tensor

    def give_back(self, count: int) -> None:
        self.held -= count


def test_memory_does_not_grow_with_the_ring() -> None:
    """Buffers and sums are those of shards, forward and backward, however many there are."""

    def peak(ranks: int) -> int:
        def work(comm: Comm) -> int:
            memory = Counting()
            leaves = [torch.randn(1, 16, 2, 8).requires_grad_() for _ in range(3)]
            out = ring_attention(*leaves, group=comm, allocator=memory)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
            return memory.peak

        return max(run_ranks(ranks, work))

    assert peak(3) == peak(9)


# ------------------------------------------------------------------------------------------------ errors


def ones(seq: int = 3, heads: int = 2, **options: Any) -> Tensor:
    return torch.ones(1, seq, heads, 4, **options)


def call(group: Team | Comm | None, tensor: Tensor | None = None, **options: Any) -> Tensor:
    """ring_attention of one tensor with itself."""
    tensor = ones() if tensor is None else tensor
    result: Tensor = ring_attention(tensor, tensor, tensor, group=group, **options)
    return result


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"tensor": ones(heads=3)}, "heads is 2 on ranks 0 and 2, 3 on rank 1"),
    "batch": ({"tensor": ones().expand(5, 3, 2, 4)}, "batch is 1 on ranks 0 and 2, 5 on rank 1"),
    "dtype": (
        {"tensor": ones(dtype=torch.float64)},
        "dtype is torch.float32 on ranks 0 and 2, torch.float64 on rank 1",
    ),
    "causal": ({"is_causal": True}, "is_causal is False on ranks 0 and 2, True on rank 1"),
    "scale": ({"scale": 2.0}, "scale is 0.5 on ranks 0 and 2, 2.0 on rank 1"),
    "sign": ({"scale": -0.5}, "scale is 0.5 on ranks 0 and 2, -0.5 on rank 1"),
    "mode": ({"mode": "all_to_all"}, "mode is ring on ranks 0 and 2, all_to_all on rank 1"),
    "balance": ({"balance": "head_tail"}, "balance is contiguous on ranks 0 and 2, head_tail on rank 1"),
    "bounds": ({"bounds": (0, 3, 6, 9)}, r"bounds is \(\) on ranks 0 and 2, \(0, 3, 6, 9\) on rank 1"),
    "mask": (
        {"key_padding_mask": torch.ones(1, 3, dtype=torch.bool)},
        "key_padding_mask is not given on ranks 0 and 2",
    ),
    "gradients": ({"tensor": ones(requires_grad=True)}, "differentiable is False on ranks 0 and 2, True on rank 1"),
    "lse": ({"return_aux": AuxRequest(lse=True)}, "with_lse is False on ranks 0 and 2, True on rank 1"),
}


@pytest.mark.parametrize(("options", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_ranks_that_differ_are_named(options: dict[str, Any], message: str) -> None:
    found = errors_of(Way(3), lambda team: call(team, **(options if team.rank == 1 else {})))
    assert len({str(error) for error in found}) == 1
    for error in found:
        with pytest.raises(DisagreementError, match=message):
            raise error or AssertionError("no error")


def test_kernels_may_differ() -> None:
    assert errors_of(Way(2), lambda team: call(team, kernel=("math", "auto")[team.rank])) == [None, None]


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "causal": ({"is_causal": 1}, TypeError, "is_causal: expected"),
    "gqa": ({"enable_gqa": "yes"}, TypeError, "enable_gqa: expected"),
    "verify": ({"verify": None}, TypeError, "verify: expected"),
    "kernel": ({"kernel": "best"}, ValueError, "kernel: expected one of"),
    "kernel-here": ({"kernel": "cuda_flash"}, ValueError, 'kernel: "cuda_flash" cannot run'),
    "mode": ({"mode": "tree"}, ValueError, r"mode: expected one of \['ring', 'all_to_all'\], got 'tree'"),
    "balance": ({"balance": "zigzag"}, ValueError, "balance: expected one of"),
    "aux": ({"return_aux": True}, TypeError, "return_aux: expected an AuxRequest or None, got bool"),
    "allocator": ({"allocator": 3}, TypeError, "allocator: expected"),
    "query": ({"tensor": torch.ones(3)}, ValueError, "query: expected 4 dimensions"),
    "integers": ({"tensor": ones(dtype=torch.int64)}, TypeError, "query: expected float64"),
    "scale": ({"scale": float("nan")}, ValueError, "scale: expected a finite float"),
    "mask": ({"key_padding_mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError, "key_padding_mask: expected shape"),
    "ring-size": ({"ring_size": 2}, ValueError, "ring_size: expected None with a group, got 2"),
    "bounds": ({"bounds": 7}, TypeError, "bounds: expected a sequence"),
    "bounds-fall": ({"bounds": (0, 4, 3)}, ValueError, "bounds: expected positions that rise"),
    "bounds-count": ({"bounds": (0, 3)}, ValueError, r"bounds: expected world_size \+ 1 = 3 positions, got 2"),
    "bounds-own": ({"bounds": (0, 3, 5)}, ValueError, "query: expected the 2 positions that bounds give rank 1, got 3"),
    "bounds-balance": (
        {"bounds": (0, 1, 4), "balance": "head_tail"},
        ValueError,
        'balance: "head_tail" expects shards',
    ),
}


@pytest.mark.parametrize(("options", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_of_one_rank_are_told_to_all(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    """Before any row travels: who is right does not wait for who is wrong."""
    right, wrong = errors_of(Way(2), lambda team: call(team, **(options if team.rank == 1 else {})))
    with pytest.raises(kind, match=message):
        raise wrong or AssertionError("no error")
    with pytest.raises(DisagreementError, match=f"rank 1 refused its arguments: {kind.__name__}: {message}"):
        raise right or AssertionError("no error")


def test_shapes_that_do_not_fit_each_other() -> None:
    query, key = ones(heads=4), ones(heads=2)
    with pytest.raises(ValueError, match="enable_gqa=True"):
        ring_attention(query, key, key, ring_size=1)
    with pytest.raises(ValueError, match="key: expected the seq of query, 3, got 5"):
        ring_attention(query, ones(5, 4), ones(5, 4), ring_size=1)


def test_head_and_tail_of_other_lengths() -> None:
    found = errors_of(Way(2), lambda team: call(team, ones(4 - team.rank), balance="head_tail"))
    for error in found:
        with pytest.raises(
            ValueError, match=r'"head_tail" expects shards of \[3, 4\] of the 7 positions, got \[4, 3\]'
        ):
            raise error or AssertionError("no error")


def test_ring_size_and_a_group() -> None:
    with pytest.raises(ValueError, match="ring_size: expected None with a group, got 2"):
        call(run_ranks(1, lambda comm: comm)[0], ring_size=2)
    for ring_size, kind in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(kind, match="ring_size: expected a positive int"):
            call(None, ring_size=ring_size)


def test_no_group_at_all() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        call(None)
    with pytest.raises(TypeError, match="group: expected a ProcessGroup"):
        call("everyone")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"rank": 3, "world_size": 3}, ValueError, "rank: expected less than world_size = 3, got 3"),
        ({"rank": -1, "world_size": 3}, ValueError, "rank: expected"),
        ({"rank": 0, "world_size": 0}, ValueError, "world_size: expected"),
        ({"rank": 0, "world_size": 2, "balance": "tail"}, ValueError, "balance: expected one of"),
    ],
)
def test_shards_of_nobody(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        shard(ones(), **arguments)


def test_shards_that_are_not_a_whole() -> None:
    with pytest.raises(ValueError, match="shards: expected at least one tensor"):
        unshard([])
    with pytest.raises(ValueError, match="balance: expected one of"):
        unshard([ones()], balance="tail")
    with pytest.raises(ValueError, match='"head_tail" expects shards of'):
        unshard([ones(1), ones(5)], balance="head_tail")


@pytest.mark.parametrize("verify", [True, False])
def test_who_leaves_before_the_backward_is_named(verify: bool) -> None:
    def work(team: Team) -> None:
        out = call(team, ones(requires_grad=True), bounds=(0, 3, 6, 9), verify=verify)
        if team.rank != 1:
            out.sum().backward()

    expected = "what they were called with, agreement" if verify else r"keys and values \(hop 1 of 2\), backward"
    found = errors_of(Way(3), work)
    assert found[1] is None
    with pytest.raises(PeerError, match=f"{expected}: rank 1 is gone"):
        raise found[2] or AssertionError("no error")


def test_a_forward_that_meets_a_backward_is_named() -> None:
    def work(team: Team) -> None:
        out = call(team, ones(requires_grad=True))
        if team.rank:
            call(team, ones(requires_grad=True))
        else:
            out.sum().backward()

    for error in errors_of(Way(2), work):
        with pytest.raises(DisagreementError, match="phase is backward on rank 0, forward on rank 1"):
            raise error or AssertionError("no error")


# ------------------------------------------------------------------------------------------------ processes

REAL = dense(2, 31, 4, 8, kv_heads=2, is_causal=True, mask="right")


def on_a_ring(rank: int, balance: str, mesh: bool) -> Any:
    ranks = distributed.get_world_size()
    group = init_device_mesh("cpu", (ranks,)) if mesh else None
    return run_rank(REAL, torch.float64, group, Way(ranks, balance=balance), rank, with_lse=True)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "balance", "mesh"), [(2, "head_tail", False), (4, "contiguous", True)])
def test_processes(ranks: int, balance: str, mesh: bool, tmp_path: Path) -> None:
    results = run_processes(ranks, on_a_ring, balance, mesh, tmp_path=tmp_path)
    whole = joined(results, Way(ranks, balance=balance))
    assert_close(REAL, torch.float64, whole, oracle(REAL, torch.float64, with_lse=True))


def disagree(rank: int) -> str:
    with pytest.raises(DisagreementError) as found:
        call(None, ones(heads=2 + rank // 2))
    return str(found.value)


@pytest.mark.slow
def test_processes_that_differ_are_named(tmp_path: Path) -> None:
    messages = run_processes(3, disagree, tmp_path=tmp_path)
    assert len(set(messages)) == 1
    assert "heads is 2 on ranks 0-1, 3 on rank 2" in messages[0]


def test_compiled_on_one_device() -> None:
    leaves = [torch.randn(1, 9, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def work(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ring_attention(query, key, value, ring_size=3, is_causal=True)

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        *([out, *torch.autograd.grad(out.square().sum(), leaves)] for out in (compiled(*leaves), work(*leaves))),
        strict=True,
    ):
        assert deviation(found.detach(), expected.detach()) < 1e-12


def test_the_operator_keeps_its_promises() -> None:
    tensors = [torch.randn(1, 5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    options = (None, "", "", True, 0.5, 0.5, "ring", "contiguous", [], 2, True, True, True, "auto")
    torch.library.opcheck(torch.ops.dilated_ring.ring_attention.default, (*tensors, *options))


def test_compiled_without_a_process_group() -> None:
    def work(comm: Comm) -> None:
        # Not imported above: the processes of this file's tests need no compiler.
        with pytest.raises(
            torch._dynamo.exc.Unsupported,
            match=r"group: expected a process group under torch\.compile, got VirtualComm",
        ):
            torch.compile(lambda tensor: call(comm, tensor), fullgraph=True, backend="eager")(ones())

    run_ranks(1, work)


@pytest.mark.parametrize(
    ("cut", "kind", "message"),
    [
        (lambda: shard([1, 2], 0, 2), TypeError, "tensor: expected a torch.Tensor, got list"),
        (
            lambda: shard(torch.ones(4), 0, 2),
            ValueError,
            r"dim: expected a dimension of tensor, .* got 1",
        ),
        (lambda: unshard([torch.ones(1, 2), 3]), TypeError, r"shards\[1\]: expected a torch.Tensor, got int"),
        (lambda: unshard([torch.ones(2)]), ValueError, r"dim: expected a dimension of shards\[0\], of shape \(2,\)"),
    ],
)
def test_what_cannot_be_cut_is_named(cut: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        cut()
