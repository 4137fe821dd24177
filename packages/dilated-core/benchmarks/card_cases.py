"""What bench_card measures in one row: the problem, who attends it, what is right, and what it costs at least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dilated_core import DilatedPattern, dilated_attention, kernels, reference

BATCH = 1
PATTERNS = {"paper": DilatedPattern.longnet(), "gigapath": DilatedPattern.gigapath()}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DENSE = {"dense flash": SDPBackend.FLASH_ATTENTION, "dense cudnn": SDPBackend.CUDNN_ATTENTION}
# A backward has five matrix products where the forward has two.
BACKWARD_TO_FORWARD = 2.5
# Rows that are compared with the definition: the first, the last and six between.
CHECKED_ROWS = 8
# Largest deviation from the definition, see ``deviation``: a few roundings. Half precision rounds the weights too.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-5}
# Of a row's norm, which may be next to nothing: at least this share of the mean one is allowed for.
LEAST_NORM = 0.1

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        pattern: a name of PATTERNS.
        seq: tokens.
        heads, head_dim, dtype: of query, key and value alike.
        is_causal: whether a row sees only keys at or before it.
        backward: whether the backward alone is measured, or else the forward.
    """

    pattern: str
    seq: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    is_causal: bool
    backward: bool

    @property
    def key(self) -> dict[str, str | int]:
        """What tells it from the other rows of a run. JSON-ready."""
        way = "backward" if self.backward else "forward"
        return {"pattern": self.pattern, "seq": self.seq, "head_dim": self.head_dim, "pass": way}

    def pattern_of(self, name: str) -> DilatedPattern:
        """What the candidate of that name attends."""
        return DilatedPattern([self.seq], [1]) if name in DENSE else PATTERNS[self.pattern]

    def flops(self, name: str) -> float:
        """Floating point operations of the pass, by the pairs that are attended."""
        forward = self.pattern_of(name).flops(self.seq, self.heads, self.head_dim, is_causal=self.is_causal)
        return BATCH * forward * (BACKWARD_TO_FORWARD if self.backward else 1.0)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of query, and of every tensor like it."""
        return BATCH * self.seq * self.heads * self.head_dim * self.dtype.itemsize

    @property
    def fewest_bytes(self) -> int:
        """Bytes that the pass must move: each input read once, each result written once.

        Forward: query, key, value; out and lse. Backward: these five and grad_out; three gradients.
        """
        lse = 4 * BATCH * self.seq * self.heads
        return (8 if self.backward else 4) * self.tensor_bytes + lse

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Query, key, value and a cotangent: random, and for this case always the same."""
        size = (BATCH, self.seq, self.heads, self.head_dim)
        generator = torch.Generator(device).manual_seed(self.seq + self.head_dim)
        return [torch.randn(size, generator=generator, device=device, dtype=self.dtype) for _ in range(4)]


# ------------------------------------------------------------------------------------------------ who attends


def dilated(case: Case, kernel: str) -> Attention:
    """dilated_attention by one kernel."""
    pattern = PATTERNS[case.pattern]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dilated_attention(
            query, key, value, pattern.segment_lengths, pattern.dilation_rates, is_causal=case.is_causal, kernel=kernel
        )

    return run


def dense(case: Case, name: str) -> Attention:
    """SDPA by one backend alone, in our layout."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = (tensor.transpose(1, 2) for tensor in (query, key, value))
        with sdpa_kernel(DENSE[name]):
            return scaled_dot_product_attention(*rows, is_causal=case.is_causal).transpose(1, 2)

    return run


def candidates(
    case: Case, device: torch.device, names: list[str] | None, longest_dense: int
) -> tuple[dict[str, Attention], dict[str, str]]:
    """Who is measured, and of the others why not.

    Args:
        names: kernels, by name; None for all that do not refuse, without "math" on a card: it forms the scores.
        longest_dense: tokens; dense attention of more is left out.
    """
    found: dict[str, Attention] = {}
    left_out: dict[str, str] = {}
    for name, refusal in kernels.survey(device, case.dtype, case.head_dim).items():
        if refusal is not None:
            left_out[name] = refusal
        elif names is not None and name not in names:
            left_out[name] = "it was not asked for (--kernels)"
        elif names is None and name == "math" and device.type == "cuda":
            left_out[name] = "it forms the scores, and is there for what no other kernel takes"
        else:
            found[name] = dilated(case, name)
    for name in DENSE:
        if device.type == "cpu" and DENSE[name] is SDPBackend.CUDNN_ATTENTION:
            left_out[name] = "it runs on CUDA, not on cpu"
        elif case.seq > longest_dense:
            left_out[name] = f"dense attention of more than {longest_dense:,} tokens is left out (--dense-up-to)"
        else:
            found[name] = dense(case, name)
    return found, left_out


# ------------------------------------------------------------------------------------------------ what is right


def drawn_rows(seq: int) -> Tensor:
    """The rows that are compared: both ends, and others drawn from the whole length."""
    between = torch.randint(seq, (CHECKED_ROWS - 2,), generator=torch.Generator().manual_seed(seq))
    return torch.cat([torch.tensor([0, seq - 1]), between]).unique()


def definition(
    qkv: list[Tensor], pattern: DilatedPattern, rows: Tensor, cotangent: Tensor | None, is_causal: bool
) -> Iterator[list[Tensor]]:
    """The definition in float64, a head at a time, so that a million tokens stay affordable.

    ``reference.multiplicity`` says how often a row meets a key; the rest is one softmax. ``check_definition`` compares
    it with ``reference.dilated_attention`` itself.

    Yields:
        of each head: out (rows, head_dim); with a cotangent (batch, rows, heads, head_dim) the gradients of query (in
        the rows), key and value (everywhere).
    """
    _, seq, heads, head_dim = qkv[0].shape
    counts = reference.multiplicity(
        seq, heads, pattern.segment_lengths, pattern.dilation_rates,
        is_causal=is_causal, rows=rows, device=qkv[0].device,
    )  # fmt: skip
    for head, count in enumerate(counts):
        query, key, value = (
            tensor.detach().double().requires_grad_(cotangent is not None)
            for tensor in (qkv[0][0, rows, head], qkv[1][0, :, head], qkv[2][0, :, head])
        )
        scores = (query @ key.T / head_dim**0.5).masked_fill(count == 0, -torch.inf)
        weights = count * torch.exp(scores - scores.detach().amax(-1, keepdim=True))
        out = weights / weights.sum(-1, keepdim=True) @ value
        results = [out.detach()]
        if cotangent is not None:
            results += torch.autograd.grad(out, (query, key, value), cotangent[0, :, head].double())
        yield results


def check_definition(device: torch.device) -> float:
    """``definition`` against ``reference.dilated_attention``, out and gradients (raises where they differ)."""
    pattern, heads = DilatedPattern([32, 64, 200], [1, 2, 3]), 5
    qkv = [torch.randn(BATCH, 200, heads, 16, dtype=torch.float64, device=device) for _ in range(3)]
    rows = drawn_rows(200).to(device)
    cotangent = torch.randn(BATCH, len(rows), heads, 16, dtype=torch.float64, device=device)
    largest = 0.0
    for is_causal in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in qkv]
        exact, _ = reference.dilated_attention(
            *leaves, pattern.segment_lengths, pattern.dilation_rates, is_causal=is_causal, rows=rows
        )
        gradients = torch.autograd.grad(exact, leaves, cotangent)
        expected = [exact, gradients[0][:, rows], *gradients[1:]]
        for head, results in enumerate(definition(qkv, pattern, rows, cotangent, is_causal)):
            for found, right in zip(results, expected, strict=True):
                largest = max(largest, (found - right[0, :, head]).abs().max().item())
    if not largest < 1e-12:
        raise SystemExit(f"the definition, head by head, deviates from the reference by {largest}; nothing is reported")
    return largest


def deviation(found: Tensor, exact: Tensor, by_row: bool) -> float:
    """The larger of two: the largest difference over the largest magnitude, and that of norms, NaN where one is there.

    Args:
        found, exact: (rows, head_dim).
        by_row: norms of each row, against its own (or LEAST_NORM of the mean one); else of the whole.
    """
    difference = found.double() - exact
    largest = difference.abs().max() / exact.abs().max()
    if by_row:
        norms = exact.norm(dim=-1)
        whole = (difference.norm(dim=-1) / norms.clamp(min=LEAST_NORM * norms.mean())).max()
    else:
        whole = difference.norm() / exact.norm()
    return torch.maximum(largest, whole).item()  # which hands NaN on


def check(case: Case, name: str, run: Attention, tensors: list[Tensor]) -> float:
    """Largest deviation of a candidate from the definition, in rows spread over the whole length; NaN is one.

    A backward is compared under a cotangent that lives in these rows only, so that the definition needs no others.

    Args:
        tensors: query, key, value and a cotangent.
    """
    *qkv, cotangent = tensors
    rows = drawn_rows(case.seq).to(cotangent.device)
    leaves = [tensor.detach().requires_grad_(case.backward) for tensor in qkv]
    out = run(*leaves)
    found = [out.detach()[0, rows]]
    if case.backward:
        grad_out = torch.zeros_like(cotangent)
        grad_out[:, rows] = cotangent[:, rows]
        grad_query, grad_key, grad_value = torch.autograd.grad(out, leaves, grad_out)
        found += [grad_query[0, rows], grad_key[0], grad_value[0]]
        grad_query[0, rows] = 0
        if grad_query.count_nonzero():
            return math.nan  # rows without a cotangent have a gradient, or hold NaN
    del out
    largest = torch.zeros(())
    own = cotangent[:, rows] if case.backward else None
    for head, results in enumerate(definition(qkv, case.pattern_of(name), rows, own, case.is_causal)):
        for place, (ours, exact) in enumerate(zip(found, results, strict=True)):
            # Out and the gradient of query are rows of many keys each; one key's gradient may cancel to nothing.
            one = deviation(ours[:, head], exact, by_row=place < 2)
            largest = torch.maximum(largest, torch.tensor(one))
    return largest.item()
