"""What a caller's process has set up, or does with a layout: default devices, inference mode, many layouts, imports."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dilated_block_sparse import (
    BlockLayout,
    BlockSparseAdaptiveAttention,
    attention_recall,
    block_sparse_attention,
    operators,
    reference,
)
from dilated_block_sparse.plan import stacks


def problem(tokens: int = 60, *, heads: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, tokens, heads, 8, generator=generator).to(dtype).unbind()
    return query, key, value


def layout_of(tokens: int = 60, seed: int = 0) -> BlockLayout:
    drawn = BlockLayout.random(tokens, 2, seed=seed, block_size=8)
    return drawn | BlockLayout.strided(tokens, 3, block_size=8) | BlockLayout.global_(tokens, 1, 0, block_size=8)


def test_a_default_device_elsewhere_changes_nothing() -> None:
    query, key, value = problem()
    expected = block_sparse_attention(query, key, value, layout_of(), is_causal=True)
    with torch.device("meta"):
        layout = layout_of()
        out = block_sparse_attention(query, key, value, layout, is_causal=True)
        bias = torch.zeros(layout.live, device="cpu")
        biased = block_sparse_attention(query, key, value, layout, block_bias=bias)
        kept = BlockSparseAdaptiveAttention(8, keep=0.5, is_causal=True).layout(query, key)
        recall = attention_recall(query, key, kept, is_causal=True).mean
        other = layout.causal() - layout.T
    assert layout == layout_of()
    assert other == layout_of().causal() - layout_of().T
    assert torch.equal(out, expected)
    assert biased.device == recall.device == query.device


def test_a_layout_made_in_inference_mode_trains_under_compile() -> None:
    with torch.inference_mode():
        layout = layout_of()
    assert not layout.indices.is_inference()
    leaves = [tensor.requires_grad_() for tensor in problem()]

    def attend(*qkv: Tensor) -> Tensor:
        return block_sparse_attention(*qkv, layout)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        torch.autograd.grad(compiled(*leaves).sum(), leaves),
        torch.autograd.grad(attend(*leaves).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_many_layouts_are_planned_once_each_however_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[BlockLayout] = []
    make_plan = stacks.make_plan

    def counted(layout: BlockLayout, **options: bool) -> object:
        made.append(layout)
        return make_plan(layout, **options)

    monkeypatch.setattr(stacks, "make_plan", counted)
    layouts = [layout_of(seed=seed) for seed in range(40)]
    qkv = problem()
    for _ in range(2):
        for layout in layouts:
            place = layout.indptr, layout.indices, [60, 60, 8, 8]
            traced, _ = operators._operator(*qkv, None, None, None, *place, False, 0.3, 0.0, "auto")
            assert torch.equal(traced, block_sparse_attention(*qkv, layout, scale=0.3))
    assert len(made) == len(layouts)
    copies = layouts[0].indptr.clone(), layouts[0].indices.clone(), [60, 60, 8, 8]
    found, _ = operators._operator(*qkv, None, None, None, *copies, False, 0.3, 0.0, "auto")
    assert torch.equal(found, block_sparse_attention(*qkv, layouts[0], scale=0.3))


def test_validate_forgets_what_was_made_of_what_was_there_before() -> None:
    layout = BlockLayout.from_rows([[0], [1]], 16, 16, block_size=8)
    qkv = problem(16)
    before, key = block_sparse_attention(*qkv, layout), layout.key()
    layout.indices[:] = torch.tensor([1, 0])
    layout.validate()
    assert layout.key() != key
    assert layout == BlockLayout.from_rows([[1], [0]], 16, 16, block_size=8)
    assert not torch.equal(block_sparse_attention(*qkv, layout), before)


@pytest.mark.parametrize(("size", "scale"), [(9000.0, None), (20.0, 1e-5), (torch.finfo(torch.float16).max, None)])
def test_a_large_bias_in_half_precision_hides_blocks_and_nothing_else(size: float, scale: float | None) -> None:
    query, key, value = problem(dtype=torch.float16)
    layout = layout_of()
    bias = torch.where(torch.arange(layout.live) % 3 == 0, -size, 0.0).half()
    out = block_sparse_attention(query, key, value, layout, block_bias=bias, scale=scale)
    exact, _ = reference.block_sparse_attention(
        *(tensor.double() for tensor in (query, key, value)), layout, block_bias=bias.double(), scale=scale
    )
    torch.testing.assert_close(out.double(), exact, rtol=0.0, atol=5e-3)


def test_an_infinite_bias_is_refused() -> None:
    layout = layout_of()
    bias = torch.full((layout.live,), -torch.inf)
    with pytest.raises(ValueError, match="block_bias: expected finite numbers, got inf"):
        block_sparse_attention(*problem(), layout, block_bias=bias)


def test_a_bias_is_cast_as_the_rest_is_under_autocast() -> None:
    layout = layout_of()
    bias = torch.randn(layout.live)
    with torch.autocast("cpu", torch.bfloat16):
        out = block_sparse_attention(*problem(), layout, block_bias=bias)
    half = [tensor.bfloat16() for tensor in problem()]
    assert torch.equal(out, block_sparse_attention(*half, layout, block_bias=bias.bfloat16()))


def test_a_mask_of_any_strides_is_read_right() -> None:
    query, key, value = problem()
    mask = torch.rand(60, 1).expand(60, 2)[:, :1].T > 0.3
    wide = torch.zeros(1, 120, dtype=torch.bool)
    wide[:, ::2] = mask
    layout = layout_of()
    out = block_sparse_attention(query, key, value, layout, key_padding_mask=wide[:, ::2])
    assert torch.equal(out, block_sparse_attention(query, key, value, layout, key_padding_mask=mask.contiguous()))


def test_importing_it_does_not_load_the_compiler() -> None:
    code = "import sys, dilated_block_sparse as d; d.BlockSparseAttention; print('torch._dynamo' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert shown.stdout.strip() == "False"


def test_everything_it_names_is_there() -> None:
    import dilated_block_sparse

    for name in [*dilated_block_sparse.__all__, *(name for name in dir(dilated_block_sparse) if name[0].isupper())]:
        assert getattr(dilated_block_sparse, name) is not None
