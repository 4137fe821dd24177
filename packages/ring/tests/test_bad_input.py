"""Wrong arguments: an error that names them, on every rank, and nobody is left waiting.

On one rank alone, that rank raises what is wrong, and the others a DisagreementError that quotes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from dilated_core import AuxRequest
from dilated_ring import DisagreementError, dilated_ring_attention
from dilated_ring.comm import Comm, run_ranks

X = torch.zeros(2, 6, 4, 8)
MASK = torch.ones(2, 6, dtype=torch.bool)
GOOD: dict[str, Any] = {
    "query": X,
    "key": X,
    "value": X,
    "segment_lengths": [2, 8],
    "dilation_rates": [1, 2],
}
RANKS = 3

Fault = tuple[dict[str, Any], type[Exception], str]
FAULTS: dict[str, Fault] = {
    "query not a tensor": ({"query": [1.0]}, TypeError, "query: expected a torch.Tensor, got list"),
    "query of 3 dims": ({"query": X[0]}, ValueError, r"query: expected 4 dimensions .*, got shape \(6, 4, 8\)"),
    "query of ints": ({"query": X.int()}, TypeError, "query: expected float64, float32, .* got torch.int32"),
    "key of another dtype": ({"key": X.double()}, TypeError, "key: expected the dtype of query, torch.float32"),
    "key of another device": ({"key": X.to("meta")}, ValueError, "key: expected the device of query, cpu, got meta"),
    "value of another shape": ({"value": X[:, :5]}, ValueError, "value: expected the shape of key"),
    "another batch": ({"key": X[:1], "value": X[:1]}, ValueError, "key: expected the batch of query, 2, got 1"),
    "another head_dim": ({"key": X[..., :4], "value": X[..., :4]}, ValueError, "key: expected the head_dim of query"),
    "another length": ({"key": X[:, :5], "value": X[:, :5]}, ValueError, "key: expected the seq of query, 6, got 5"),
    "fewer kv heads": (
        {"key": X[:, :, :2], "value": X[:, :, :2]},
        ValueError,
        "key: expected the heads of query, 4, got 2 .*enable_gqa=True",
    ),
    "kv heads no divisor": (
        {"key": X[:, :, :3], "value": X[:, :, :3], "enable_gqa": True},
        ValueError,
        "key: expected kv_heads that divide the 4 heads of query, got 3",
    ),
    "head_dim 0": (dict.fromkeys(("query", "key", "value"), X[..., :0]), ValueError, "head_dim of at least 1"),
    "is_causal not a bool": ({"is_causal": 1}, TypeError, "is_causal: expected a bool, got 1"),
    "enable_gqa not a bool": ({"enable_gqa": "yes"}, TypeError, "enable_gqa: expected a bool"),
    "refetch not a bool": ({"refetch": None}, TypeError, "refetch: expected a bool, got None"),
    "verify not a bool": ({"verify": 0}, TypeError, "verify: expected a bool, got 0"),
    "exchange unknown": (
        {"exchange": "ring"},
        ValueError,
        r"exchange: expected one of \['auto', 'gather', 'heads'\], got 'ring'",
    ),
    "exchange not a string": ({"exchange": None}, TypeError, "exchange: expected one of .* got None"),
    "exchange for one branch of two": (
        {"exchange": ["gather"]},
        ValueError,
        "exchange: expected one for each of the 2 branches, got 1",
    ),
    "exchange unknown of one branch": ({"exchange": ["gather", "ring"]}, ValueError, "exchange.*: expected .*'ring'"),
    "semantics unknown": ({"semantics": "longnet"}, ValueError, "semantics: expected one of .* got 'longnet'"),
    "scale a string": ({"scale": "0.1"}, TypeError, "scale: expected a float or None"),
    "scale not finite": ({"scale": float("nan")}, ValueError, "scale: expected a finite float"),
    "kernel unknown": ({"kernel": "magic"}, ValueError, r"kernel: expected one of \['auto'.*got 'magic'"),
    "dropout of all": ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
    "generator a seed": ({"generator": 3}, TypeError, "generator: expected a torch.Generator or None, got int"),
    "mask of numbers": ({"key_padding_mask": MASK.float()}, TypeError, "key_padding_mask: .*got torch.float32"),
    "mask of another shape": (
        {"key_padding_mask": MASK[:, :5]},
        ValueError,
        r"key_padding_mask: expected shape \(batch, seq\) = \(2, 6\), got \(2, 5\)",
    ),
    "aux a bool": ({"return_aux": True}, TypeError, "return_aux: expected an AuxRequest or None, got bool"),
    "allocator without empty": ({"allocator": object()}, TypeError, "allocator: expected an object with empty"),
    "patterns a dict": ({"patterns": {}}, TypeError, "patterns: expected an object with get_or_create.* got dict"),
    "lengths not a list": ({"segment_lengths": 4}, TypeError, "segment_lengths: expected a sequence"),
    "rate zero": ({"dilation_rates": [1, 0]}, ValueError, r"dilation_rates\[1\]: expected a positive int, got 0"),
    "one rate missing": ({"dilation_rates": [1]}, ValueError, "one rate a segment length"),
    "swapped": (
        {"segment_lengths": [1, 2], "dilation_rates": [2, 8]},
        ValueError,
        "were the two lists swapped",
    ),
    "bounds a number": ({"bounds": 18}, TypeError, "bounds: expected a sequence of positions, got int"),
    "bounds too few": ({"bounds": [0, 6, 18]}, ValueError, r"bounds: expected world_size \+ 1 = 4 positions, got 3"),
    "bounds that fall": ({"bounds": [0, 6, 5, 11]}, ValueError, "bounds: expected positions that rise from 0"),
    "bounds not from 0": ({"bounds": [1, 7, 13, 19]}, ValueError, "bounds: expected positions that rise from 0"),
    "bounds of fractions": (
        {"bounds": [0, 6.0, 12, 18]},
        TypeError,
        r"bounds\[1\]: expected an int of at least 0, got 6.0",
    ),
    "bounds that do not fit": (
        {"bounds": [0, 5, 10, 15]},
        ValueError,
        r"query: expected the 5 positions that bounds give rank [012], got 6",
    ),
    "kernel impossible": ({"kernel": "cuda_flash"}, ValueError, 'kernel: "cuda_flash" cannot run'),
    "kernel that cannot drop": (
        {"kernel": "cpu_flash", "dropout_p": 0.5},
        ValueError,
        'kernel: "cpu_flash" cannot run .* it drops no probabilities',
    ),
}
# What is not wrong on one rank alone: there it is a difference between ranks, see DIFFERENCES.
ON_ALL_RANKS: dict[str, Fault] = {
    "torchscale cannot": (
        {"semantics": "torchscale", "segment_lengths": [2, 5]},
        ValueError,
        r"segment_lengths\[1\]: .*multiple of dilation_rates\[1\] = 2 .* got 5 for 18 tokens",
    ),
}
BOUNDS_ON_ALL = [0, 6, 12, 18]


def errors_of(work: Callable[[Comm], object]) -> list[Exception | None]:
    """What each rank raises, of ranks that are threads."""

    def run(comm: Comm) -> Exception | None:
        try:
            work(comm)
        except Exception as error:
            return error
        return None

    return run_ranks(RANKS, run, timeout=60)


@pytest.mark.parametrize("name", [*FAULTS, *ON_ALL_RANKS])
def test_a_wrong_argument_is_named_on_every_rank(name: str) -> None:
    changes, kind, message = (FAULTS | ON_ALL_RANKS)[name]
    for error in errors_of(lambda comm: dilated_ring_attention(**{**GOOD, **changes}, group=comm)):
        assert type(error) is kind
        assert re.search(message, str(error)), error


@pytest.mark.parametrize("culprit", range(RANKS))
@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_argument_on_one_rank_is_quoted_on_the_others(name: str, culprit: int) -> None:
    changes, kind, message = FAULTS[name]
    same = {"bounds": BOUNDS_ON_ALL} if "bounds" in changes else {}
    same |= {key: changes[key] for key in ("dropout_p",) if key in changes and "kernel" in changes}

    def work(comm: Comm) -> None:
        dilated_ring_attention(**{**GOOD, **same, **(changes if comm.rank == culprit else {})}, group=comm)

    errors = errors_of(work)
    assert type(errors[culprit]) is kind
    for rank, error in enumerate(errors):
        assert re.search(message, str(error)), (rank, error)
        if rank != culprit:
            assert type(error) is DisagreementError
            assert str(error).startswith(f"rank {culprit} refused its arguments: {kind.__name__}: ")
    others = {str(error) for rank, error in enumerate(errors) if rank != culprit}
    assert len(others) == 1


def test_several_ranks_that_refuse_are_all_quoted() -> None:
    changes = [{"scale": "a"}, {}, {"exchange": "b"}]
    errors = errors_of(lambda comm: dilated_ring_attention(**{**GOOD, **changes[comm.rank]}, group=comm))
    assert [type(error) for error in errors] == [TypeError, DisagreementError, ValueError]
    assert re.search("rank 0 refused .* got 'a'.*; rank 2 refused .* got 'b'", str(errors[1]))


# ------------------------------------------------------------------------------------------------ differences

# name -> (what rank 1 is called with instead, what everybody is told)
DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "batch": (
        dict.fromkeys(("query", "key", "value"), X[:1]),
        "batch is 2 on ranks 0 and 2, 1 on rank 1",
    ),
    "heads": (dict.fromkeys(("query", "key", "value"), X[:, :, :2]), "heads is 4 on ranks 0 and 2, 2 on rank 1"),
    "kv_heads": (dict.fromkeys(("key", "value"), X[:, :, :2]), "kv_heads is 4 on ranks 0 and 2, 2 on rank 1"),
    "head_dim": (dict.fromkeys(("query", "key", "value"), X[..., :4]), "head_dim is 8 on .*, 4 on rank 1"),
    "dtype": (
        {name: X.double() for name in ("query", "key", "value")},
        "dtype is torch.float32 on ranks 0 and 2, torch.float64 on rank 1",
    ),
    "segment_lengths": (
        {"segment_lengths": [2, 9]},
        r"segment_lengths is \(2, 8\) on ranks 0 and 2, \(2, 9\) on rank 1",
    ),
    "dilation_rates": ({"dilation_rates": [1, 3]}, r"dilation_rates is \(1, 2\) on .*, \(1, 3\) on rank 1"),
    "more branches": ({"segment_lengths": [2, 8, 8], "dilation_rates": [1, 2, 4]}, "segment_lengths is .* on rank 1"),
    "is_causal": ({"is_causal": True}, "is_causal is False on ranks 0 and 2, True on rank 1"),
    "scale": ({"scale": 0.3}, "scale is 0.35.* on ranks 0 and 2, 0.3 on rank 1"),
    "semantics": ({"semantics": "grouped"}, "semantics is paper on ranks 0 and 2, grouped on rank 1"),
    "dropout_p": ({"dropout_p": 0.1}, "dropout_p is 0.0 on ranks 0 and 2, 0.1 on rank 1"),
    "exchange": ({"exchange": "heads"}, "exchange is auto on ranks 0 and 2, heads on rank 1"),
    "mask": ({"key_padding_mask": MASK}, "key_padding_mask is None on ranks 0 and 2, given on rank 1"),
    "bounds": ({"bounds": BOUNDS_ON_ALL}, r"bounds is None on ranks 0 and 2, \(0, 6, 12, 18\) on rank 1"),
    "gradients": ({"value": X.clone().requires_grad_()}, "gradients is False on ranks 0 and 2, True on rank 1"),
    "several": (
        {"is_causal": True, "scale": 0.3},
        "is_causal is False on .*, True on rank 1; scale is 0.35.* on .*, 0.3 on rank 1",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_between_ranks_is_named_on_all(name: str) -> None:
    changes, message = DIFFERENCES[name]
    same = {"enable_gqa": True}
    errors = errors_of(
        lambda comm: dilated_ring_attention(**{**GOOD, **same, **(changes if comm.rank == 1 else {})}, group=comm)
    )
    assert {type(error) for error in errors} == {DisagreementError}
    assert len({str(error) for error in errors}) == 1
    assert re.search(f"the ranks were called with different arguments: {message}", str(errors[0])), errors[0]


def test_a_scale_and_its_negative_differ() -> None:
    """The scale that kernels get is positive, and the sign goes into the query: no such thing may hide a difference."""
    errors = errors_of(lambda comm: dilated_ring_attention(**GOOD, scale=[0.5, -0.5, 0.5][comm.rank], group=comm))
    assert {type(error) for error in errors} == {DisagreementError}


@pytest.mark.parametrize("exchange", ["gather", "heads"])
def test_ranks_that_differ_in_refetch_are_told(exchange: str) -> None:
    """Some would gather again in the backward, and others not take part."""

    def work(comm: Comm) -> None:
        leaves = {name: X.clone().requires_grad_() for name in ("query", "key", "value")}
        options = {**GOOD, **leaves, "exchange": exchange, "refetch": comm.rank == 1}
        dilated_ring_attention(**options, group=comm).sum().backward()

    errors = errors_of(work)
    assert {type(error) for error in errors} == {DisagreementError}
    assert "refetch" in str(errors[0])


@pytest.mark.parametrize("exchange", ["gather", "heads"])
def test_an_lse_that_only_some_ranks_differentiate(exchange: str) -> None:
    """As where one rank's loss has no use for it: exact there too, or an error on all; never a hang."""
    values = torch.randn(3, 1, 18, 4, 8, dtype=torch.float64)

    def work(comm: Comm, everywhere: bool) -> list[torch.Tensor]:
        shard = slice(comm.rank * 6, comm.rank * 6 + 6)
        leaves = [tensor[:, shard].clone().requires_grad_() for tensor in values]
        out, aux = dilated_ring_attention(
            *leaves, [2, 18], [1, 2], group=comm, exchange=exchange, return_aux=AuxRequest(lse=True)
        )
        loss = out.sum()
        if everywhere or comm.rank == 1:
            loss = loss + (comm.rank == 1) * aux.lse.sum()
        return list(torch.autograd.grad(loss, leaves))

    expected = run_ranks(RANKS, lambda comm: work(comm, True))
    found = run_ranks(RANKS, lambda comm: work(comm, False))
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_after_an_error_the_ranks_go_on() -> None:
    """A refusal, a disagreement, and then a call that works, by the same ranks."""

    def work(comm: Comm) -> torch.Tensor:
        with pytest.raises((TypeError, DisagreementError)):
            dilated_ring_attention(**GOOD, scale="a" if comm.rank == 2 else None, group=comm)
        with pytest.raises(DisagreementError):
            dilated_ring_attention(**GOOD, is_causal=comm.rank == 1, group=comm)
        return dilated_ring_attention(**GOOD, group=comm)

    assert all(out.shape == X.shape for out in run_ranks(RANKS, work))


# ------------------------------------------------------------------------------------------------ groups


@pytest.mark.parametrize("group", [0, "world", [0, 1], object()], ids=["int", "str", "list", "object"])
def test_a_group_that_is_none(group: object) -> None:
    with pytest.raises(TypeError, match="group: expected a ProcessGroup, a DeviceMesh, a Comm or None, got "):
        dilated_ring_attention(**GOOD, group=group)


def test_no_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"group: expected a process group .*torchrun"):
        dilated_ring_attention(**GOOD)


def on_processes(rank: int) -> list[str]:
    """Errors that this process sees: one after the other, by the same group."""
    seen = []

    def note(kind: type[Exception], **options: Any) -> None:
        with pytest.raises(kind) as caught:
            dilated_ring_attention(**{**GOOD, **options})
        seen.append(str(caught.value))

    note(TypeError if rank == 1 else DisagreementError, scale="a" if rank == 1 else None)
    note(DisagreementError, is_causal=rank == 0)
    note(DisagreementError, bounds=BOUNDS_ON_ALL if rank == 2 else None)
    mesh = init_device_mesh("cpu", (1, 3), mesh_dim_names=("data", "sequence"))
    note(ValueError, group=mesh)
    dilated_ring_attention(**GOOD, group=mesh["sequence"])
    return seen


@pytest.mark.slow
def test_processes_are_told_too(tmp_path: Path) -> None:
    seen = run_processes(RANKS, on_processes, tmp_path=tmp_path)
    assert seen[0][0] == seen[2][0]
    assert "rank 1 refused its arguments: TypeError: scale: expected a float or None, got 'a'" in seen[0][0]
    assert seen[1][0].startswith("scale: expected a float or None, got 'a'")
    assert all("is_causal is False on ranks 1-2, True on rank 0" in each[1] for each in seen), seen
    assert all("bounds is None on ranks 0-1, (0, 6, 12, 18) on rank 2" in each[2] for each in seen), seen
    for each in seen:
        assert "group: expected one dimension of a mesh, got 2: ('data', 'sequence')" in each[-1]


def call_in_a_group_of_others(rank: int) -> str:
    group = distributed.new_group([0, 1])
    if rank < 2:
        return str(tuple(dilated_ring_attention(**GOOD, group=group).shape))
    with pytest.raises((TypeError, ValueError)) as caught:
        dilated_ring_attention(**GOOD, group=group)
    return str(caught.value)


@pytest.mark.slow
def test_a_group_of_others(tmp_path: Path) -> None:
    """Who is no member is told so, and the members are not disturbed."""
    shape, _, told = run_processes(RANKS, call_in_a_group_of_others, tmp_path=tmp_path)
    assert shape == str(tuple(X.shape))
    assert "group: expected a group that this process belongs to" in told
