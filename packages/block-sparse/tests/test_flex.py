"""FlexAttention as a backend: compiled on a CPU, forward, against the definition; what it refuses; on a GPU everything.

Every compilation takes seconds, so the tests share a few: one per combination of sizes and options.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dilated_block_sparse import flex, reference
from dilated_block_sparse.functional import block_sparse_attention
from dilated_block_sparse.layout import BlockLayout
from dilated_core import AuxRequest

FORWARD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
GRADIENT_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}

needs_avx2 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="FlexAttention on a CPU needs AVX2"
)


def random_layout(
    q_len: int, kv_len: int, block_size: tuple[int, int], *, heads: int = 1, density: float = 0.5, seed: int = 0
) -> BlockLayout:
    """Blocks drawn alone; the row of blocks in the middle has none."""
    generator = torch.Generator().manual_seed(seed)
    q_blocks, kv_blocks = -(-q_len // block_size[0]), -(-kv_len // block_size[1])
    blocks = torch.rand(heads, q_blocks, kv_blocks, generator=generator) < density
    blocks[:, q_blocks // 2] = False
    return BlockLayout.from_blocks(blocks, q_len, kv_len, block_size=block_size)


def tensors(
    batch: int, layout: BlockLayout, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    query = torch.randn(batch, layout.q_len, heads, head_dim, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, batch, layout.kv_len, kv_heads, head_dim, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def padding(batch: int, kv_len: int) -> Tensor:
    """Seven keys in ten are real; none is in the last batch row."""
    real = torch.rand(batch, kv_len, generator=torch.Generator().manual_seed(7)) < 0.7
    real[-1] = False
    return real


def deviation(result: Tensor, oracle: Tensor) -> float:
    """Largest difference over the oracle's largest magnitude (at least 1e-3); NaN shows as infinity."""
    difference = (result.detach().cpu().double() - oracle.detach()).abs().max().item()
    return difference / max(oracle.detach().abs().max().item(), 1e-3) if difference == difference else math.inf


def exact(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, **options: object) -> tuple[Tensor, Tensor]:
    """The definition, in float64."""
    inputs = (tensor.double() for tensor in (query, key, value))
    return reference.block_sparse_attention(*inputs, layout, **options)  # type: ignore[arg-type]


def assert_same(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, **options: object) -> None:
    out = block_sparse_attention(query, key, value, layout, backend="flex", enable_gqa=True, **options)  # type: ignore[call-overload]
    expected, lse = exact(query, key, value, layout, **options)
    assert out.dtype == query.dtype
    assert deviation(out, expected) <= FORWARD_TOLERANCE[query.dtype]
    no_key = (lse == -math.inf).transpose(1, 2)
    assert not out[no_key].any()


# ------------------------------------------------------------------------------------------------ compiled, on a CPU


@needs_avx2
@pytest.mark.slow
def test_every_layout_of_the_same_sizes_runs_what_was_compiled_once() -> None:
    def check(layout: BlockLayout) -> None:
        assert_same(*tensors(2, layout, heads=4, kv_heads=2, head_dim=16), layout)

    counters.clear()  # of graphs that other tests compiled
    check(random_layout(101, 77, (16, 8), heads=4))
    before = counters["stats"]["unique_graphs"]

    @given(st.sampled_from([2, 4]), st.floats(0.0, 1.0), st.integers(0, 2**20))
    @settings(max_examples=30)
    def other_layouts(heads: int, density: float, seed: int) -> None:
        check(random_layout(101, 77, (16, 8), heads=heads, density=density, seed=seed))

    other_layouts()
    check(BlockLayout.from_blocks(torch.zeros(4, 7, 10, dtype=torch.bool), 101, 77, block_size=(16, 8)))
    check(BlockLayout.from_blocks(torch.ones(4, 7, 10, dtype=torch.bool), 101, 77, block_size=(16, 8)))
    assert counters["stats"]["unique_graphs"] == before
    assert not counters["graph_break"]


@needs_avx2
@pytest.mark.slow
def test_causal_with_padded_keys_equals_the_definition() -> None:
    for seed in range(3):
        layout = random_layout(101, 101, (16, 8), seed=seed)
        query, key, value = tensors(2, layout, heads=4, kv_heads=4, head_dim=16)
        assert_same(query, key, value, layout, is_causal=True, key_padding_mask=padding(2, 101))


@needs_avx2
@pytest.mark.slow
def test_causal_in_half_precision_equals_the_definition() -> None:
    layout = random_layout(96, 96, (32, 32), seed=3)
    assert_same(*tensors(1, layout, heads=2, kv_heads=1, head_dim=16, dtype=torch.bfloat16), layout, is_causal=True)


def test_the_layout_of_a_block_mask_gives_what_flex_attention_gives_with_it() -> None:
    layout = random_layout(96, 96, (32, 32), density=0.6, seed=5)
    blocks = layout.to_blocks()[0]

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return blocks[q_idx // 32, kv_idx // 32]

    block_mask = create_block_mask(mask_mod, None, None, 96, 96, device="cpu", BLOCK_SIZE=32)
    read = BlockLayout.from_block_mask(block_mask)
    assert read == layout
    query, key, value = tensors(1, layout, heads=2, kv_heads=2, head_dim=16)
    # The layout is compared above; for the numbers another compilation to C++ would show no more.
    traced = torch.compile(flex_attention, backend="eager", dynamic=False, fullgraph=True)
    with torch.no_grad():
        theirs = traced(*(tensor.transpose(1, 2) for tensor in (query, key, value)), block_mask=block_mask)
    ours = block_sparse_attention(query, key, value, read)
    assert deviation(ours, theirs.transpose(1, 2).double()) <= FORWARD_TOLERANCE[torch.float32]


@needs_avx2
@pytest.mark.slow
def test_the_peer_of_benchmarks_runs_what_the_backend_runs() -> None:
    layout = random_layout(101, 77, (16, 8), heads=4, seed=9)
    query, key, value = tensors(2, layout, heads=4, kv_heads=2, head_dim=16)
    assert_same(query, key, value, layout)
    before = counters["stats"]["unique_graphs"]
    out = flex.compiled(layout)(query, key, value)
    assert counters["stats"]["unique_graphs"] == before
    assert deviation(out, exact(query, key, value, layout)[0]) <= FORWARD_TOLERANCE[torch.float32]


@needs_avx2
@pytest.mark.slow
def test_inputs_that_could_take_a_gradient_run_where_none_is_recorded() -> None:
    layout = random_layout(101, 77, (16, 8), heads=4, seed=9)
    query, key, value = (tensor.requires_grad_() for tensor in tensors(2, layout, heads=4, kv_heads=2, head_dim=16))
    with torch.no_grad():
        assert_same(query, key, value, layout)


# ------------------------------------------------------------------------------------------------ the mask alone


@pytest.mark.parametrize("masked", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_the_mask_function_holds_where_a_backend_reads_no_lists(is_causal: bool, masked: bool) -> None:
    # The "eager" backend forms all scores and knows the layout by the mask function alone; it gives the lse too.
    traced = torch.compile(flex._attention, backend="eager", fullgraph=True, dynamic=False)
    torch.compiler.reset()
    for layout_heads in (1, 2, 4):
        layout = random_layout(45, 45, (8, 16), heads=layout_heads)
        query, key, value = tensors(2, layout, heads=4, kv_heads=2, head_dim=16, dtype=torch.float64)
        real = padding(2, 45) if masked else None
        tables = flex.tables_of(layout, query.device, 4, is_causal=is_causal, masked=masked)
        with torch.no_grad():
            out, lse = traced(query, key, value, real, tables, layout.block_size, is_causal, 0.3, True)
        options = {"is_causal": is_causal, "scale": 0.3, "key_padding_mask": real}
        expected_out, expected_lse = exact(query, key, value, layout, **options)
        assert deviation(out, expected_out) <= FORWARD_TOLERANCE[torch.float64], layout_heads
        no_key = expected_lse == -math.inf
        assert no_key.any()
        assert torch.equal(lse == -math.inf, no_key), layout_heads
        assert deviation(lse[~no_key], expected_lse[~no_key]) <= FORWARD_TOLERANCE[torch.float32], layout_heads


def test_what_padding_holds_has_no_influence() -> None:
    traced = torch.compile(flex._attention, backend="eager", fullgraph=True, dynamic=False)
    layout = random_layout(45, 45, (8, 16))
    query, key, value = tensors(2, layout, heads=2, kv_heads=2, head_dim=16)
    real = padding(2, 45)
    tables = flex.tables_of(layout, query.device, 2, is_causal=False, masked=True)
    spoilt = (tensor.masked_fill(~real[:, :, None, None], math.nan) for tensor in (key, value))
    with torch.no_grad():
        out, _ = traced(query, *spoilt, real, tables, layout.block_size, False, 0.25, False)
        clean, _ = traced(query, key, value, real, tables, layout.block_size, False, 0.25, False)
    assert torch.equal(out, clean)


def test_another_torch_compile_takes_it_in_where_the_tables_lie_ready() -> None:
    layout = random_layout(45, 45, (8, 16))
    query, key, value = tensors(2, layout, heads=2, kv_heads=2, head_dim=16)
    flex.tables_of(layout, query.device, 2, is_causal=True, masked=False)

    @torch.compile(backend="eager", fullgraph=True)
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flex.attend(query, key, value, None, layout, is_causal=True, scale=0.25, with_lse=False)[0]

    with torch.no_grad():
        out = run(query, key, value)
    assert deviation(out, exact(query, key, value, layout, is_causal=True, scale=0.25)[0]) <= 2e-6


# ------------------------------------------------------------------------------------------------ tables


def test_the_tables_of_a_layout_are_made_once() -> None:
    layout = random_layout(45, 45, (8, 16), heads=2)
    cpu = torch.device("cpu")
    first = flex.tables_of(layout, cpu, 4, is_causal=True, masked=False)
    assert flex.tables_of(layout, cpu, 4, is_causal=True, masked=False) is first
    assert flex.tables_of(layout, cpu, 4, is_causal=False, masked=False) is not first
    assert flex.tables_of(layout, cpu, 4, is_causal=True, masked=True) is not first


@pytest.mark.parametrize("masked", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_the_lists_hold_each_live_block_once_and_agree_with_their_transpose(is_causal: bool, masked: bool) -> None:
    layout = random_layout(45, 45, (8, 16), heads=2)
    tables = flex.tables_of(layout, torch.device("cpu"), 4, is_causal=is_causal, masked=masked)
    live = (layout.causal() if is_causal else layout).to_blocks().repeat_interleave(2, 0)
    by_rows = _counted(tables.kv_num_blocks, tables.kv_indices)
    by_columns = _counted(tables.q_num_blocks, tables.q_indices)
    if not masked:
        assert tables.full_kv_indices.shape == tables.kv_indices.shape
        by_rows += _counted(tables.full_kv_num_blocks, tables.full_kv_indices)
        by_columns += _counted(tables.full_q_num_blocks, tables.full_q_indices)
    assert torch.equal(by_rows, live.int())
    assert torch.equal(by_columns.transpose(1, 2), live.int())
    assert torch.equal(tables.live, live)
    assert (tables.full_kv_indices is None) == masked


def _counted(counts: Tensor, columns: Tensor) -> Tensor:
    """How often each block is listed, int32 (heads, rows, columns)."""
    table = torch.zeros(columns.shape[1:], dtype=torch.int32)
    for head, row in torch.cartesian_prod(torch.arange(counts.shape[1]), torch.arange(counts.shape[2])).tolist():
        for column in columns[0, head, row, : counts[0, head, row]].tolist():
            table[head, row, column] += 1
    return table


# ------------------------------------------------------------------------------------------------ refusals


def _refusal(layout: BlockLayout, *, device: str = "cpu", head_dim: int = 16, batch: int = 1, **options: object) -> str:
    dtype = options.pop("dtype", torch.float32)
    query = torch.empty(batch, layout.q_len, 2, head_dim, dtype=dtype, device=device)
    key = torch.empty(batch, layout.kv_len, 2, head_dim, dtype=dtype, device=device)
    told = dict.fromkeys(("is_causal", "has_mask", "dropout", "has_bias", "needs_grad"), False)
    return flex.refusal(query, key, layout, **{**told, **options}) or "none"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout": True}, "no dropout"),
        ({"has_bias": True}, "no bias"),
        ({"needs_grad": True}, "no backward"),
        ({"with_lse": True}, "no lse"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"batch": 0}, "a size is 0"),
        ({"device": "meta"}, "not on meta"),
    ],
    ids=str,
)
def test_it_says_why_it_cannot_run(options: dict[str, object], reason: str) -> None:
    assert reason in _refusal(random_layout(45, 45, (8, 16)), **options)  # type: ignore[arg-type]


@needs_avx2
def test_it_refuses_nothing_else_on_a_cpu() -> None:
    layout = random_layout(45, 45, (8, 16))
    for dtype in flex.DTYPES:
        assert _refusal(layout, dtype=dtype, is_causal=True, has_mask=True) == "none"


def test_it_refuses_tables_above_the_limit_without_making_them() -> None:
    layout = BlockLayout.from_rows([[0]] * 2**13, 2**17, 2**17, block_size=16)
    assert "above the limit" in _refusal(layout, head_dim=1)
    assert not layout.plans


def test_it_says_what_a_gpu_needs() -> None:
    fake = importlib.import_module("torch._subclasses.fake_tensor")
    blocks, small = (random_layout(256, 256, size) for size in ((128, 128), (128, 64)))
    with fake.FakeTensorMode():
        assert "multiples of 128" in _refusal(small, device="cuda")
        assert "head_dim of at least 16" in _refusal(blocks, device="cuda", head_dim=8)


def test_the_functional_call_names_the_reason() -> None:
    layout = random_layout(45, 45, (8, 16))
    query, key, value = tensors(1, layout, heads=2, kv_heads=2, head_dim=16)
    with pytest.raises(ValueError, match='backend: "flex" cannot run this: on a CPU it has no backward'):
        block_sparse_attention(query.requires_grad_(), key, value, layout, backend="flex")


def test_the_lse_is_refused_on_a_cpu() -> None:
    layout = random_layout(45, 45, (8, 16))
    query, key, value = tensors(1, layout, heads=2, kv_heads=2, head_dim=16)
    with pytest.raises(ValueError, match="no lse"):
        block_sparse_attention(query, key, value, layout, backend="flex", return_aux=AuxRequest(lse=True))


def test_it_never_forms_all_scores_where_compilation_is_switched_off() -> None:
    layout = random_layout(45, 45, (8, 16))
    query, key, value = tensors(1, layout, heads=2, kv_heads=2, head_dim=16)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="forms all scores"):
        flex.attend(query, key, value, None, layout, is_causal=False, scale=0.25, with_lse=False)


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("layout_heads", "is_causal", "masked"),
    [(1, False, False), (4, True, False), (2, True, True)],
    ids=["plain", "causal", "causal-padded"],
)
@pytest.mark.parametrize("dtype", flex.DTYPES, ids=str)
def test_forward_backward_and_lse_on_a_gpu_equal_the_definition(
    dtype: torch.dtype, layout_heads: int, is_causal: bool, masked: bool
) -> None:
    layout = random_layout(601, 601, (128, 128), heads=layout_heads)
    real = padding(2, 601) if masked else None
    inputs = tensors(2, layout, heads=4, kv_heads=2, head_dim=64, dtype=dtype)
    generator = torch.Generator().manual_seed(11)
    cotangent = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    expected_out, expected_lse = exact(*leaves, layout, is_causal=is_causal, key_padding_mask=real)
    no_key = expected_lse == -math.inf
    of_lse = torch.randn(no_key.shape, generator=generator, dtype=torch.float64).masked_fill(no_key, 0.0)
    expected = torch.autograd.grad([expected_out, expected_lse], leaves, [cotangent.double(), of_lse])

    leaves = [tensor.cuda().requires_grad_() for tensor in inputs]
    out, aux = block_sparse_attention(
        *leaves,
        layout,
        backend="flex",
        is_causal=is_causal,
        key_padding_mask=None if real is None else real.cuda(),
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    gradients = torch.autograd.grad([out, aux.lse], leaves, [cotangent.cuda(), of_lse.float().cuda()])

    # Its float32 products are summed in another order, and its exponentials are those of the card.
    slack = 10.0 if dtype == torch.float32 else 2.0
    assert deviation(out, expected_out) <= slack * FORWARD_TOLERANCE[dtype]
    assert torch.equal(aux.lse.cpu() == -math.inf, no_key)
    assert deviation(aux.lse[~no_key.cuda()], expected_lse[~no_key]) <= slack * FORWARD_TOLERANCE[dtype]
    for name, ours, theirs in zip(("dq", "dk", "dv"), gradients, expected, strict=True):
        assert deviation(ours, theirs) <= slack * GRADIENT_TOLERANCE[dtype], name
