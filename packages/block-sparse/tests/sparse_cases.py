"""What the tests of block_sparse_attention share: tolerances, problems, hypothesis strategies, the oracle's results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dilated_block_sparse import BlockLayout, block_sparse_attention, reference
from dilated_core import AuxRequest

# Largest deviation from the float64 oracle, relative to the oracle's largest magnitude: those of dilated-core's tests.
FORWARD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}

KINDS = ("random", "empty", "full", "one", "local", "strided", "global")
MASKS = ("none", "random", "right")
SHARES = ("all", "key", "query")
STORAGES = ("plain", "head-major", "dim-major", "sliced", "expanded", "packed")
THROUGH = ("out", "lse", "both")


@dataclass(frozen=True)
class Case:
    """One attention problem; its id reads like B2-N31x45-H4kv2-D8-b8x5-random+local-key-causal-right-bias.

    Attributes:
        kv_len: keys, None for as many as query rows; kv_heads: the same of heads.
        block_size: (rows, columns) in tokens.
        kinds: what the layout is a union of; "random" keeps ``density`` of the blocks, and may leave rows empty.
        share: whether the layout is one for "all" heads, one a "key" head or one a "query" head.
        mask: of the keys. "random" keeps 7 in 10; "right" pads at the right, a random amount in each batch row, and
            the last of several batch rows altogether. What padding holds is NaN and infinity, but for the oracle.
        storage: how query, key, value and the cotangent lie in memory; "expanded" ones share one head's numbers.
        through: which result gradients come through.
    """

    batch: int
    q_len: int
    heads: int
    head_dim: int
    block_size: tuple[int, int]
    kinds: tuple[str, ...] = ("random",)
    density: float = 0.4
    kv_len: int | None = None
    kv_heads: int | None = None
    share: str = "all"
    is_causal: bool = False
    mask: str = "none"
    has_bias: bool = False
    scale: float | None = None
    storage: str = "plain"
    through: str = "both"
    seed: int = 0

    def __str__(self) -> str:
        keys = "" if self.kv_len is None else f"x{self.kv_len}"
        shared = "" if self.kv_heads is None else f"kv{self.kv_heads}"
        rows, columns = self.block_size
        words = [
            f"B{self.batch}-N{self.q_len}{keys}-H{self.heads}{shared}-D{self.head_dim}-b{rows}x{columns}",
            "+".join(self.kinds),
            self.share * (self.share != "all"),
            "causal" * self.is_causal,
            self.mask * (self.mask != "none"),
            "bias" * self.has_bias,
            "" if self.scale is None else f"scale{self.scale:g}",
            self.storage * (self.storage != "plain"),
            self.through * (self.through != "both"),
        ]
        return "-".join(filter(None, words))

    @property
    def lengths(self) -> tuple[int, int]:
        """q_len and kv_len."""
        return self.q_len, self.q_len if self.kv_len is None else self.kv_len

    def layout(self) -> BlockLayout:
        """A new one at every call: no plan is kept from an earlier run."""
        q_len, kv_len = self.lengths
        shape = (-(-q_len // self.block_size[0]), -(-kv_len // self.block_size[1]))
        heads = {"all": 1, "key": self.kv_heads or self.heads, "query": self.heads}[self.share]
        generator = torch.Generator().manual_seed(self.seed)
        row, column = torch.arange(shape[0]).unsqueeze(1), torch.arange(shape[1])
        blocks = torch.zeros(heads, *shape, dtype=torch.bool)
        for kind in self.kinds:
            lot = torch.rand(heads, *shape, generator=generator)
            if kind == "random":
                blocks |= lot < self.density
            elif kind == "one" and blocks.numel():
                blocks |= lot == lot.amax((1, 2), keepdim=True)
            elif kind != "empty":
                blocks |= {
                    "full": row + column >= 0,
                    "local": (row - column).abs() <= 1,
                    "strided": (row - column) % 3 == 0,
                    "global": (row == 1) | (column == 0),
                }.get(kind, row + column < 0)
        return BlockLayout.from_blocks(blocks, q_len, kv_len, block_size=self.block_size)

    def problem(self, dtype: torch.dtype, *, poisoned: bool = True) -> list[Tensor]:
        """query, key, value, and where there is one the bias; the same values in every dtype."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        q_len, kv_len = self.lengths
        sizes = [(q_len, self.heads), *[(kv_len, self.kv_heads or self.heads)] * 2]
        qkv = [
            torch.randn(self.batch, *size, self.head_dim, generator=generator, dtype=torch.float64).to(dtype)
            for size in sizes
        ]
        real = self.key_padding_mask()
        if real is not None and poisoned:
            qkv[1][~real], qkv[2][~real] = torch.nan, torch.inf
        problem = lay_out(qkv, self.storage)
        if self.has_bias:
            problem.append(torch.randn(self.layout().live, generator=generator, dtype=torch.float64).to(dtype))
        return problem

    def cotangents(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of out, (batch, q_len, heads, head_dim), and of lse, (batch, heads, q_len)."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        of_out, of_lse = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in (
                (self.batch, self.q_len, self.heads, self.head_dim),
                (self.batch, self.heads, self.q_len),
            )
        )
        return lay_out([of_out], self.storage if self.storage != "packed" else "plain")[0], of_lse

    def key_padding_mask(self) -> Tensor | None:
        """(batch, kv_len), True where the key is real; None for no mask."""
        if self.mask == "none":
            return None
        generator = torch.Generator().manual_seed(self.seed + 3)
        kv_len = self.lengths[1]
        if self.mask == "random":
            return torch.rand(self.batch, kv_len, generator=generator) < 0.7
        lengths = torch.randint(kv_len + 1, (self.batch, 1), generator=generator)
        if self.batch > 1:
            lengths[-1] = 0
        return torch.arange(kv_len) < lengths

    def options(self) -> dict[str, Any]:
        """The keyword arguments that both block_sparse_attention and the oracle take, without the bias."""
        return {"is_causal": self.is_causal, "scale": self.scale, "key_padding_mask": self.key_padding_mask()}


def lay_out(tensors: Sequence[Tensor], storage: str) -> list[Tensor]:
    """The same values (but for "expanded") in other storage. "packed": tensors of equal shape side by side."""
    if storage == "packed":
        if len({tensor.shape for tensor in tensors}) > 1:
            return [tensors[0], *torch.stack(list(tensors[1:]), 2).unbind(2)]
        return list(torch.stack(list(tensors), 2).unbind(2))
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": lambda tensor: tensor,
        "head-major": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
        "dim-major": lambda tensor: tensor.transpose(1, 3).contiguous().transpose(1, 3),
        "sliced": lambda tensor: tensor.repeat_interleave(2, dim=-1)[..., ::2],
        "expanded": lambda tensor: tensor[:, :, :1].expand_as(tensor),
    }
    return [changes[storage](tensor) for tensor in tensors]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small problem: every kind of layout, mask, sharing, length and option."""
    is_causal = draw(st.booleans())
    kv_heads = draw(st.integers(1, 3))
    rows = draw(st.integers(1, 20))
    columns = rows if draw(st.booleans()) else draw(st.integers(1, 20))
    q_len = draw(st.one_of(st.integers(0, 60), st.integers(10, 60)))
    return Case(
        batch=draw(st.sampled_from([1, 2, 3, 0])),
        q_len=q_len,
        heads=kv_heads * draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([4, 1, 8])),
        block_size=(rows, columns),
        kinds=tuple(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))),
        density=draw(st.sampled_from([0.3, 0.1, 0.6, 0.9])),
        kv_len=None if is_causal or draw(st.booleans()) else draw(st.integers(0, 60)),
        kv_heads=kv_heads,
        share=draw(st.sampled_from(SHARES)),
        is_causal=is_causal,
        mask=draw(st.sampled_from(MASKS)),
        has_bias=draw(st.booleans()),
        scale=draw(st.sampled_from([None, None, 0.1, -0.3, 0.0])),
        storage=draw(st.sampled_from(["plain", *STORAGES])),
        through=draw(st.sampled_from(THROUGH)),
        seed=draw(st.integers(0, 2**20)),
    )


@dataclass(frozen=True)
class Results:
    """out, lse and the gradients of one run; dbias is None where there is no bias."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None

    def each(self) -> list[Tensor]:
        """All that there are."""
        return [tensor for tensor in vars(self).values() if tensor is not None]

    def equal(self, other: Results) -> bool:
        """To the bit."""
        return all(torch.equal(a, b) for a, b in zip(self.each(), other.each(), strict=True))


def run(case: Case, dtype: torch.dtype, layout: BlockLayout | None = None, **options: Any) -> Results:
    """block_sparse_attention and its gradients under random cotangents, also where a row has no key."""
    leaves = [tensor.detach().requires_grad_() for tensor in case.problem(dtype)]
    out, aux = block_sparse_attention(
        *leaves[:3],
        case.layout() if layout is None else layout,
        **case.options(),
        block_bias=leaves[3] if case.has_bias else None,
        enable_gqa=case.kv_heads is not None,
        return_aux=AuxRequest(lse=True),
        **options,
    )
    of_out, of_lse = case.cotangents(dtype)
    pairs = {"out": [(out, of_out)], "lse": [(aux.lse, of_lse.to(aux.lse))]}
    pairs["both"] = pairs["out"] + pairs["lse"]
    outputs, cotangents = zip(*pairs[case.through], strict=True)
    grads = torch.autograd.grad(outputs, leaves, cotangents)
    return Results(out.detach(), aux.lse.detach(), *grads, *[None] * (not case.has_bias))


@lru_cache(maxsize=4)
def oracle(case: Case, dtype: torch.dtype) -> Results:
    """The same in float64 by the definition, from the inputs as ``dtype`` rounds them."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in case.problem(dtype, poisoned=False)]
    out, lse = reference.block_sparse_attention(
        *leaves[:3], case.layout(), **case.options(), block_bias=leaves[3] if case.has_bias else None
    )
    of_out, of_lse = (cotangent.double() for cotangent in case.cotangents(dtype))
    # Rows without a key have lse -inf, which is no function of anything.
    has_key = lse != -math.inf
    loss = out.new_zeros(())
    if case.through != "lse":
        loss = loss + (out * of_out).sum()
    if case.through != "out":
        loss = loss + (lse.masked_fill(~has_key, 0.0) * of_lse.masked_fill(~has_key, 0.0)).sum()
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return Results(out.detach(), lse.detach(), *grads, *[None] * (not case.has_bias))


def deviation(result: Tensor, exact: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the exact one's largest magnitude; infinite where either is not finite."""
    assert result.shape == exact.shape
    if exact.numel() == 0:
        return 0.0
    difference = (result.double() - exact.double()).abs().max().item()
    scale = max(exact.abs().max().item(), floor, torch.finfo(torch.float64).tiny)
    return difference / scale if difference == difference else math.inf


def assert_close(case: Case, dtype: torch.dtype, results: Results, expected: Results, *, slack: float = 1.0) -> None:
    """Compare out, lse, dq, dk, dv and dbias, each alone and by name; ``slack`` widens the tolerances."""
    assert results.out.dtype == dtype, "dtype of out"
    forward, gradient = slack * FORWARD_TOLERANCE[dtype], slack * GRADIENT_TOLERANCE[dtype]
    difference = deviation(results.out, expected.out)
    assert difference <= forward, f"out of {case}: {difference}"
    no_key = expected.lse == -math.inf
    assert torch.equal(results.lse == -math.inf, no_key), f"rows with no key of {case}"
    assert not results.out.transpose(1, 2)[no_key].any(), f"out of a row with no key of {case}"
    assert not results.dq.transpose(1, 2)[no_key].any(), f"dq of a row with no key of {case}"
    # An error of lse is one of the softmax's weights, whatever its size: measured against 1.
    difference = deviation(*(lse.masked_fill(no_key, 0.0) for lse in (results.lse, expected.lse)), floor=1.0)
    assert difference <= forward, f"lse of {case}: {difference}"
    # Gradients may vanish (a row with one key has no choice): the cotangent says how small counts as nothing. In half
    # precision they err by what out was rounded by, times the cotangent.
    floor = 1.0 if dtype.itemsize == 2 else 0.1
    for name in ("dq", "dk", "dv", "dbias"):
        found, wanted = getattr(results, name), getattr(expected, name)
        if wanted is not None:
            # That of a bias is a sum over the rows of its block, of every batch row and head, which may cancel out.
            many = (case.block_size[0] * case.batch * case.heads) ** 0.5 if name == "dbias" else 1.0
            difference = deviation(found, wanted, floor=floor * many)
            assert difference <= gradient, f"{name} of {case}: {difference}"


class Lender:
    """An allocator that remembers what it lent, each tensor full of NaN."""

    def __init__(self) -> None:
        self.lent: list[Tensor] = []

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = torch.full(tuple(size), torch.nan, dtype=dtype, device=device)
        self.lent.append(tensor)
        return tensor

    def owns(self, tensor: Tensor) -> bool:
        """Whether it lies in what was lent."""
        address = tensor.untyped_storage().data_ptr()
        return any(address == lent.untyped_storage().data_ptr() for lent in self.lent)


class Store(dict[Hashable, Any]):
    """A store of plans that counts how often each is asked for and made."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[Hashable] = Counter()
        self.made: Counter[Hashable] = Counter()

    def get_or_create(self, key: Hashable, create: Callable[[], Any]) -> Any:
        self.asked[key] += 1
        if key not in self:
            self.made[key] += 1
            self[key] = create()
        return self[key]
