"""Streamed attention: against the float64 oracle in every gradient, from tensors and from files, and its memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dilated_core import AuxRequest, kernels, measure, reference
from dilated_ring.streaming import StoredTensor, streamed_attention

# Largest deviation from the float64 oracle, relative to the oracle's largest magnitude.
FORWARD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}
RING_SIZES = (1, 2, 3, 7, 300)
STORED_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Case:
    """One problem; its id reads like B2-N37-H4kv2-D8-causal-random. kv_seq None: as many keys as queries."""

    batch: int
    seq: int
    heads: int
    head_dim: int
    kv_heads: int | None = None
    kv_seq: int | None = None
    is_causal: bool = False
    mask: str = "none"
    scale: float | None = None
    seed: int = 0

    def __str__(self) -> str:
        shared = "" if self.kv_heads is None else f"kv{self.kv_heads}"
        keys = "" if self.kv_seq is None else f"kv{self.kv_seq}"
        words = ["causal" * self.is_causal, self.mask * (self.mask != "none"), f"scale{self.scale}" * bool(self.scale)]
        return "-".join(
            [f"B{self.batch}-N{self.seq}{keys}-H{self.heads}{shared}-D{self.head_dim}", *filter(None, words)]
        )

    @property
    def keys(self) -> int:
        return self.seq if self.kv_seq is None else self.kv_seq

    def problem(self, dtype: torch.dtype) -> list[Tensor]:
        """query, key, value, a cotangent of out and one of lse; the same values in every dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        kv_shape = (self.batch, self.keys, self.kv_heads or self.heads, self.head_dim)
        shape = (self.batch, self.seq, self.heads, self.head_dim)
        shapes: list[tuple[int, ...]] = [shape, kv_shape, kv_shape, shape, (self.batch, self.heads, self.seq)]
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        return [*tensors[:4], tensors[4].to(torch.float64 if dtype == torch.float64 else torch.float32)]

    def key_padding_mask(self) -> Tensor | None:
        """ "random" keeps 7 keys in 10; "right" pads at the right, the last of several batch rows altogether."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        if self.mask == "none":
            return None
        if self.mask == "random":
            return torch.rand(self.batch, self.keys, generator=generator) < 0.7
        lengths = torch.randint(self.keys + 1, (self.batch, 1), generator=generator)
        lengths[-1] *= self.batch == 1
        return torch.arange(self.keys) < lengths

    def options(self) -> dict[str, Any]:
        return {
            "is_causal": self.is_causal,
            "scale": self.scale,
            "enable_gqa": self.kv_heads is not None,
            "key_padding_mask": self.key_padding_mask(),
        }


class Stored:
    """A stored tensor whose parts are copies, and that remembers which were read."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.read: list[tuple[int, int]] = []

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return STORED_NAMES[self.tensor.dtype]

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        self.read.append((index[1].start, index[1].stop))
        return self.tensor[index].clone(memory_format=torch.contiguous_format)


class Lender:
    """An allocator that knows what it lent, each tensor full of NaN; keeps it, or sees what the borrower keeps."""

    def __init__(self, *, keep: bool) -> None:
        self.kept: list[Tensor] | None = [] if keep else None
        self.lent: list[weakref.ref[Tensor]] = []

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = torch.full(tuple(size), torch.nan, dtype=dtype, device=device)
        self.lent.append(weakref.ref(tensor))
        if self.kept is not None:
            self.kept.append(tensor)
        return tensor

    def alive(self) -> list[Tensor]:
        gc.collect()
        return [tensor for tensor in (lent() for lent in self.lent) if tensor is not None]

    def owns(self, tensor: Tensor) -> bool:
        assert self.kept is not None
        address = tensor.untyped_storage().data_ptr()
        return any(address == lent.untyped_storage().data_ptr() for lent in self.kept)


@dataclass(frozen=True)
class Results:
    """out, lse and the gradients of one run, those of key and value None for stored ones."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor | None = None
    dv: Tensor | None = None

    def each(self) -> list[Tensor]:
        return [tensor for tensor in (self.out, self.lse, self.dq, self.dk, self.dv) if tensor is not None]


def run(case: Case, dtype: torch.dtype, ring_size: int, *, device: str = "cpu", **options: object) -> Results:
    """streamed_attention and its gradients under random cotangents of out and lse."""
    query, key, value, cotangent, lse_cotangent = case.problem(dtype)
    leaves = [tensor.requires_grad_() for tensor in (query.to(device), key, value)]
    arguments = {**case.options(), "return_aux": AuxRequest(lse=True), **options}
    out, aux = streamed_attention(*leaves, ring_size=ring_size, **arguments)
    # lse of a row with no key is -inf, which has no gradient.
    lse_cotangent = lse_cotangent.to(device).masked_fill(aux.lse == -torch.inf, 0.0)
    return Results(out, aux.lse, *torch.autograd.grad([out, aux.lse], leaves, [cotangent.to(device), lse_cotangent]))


def oracle(case: Case, dtype: torch.dtype) -> Results:
    """The same in float64 by the definition, from the inputs as ``dtype`` rounds them."""
    query, key, value, cotangent, lse_cotangent = (tensor.double() for tensor in case.problem(dtype))
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    group = case.heads // (case.kv_heads or case.heads)
    key, value = (tensor.repeat_interleave(group, dim=2) for tensor in (key, value))
    # The definition has as many queries as keys. Further ones are added where there are fewer, which only
    # lets more rows ask; further keys are padding, which no row attends.
    longer = max(case.seq, case.keys)
    real = case.key_padding_mask()
    real = torch.ones(case.batch, case.keys, dtype=torch.bool) if real is None else real
    query, key, value = (_longer(tensor, longer) for tensor in (query, key, value))
    out, lse = reference.dilated_attention(
        query, key, value, [longer], [1], is_causal=case.is_causal, scale=case.scale,
        key_padding_mask=_longer(real, longer),
    )  # fmt: skip
    out, lse = out[:, : case.seq], lse[:, :, : case.seq]
    lse_cotangent = lse_cotangent.masked_fill(lse == -torch.inf, 0.0)
    return Results(out, lse, *torch.autograd.grad([out, lse], leaves, [cotangent, lse_cotangent]))


def _longer(tensor: Tensor, length: int) -> Tensor:
    """``tensor`` with zeros, or False, after its positions."""
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], length - tensor.shape[1], *tensor.shape[2:])], 1)


def deviation(result: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest magnitude; infinite where it is no number."""
    difference = (result.detach().cpu().double() - expected.detach().double()).abs().max().item()
    scale = max(expected.detach().abs().max().item(), floor, torch.finfo(torch.float64).tiny)
    return difference / scale if difference == difference else float("inf")


def assert_close(case: Case, dtype: torch.dtype, results: Results, expected: Results, *, slack: float = 1.0) -> None:
    """Compare out, lse, dq, dk and dv, each alone and by name; ``slack`` widens the tolerances."""
    assert results.out.dtype == dtype
    assert deviation(results.out, expected.out) <= slack * FORWARD_TOLERANCE[dtype], f"out of {case}"
    no_key = expected.lse == -torch.inf
    assert torch.equal(results.lse.cpu() == -torch.inf, no_key), f"rows with no key of {case}"
    lse, expected_lse = (each.cpu().masked_fill(no_key, 0.0) for each in (results.lse, expected.lse))
    assert deviation(lse, expected_lse, floor=1.0) <= slack * FORWARD_TOLERANCE[dtype], f"lse of {case}"
    # dq and dk may vanish (a row with one key has no choice), dv does not: its size says how small counts as nothing.
    assert expected.dv is not None
    floor = (1.0 if dtype.itemsize == 2 else 0.1) * expected.dv.abs().max().item()
    for name in ("dq", "dk", "dv"):
        found = getattr(results, name)
        if found is not None:
            assert found.dtype == dtype, name
            difference = deviation(found, getattr(expected, name), floor=floor)
            assert difference <= slack * GRADIENT_TOLERANCE[dtype], f"{name} of {case}: {difference}"


CASES = [
    Case(1, 1, 1, 1),
    Case(1, 2, 3, 8),
    Case(2, 13, 3, 4),
    Case(1, 53, 2, 8),
    Case(2, 41, 4, 8, kv_heads=2),
    Case(1, 29, 6, 5, kv_heads=1),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mask", ["none", "random", "right"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case: Case, is_causal: bool, mask: str, dtype: torch.dtype) -> None:
    case = replace(case, is_causal=is_causal, mask=mask)
    expected = oracle(case, dtype)
    # More chunks than keys make a tile of each pair: of few keys here, of many in test_any_problem.
    for ring_size in RING_SIZES if case.seq < 20 else RING_SIZES[:-1]:
        assert_close(case, dtype, run(case, dtype, ring_size), expected)


@pytest.mark.parametrize("kernel", ["cpu_flash", "math"])
@pytest.mark.parametrize("case", CASES[2:5], ids=str)
def test_every_kernel(case: Case, kernel: str) -> None:
    case = replace(case, is_causal=True, mask="random")
    assert_close(case, torch.float64, run(case, torch.float64, 3, kernel=kernel), oracle(case, torch.float64))


@pytest.mark.parametrize("ring_size", RING_SIZES)
@pytest.mark.parametrize(("seq", "kv_seq"), [(1, 37), (37, 1), (5, 19), (23, 11)])
def test_other_keys_than_queries(seq: int, kv_seq: int, ring_size: int) -> None:
    for mask in ("none", "random"):
        case = Case(2, seq, 4, 8, kv_heads=2, kv_seq=kv_seq, mask=mask)
        assert_close(case, torch.float64, run(case, torch.float64, ring_size), oracle(case, torch.float64))


@pytest.mark.parametrize("scale", [0.7, -0.3, 0.0])
def test_scale(scale: float) -> None:
    case = Case(2, 23, 2, 8, is_causal=True, scale=scale)
    assert_close(case, torch.float64, run(case, torch.float64, 3), oracle(case, torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [Case(1, 211, 2, 32), Case(2, 131, 4, 16, kv_heads=2, is_causal=True), Case(2, 61, 2, 8, mask="right")],
    ids=str,
)
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    """In many chunks the error is at most twice that in one (root of the mean square): sums are float32."""
    expected = oracle(case, dtype)
    whole = run(case, dtype, 1)
    assert_close(case, dtype, whole, expected)
    for ring_size in (2, 7, 31):
        results = run(case, dtype, ring_size)
        assert_close(case, dtype, results, expected)
        for name in ("out", "dq", "dk", "dv"):
            many, one = ((getattr(each, name) - getattr(expected, name)).norm() for each in (results, whole))
            assert many <= 2 * one, f"{name}, ring_size {ring_size}: {many / one:.2f}"


@st.composite
def problems(draw: st.DrawFn) -> Case:
    heads = draw(st.integers(1, 6))
    is_causal = draw(st.booleans())
    return Case(
        batch=draw(st.integers(1, 3)),
        seq=draw(st.integers(1, 40)),
        heads=heads,
        head_dim=draw(st.sampled_from([1, 2, 3, 8, 16])),
        kv_heads=draw(st.sampled_from([None, *(count for count in range(1, heads) if heads % count == 0)])),
        kv_seq=None if is_causal else draw(st.none() | st.integers(1, 40)),
        is_causal=is_causal,
        mask=draw(st.sampled_from(["none", "random", "right"])),
        seed=draw(st.integers(0, 2**20)),
    )


@settings(max_examples=40)
@given(case=problems(), ring_size=st.integers(1, 45))
def test_any_problem(case: Case, ring_size: int) -> None:
    assert_close(case, torch.float64, run(case, torch.float64, ring_size), oracle(case, torch.float64))


# ------------------------------------------------------------------------------------------------ sources

SOURCED = Case(2, 41, 4, 8, kv_heads=2, is_causal=True, mask="random")


def from_safetensors(folder: Path, key: Tensor, value: Tensor) -> list[Any]:
    save_file({"key": key, "value": value}, folder / "cache.safetensors")
    file: Any = safe_open(folder / "cache.safetensors", "pt")
    return [file.get_slice(name) for name in ("key", "value")]


def from_mapped_file(folder: Path, key: Tensor, value: Tensor) -> list[Any]:
    mapped = []
    for name, tensor in (("key", key), ("value", value)):
        (folder / name).write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        storage = torch.from_file(str(folder / name), size=tensor.numel(), dtype=tensor.dtype)
        mapped.append(storage.view(tensor.shape))
    return mapped


def from_numpy_memmap(folder: Path, key: Tensor, value: Tensor) -> list[Any]:
    mapped = []
    for name, tensor in (("key", key), ("value", value)):
        array = numpy.memmap(folder / name, dtype=tensor.numpy().dtype, mode="w+", shape=tuple(tensor.shape))
        array[:] = tensor.numpy()
        mapped.append(torch.from_numpy(array))
    return mapped


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("source", [from_safetensors, from_mapped_file, from_numpy_memmap])
def test_keys_from_a_file(source: Callable[..., list[Any]], dtype: torch.dtype, tmp_path: Path) -> None:
    """The query's gradient is exact; a stored tensor takes none."""
    if source is from_numpy_memmap and dtype == torch.bfloat16:
        pytest.skip("numpy has no bfloat16")
    query, key, value, cotangent, _ = SOURCED.problem(dtype)
    sources, query = source(tmp_path, key, value), query.requires_grad_()
    expected = streamed_attention(query, key, value, ring_size=7, **SOURCED.options())
    (expected_dq,) = torch.autograd.grad(expected, query, cotangent)
    out = streamed_attention(query, *sources, ring_size=7, **SOURCED.options())
    (dq,) = torch.autograd.grad(out, query, cotangent)
    assert torch.equal(out, expected)
    assert torch.equal(dq, expected_dq)


def test_a_slice_of_safetensors_is_a_stored_tensor(tmp_path: Path) -> None:
    sources = from_safetensors(tmp_path, torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    assert all(isinstance(source, StoredTensor) for source in sources)


def test_one_of_key_and_value_may_be_stored() -> None:
    query, key, value, cotangent, _ = SOURCED.problem(torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    whole = streamed_attention(*leaves, ring_size=3, **SOURCED.options())
    dq, dk, _ = torch.autograd.grad(whole, leaves, cotangent)
    out = streamed_attention(query, key, Stored(value.detach()), ring_size=3, **SOURCED.options())
    found = torch.autograd.grad(out, [query, key], cotangent)
    assert all(torch.equal(a, b) for a, b in zip((out, *found), (whole, dq, dk), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_how_often_keys_are_read(is_causal: bool, dtype: torch.dtype) -> None:
    """float32: once. Half precision: once a chunk of queries, less the chunk that two rows of tiles share."""
    case = Case(1, 40, 2, 8, is_causal=is_causal)
    query, key, value, cotangent, _ = case.problem(dtype)
    stored = Stored(key), Stored(value)
    out = streamed_attention(query.requires_grad_(), *stored, ring_size=4, **case.options())
    chunks = [(start, start + 10) for start in range(0, 40, 10)]
    a, b, c, d = chunks
    if dtype == torch.float32:
        expected = chunks
    elif is_causal:
        expected = [a, b, a, b, c, d, c, b, a]
    else:
        expected = [a, b, c, d, c, b, a, b, c, d, c, b, a]
    assert [source.read for source in stored] == [expected] * 2
    torch.autograd.grad(out, query, cotangent)
    assert [source.read for source in stored] == [expected * 2] * 2


def test_a_stored_tensor_that_breaks_its_promise_is_an_error() -> None:
    class Short(Stored):
        def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
            return super().__getitem__(index)[:, 1:]

    class Other(Stored):
        def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
            return super().__getitem__(index).double()

    class Nothing(Stored):
        def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
            return None  # type: ignore[return-value]

    x = torch.zeros(1, 6, 2, 8)
    promise = r"value: expected \[:, 0:3\] of the stored tensor to be torch.float32 of \(1, 3, 2, 8\), got "
    for kind, found in ((Short, r"torch.float32 of \(1, 2, 2, 8\)"), (Other, "torch.float64 of"), (Nothing, "None")):
        with pytest.raises(ValueError, match=promise + found):
            streamed_attention(x, x, kind(x), ring_size=2)


# ------------------------------------------------------------------------------------------------ tensors of all kinds

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "head-major": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
    "dim-major": lambda tensor: tensor.transpose(1, 3).contiguous().transpose(1, 3),
    "every other": lambda tensor: tensor.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda tensor: tensor[:, :, :1].expand_as(tensor),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Of query, key, value and cotangent: the same as from contiguous tensors, but for the order of sums."""
    for case in (Case(2, 23, 4, 8), SOURCED):
        *qkv, cotangent, _ = case.problem(dtype)
        results = []
        for lay in (layout, lambda tensor: layout(tensor).contiguous()):
            leaves = [lay(tensor).detach().requires_grad_() for tensor in qkv]
            out = streamed_attention(*leaves, ring_size=3, **case.options())
            results.append([out, *torch.autograd.grad(out, leaves, lay(cotangent))])
        for found, expected in zip(*results, strict=True):
            assert deviation(found, expected.double(), floor=1.0) <= FORWARD_TOLERANCE[dtype]


EMPTY = {"no batch": (0, 5, 5, 2), "no queries": (2, 0, 5, 2), "no keys": (2, 5, 0, 2), "nothing": (2, 0, 0, 2),
         "no heads": (2, 5, 5, 0)}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "seq", "kv_seq", "heads"), EMPTY.values(), ids=EMPTY)
def test_empty(batch: int, seq: int, kv_seq: int, heads: int, dtype: torch.dtype) -> None:
    leaves = [torch.randn(batch, n, heads, 8).to(dtype).requires_grad_() for n in (seq, kv_seq, kv_seq)]
    out, aux = streamed_attention(*leaves, ring_size=3, return_aux=AuxRequest(lse=True))
    assert aux.lse is not None
    assert aux.lse.shape == (batch, heads, seq)
    assert bool((aux.lse == -torch.inf).all())
    grads = torch.autograd.grad(out, leaves, torch.randn_like(out))
    for result, like in zip((out, *grads), (leaves[0], *leaves), strict=True):
        assert result.shape == like.shape
        assert not result.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_what_padding_holds_has_no_influence(is_causal: bool, dtype: torch.dtype) -> None:
    for mask in ("random", "right"):
        case = replace(SOURCED, is_causal=is_causal, mask=mask)
        query, key, value, cotangent, _ = case.problem(dtype)
        results = []
        for held in (torch.nan, 0.0):
            padding = ~case.options()["key_padding_mask"][:, :, None, None]
            leaves = [query, key.masked_fill(padding, held), value.masked_fill(padding, held)]
            leaves = [tensor.detach().requires_grad_() for tensor in leaves]
            out = streamed_attention(*leaves, ring_size=5, **case.options())
            results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)
            assert not found.isnan().any()


@pytest.mark.parametrize("wanting", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_of_some(dtype: torch.dtype, wanting: tuple[bool, ...]) -> None:
    *qkv, cotangent, _ = SOURCED.problem(dtype)
    found = []
    for wanted in ((True, True, True), wanting):
        leaves = [tensor.detach().requires_grad_(wants) for tensor, wants in zip(qkv, wanted, strict=True)]
        streamed_attention(*leaves, ring_size=3, **SOURCED.options()).backward(cotangent)
        found.append([leaf.grad for leaf in leaves])
    for grad, whole, wants in zip(found[1], found[0], wanting, strict=True):
        assert (grad is not None) == wants
        assert whole is not None
        assert grad is None or torch.equal(grad, whole)


def test_gradient_of_lse_alone() -> None:
    *qkv, _, lse_cotangent = SOURCED.problem(torch.float64)
    leaves = [tensor.requires_grad_() for tensor in qkv]
    for cotangent in (lse_cotangent, lse_cotangent[:1, :1, :1].expand_as(lse_cotangent)):
        found = []
        for ring_size in (1, 5):
            options = {**SOURCED.options(), "key_padding_mask": None, "return_aux": AuxRequest(lse=True)}
            _, aux = streamed_attention(*leaves, ring_size=ring_size, **options)
            found.append(torch.autograd.grad(aux.lse, leaves, cotangent, allow_unused=True))
        for whole, streamed in zip(*found, strict=True):
            torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-13)
        assert not found[0][2].any()  # lse does not depend on value


@pytest.mark.parametrize("keys", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(keys: torch.dtype) -> None:
    """float32 in, bfloat16 out; gradients in the dtypes of the inputs, those of key and value rounded once."""
    query, key, value, cotangent, _ = SOURCED.problem(torch.bfloat16)
    expected = run_plain([query, key, value], cotangent)
    leaves = [query.float(), key.to(keys), value.to(keys)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_plain(leaves, cotangent)
    assert found[0].dtype == torch.bfloat16
    assert [grad.dtype for grad in found[1:]] == [torch.float32, keys, keys]
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(found, expected, strict=True))


def run_plain(qkv: list[Tensor], cotangent: Tensor, **options: Any) -> list[Tensor]:
    """out and the gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    out = streamed_attention(*leaves, **{"ring_size": 3, **SOURCED.options(), **options})
    return [out, *torch.autograd.grad(out, leaves, cotangent)]


# ------------------------------------------------------------------------------------------------ autograd, compile


def test_a_second_derivative_is_an_error() -> None:
    leaves = [tensor.requires_grad_() for tensor in SOURCED.problem(torch.float64)[:3]]
    out = streamed_attention(*leaves, ring_size=3, **SOURCED.options())
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="streamed_attention: second derivatives are not defined"):
        torch.autograd.grad(dq.sum(), leaves)


def test_a_change_in_place_before_the_backward_is_an_error() -> None:
    query, key, value, cotangent, _ = SOURCED.problem(torch.float64)
    out = streamed_attention(query.requires_grad_(), key, value, ring_size=3, **SOURCED.options())
    key += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(cotangent)


# torch's compiler looks at .grad of what the break hands on, and silences the warning only where it is none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_it_is_a_graph_break_that_says_why() -> None:
    *qkv, cotangent, _ = SOURCED.problem(torch.float64)
    options = SOURCED.options()

    def double(*leaves: Tensor) -> Tensor:
        out: Tensor = streamed_attention(*leaves, ring_size=3, **options)
        return 2 * out

    results = []
    for function in (double, torch.compile(double, backend="eager")):
        leaves = [tensor.detach().requires_grad_() for tensor in qkv]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(Exception, match="reads its keys while it runs, which cannot be traced"):
        torch.compile(double, backend="eager", fullgraph=True)(*qkv)


# ------------------------------------------------------------------------------------------------ progress, allocator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("case", "total"), [(Case(1, 40, 2, 8), 16), (Case(1, 40, 2, 8, is_causal=True), 10), (Case(1, 2, 1, 8), 4)]
)
def test_progress(case: Case, total: int, dtype: torch.dtype) -> None:
    told: list[tuple[int, int]] = []
    run(case, dtype, 4, progress=lambda done, of: told.append((done, of)))
    assert told == [(done, total) for done in range(1, total + 1)] * 2


class Stop(Exception):  # noqa: N818
    """What a user raises who has seen enough."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [3, 12], ids=["forward", "backward"])
def test_an_exception_from_progress_ends_it_and_leaves_nothing(last: int, dtype: torch.dtype) -> None:
    calls, lender = [0], Lender(keep=False)

    def progress(done: int, total: int) -> None:
        calls[0] += 1
        if calls[0] == last:
            raise Stop(f"{done} of {total}")

    with pytest.raises(Stop, match="3 of 9"):
        run(Case(1, 40, 2, 8), dtype, 3, progress=progress, allocator=lender)
    assert calls[0] == last
    assert lender.lent
    assert not lender.alive()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_lent_memory_holds_the_results_and_changes_no_bit(dtype: torch.dtype) -> None:
    lender = Lender(keep=True)
    alone = run(SOURCED, dtype, 3)
    lent = run(SOURCED, dtype, 3, allocator=lender)
    assert all(torch.equal(a, b) for a, b in zip(lent.each(), alone.each(), strict=True))
    assert all(lender.owns(result) for result in lent.each())


# ------------------------------------------------------------------------------------------------ bad input

X = torch.zeros(2, 6, 4, 8)
MASK = torch.ones(2, 6, dtype=torch.bool)
INTEGERS = Stored(X)
INTEGERS.get_dtype = lambda: "I32"  # type: ignore[method-assign]
FAULTS: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "query not a tensor": ({"query": [1.0]}, TypeError, "query: expected a torch.Tensor, got list"),
    "query of 3 dims": ({"query": X[0]}, ValueError, r"query: expected 4 dimensions .*, got shape \(6, 4, 8\)"),
    "query of ints": ({"query": X.int()}, TypeError, "query: expected float64, float32, .* got torch.int32"),
    "query without data": ({"query": X.to("meta")}, ValueError, "query: expected a tensor on the CPU or a CUDA device"),
    "key a list": ({"key": [1.0]}, TypeError, r"key: expected a torch.Tensor on the CPU, or .* got list"),
    "key on a device": ({"key": X.to("meta")}, ValueError, "key: expected a tensor in host memory .* got one on meta"),
    "key of another dtype": ({"key": X.double()}, TypeError, "key: expected the dtype of query, torch.float32"),
    "stored value of another dtype": ({"value": Stored(X.half())}, TypeError, "value: expected the dtype of query"),
    "stored value of ints": ({"value": INTEGERS}, TypeError, r"value: expected a stored dtype of \['F64'.* got 'I32'"),
    "stored key of 3 dims": ({"key": Stored(X[0])}, ValueError, "key: expected 4 dimensions"),
    "value of another shape": ({"value": X[:, :5]}, ValueError, "value: expected the shape of key"),
    "another batch": ({"key": X[:1], "value": X[:1]}, ValueError, "key: expected the batch of query, 2, got 1"),
    "another head_dim": ({"key": X[..., :4], "value": X[..., :4]}, ValueError, "key: expected the head_dim of query"),
    "other keys, causal": (
        {"key": X[:, :5], "value": X[:, :5], "is_causal": True},
        ValueError,
        "key: expected the seq of query, 6, got 5",
    ),
    "fewer kv heads": ({"key": X[:, :, :2], "value": X[:, :, :2]}, ValueError, "key: expected the heads of query, 4"),
    "kv heads that do not divide": (
        {"key": X[:, :, :3], "value": X[:, :, :3], "enable_gqa": True},
        ValueError,
        "key: expected kv_heads that divide the 4 heads of query, got 3",
    ),
    "ring_size 0": ({"ring_size": 0}, ValueError, "ring_size: expected a positive int, got 0"),
    "ring_size a float": ({"ring_size": 2.0}, TypeError, "ring_size: expected a positive int, got 2.0"),
    "is_causal not a bool": ({"is_causal": 1}, TypeError, "is_causal: expected a bool, got 1"),
    "enable_gqa not a bool": ({"enable_gqa": None}, TypeError, "enable_gqa: expected a bool"),
    "scale a string": ({"scale": "0.1"}, TypeError, "scale: expected a float or None"),
    "mask of numbers": ({"key_padding_mask": MASK.float()}, TypeError, "key_padding_mask: .*got torch.float32"),
    "mask a list": ({"key_padding_mask": [True]}, TypeError, "key_padding_mask: expected a bool tensor.*got list"),
    "mask of another shape": ({"key_padding_mask": MASK[:, :5]}, ValueError, r"key_padding_mask: .* got \(2, 5\)"),
    "mask elsewhere": ({"key_padding_mask": MASK.to("meta")}, ValueError, "key_padding_mask: expected one on the CPU"),
    "kernel unknown": ({"kernel": "magic"}, ValueError, r"kernel: expected one of \['auto'.*got 'magic'"),
    "kernel impossible": ({"kernel": "cuda_flash"}, ValueError, 'kernel: "cuda_flash" cannot run'),
    "return_aux a bool": ({"return_aux": True}, TypeError, "return_aux: expected an AuxRequest or None, got bool"),
    "progress a number": ({"progress": 3}, TypeError, "progress: expected a callable or None, got int"),
    "allocator a dict": ({"allocator": {}}, TypeError, r"allocator: expected an object with empty\(.*got dict"),
}


@pytest.mark.parametrize(("changes", "error", "message"), FAULTS.values(), ids=FAULTS)
def test_bad_input(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"query": X, "key": X, "value": X, "ring_size": 2, **changes}
    with pytest.raises(error, match=message):
        streamed_attention(**arguments)  # type: ignore[call-overload]


# ------------------------------------------------------------------------------------------------ memory


def extra_memory(ring_size: int, kind: str, dtype: torch.dtype, backward: bool) -> float:
    """Peak beyond inputs and results, in units of out. ``kind``: what key and value are, see the test."""
    batch, seq, heads, head_dim = 1, 512, 2, 64
    query, key, value, cotangent = torch.randn(4, batch, seq, heads, head_dim).to(dtype).unbind()
    sources: list[Any] = [key.clone(), value.clone()]
    if kind == "stored":
        sources = [Stored(source) for source in sources]
    elif kind == "float32":
        sources = [source.float() for source in sources]
    leaves = [query.clone(), *sources][: 1 if kind == "stored" else 3]
    for leaf in leaves:
        leaf.requires_grad_(backward)

    def attend() -> None:
        # By name: "auto" may be a kernel for half precision whose scratch is not proportional to the tile.
        with torch.autocast("cpu", torch.bfloat16) if kind == "float32" else nullcontext():
            out, aux = streamed_attention(
                leaves[0], *sources, ring_size=ring_size, kernel="cpu_flash", return_aux=AuxRequest(lse=True)
            )
        results = [out, aux.lse, *(torch.autograd.grad(out, leaves, cotangent) if backward else ())]
        sizes.append(sum(result.nbytes for result in results if result is not None))

    sizes: list[int] = []
    peak = measure.peak_memory(attend)
    return (peak - sizes[0]) / query.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("stored", torch.float32), ("stored", torch.bfloat16), ("tensor", torch.float32), ("float32", torch.bfloat16)],
    ids=["stored-float32", "stored-bfloat16", "tensor-float32", "float32-autocast"],
)
def test_memory_falls_as_one_over_ring_size(kind: str, dtype: torch.dtype, backward: bool) -> None:
    """Within 15 %, of what ring_size=1 needs. Parts of stored tensors are copies, and count.

    Keys in bfloat16 that want gradients are left out: their float32 sums lie in host memory, which on a CPU is the
    device. So are those of float32 keys under autocast, but there they are the gradients.
    """
    whole = extra_memory(1, kind, dtype, backward)
    for ring_size in (2, 4, 8):
        share = extra_memory(ring_size, kind, dtype, backward) / whole
        assert 0.85 / ring_size <= share <= 1.15 / ring_size, f"ring_size {ring_size}: {share * ring_size:.3f}"


# ------------------------------------------------------------------------------------------------ CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, Case(2, 257, 4, 64), Case(1, 601, 4, 64, is_causal=True), SOURCED], ids=str)
def test_cuda(case: Case, dtype: torch.dtype) -> None:
    """Query on the device, keys and their gradients in host memory."""
    expected = oracle(case, dtype)
    for ring_size in RING_SIZES[:4]:
        results = run(case, dtype, ring_size, device="cuda")
        assert_close(case, dtype, results, expected, slack=10.0 if dtype.itemsize > 2 else 2.0)
        assert [result.device.type for result in results.each()] == ["cuda", "cuda", "cuda", "cpu", "cpu"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_buffers_are_not_overwritten_early(dtype: torch.dtype) -> None:
    """Chunks large enough that copies and attention overlap, the mask on the device, often: always the same bits."""
    if dtype == torch.bfloat16 and kernels.survey(torch.device("cuda"), dtype, 64)["cuda_flash"]:
        pytest.skip("no half precision kernel here")
    query, key, value = torch.randn(3, 1, 16384, 4, 64).to(dtype).unbind()
    first = streamed_attention(query.cuda(), key, value, ring_size=16)
    for _ in range(5):
        assert torch.equal(streamed_attention(query.cuda(), key, value, ring_size=16), first)
    whole = streamed_attention(query.cuda(), key, value, ring_size=1)
    assert deviation(first, whole.cpu().double()) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_memory_falls_as_one_over_ring_size(dtype: torch.dtype) -> None:
    """From ring_size 2 on, where there are two buffers of keys."""
    query, *sources, cotangent = torch.randn(4, 1, 16384, 8, 64).to(dtype).unbind()
    query, cotangent = query.cuda().requires_grad_(), cotangent.cuda()
    sources = [source.clone().requires_grad_() for source in sources]

    def attend(ring_size: int) -> Tensor:
        out = streamed_attention(query, *sources, ring_size=ring_size)
        return torch.autograd.grad(out, [query, *sources], cotangent)[0]

    results = 2 * query.nbytes + query.nbytes // query.shape[-1] * 4 // query.itemsize  # out, its gradient, lse
    extra = {ring: measure.peak_memory(lambda ring=ring: attend(ring), "cuda") - results for ring in (2, 4, 8, 16)}  # type: ignore[misc]
    for ring_size, found in extra.items():
        assert abs(found * ring_size / (2 * extra[2]) - 1) <= 0.15, f"ring_size {ring_size}: {extra}"
