"""Models of transformers with attn_implementation="dilated" and "block_sparse", built small from their configs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

if sys.version_info < (3, 11):
    pytest.skip("transformers needs Python 3.11", allow_module_level=True)

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BartConfig,
    BartModel,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    StaticCache,
    ViTConfig,
    ViTModel,
)
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from dilated_block_sparse import BlockLayout
from dilated_core import DilatedPattern, dilated_attention, reference
from dilated_core.resources import NO_RESOURCES
from dilated_factory import NotInstalledError
from dilated_factory.interop.transformers import register_transformers
from dilated_factory.interop.transformers.dilated import DilatedEngine
from dilated_factory.interop.transformers.masks import make_mask_function
from dilated_factory.interop.transformers.settings import BlockSparseSettings, DilatedSettings

BOTH = ("dilated", "block_sparse")
# One segment over everything, and every block: plain attention.
PLAIN = {
    "dilated": {"segment_lengths": [512], "dilation_rates": [1]},
    "block_sparse": {"patterns": [{"name": "full"}], "block_size": 8},
}
SPARSE = {
    "dilated": {"segment_lengths": [6, 16], "dilation_rates": [1, 3]},
    "block_sparse": {
        "patterns": [{"name": "local", "window": 1}, {"name": "global_", "cols": 1, "rows": 0}],
        "block_size": 4,
    },
}
VOCABULARY = 61
LENGTH = 21
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register_transformers()


def llama(
    entries: dict[str, Any] = PLAIN, kv_heads: int = 2, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 48, "num_key_value_heads": kv_heads, "max_position_embeddings": 128}
    config = LlamaConfig(**{**sizes, "pad_token_id": 0, "eos_token_id": None, **entries, **options})
    return LlamaForCausalLM(config).to(dtype).eval()


def bert(entries: dict[str, Any] = PLAIN, **options: Any) -> Any:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, intermediate_size=48, max_position_embeddings=64, **entries, **options)
    return BertModel(config).eval()


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(side: str, batch: int = 2, length: int = LENGTH) -> Tensor | None:
    """Rows of unequal length, the first one whole: transformers' sense, 1 where a token is real."""
    if side == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, : 4 * row + 1] = 0
    return mask if side == "left" else mask.flip(1)


def with_implementation(model: Any, name: str) -> Any:
    model.set_attn_implementation(name)
    return model


def outputs(model: Any, name: str, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Logits or hidden states of the real tokens."""
    with torch.no_grad():
        found: Tensor = with_implementation(model, name)(ids, attention_mask=mask)[0]
    return found if mask is None else found[mask.bool()]


# ------------------------------------------------------------------------------------------------ plain attention


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("make", [llama, lambda: llama(kv_heads=4), bert], ids=["llama-gqa", "llama", "bert"])
def test_one_segment_or_every_block_equals_sdpa(make: Callable[[], Any], side: str, name: str) -> None:
    model, mask = make(), padding(side)
    expected = outputs(model, "sdpa", tokens(), mask)
    torch.testing.assert_close(outputs(model, name, tokens(), mask), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_other_models_equal_sdpa_too(name: str) -> None:
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=VOCABULARY, n_positions=64, **PLAIN))
    small = {**SIZES, "intermediate_size": 48, "num_hidden_layers": 1}
    mistral = MistralForCausalLM(MistralConfig(**small, num_key_value_heads=2, sliding_window=None, **PLAIN))
    for model in (gpt.eval(), mistral.eval()):
        expected = outputs(model, "sdpa", tokens(), padding("left"))
        found = outputs(model, name, tokens(), padding("left"))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_a_model_without_masks_equals_sdpa(name: str) -> None:
    torch.manual_seed(0)
    small = {**SIZES, "intermediate_size": 48, "num_hidden_layers": 1}
    del small["vocab_size"]
    model = ViTModel(ViTConfig(**small, image_size=32, patch_size=8, **PLAIN)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = with_implementation(model, "sdpa")(pixels)[0]
        found = with_implementation(model, name)(pixels)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_models_whose_layers_use_no_window_of_theirs_equal_sdpa(name: str) -> None:
    torch.manual_seed(0)
    small = {**SIZES, "intermediate_size": 48, "layer_types": ["full_attention"] * 2, "pad_token_id": 0, **PLAIN}
    tokens_ = {"bos_token_id": 1, "eos_token_id": 2}
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**small, **tokens_, num_key_value_heads=2, head_dim=8))
    ends = {"cls_token_id": 1, "sep_token_id": 2}
    modern = ModernBertModel(ModernBertConfig(**small, **tokens_, **ends, max_position_embeddings=64))
    for model in (gemma.eval(), modern.eval()):
        for side in ("none", "left", "right"):
            expected = outputs(model, "sdpa", tokens(), padding(side))
            found = outputs(model, name, tokens(), padding(side))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_mask_says_whether_it_is_causal_whatever_the_module_says(is_causal: bool, name: str) -> None:
    module, mask = Attention(not is_causal), padding("left")
    make = create_causal_mask if is_causal else create_bidirectional_mask
    found = {}
    for implementation in ("sdpa", name):
        module.config._attn_implementation = implementation
        options = {"attention_mask": mask, "past_key_values": None}
        made = make(module.config, inputs_embeds=torch.zeros(2, LENGTH, 32), **options)
        torch.manual_seed(5)
        found[implementation] = call(implementation, module, (LENGTH, LENGTH), made)[mask.bool()]
    torch.testing.assert_close(found[name], found["sdpa"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_gives_the_tokens_of_sdpa(cache: str, name: str) -> None:
    model = llama()
    options = {"attention_mask": padding("left"), "max_new_tokens": 8, "do_sample": False}
    expected = with_implementation(model, "sdpa").generate(tokens(), **options)
    found = with_implementation(model, name).generate(tokens(), **options, cache_implementation=cache)
    assert torch.equal(found, expected)


def test_a_sparse_pattern_is_another_function_than_sdpa() -> None:
    model = llama(SPARSE)
    for name in BOTH:
        assert (outputs(model, name, tokens(), None) - outputs(model, "sdpa", tokens(), None)).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------ the definition


def define(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """The float64 oracle, of sequences without padding."""
    assert mask is None
    entry = module.config.dilated
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(query.shape[2] // key.shape[2], 2) for tensor in (key, value))
    out, _ = reference.dilated_attention(
        query,
        key,
        value,
        entry["segment_lengths"],
        entry["dilation_rates"],
        is_causal=module.is_causal,
        scale=options["scaling"],
        semantics=entry.get("semantics", "paper"),
    )
    return out, None


@pytest.fixture
def _definition() -> None:
    AttentionInterface.register("definition", define)
    AttentionMaskInterface.register("definition", lambda **_: None)


@pytest.mark.usefixtures("_definition")
@pytest.mark.parametrize("semantics", ["paper", "torchscale", "grouped"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_every_row_of_a_padded_batch_gives_what_it_gives_alone_by_the_definition(side: str, semantics: str) -> None:
    model = llama({"dilated": {"segment_lengths": [6, 15], "dilation_rates": [1, 3], "semantics": semantics}})
    model.double()
    ids, mask = tokens(3), padding(side, 3)
    # As generate() does: rotary tables are float32, and rows shifted in them differ by 1e-8.
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = with_implementation(model, "dilated")(ids, attention_mask=mask, position_ids=positions).logits
        with_implementation(model, "definition")
        for row in range(3):
            real = slice(None) if mask is None else mask[row].bool()
            expected = model(ids[row, real][None]).logits[0]
            torch.testing.assert_close(found[row, real], expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("_definition")
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_row_of_a_padded_bert_gives_what_it_gives_alone(side: str) -> None:
    model = bert(SPARSE).double()
    ids, mask = tokens(3), padding(side, 3)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = with_implementation(model, "dilated")(ids, attention_mask=mask, position_ids=positions)[0]
        with_implementation(model, "definition")
        for row in range(3):
            expected = model(ids[row, mask[row].bool()][None])[0][0]
            torch.testing.assert_close(found[row, mask[row].bool()], expected, rtol=0, atol=1e-12)


def test_block_sparse_equals_sdpa_with_the_mask_of_its_layout() -> None:
    model = llama(SPARSE, dtype=torch.float64)
    layout = BlockLayout.local(LENGTH, 1, block_size=4) | BlockLayout.global_(LENGTH, 1, 0, block_size=4)
    pairs = layout.to_dense().tril()[None]
    with torch.no_grad():
        expected = with_implementation(model, "sdpa")(tokens(), attention_mask=pairs.expand(2, -1, -1, -1)).logits
        found = with_implementation(model, "block_sparse")(tokens()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BOTH)
def test_what_padding_holds_has_no_influence(name: str) -> None:
    model, mask = llama(SPARSE), padding("left")
    other = torch.where(mask.bool(), tokens(), tokens().flip(1))
    assert torch.equal(outputs(model, name, tokens(), mask), outputs(model, name, other, mask))


def test_a_row_of_padding_alone_gives_numbers() -> None:
    mask = padding("left")
    mask[1] = 0
    for name in BOTH:
        with torch.no_grad():
            logits = with_implementation(llama(SPARSE), name)(tokens(), attention_mask=mask).logits
        assert logits.isfinite().all()


# ------------------------------------------------------------------------------------------------ decoding


def entries(semantics: str) -> dict[str, Any]:
    return {
        "dilated": {"segment_lengths": [6, 15], "dilation_rates": [1, 3], "semantics": semantics},
        "block_sparse": SPARSE["block_sparse"],
    }


@pytest.mark.parametrize(
    ("name", "semantics"),
    [("dilated", "paper"), ("dilated", "torchscale"), ("dilated", "grouped"), ("block_sparse", "paper")],
)
def test_generation_with_a_cache_equals_generation_without_step_by_step(name: str, semantics: str) -> None:
    model = with_implementation(llama(entries(semantics), dtype=torch.float64), name)
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ids, mask = tokens(3, 11), padding("left", 3, 11)
    cached, full = (model.generate(ids, attention_mask=mask, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, full.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(full.logits), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("side", ["none", "left"])
def test_a_prompt_in_chunks_gives_what_it_gives_at_once(side: str, static: bool, name: str) -> None:
    model = with_implementation(llama(SPARSE, dtype=torch.float64), name)
    ids, mask = tokens(3), padding(side, 3)
    cache = StaticCache(config=model.config, max_cache_len=40) if static else None
    logits, seen = [], 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        for chunk in ids.split([3, 4, 1, 9, 1, 3], 1):  # the second and third row start in the second and fourth chunk
            seen += chunk.shape[1]
            so_far = None if mask is None else mask[:, :seen]
            positions = torch.arange(seen - chunk.shape[1], seen)[None]
            step = model(chunk, attention_mask=so_far, past_key_values=cache, use_cache=True, position_ids=positions)
            cache = step.past_key_values
            logits.append(step.logits)
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[real], whole[real], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BOTH)
def test_beam_search_with_a_cache_equals_beam_search_without(name: str) -> None:
    model = with_implementation(llama(SPARSE, dtype=torch.float64), name)
    options = {"attention_mask": padding("left"), "max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    cached, full = (model.generate(tokens(), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, full)


@settings(max_examples=60)
@given(data=st.data())
def test_the_last_rows_are_those_of_the_whole_call(data: st.DataObject) -> None:
    compare_last_rows(data)


@pytest.mark.fuzz
@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_the_last_rows_are_those_of_many_whole_calls(data: st.DataObject) -> None:
    compare_last_rows(data)


def compare_last_rows(data: st.DataObject) -> None:
    branches = data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=branches, max_size=branches))
    rates = [data.draw(st.integers(1, length)) for length in lengths]
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    length = data.draw(st.integers(2, 26))
    new = data.draw(st.integers(1, length - 1))
    semantics = data.draw(st.sampled_from(["paper", "grouped"]))
    masked = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    query = torch.randn(2, length, kv_heads * group, 4, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, 2, length, kv_heads, 4, dtype=torch.float64, generator=generator)
    real = torch.rand(2, length, generator=generator) < 0.7 if masked else None
    described = DilatedSettings(tuple(lengths), tuple(rates), semantics)
    found = DilatedEngine(None, NO_RESOURCES).last_rows(
        described, query[:, -new:], key, value, real, scale=0.3, dropout_p=0.0
    )
    expected = dilated_attention(
        query,
        key,
        value,
        lengths,
        rates,
        is_causal=True,
        scale=0.3,
        key_padding_mask=real,
        enable_gqa=True,
        semantics=semantics,
    )
    torch.testing.assert_close(found, expected[:, -new:], rtol=0, atol=1e-12)


def test_blocks_that_depend_on_the_length_are_refused_with_a_cache_and_taken_without() -> None:
    drawn = {"patterns": [{"name": "random", "sparsity_ratio": 0.5}], "block_size": 4}
    model = with_implementation(llama({"block_sparse": drawn}), "block_sparse")
    options = {"max_new_tokens": 8, "do_sample": False}
    assert model.generate(tokens(), use_cache=False, **options).shape == (2, LENGTH + 8)
    with pytest.raises(ValueError, match=r"expected blocks that do not depend on the length.*use_cache=False"):
        model.generate(tokens(), **options)


# ------------------------------------------------------------------------------------------------ training


def gradients(model: Any, mask: Tensor | None) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(tokens(), attention_mask=mask).logits
    cotangent = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(2))
    if mask is not None:
        cotangent = cotangent * mask[..., None]
    logits.backward(cotangent)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.usefixtures("_definition")
def test_gradients_are_those_of_the_definition() -> None:
    model = llama(SPARSE, dtype=torch.float64)
    found, expected = (gradients(with_implementation(model, name), None) for name in ("dilated", "definition"))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-11, msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("side", ["none", "left"])
def test_gradient_checkpointing_changes_no_gradient(side: str, name: str) -> None:
    model = with_implementation(llama(SPARSE), name).train()
    expected = gradients(model, padding(side))
    model.config.use_cache = False
    model.activation_checkpointing_enable()
    for parameter, gradient in gradients(model, padding(side)).items():
        assert torch.equal(gradient, expected[parameter]), parameter


@pytest.mark.parametrize("name", BOTH)
def test_gradients_of_plain_attention_with_padding_equal_those_of_sdpa(name: str) -> None:
    model = llama(dtype=torch.float64)
    found, expected = (gradients(with_implementation(model, each), padding("left")) for each in (name, "sdpa"))
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", BOTH)
def test_attention_dropout_drops_while_training_alone(name: str) -> None:
    model = with_implementation(llama(SPARSE, attention_dropout=0.5), name)
    with torch.no_grad():
        still = model(tokens()).logits
        assert torch.equal(model(tokens()).logits, still)
        model.train()
        torch.manual_seed(3)
        first, second = model(tokens()).logits, model(tokens()).logits
        torch.manual_seed(3)
        assert torch.equal(model(tokens()).logits, first)
    assert (first - still).abs().max() > 1e-3
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("name", BOTH)
def test_bfloat16_is_near_float32(name: str) -> None:
    model = llama(SPARSE)
    expected = outputs(model, name, tokens(), padding("left"))
    found = outputs(model.bfloat16(), name, tokens(), padding("left"))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", BOTH)
def test_autocast_holds_in_steps_too(name: str) -> None:
    model = with_implementation(llama(SPARSE), name)
    options = {"attention_mask": padding("left"), "max_new_tokens": 3, "do_sample": False}
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(tokens(), **options).shape == (2, LENGTH + 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_a_model_compiles_to_one_graph(name: str) -> None:
    model = with_implementation(llama(SPARSE, num_hidden_layers=1), name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(tokens(), attention_mask=padding("left"), use_cache=False).logits
    expected = outputs(model, name, tokens(), padding("left"))
    torch.testing.assert_close(found[padding("left").bool()], expected, rtol=0, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_a_compiled_step_gives_the_row_of_the_whole_call(name: str) -> None:
    model = with_implementation(llama(SPARSE, num_hidden_layers=1), name)
    try:
        with torch.no_grad():
            before = model(tokens()[:, :-1], use_cache=True)
            options = {"past_key_values": before.past_key_values, "position_ids": torch.tensor([[LENGTH - 1]])}
            step = torch.compile(model, backend="aot_eager")(tokens()[:, -1:], **options)
            expected = model(tokens()).logits[:, -1:]
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(step.logits, expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ settings


def test_a_config_keeps_its_settings_on_disk(tmp_path: Path) -> None:
    model = llama(SPARSE)
    model.save_pretrained(tmp_path)
    for name in BOTH:
        loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=name).eval()
        assert getattr(loaded.config, name) == SPARSE[name]
        assert torch.equal(outputs(loaded, name, tokens(), None), outputs(model, name, tokens(), None))


def test_defaults_serve_models_without_settings_and_a_config_wins() -> None:
    bare, own = llama({}), llama(SPARSE)
    expected = {name: outputs(own, name, tokens(), None) for name in BOTH}
    try:
        register_transformers(
            SPARSE["dilated"]["segment_lengths"],
            SPARSE["dilated"]["dilation_rates"],
            block_sparse=SPARSE["block_sparse"],
        )
        for name in BOTH:
            assert torch.equal(outputs(bare, name, tokens(), None), expected[name])
        register_transformers([512], [1], block_sparse=PLAIN["block_sparse"])
        for name in BOTH:
            assert torch.equal(outputs(own, name, tokens(), None), expected[name])
            assert not torch.equal(outputs(bare, name, tokens(), None), expected[name])
    finally:
        register_transformers()


@pytest.mark.parametrize("name", BOTH)
def test_a_model_without_settings_says_what_to_write(name: str) -> None:
    model = with_implementation(llama({}), name)
    with pytest.raises(ValueError, match=rf"config\.{name}: expected a dict, as .*register_transformers"):
        model(tokens())


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ([512], TypeError, r"config\.dilated: expected a dict, got \[512\]"),
        ({"segment_lengths": [512]}, ValueError, "expected the key 'dilation_rates'"),
        ({**PLAIN["dilated"], "lengths": 3}, ValueError, "expected the keys .* got 'lengths'"),
        ({"segment_lengths": [4, 8], "dilation_rates": [1]}, ValueError, "dilation_rates"),
        ({**PLAIN["dilated"], "semantics": "other"}, ValueError, "semantics: expected one of"),
        ({**PLAIN["dilated"], "kernel": "other"}, ValueError, "kernel: expected one of"),
    ],
)
def test_a_bad_entry_for_dilated_is_named(entry: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        with_implementation(llama({"dilated": entry}), "dilated")(tokens())


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ("local", TypeError, r"config\.block_sparse: expected a dict, got 'local'"),
        ({"patterns": "local"}, TypeError, r"patterns: expected a list of dicts, got 'local'"),
        ({"patterns": []}, ValueError, "expected at least one pattern"),
        ({"patterns": ["local"]}, TypeError, r"patterns\[0\]: expected a dict with a \"name\""),
        ({"patterns": [{"name": "other"}]}, ValueError, r"patterns\[0\]: name: expected one of"),
        ({"patterns": [{"name": "local", "width": 3}]}, TypeError, r"patterns\[0\]: width: .* no such option"),
        ({"patterns": [{"name": "full"}], "backend": "other"}, ValueError, r"backend: expected one of"),
    ],
)
def test_a_bad_entry_for_block_sparse_is_named(entry: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        with_implementation(llama({"block_sparse": entry}), "block_sparse")(tokens())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"segment_lengths": [512]}, ValueError, "dilation_rates: expected one entry a branch"),
        ({"segment_lengths": [1, 4], "dilation_rates": [64, 256]}, ValueError, "look swapped"),
        ({"semantics": "paper"}, ValueError, "semantics: expected None without segment_lengths"),
        ({"kernel": "math"}, ValueError, "kernel: expected None without segment_lengths"),
        ({"block_sparse": {"patterns": []}}, ValueError, "block_sparse.patterns: expected at least one pattern"),
        ({"allocator": 3}, TypeError, "allocator: expected an object with empty"),
    ],
)
def test_bad_defaults_are_refused_before_anything_is_registered(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = AttentionInterface()["dilated"]
    with pytest.raises(error, match=message):
        register_transformers(**arguments)
    assert AttentionInterface()["dilated"] is before


def test_settings_are_the_same_however_they_are_given() -> None:
    given = DilatedSettings.from_arguments([4, 8], [1, 2], None, None)
    assert given == DilatedSettings.from_config("here", {"segment_lengths": (4, 8), "dilation_rates": [1, 2]})
    pattern = BlockSparseSettings.from_config("here", SPARSE["block_sparse"])
    assert hash(pattern) == hash(BlockSparseSettings.from_config("here", SPARSE["block_sparse"]))
    assert DilatedPattern(given.segment_lengths, given.dilation_rates).branches == 2


def test_a_lent_allocator_and_store_are_used() -> None:
    class Lent:
        def __init__(self) -> None:
            self.asked, self.kept = 0, {}

        def empty(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
            self.asked += 1
            return torch.empty(size, dtype=dtype, device=device)

        def get_or_create(self, key: Any, create: Callable[[], Any]) -> Any:
            return self.kept.setdefault(key, None) or self.kept.update({key: create()}) or self.kept[key]

    model, lent = llama(SPARSE), Lent()
    expected = outputs(model, "dilated", tokens(), None)
    try:
        register_transformers(allocator=lent, patterns=lent)
        assert torch.equal(outputs(model, "dilated", tokens(), None), expected)
    finally:
        register_transformers()
    assert lent.asked
    assert lent.kept


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", BOTH)
def test_a_mask_of_pairs_is_refused(name: str) -> None:
    pairs = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"attention_mask: expected a padding mask .* four dimensions"):
        with_implementation(llama(), name)(tokens(), attention_mask=pairs)


@pytest.mark.parametrize("name", BOTH)
def test_a_sliding_window_is_refused(name: str) -> None:
    config = MistralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, sliding_window=4, **PLAIN)
    model = with_implementation(MistralForCausalLM(config), name)
    with pytest.raises(ValueError, match=r"config\.sliding_window = None"):
        model(tokens())


@pytest.mark.parametrize("name", BOTH)
def test_a_mask_of_more_tokens_than_there_are_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"attention_mask: expected .* = \(2, 21\), got \(2, 25\)"):
        with_implementation(llama(), name)(tokens(), attention_mask=padding("left", 2, LENGTH + 4), use_cache=False)


@pytest.mark.parametrize("name", BOTH)
def test_packed_sequences_are_refused(name: str) -> None:
    positions = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None].expand(2, -1)
    with pytest.raises(ValueError, match="packed sequences: pass them as rows of a batch"):
        with_implementation(llama(), name)(tokens(), position_ids=positions, use_cache=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # torch says so of itself
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BOTH)
def test_padding_is_refused_by_a_trace_that_would_keep_that_of_its_example(name: str, side: str) -> None:
    model = with_implementation(llama(use_cache=False), name).requires_grad_(False)
    for mask in (padding(side), torch.ones(2, LENGTH, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"attention_mask: expected None under torch\.jit\.trace"):
            torch.jit.trace(lambda ids, mask: model(ids, attention_mask=mask).logits, (tokens(), mask))


@pytest.mark.parametrize("name", BOTH)
def test_attention_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="output_attentions"):
        with_implementation(llama(), name)(tokens(), output_attentions=True)


@pytest.mark.parametrize("name", BOTH)
def test_cross_attention_is_refused_even_where_lengths_agree(name: str) -> None:
    small = {**SIZES, "intermediate_size": 48, "num_hidden_layers": 1}
    decoder = BertLMHeadModel(BertConfig(**small, is_decoder=True, add_cross_attention=True, **PLAIN))
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCABULARY}
    bart = BartModel(BartConfig(**sizes, **heads, max_position_embeddings=64, **PLAIN))
    for length in (LENGTH, 5):
        states = torch.randn(2, length, 32)
        with pytest.raises(ValueError, match="expected self-attention, got BertCrossAttention"):
            with_implementation(decoder, name)(tokens(), encoder_hidden_states=states)
        with pytest.raises(ValueError, match="expected self-attention, got BartAttention"):
            with_implementation(bart, name)(tokens(), decoder_input_ids=tokens(2, length))


class Attention(nn.Module):
    """What an attention function is given as module."""

    def __init__(self, is_causal: bool | None) -> None:
        super().__init__()
        self.config = LlamaConfig(**SIZES, **PLAIN)
        if is_causal is not None:
            self.is_causal = is_causal


def call(name: str, module: nn.Module, lengths: tuple[int, int], mask: Any = None, **options: Any) -> Tensor:
    query, key = (torch.randn(2, 4, length, 8) for length in lengths)
    out: Tensor = AttentionInterface()[name](module, query, key, key, mask, **options)[0]
    return out


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("is_causal", "lengths", "mask", "options", "error", "message"),
    [
        (None, (6, 6), None, {}, ValueError, "module: expected an attribute is_causal, Attention has none"),
        (False, (6, 9), None, {}, ValueError, "key: expected the tokens of query, 6, .* got 9"),
        (True, (9, 6), None, {}, ValueError, "key: expected the tokens of query, 9, .* got 6"),
        (False, (6, 6), torch.ones(2, 5, dtype=torch.bool), {}, ValueError, "key: expected the tokens of query"),
        (True, (6, 6), torch.ones(2, 7, dtype=torch.bool), {}, ValueError, "attention_mask: expected .* at most 6"),
        (True, (6, 6), torch.ones(3, 6, dtype=torch.bool), {}, ValueError, "attention_mask: expected"),
        (True, (6, 6), torch.ones(2, 6), {}, TypeError, "attention_mask: expected a bool tensor .* torch.float32"),
        (True, (6, 6), [True], {}, TypeError, "attention_mask: expected a bool tensor .* got list"),
        (True, (6, 6), None, {"softcap": 50.0}, ValueError, "softcap: expected None.* got 50.0"),
        (True, (6, 6), None, {"sliding_window": 4}, ValueError, "sliding_window: expected None"),
        (True, (6, 6), None, {"s_aux": torch.ones(4)}, ValueError, r"s_aux: expected None.* got shape \(4,\)"),
        (True, (6, 6), None, {"cu_seq_lens_q": torch.ones(4)}, ValueError, "cu_seq_lens_q: expected None"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    name: str,
    is_causal: bool | None,
    lengths: tuple[int, int],
    mask: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        call(name, Attention(is_causal), lengths, mask, **options)


@pytest.mark.parametrize("name", BOTH)
def test_what_has_no_effect_is_taken(name: str) -> None:
    options = {"softcap": None, "output_attentions": False, "position_ids": torch.arange(6), "use_cache": True}
    out = call(name, Attention(True), (6, 6), **options)
    assert out.shape == (2, 6, 4, 8)
    assert out.is_contiguous()


@pytest.mark.parametrize("name", BOTH)
def test_the_callers_word_on_causality_wins(name: str) -> None:
    def of(module: nn.Module, **options: Any) -> Tensor:
        torch.manual_seed(5)
        return call(name, module, (6, 6), **options)

    assert torch.equal(of(Attention(True), is_causal=False), of(Attention(False)))
    assert not torch.equal(of(Attention(True)), of(Attention(False)))


def shards(semantics: str, rates: list[int]) -> tuple[Tensor, Tensor]:
    """The last two of four heads: by themselves, as tensor parallelism has them, and among all."""
    module = Attention(True)
    module.config.dilated = {"segment_lengths": [6, 12], "dilation_rates": rates, "semantics": semantics}
    query, key = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8)
    attend = AttentionInterface()["dilated"]
    whole = attend(module, query, key, key, None)[0][:, :, 2:]
    return attend(module, query[:, 2:], key[:, 1:], key[:, 1:], None)[0], whole


def test_a_shard_of_heads_gives_what_it_gives_among_all_heads_or_is_refused() -> None:
    torch.testing.assert_close(*shards("paper", [1, 2]), rtol=0, atol=1e-6)
    for semantics, rates in (("paper", [1, 3]), ("torchscale", [1, 2]), ("grouped", [1, 2])):
        with pytest.raises(ValueError, match="query: expected all 4 heads, got 2: a shard of tensor parallelism"):
            shards(semantics, rates)


def causal(*_: Any) -> bool:
    return True


def bidirectional(*_: Any) -> bool:
    return True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_offset": 3}, "past_key_values: expected a cache that keeps all tokens, got one that dropped 3"),
        ({"q_offset": 9}, "past_key_values: expected room for 15 tokens, got 10"),
        (
            {"attention_mask": torch.ones(2, 3)},
            r"attention_mask: expected \(batch, tokens so far\) = \(2, 6\), got \(2, 3\)",
        ),
        ({"attention_mask": torch.ones(2, 1, 6)}, r"attention_mask: expected .* got \(2, 1, 6\)"),
        ({"attention_mask": torch.ones(2, 10)}, r"attention_mask: expected .* got \(2, 10\)"),
    ],
)
def test_masks_that_say_something_else_are_refused(options: dict[str, Any], message: str) -> None:
    mask_function = make_mask_function(causal, bidirectional)
    with pytest.raises(ValueError, match=message):
        mask_function(batch_size=2, q_length=6, kv_length=10, **{"mask_function": causal, **options})


def test_another_mask_function_gives_a_mask_that_every_layer_refuses() -> None:
    mask_function = make_mask_function(causal, bidirectional)
    sizes = {"batch_size": 2, "q_length": 6, "kv_length": 6}
    made = mask_function(**sizes, mask_function=lambda *_: True)
    for mask in (made, mask_function(**sizes, mask_function=causal, attention_mask=made)):
        for name in BOTH:
            with pytest.raises(ValueError, match="attention_mask: expected causal or bidirectional attention"):
                call(name, Attention(True), (6, 6), mask)


def test_a_mask_of_its_own_making_stays_as_it_is() -> None:
    mask_function = make_mask_function(causal, bidirectional)
    sizes = {"batch_size": 2, "q_length": 3, "kv_length": 40, "q_offset": torch.tensor(4), "mask_function": causal}
    first = mask_function(**sizes)
    assert first.tolist() == [[True] * 7] * 2
    assert torch.equal(mask_function(**sizes, attention_mask=first), first)
    assert torch.equal(mask_function(**sizes, attention_mask=torch.ones(2, 40)), first)


def test_no_padding_means_no_mask_but_where_one_is_asked_for() -> None:
    mask_function = make_mask_function(causal, bidirectional)
    sizes = {"batch_size": 2, "q_length": 6, "kv_length": 6}
    assert mask_function(**sizes, mask_function=causal) is None
    assert mask_function(**sizes, mask_function=causal, attention_mask=torch.ones(2, 6)) is None
    assert mask_function(**sizes, mask_function=bidirectional, allow_is_bidirectional_skip=True) is None
    asked = mask_function(**sizes, mask_function=causal, allow_is_causal_skip=False)
    assert asked.tolist() == [[True] * 6] * 2


# ------------------------------------------------------------------------------------------------ what is installed


def test_block_sparse_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_implementation(
        llama({"block_sparse": {"patterns": [{"name": "full"}], "block_size": 16}}), "block_sparse"
    )
    for module in ("dilated_block_sparse", "dilated_block_sparse.pattern"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NotInstalledError, match=r'pip install "dilated-factory\[block-sparse\]"'):
        model(tokens())


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "dilated-factory\[transformers\]"'):
        register_transformers()


def test_importing_the_adapter_imports_neither_transformers_nor_block_sparse() -> None:
    script = (
        "import sys, dilated_factory.interop.transformers\n"
        "print(sorted({'transformers', 'dilated_block_sparse'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ran.stdout.strip() == "[]", ran.stderr
