"""The modules: equal to the function and to nn.MultiheadAttention; dilated_core's weights; any length; in PyTorch."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dilated_block_sparse.functional import block_sparse_attention
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.modules import BlockSparseAttention, BlockSparseMultiheadAttention
from dilated_block_sparse.pattern import KEPT_LENGTHS, Pattern
from dilated_core import MultiheadDilatedAttention
from dilated_factory.models import RotaryPositions
from dilated_memory_pool import MemoryPool
from dilated_pattern_cache import DilatedPatternCache, PatternCache

WIDTH, HEADS, SEQ = 24, 4, 53
LOCAL = Pattern("local", window=1, block_size=8)
PATTERN = LOCAL | Pattern("global_", cols=1, rows=1, block_size=8)
LAYOUT = PATTERN(SEQ)
KINDS = (MultiheadDilatedAttention, BlockSparseMultiheadAttention)


def make(layout: Any = PATTERN, **options: Any) -> BlockSparseMultiheadAttention:
    return BlockSparseMultiheadAttention(WIDTH, HEADS, layout, dtype=torch.float64, **options)


def unsettled(module: nn.Module) -> nn.Module:
    """The module with biases and norms that are not what they start from."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def differentiate(
    module: Callable[..., Any], leaves: dict[str, Tensor], cotangent: Tensor, *inputs: Tensor, **options: Any
) -> dict[str, Tensor]:
    """The output, and the gradient of each leaf, by their names."""
    out = module(*inputs, **options)
    out = out[0] if isinstance(out, tuple) else out
    return {
        "out": out.detach(),
        **dict(zip(leaves, torch.autograd.grad(out, [*leaves.values()], cotangent), strict=True)),
    }


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Within 1e-12 of the largest of its kind: the output, and each gradient."""
    assert found.keys() == wanted.keys()
    # A constant added to all keys changes nothing: the gradient of k_proj.bias is all rounding.
    floor = 0.1 * max(gradient.abs().max().item() for gradient in wanted.values())
    for name, expected in wanted.items():
        assert (found[name] - expected).abs().max().item() <= 1e-12 * max(floor, expected.abs().max().item()), name


# ------------------------------------------------------------------------------------------- the function


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # of the module, of its call, of the function where it says them otherwise
    "plain": ({}, {}, {}),
    "causal": ({"is_causal": True}, {}, {}),
    "causal-call": ({}, {"is_causal": True}, {}),
    "not-causal-call": ({"is_causal": True}, {"is_causal": False}, {}),
    "scale": ({"softmax_scale": -0.3}, {}, {"scale": -0.3}),
    "masked": ({}, {"key_padding_mask": torch.arange(SEQ).expand(2, -1) % 5 > 0}, {}),
    "bias": ({}, {"block_bias": torch.linspace(-1, 1, LAYOUT.live)}, {}),
    "kernel": ({"kernel": "math", "backend": "tiles"}, {}, {}),
    "dropout": ({"attention_dropout": 0.4}, {}, {"dropout_p": 0.4}),
}


@pytest.mark.parametrize("layout", [LAYOUT, PATTERN, PATTERN.__call__], ids=["layout", "pattern", "function"])
@pytest.mark.parametrize(("options", "call", "said"), CALLS.values(), ids=CALLS)
def test_module_is_the_function(
    layout: Any, options: dict[str, Any], call: dict[str, Any], said: dict[str, Any]
) -> None:
    query, key, value = torch.randn(3, 2, SEQ, 4, 8).unbind()
    module = BlockSparseAttention(layout, **options)
    torch.manual_seed(1)
    found = module(query, key, value, **call)
    renamed = {name: one for name, one in options.items() if name not in ("softmax_scale", "attention_dropout")}
    torch.manual_seed(1)
    assert torch.equal(found, block_sparse_attention(query, key, value, LAYOUT, **{**renamed, **call, **said}))


def test_key_heads_may_be_shared_and_lengths_of_a_fixed_layout_differ() -> None:
    layout = BlockLayout.from_rows([[0], [0, 2], [1]], 20, 17, block_size=(8, 6))
    query, key, value = torch.randn(1, 20, 4, 8), *torch.randn(2, 1, 17, 2, 8).unbind()
    found = BlockSparseAttention(layout, enable_gqa=True)(query, key, value)
    assert torch.equal(found, block_sparse_attention(query, key, value, layout, enable_gqa=True))


def test_dropout_only_while_training() -> None:
    module = BlockSparseAttention(PATTERN, attention_dropout=0.5)
    query, key, value = torch.randn(3, 1, SEQ, 2, 8).unbind()
    expected = block_sparse_attention(query, key, value, LAYOUT)
    assert not torch.allclose(module(query, key, value), expected)
    assert torch.equal(module.eval()(query, key, value), expected)


def test_resources_are_used() -> None:
    with MemoryPool("host", min_bytes=0) as pool:
        patterns: PatternCache[Any, Any] = PatternCache()
        module = BlockSparseAttention(PATTERN, allocator=pool, patterns=patterns)
        query, key, value = torch.randn(3, 2, SEQ, 4, 8).unbind()
        out = module(query, key, value)
        assert torch.equal(out, block_sparse_attention(query, key, value, LAYOUT))
        statistics = pool.statistics()
        assert statistics.hits + statistics.misses + statistics.bypasses > 0
        assert ("dilated_block_sparse.layout", PATTERN, SEQ) in patterns
        del out
        gc.collect()


# ------------------------------------------------------------------------------------------- several heads


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_equals_torch(is_causal: bool, masked: bool) -> None:
    """nn.MultiheadAttention with the layout as its mask and the same weights, forward and every gradient."""
    ours = unsettled(make(layer_norm=False))
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([each.weight for each in projections]))
        theirs.in_proj_bias.copy_(torch.cat([each.bias for each in projections]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    tokens, cotangent = torch.randn(2, 2, SEQ, WIDTH, dtype=torch.float64).unbind()
    tokens.requires_grad_()
    # True = padding, in both. The first key stays, so that no row is without one, which torch answers with NaN.
    padding = torch.stack([torch.arange(SEQ) >= 40, torch.arange(SEQ) % 5 == 1]) if masked else None
    dead = ~LAYOUT.to_dense()[0]
    dead = dead | ~torch.ones_like(dead).tril() if is_causal else dead

    mine = {
        "tokens": tokens,
        **{name: getattr(ours, name).weight for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    }
    found = differentiate(ours, mine, cotangent, tokens, key_padding_mask=padding, is_causal=is_causal)
    yours = {"tokens": tokens, "in_proj": theirs.in_proj_weight, "out_proj": theirs.out_proj.weight}
    options = {"key_padding_mask": padding, "attn_mask": dead, "need_weights": False}
    wanted = differentiate(theirs, yours, cotangent, tokens, tokens, tokens, **options)
    wanted.update(zip(("q_proj", "k_proj", "v_proj"), wanted.pop("in_proj").chunk(3), strict=True))
    assert_same(found, wanted)


WHOLE: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "shared-heads": {"kv_heads": 2, "is_causal": True},
    "rotary": {"rotary": RotaryPositions(WIDTH // HEADS), "kv_heads": 1},
    "plain-projections": {"bias": False, "layer_norm": False, "softmax_scale": 0.3},
}


@pytest.mark.parametrize("options", WHOLE.values(), ids=WHOLE)
def test_multihead_with_all_blocks_equals_the_cores_with_one_segment(options: dict[str, Any]) -> None:
    theirs = unsettled(MultiheadDilatedAttention(WIDTH, HEADS, [64], [1], dtype=torch.float64, **options))
    ours = make(Pattern("local", window=100, block_size=8), **options)
    ours.load_state_dict(theirs.state_dict())
    tokens, cotangent = torch.randn(2, 2, SEQ, WIDTH, dtype=torch.float64).unbind()
    tokens.requires_grad_()
    padding = torch.rand(2, SEQ) < 0.3
    found, wanted = (
        differentiate(
            module, {"tokens": tokens, **dict(module.named_parameters())}, cotangent, tokens, key_padding_mask=padding
        )
        for module in (ours, theirs)
    )
    assert_same(found, wanted)


def test_each_head_may_have_a_layout() -> None:
    layouts = [LOCAL(SEQ), LAYOUT, LAYOUT.causal(), LOCAL(SEQ).causal()]
    tokens = torch.randn(1, SEQ, WIDTH, dtype=torch.float64)
    weights = make().state_dict()

    def heads(layout: BlockLayout) -> Tensor:
        seen: list[Tensor] = []
        module = make(layout)
        module.load_state_dict(weights)
        module.attention.register_forward_hook(lambda *hooked: seen.append(hooked[-1]))
        module(tokens)
        return seen[0]

    together = heads(BlockLayout.stack(layouts))
    for head, layout in enumerate(layouts):
        torch.testing.assert_close(together[:, :, head], heads(layout)[:, :, head], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kinds", [KINDS, KINDS[::-1]], ids=["to-blocks", "from-blocks"])
def test_weights_load_in_both_directions(kinds: tuple[Any, ...]) -> None:
    options: dict[str, Any] = {"kv_heads": 2, "rotary": RotaryPositions(WIDTH // HEADS)}
    patterns = {MultiheadDilatedAttention: ([8], [1]), BlockSparseMultiheadAttention: (PATTERN,)}
    source, target = (kind(WIDTH, HEADS, *patterns[kind], **options) for kind in kinds)
    assert list(source.state_dict()) == list(target.state_dict())
    target.load_state_dict(source.state_dict(), strict=True)
    for name, parameter in source.named_parameters():
        assert torch.equal(target.get_parameter(name), parameter), name


def test_the_same_seed_gives_the_same_weights() -> None:
    torch.manual_seed(3)
    ours = BlockSparseMultiheadAttention(WIDTH, HEADS, PATTERN, gamma_init=2.0).state_dict()
    torch.manual_seed(3)
    theirs = MultiheadDilatedAttention(WIDTH, HEADS, [8], [1], gamma_init=2.0).state_dict()
    for name, weight in theirs.items():
        assert torch.equal(weight, ours[name]), name


def test_a_few_steps_lower_a_loss_and_reach_every_parameter() -> None:
    module = BlockSparseMultiheadAttention(WIDTH, HEADS, PATTERN, kv_heads=2, is_causal=True)
    tokens, target = torch.randn(2, 2, SEQ, WIDTH).unbind()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(tokens)[0], target)
        loss.backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_autocast_and_bfloat16() -> None:
    module = BlockSparseMultiheadAttention(32, 4, PATTERN)
    tokens = torch.randn(2, SEQ, 32)
    expected = module(tokens)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert module(tokens)[0].dtype == torch.bfloat16
        torch.testing.assert_close(module(tokens)[0].float(), expected, rtol=0.05, atol=0.05)
    half = module.to(torch.bfloat16)
    torch.testing.assert_close(half(tokens.bfloat16())[0].float(), expected, rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------------- any length


@pytest.mark.parametrize("seq", [0, 1, 7, 8, 64, 101])
def test_a_pattern_follows_the_length(seq: int) -> None:
    attention = BlockSparseAttention(PATTERN, is_causal=True)
    query, key, value = torch.randn(3, 1, seq, 2, 8).unbind()
    expected = block_sparse_attention(query, key, value, PATTERN(seq), is_causal=True)
    assert torch.equal(attention(query, key, value), expected)


def test_a_fixed_layout_refuses_another_length() -> None:
    query = torch.randn(1, SEQ + 1, 2, 8)
    with pytest.raises(ValueError, match="layout: expected"):
        BlockSparseAttention(LAYOUT)(query, query, query)


def test_the_layouts_of_the_last_lengths_are_kept() -> None:
    asked: list[int] = []

    def layout(seq_len: int) -> BlockLayout:
        asked.append(seq_len)
        return LOCAL(seq_len)

    module = BlockSparseAttention(layout)
    first = module.layout_for(1)
    for length in range(1, KEPT_LENGTHS + 1):
        module.layout_for(length)
        module.layout_for(length)
    assert asked == list(range(1, KEPT_LENGTHS + 1))
    assert module.layout_for(1) is first
    module.layout_for(99)  # drops the layout of 2, which was not asked for since
    assert module.layout_for(1) is first
    module.layout_for(2)
    assert asked == [*range(1, KEPT_LENGTHS + 1), 99, 2]


@pytest.mark.parametrize("kind", [PatternCache, DilatedPatternCache])
def test_modules_with_one_store_share_layouts(kind: type[PatternCache[Any, Any]]) -> None:
    patterns = kind()
    first = BlockSparseAttention(PATTERN, patterns=patterns)
    second = BlockSparseAttention(
        Pattern("local", block_size=8, window=1) | Pattern("global_", rows=1, block_size=8, cols=1), patterns=patterns
    )
    assert first.layout_for(SEQ) is second.layout_for(SEQ)
    query = torch.randn(1, SEQ, 2, 8)
    assert torch.equal(first(query, query, query), second(query, query, query))
    # A function is equal to nothing but itself: no other module could find what it gave.
    own = BlockSparseAttention(lambda seq_len: PATTERN(seq_len), patterns=patterns)
    assert own.layout_for(SEQ) is own.layout_for(SEQ)
    assert own.layout_for(SEQ) is not first.layout_for(SEQ)


@pytest.mark.parametrize(
    "mode",
    [FakeTensorMode, torch.inference_mode, lambda: torch.device("meta")],
    ids=["fake", "inference", "device"],
)
def test_a_layout_first_made_in_a_mode_is_like_any_other(mode: Callable[[], Any]) -> None:
    module = BlockSparseAttention(PATTERN)
    with mode():
        layout = module.layout_for(SEQ)
    assert layout == LAYOUT
    for tensor in (layout.indptr, layout.indices):
        assert type(tensor) is Tensor
        assert tensor.device.type == "cpu"
        assert not tensor.is_inference()


def test_what_a_function_raises_comes_through() -> None:
    def layout(seq_len: int) -> BlockLayout:
        raise OverflowError(f"{seq_len} tokens")

    with pytest.raises(OverflowError, match="53 tokens"):
        BlockSparseAttention(layout).layout_for(SEQ)


# ------------------------------------------------------------------------------------------- patterns


def test_a_pattern_is_a_value() -> None:
    again = Pattern("local", block_size=8, window=1) | Pattern("global_", rows=1, cols=1, block_size=8)
    assert again == PATTERN
    assert hash(again) == hash(PATTERN)
    assert {PATTERN: 1}[again] == 1
    assert LOCAL != PATTERN
    assert eval(repr(PATTERN)) == PATTERN
    assert pickle.loads(pickle.dumps(PATTERN)) == PATTERN
    assert copy.deepcopy(PATTERN) == PATTERN
    with pytest.raises(AttributeError):
        PATTERN.parts = ()  # type: ignore[misc]


def test_options_that_are_lists_are_kept_as_tuples() -> None:
    lengths, rates = [16, 32], [1, 2]
    pattern = Pattern("longnet", segment_lengths=lengths, dilation_rates=rates, block_size=[8, 4])
    expected = BlockLayout.longnet(SEQ, [16, 32], [1, 2], block_size=(8, 4))
    lengths.append(64)
    assert pattern(SEQ) == expected
    assert hash(pattern) == hash(eval(repr(pattern)))


def test_a_pattern_is_its_constructor() -> None:
    assert LOCAL(SEQ) == BlockLayout.local(SEQ, 1, block_size=8)
    assert PATTERN(SEQ) == LOCAL(SEQ) | BlockLayout.global_(SEQ, 1, 1, block_size=8)
    drawn = Pattern("bigbird", window=1, global_blocks=1, blocks_per_row=2, seed=5, block_size=8, heads=3)
    expected = BlockLayout.bigbird(SEQ, 1, 1, 2, seed=5, block_size=8, heads=3)
    assert drawn(SEQ) == expected
    share = Pattern("local_window", sparsity_ratio=0.75, block_size=16)
    assert share(1024) == BlockLayout.named("local_window", 1024, 0.75, block_size=16)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (3, {}, TypeError, "name: expected one of .*, got 3 of type int"),
        ("locale", {}, ValueError, "name: expected one of .*'local'.*, got 'locale'"),
        ("topk", {"k": 3}, ValueError, "name: expected one of"),
        ("live", {}, ValueError, "name: expected one of"),
        ("named", {}, ValueError, "name: expected one of"),
        ("local", {"sparsity_ratio": 0.5}, ValueError, r"name: expected one of \['local_window', "),
        ("local", {"windows": 3}, TypeError, 'windows: pattern "local" has no such option, only window, '),
        ("local", {"block_size": 8}, TypeError, 'window: pattern "local" needs it, only block_size was given'),
        ("local_window", {"sparsity_ratio": 0.5, "window": 1}, TypeError, "window: pattern .* has no such option"),
    ],
)
def test_a_bad_pattern_is_named(name: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Pattern(name, **options)


def test_a_pattern_is_joined_to_a_pattern_only() -> None:
    with pytest.raises(TypeError):
        PATTERN | LAYOUT  # type: ignore[operator]


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layout": [[0], [1]]}, TypeError, "layout: expected a BlockLayout, a Pattern or a function of the length"),
        ({"softmax_scale": "0.3"}, TypeError, "softmax_scale: expected a float"),
        ({"attention_dropout": 1.0}, ValueError, "attention_dropout: expected a probability"),
        ({"dropout": -0.1}, ValueError, "dropout: expected a probability"),
        ({"is_causal": 1}, TypeError, "is_causal: expected a bool"),
        ({"enable_gqa": None}, TypeError, "enable_gqa: expected a bool"),
        ({"backend": "dense"}, ValueError, "backend: expected one of"),
        ({"kernel": "no_such"}, ValueError, "kernel: expected one of"),
        ({"allocator": 1}, TypeError, "allocator: expected an object"),
        ({"patterns": {}}, TypeError, "patterns: expected an object"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"layout": LAYOUT, **options}
    if "dropout" not in options:
        with pytest.raises(error, match=message):
            BlockSparseAttention(**options)
    if not {"attention_dropout", "enable_gqa"} & options.keys():
        with pytest.raises(error, match=message):
            BlockSparseMultiheadAttention(WIDTH, HEADS, **options)


def test_bad_calls_are_named() -> None:
    module, tokens = make(), torch.randn(1, 9, WIDTH, dtype=torch.float64)
    for arguments, message in (
        ({"attn_mask": torch.zeros(9, 9)}, "attn_mask: expected None, there is no further mask"),
        ({"need_weights": True}, "need_weights: expected False"),
        ({"key": torch.randn(1, 9, WIDTH + 1)}, "key: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            module(tokens, **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"query: expected a torch\.Tensor, got list"):
        BlockSparseAttention(PATTERN)([1], tokens, tokens)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="query: expected 4 dimensions"):
        BlockSparseAttention(PATTERN)(tokens, tokens, tokens)
    with pytest.raises(TypeError, match="layout: expected a function that returns a BlockLayout, got list"):
        make(lambda seq_len: [seq_len])(tokens)


def test_there_is_no_cache_to_decode_with() -> None:
    assert not hasattr(make(), "new_cache")


# ------------------------------------------------------------------------------------------- living in PyTorch


@pytest.mark.parametrize("layout", [LAYOUT, PATTERN], ids=["layout", "pattern"])
def test_copies_and_pickles(layout: Any) -> None:
    module = make(layout, kv_heads=2, is_causal=True)
    tokens = torch.randn(1, SEQ, WIDTH, dtype=torch.float64)
    expected = module(tokens)[0]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(twin) == repr(module)
        assert {*twin.parameters()}.isdisjoint(module.parameters())
        assert torch.equal(twin(tokens)[0], expected)
    # A layout never changes, so copies need no other, nor to plan again.
    assert copy.deepcopy(module).attention.layout_for(SEQ) is module.attention.layout_for(SEQ)


def test_a_whole_module_goes_through_a_file() -> None:
    module = make()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    tokens = torch.randn(1, 19, WIDTH, dtype=torch.float64)
    assert torch.equal(twin(tokens)[0], module(tokens)[0])


def test_repr_says_what_and_how() -> None:
    shown = repr(make(is_causal=True, backend="tiles"))
    assert "embed_dim=24, num_heads=4, kv_heads=4" in shown
    assert f"{PATTERN!r}, is_causal=True, backend='tiles', kernel='auto'" in shown
    assert "BlockLayout(q_len=53, kv_len=53" in repr(make(LAYOUT))


def differentiate_both(module: nn.Module, call: Callable[..., Any], seq: int) -> tuple[dict[str, Tensor], ...]:
    tokens, cotangent = torch.randn(2, 2, seq, WIDTH, dtype=torch.float64).unbind()
    tokens.requires_grad_()
    leaves = {"tokens": tokens, **dict(module.named_parameters())}
    return tuple(differentiate(each, leaves, cotangent, tokens, is_causal=True) for each in (module, call))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_it_compiles_to_one_graph_for_each_length(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    module = unsettled(make(kv_heads=2))
    with torch.inference_mode():
        module(torch.randn(1, SEQ, WIDTH, dtype=torch.float64))  # an evaluation before training leaves nothing behind
    # aot_eager traces forward and backward as inductor does, without a C++ compiler's minute.
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seq in (SEQ, 30, SEQ):
        eager, traced = differentiate_both(module, compiled, seq)
        assert_same(traced, eager)


@pytest.mark.slow
def test_a_fixed_layout_compiles_with_a_store_and_a_pool() -> None:
    torch._dynamo.reset()
    with MemoryPool("host", min_bytes=0) as pool:
        module = unsettled(make(LAYOUT, allocator=pool, patterns=PatternCache()))
        eager, traced = differentiate_both(module, torch.compile(module, fullgraph=True, backend="aot_eager"), SEQ)
        assert_same(traced, eager)
        del eager, traced
        gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("layout", [LAYOUT, PATTERN], ids=["layout", "pattern"])
def test_it_exports(layout: Any, strict: bool) -> None:
    module = make(layout).eval()
    tokens = torch.randn(2, SEQ, WIDTH, dtype=torch.float64)
    exported = torch.export.export(module, (tokens,), strict=strict).module()
    torch.testing.assert_close(exported(tokens)[0], module(tokens)[0], rtol=0, atol=1e-12)
