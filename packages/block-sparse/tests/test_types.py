"""The attention types: found by dilated_factory through this distribution's own entry points, and built by it."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_block_sparse import types
from dilated_block_sparse.functional import block_sparse_attention
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.modules import BlockSparseAttention, BlockSparseMultiheadAttention
from dilated_block_sparse.pattern import Pattern
from dilated_factory import LongNetLM, create_dilated_attention, create_multihead_dilated_attention, registry
from dilated_pattern_cache import PatternCache
from dilated_ring.comm import Comm, run_ranks

SEQ = 61
LOCAL = Pattern("local", window=1, block_size=8)
FORMS = ("attention", "multihead")
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.fixture(autouse=True)
def _registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the sources lie on the path and nothing is installed, the entry points as pyproject.toml says them."""
    if "block_sparse" in registry.installed():
        return
    entries = re.findall(r'^\w+ = "dilated_block_sparse\.types:\w+"$', PYPROJECT.read_text(), re.MULTILINE)
    info = tmp_path / "dilated_block_sparse-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dilated-block-sparse\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *entries]).replace('"', "") + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def create(form: str, attention_type: str = "block_sparse", *branches: Any, **options: Any) -> Any:
    if form == "attention":
        return create_dilated_attention(attention_type, *branches, **options)
    return create_multihead_dilated_attention(attention_type, 16, 4, *branches, **options)


def layout_of(module: Any) -> Any:
    return (module if isinstance(module, BlockSparseAttention) else module.attention).layout


def test_both_types_are_found_and_load() -> None:
    found = registry.installed()
    for name in ("block_sparse", "block_sparse_ring"):
        assert found[name].distribution == "dilated-block-sparse"
        assert found[name].target == f"dilated_block_sparse.types:{name}"
        loaded = EntryPoint(name, found[name].target, registry.GROUP).load()
        assert callable(loaded.attention)
        assert callable(loaded.multihead)


def test_the_module_is_the_types_own() -> None:
    single, multihead = (create(form, layout=LOCAL) for form in FORMS)
    assert type(single) is BlockSparseAttention
    assert type(multihead) is BlockSparseMultiheadAttention
    assert single.decision.attention_type == multihead.decision.attention_type == "block_sparse"
    assert single.decision.pool_mode == "lightweight"
    assert single.layout is multihead.attention.layout is LOCAL


def test_options_reach_the_modules() -> None:
    patterns: PatternCache[Any, Any] = PatternCache()
    shared = {"softmax_scale": 0.3, "is_causal": True, "backend": "tiles", "kernel": "math", "patterns": patterns}
    single = create("attention", layout=LOCAL, attention_dropout=0.25, enable_gqa=True, **shared)
    multihead = create(
        "multihead", layout=LOCAL, dropout=0.25, kv_heads=2, bias=False, layer_norm=False, dtype=torch.float64, **shared
    )
    for module in (single, multihead.attention):
        assert (module.softmax_scale, module.is_causal, module.attention_dropout) == (0.3, True, 0.25)
        assert (module.backend, module.kernel, module.enable_gqa) == ("tiles", "math", True)
        assert module.patterns is patterns
    assert multihead.inner_attn_ln is multihead.q_proj.bias is None
    assert multihead.q_proj.weight.dtype == torch.float64
    assert single.decision.kernel == multihead.decision.kernel == "math"


@pytest.mark.parametrize("form", FORMS)
def test_branches_mean_segments_and_rates_of_blocks(form: str) -> None:
    module = create(form, "block_sparse", [16, 62], [1, 4], block_size=4)
    expected = BlockLayout.dilated(SEQ, 4, 1, block_size=4) | BlockLayout.dilated(SEQ, 16, 4, block_size=4)
    assert layout_of(module)(SEQ) == expected
    assert layout_of(create(form, "block_sparse", [4, 4], [1, 4]))(SEQ) == BlockLayout.full(SEQ)


def test_a_share_of_blocks_may_be_left_out_instead() -> None:
    for options, name in (({}, "dilated_sparse"), ({"pattern": "bigbird", "seed": 3}, "bigbird")):
        layout = layout_of(create("attention", sparsity_ratio=0.75, block_size=16, **options))(2048)
        seed = {"seed": options["seed"]} if "seed" in options else {}
        assert layout == BlockLayout.named(name, 2048, 0.75, block_size=16, **seed)
    causal = layout_of(create("multihead", sparsity_ratio=0.75, pattern="random", block_size=16, is_causal=True))(2048)
    assert causal == BlockLayout.named("random", 2048, 0.75, block_size=16, is_causal=True)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_created_attends(form: str) -> None:
    module = create(form, layout=LOCAL, is_causal=True)
    if form == "attention":
        query, key, value = torch.randn(3, 2, SEQ, 4, 8).unbind()
        expected = block_sparse_attention(query, key, value, LOCAL(SEQ), is_causal=True)
        assert torch.equal(module(query, key, value), expected)
    else:
        tokens = torch.randn(2, SEQ, 16)
        assert module(tokens, tokens, tokens)[0].shape == tokens.shape


@pytest.mark.parametrize(
    ("branches", "options", "error", "message"),
    [
        ((), {"width": 3}, TypeError, 'width: attention type "block_sparse" has no such option, only layout, pattern'),
        ((), {"layout": 3}, TypeError, "layout: expected a BlockLayout"),
        ((), {"layout": LOCAL, "sparsity_ratio": 0.9}, ValueError, "sparsity_ratio: expected None beside layout"),
        ((), {"layout": LOCAL, "block_size": 64}, ValueError, "block_size: expected None beside layout"),
        (([64], [1]), {"layout": LOCAL}, ValueError, r"segment_lengths: expected None beside layout, .* got \[64\]"),
        (([64], [1]), {"sparsity_ratio": 0.9}, ValueError, "segment_lengths: expected None beside sparsity_ratio"),
        ((), {"pattern": "bigbird"}, ValueError, "pattern: expected None without sparsity_ratio, got 'bigbird'"),
        ((), {"seed": 0}, ValueError, "seed: expected None without sparsity_ratio, got 0"),
        ((), {"pattern": "no_such", "sparsity_ratio": 0.9}, ValueError, "expected one of .*'no_such'"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_mistake_is_named(
    form: str, branches: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        create(form, "block_sparse", *branches, **options)


def test_a_language_model_of_blocks_generates_what_it_predicts() -> None:
    """Without a cache: the whole text is attended for every token."""
    model = LongNetLM(32, 16, 2, 2, [8, 16], [1, 2], attention_type="block_sparse", block_size=4).eval()
    text = model.generate(torch.arange(5).unsqueeze(0), 6, temperature=0.0)
    with torch.no_grad():
        predicted = model(text[:, :-1]).argmax(-1)
    assert torch.equal(text[:, 5:], predicted[:, 4:])


# ------------------------------------------------------------------------------------------- over a ring


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options", [{"layout": LOCAL}, {"sparsity_ratio": 0.5, "block_size": 8}], ids=["layout", "share"]
)
def test_a_ring_of_what_is_created_is_the_whole(form: str, options: dict[str, Any]) -> None:
    whole = create(form, is_causal=True, **options)
    shape = (2, 64, 4, 8) if form == "attention" else (2, 64, 16)
    inputs = torch.randn(3 if form == "attention" else 1, *shape).unbind()
    expected = whole(*inputs)

    def work(comm: Comm) -> Tensor:
        module = create(form, "block_sparse_ring", is_causal=True, group=comm, **options)
        assert module.decision.attention_type == "block_sparse_ring"
        module.load_state_dict(whole.state_dict())
        out = module(*(each.tensor_split(2, 1)[comm.rank] for each in inputs))
        return out if form == "attention" else out[0]

    found = torch.cat(run_ranks(2, work), 1)
    torch.testing.assert_close(found, expected if form == "attention" else expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_an_option_the_ring_does_not_know_is_named(form: str) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        create(form, "block_sparse_ring", layout=LOCAL, no_such_option=1)


@pytest.mark.parametrize("form", FORMS)
def test_without_dilated_ring_the_extra_is_named_and_the_rest_works(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("dilated_ring.", "dilated_block_sparse.ring", "dilated_block_sparse.types")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dilated_ring", None)  # as if it were not installed
    sizes = {"embed_dim": 16, "num_heads": 4} if form == "multihead" else {}
    builders = (
        EntryPoint(name, f"dilated_block_sparse.types:{name}", registry.GROUP).load()
        for name in ("block_sparse", "block_sparse_ring")
    )
    alone, over_ring = (getattr(builder, form) for builder in builders)
    assert alone(segment_lengths=[4], dilation_rates=[1], **sizes) is not None
    with pytest.raises(ImportError, match=r'pip install "dilated-block-sparse\[ring\]"'):
        over_ring(segment_lengths=[4], dilation_rates=[1], **sizes)


def test_a_fault_inside_the_ring_room_is_not_passed_off_as_a_missing_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dilated_block_sparse.ring.modules", None)
    with pytest.raises(ModuleNotFoundError, match=r"dilated_block_sparse\.ring\.modules"):
        types.block_sparse_ring.attention(segment_lengths=[4], dilation_rates=[1])
