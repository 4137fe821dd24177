"""Generation: that a token comes from the whole text before it, by the rule asked for, and that rows do not meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dilated_factory.models import LongNetLM
from dilated_factory.models.sampling import Sampling

VOCAB, EMBED, HEADS, LAYERS = 17, 16, 2, 2
SEGMENTS, RATES = (8, 32), (1, 2)
LENGTHS = (21, 7, 30, 7, 1)
WHOLE = 10**6  # a window that never is full: no cache


def language_model(**options: object) -> LongNetLM:
    torch.manual_seed(1)
    return LongNetLM(VOCAB, EMBED, HEADS, LAYERS, SEGMENTS, RATES, **options)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def padding(lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


@contextmanager
def logits_of(model: LongNetLM) -> Iterator[list[Tensor]]:
    """The logits (batch, vocab) of each step."""
    found: list[Tensor] = []
    handle = model.output_projection.register_forward_hook(lambda _, inputs, logits: found.append(logits))
    yield found
    handle.remove()


@contextmanager
def lengths_of(model: LongNetLM) -> Iterator[list[int]]:
    """How many tokens a row each pass through the model sees."""
    found: list[int] = []
    handle = model.embed_tokens.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].shape[1]))
    yield found
    handle.remove()


# ------------------------------------------------------------------------------------------- the whole text


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_heads": 1, "semantics": "grouped"}, {"positions": "none"}, {"positions": "rotary", "layer_norm": False}],
    ids=str,
)
def test_decoding_gives_the_logits_of_the_whole(options: dict[str, object]) -> None:
    """Across the ends of segments, and one row at a time."""
    model = language_model(dtype=torch.float64, **options).eval()
    with lengths_of(model) as seen, logits_of(model) as found:
        text = model.generate(tokens(2, 21), 40, temperature=0)
    assert seen == [21] + 39 * [1]
    expected = model(text[:, :-1])[:, 20:]
    assert torch.allclose(torch.stack(found, 1), expected, rtol=0, atol=1e-10)
    assert torch.equal(expected.argmax(-1), text[:, 21:])


SAMPLED = {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1}


def test_sampled_tokens_are_those_without_a_cache() -> None:
    model = language_model(dtype=torch.float64)
    cached, whole = (
        model.generate(tokens(3, 21), 20, generator=seeded(3), window=window, **SAMPLED) for window in (None, WHOLE)
    )
    assert torch.equal(cached, whole)


def test_a_prompt_of_one_token_decodes_too() -> None:
    model = language_model(dtype=torch.float64).eval()
    text = model.generate(tokens(2, 1), 20, temperature=0)
    assert torch.equal(model(text)[:, :-1].argmax(-1), text[:, 1:])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_keep_their_dtype(dtype: torch.dtype) -> None:
    text = language_model().generate(tokens(2, 4).to(dtype), 3)
    assert (text.dtype, text.shape) == (dtype, (2, 7))


@pytest.mark.parametrize("batch", [0, 2])
def test_no_new_tokens_is_the_prompt(batch: int) -> None:
    prompt = tokens(batch, 4)
    assert torch.equal(language_model().generate(prompt, 0), prompt)
    assert language_model().generate(prompt, 3).shape == (batch, 7)


def test_a_window_bounds_what_is_seen() -> None:
    model = language_model().eval()
    with lengths_of(model) as seen:
        model.generate(tokens(1, 3), 20, window=8)
    assert seen == [3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7, 8, 5, 6]


def test_only_the_last_row_of_a_prompt_is_projected() -> None:
    model = language_model()
    with logits_of(model) as found:
        model.generate(tokens(2, 30), 2)
    assert [tuple(logits.shape) for logits in found] == [(2, VOCAB)] * 2


# ------------------------------------------------------------------------------------------- unequal rows


def alone(model: LongNetLM, prompt: Tensor, lengths: tuple[int, ...], steps: int, **options: object) -> list[Tensor]:
    return [model.generate(prompt[row : row + 1, :n], steps, **options)[0] for row, n in enumerate(lengths)]


@pytest.mark.parametrize("window", [None, 12, WHOLE])
@pytest.mark.parametrize("positions", ["xpos", "rotary", "none"])
def test_rows_of_unequal_length_go_on_as_they_would_alone(positions: str, window: int | None) -> None:
    model = language_model(positions=positions, dtype=torch.float64).eval()
    prompt = tokens(len(LENGTHS), max(LENGTHS))
    with logits_of(model) as found:
        together = model.generate(
            prompt, 20, key_padding_mask=padding(LENGTHS), pad_token_id=3, temperature=0, window=window
        )
    assert together.shape == (len(LENGTHS), max(LENGTHS) + 20)
    for row, text in enumerate(alone(model, prompt, LENGTHS, 20, temperature=0, window=window)):
        assert torch.equal(together[row, : len(text)], text)
        assert bool((together[row, len(text) :] == 3).all())
    if window is None:
        for row, length in enumerate(LENGTHS):
            expected = model(together[row : row + 1, : length + 19])[0, length - 1 :]
            assert torch.allclose(torch.stack(found)[:, row], expected, rtol=0, atol=1e-10)


prompts = given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 3))


@settings(max_examples=6)
@prompts
def test_any_lengths_go_on_as_they_would_alone(lengths: list[int], more_padding: int) -> None:
    go_on(lengths, more_padding)


@pytest.mark.fuzz
@settings(settings.get_profile("fuzz"), max_examples=200)  # most of a second for each
@prompts
def test_many_lengths_go_on_as_they_would_alone(lengths: list[int], more_padding: int) -> None:
    go_on(lengths, more_padding)


def go_on(lengths: list[int], more_padding: int) -> None:
    model = language_model(dtype=torch.float64)
    prompt = tokens(len(lengths), max(lengths) + more_padding)
    mask = torch.arange(prompt.shape[1]) >= torch.tensor(lengths)[:, None]
    together = model.generate(prompt, 10, key_padding_mask=mask, pad_token_id=0, temperature=0)
    assert together.shape == (len(lengths), prompt.shape[1] + 10)
    for row, text in enumerate(alone(model, prompt, tuple(lengths), 10, temperature=0)):
        assert torch.equal(together[row, : len(text)], text)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    """Not even ids that there are none of, nor to the penalty on repetition."""
    model = language_model(dtype=torch.float64)
    prompt, mask = tokens(len(LENGTHS), max(LENGTHS)), padding(LENGTHS)
    options = {"key_padding_mask": mask, "pad_token_id": 0, "temperature": 0, "repetition_penalty": 1.5}
    text = model.generate(prompt, 12, **options)
    assert torch.equal(model.generate(prompt.masked_fill(mask, -100), 12, **options), text)
    for row, lone in enumerate(alone(model, prompt, LENGTHS, 12, temperature=0, repetition_penalty=1.5)):
        assert torch.equal(text[row, : len(lone)], lone)


def test_sampled_rows_of_unequal_length_are_those_without_a_cache() -> None:
    model = language_model(dtype=torch.float64)
    options = {"key_padding_mask": padding(LENGTHS), "eos_token_id": (2, 5), **SAMPLED}
    prompt = tokens(len(LENGTHS), max(LENGTHS))
    cached, whole = (
        model.generate(prompt, 20, generator=seeded(8), window=window, **options) for window in (None, WHOLE)
    )
    assert torch.equal(cached, whole)


def test_a_mask_without_padding_changes_nothing() -> None:
    model = language_model()
    prompt = tokens(2, 9)
    masked = model.generate(prompt, 5, key_padding_mask=torch.zeros(2, 9, dtype=torch.bool), temperature=0)
    assert torch.equal(masked, model.generate(prompt, 5, temperature=0))


# ------------------------------------------------------------------------------------------- ends


def first_end(text: Tensor, seq: int, ends: tuple[int, ...]) -> int:
    """How many new tokens a row has, up to and with the first end."""
    new = text[seq:].tolist()
    return next((step + 1 for step, one in enumerate(new) if one in ends), len(new))


@pytest.mark.parametrize("ends", [(4,), (4, 9, 11)], ids=str)
@pytest.mark.parametrize("window", [None, WHOLE], ids=["cached", "whole"])
def test_a_row_ends_with_its_first_end_and_is_filled(ends: tuple[int, ...], window: int | None) -> None:
    model = language_model(dtype=torch.float64)
    prompt = tokens(4, 9)
    prompt[:, 3] = ends[0]  # in a prompt it ends nothing

    def varied(seen: Tensor, logits: Tensor) -> Tensor:  # greedy, yet not the same token again and again
        return logits + 8 * torch.sin(seen.sum(1, keepdim=True) * torch.arange(1.0, VOCAB + 1)).to(logits.dtype)

    options = {"temperature": 0, "logits_processor": varied, "window": window}
    free = model.generate(prompt, 30, **options)
    steps = [first_end(text, 9, ends) for text in free]
    assert len(set(steps)) > 1
    assert min(steps) < 30
    text = model.generate(prompt, 30, eos_token_id=ends if len(ends) > 1 else ends[0], pad_token_id=1, **options)
    assert text.shape[1] == 9 + max(steps), "stops with the last row"
    for row, count in enumerate(steps):
        assert torch.equal(text[row, : 9 + count], free[row, : 9 + count])
        assert bool((text[row, 9 + count :] == 1).all())


def always(token: int) -> Callable[[Tensor, Tensor], Tensor]:
    def processor(seen: Tensor, logits: Tensor) -> Tensor:
        return torch.full_like(logits, -math.inf).index_fill(1, torch.tensor([token]), 0.0)

    return processor


def test_the_fill_is_the_first_end_where_none_is_named() -> None:
    def end_of_the_first_row_only(seen: Tensor, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[:, [7, 5]] = -math.inf
        logits[0, 7] = 0.0
        logits[0, :7] = -math.inf
        logits[0, 8:] = -math.inf
        return logits

    text = language_model().generate(
        tokens(2, 3), 4, eos_token_id=[5, 7], logits_processor=end_of_the_first_row_only, temperature=0
    )
    assert text[0, 3:].tolist() == [7, 5, 5, 5]


def test_generation_stops_where_all_rows_have_ended() -> None:
    model = language_model()
    with lengths_of(model) as seen:
        text = model.generate(tokens(3, 5), 10**9, eos_token_id=6, logits_processor=always(6))
    assert seen == [5]
    assert text[:, 5:].tolist() == [[6]] * 3


def test_rows_of_a_length_that_have_all_ended_are_attended_no_more() -> None:
    def end_of_row_1(seen: Tensor, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[:, 6] = -math.inf
        logits[1] = -math.inf
        logits[1, 6] = 0.0
        return logits

    model = language_model()
    called: list[tuple[int, int]] = []
    model.layers[0].self_attn.register_forward_pre_hook(lambda _, args: called.append(tuple(args[0].shape[:2])))
    mask = padding((5, 3, 5))
    model.generate(tokens(3, 5), 3, key_padding_mask=mask, eos_token_id=6, logits_processor=end_of_row_1)
    assert called == [(2, 5), (1, 3), (2, 1), (2, 1)]


# ------------------------------------------------------------------------------------------- distributions


def by_definition(logits: list[float], rule: Sampling) -> list[float]:
    """Probabilities, one token after the other, in the order the rules are documented."""
    weights = {
        token: math.exp(one / rule.temperature - max(logits) / rule.temperature) for token, one in enumerate(logits)
    }
    ranked = sorted(weights, key=lambda token: (-logits[token], token))
    if rule.top_k is not None:
        ranked = ranked[: rule.top_k]
    if rule.top_p is not None:
        mass, nucleus = sum(weights[token] for token in ranked), []
        while not nucleus or sum(weights[token] for token in nucleus) < rule.top_p * mass:
            nucleus.append(ranked[len(nucleus)])
            # Where a sum is the threshold itself, rounding decides.
            assume(rule.top_p == 1.0 or abs(sum(weights[token] for token in nucleus) / mass - rule.top_p) > 1e-9)
        ranked = ranked if rule.top_p == 1.0 else nucleus
    if rule.min_p is not None:
        assume(all(abs(weights[token] - rule.min_p) > 1e-9 for token in ranked if weights[token] < 1.0))
        ranked = [token for token in ranked if weights[token] >= rule.min_p]
    total = sum(weights[token] for token in ranked)
    return [weights[token] / total if token in ranked else 0.0 for token in range(len(logits))]


shares = st.floats(0.01, 1.0)
# On a grid, so that logits that differ still do after the largest is subtracted.
finely = st.floats(-6, 6).map(lambda logit: round(logit, 6))


truncations = given(
    logits=st.lists(st.one_of(st.integers(-3, 3).map(float), finely), min_size=1, max_size=9),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.none() | st.integers(1, 9),
    top_p=st.none() | shares,
    min_p=st.none() | st.just(0.0) | shares,
)


@settings(max_examples=150)
@truncations
def test_truncations_are_their_definitions(logits: list[float], **options: Any) -> None:
    truncate(logits, **options)


@pytest.mark.fuzz
@settings(settings.get_profile("fuzz"))
@truncations
def test_many_truncations_are_their_definitions(logits: list[float], **options: Any) -> None:
    truncate(logits, **options)


def truncate(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    """Ties among them: of equals the first."""
    rule = Sampling(temperature, None if top_k is None else min(top_k, len(logits)), top_p, min_p)
    expected = torch.tensor([by_definition(logits, rule)], dtype=torch.float64)
    found = rule.probabilities(torch.tensor([logits], dtype=torch.float64))
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found, expected, rtol=1e-9, atol=0)


def test_rows_are_truncated_apart() -> None:
    logits = torch.randn(5, 40, dtype=torch.float64, generator=seeded(0))
    rule = Sampling(0.8, 11, 0.7, 0.05)
    alone = torch.cat([rule.probabilities(row) for row in logits.split(1)])
    assert torch.allclose(rule.probabilities(logits), alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", [Sampling(), Sampling(0.5), Sampling(1.5, top_k=4), Sampling(top_p=0.8)], ids=str)
def test_draws_have_these_probabilities(rule: Sampling) -> None:
    logits = torch.randn(1, 8, generator=seeded(2))
    draws = 40_000
    counts = rule.choose(logits.expand(draws, -1), seeded(3)).flatten().bincount(minlength=8)
    expected = rule.probabilities(logits)[0].double()
    spread = (expected * (1 - expected) * draws).sqrt()
    # 5 standard deviations: once in a million where the probabilities are right.
    assert bool(((counts - expected * draws).abs() <= 5 * spread).all())


@pytest.mark.parametrize("rule", [Sampling(0.0), Sampling(top_k=1), Sampling(min_p=1.0, top_k=1), Sampling(top_p=1e-9)])
def test_the_strictest_rules_are_greedy_also_among_equals(rule: Sampling) -> None:
    """As logits of bfloat16 often are."""
    logits = torch.randn(50, 300, generator=seeded(4)).bfloat16().float()
    assert int((logits == logits.amax(1, keepdim=True)).sum(1).max()) > 1
    assert torch.equal(rule.choose(logits), logits.argmax(1, keepdim=True))


def test_a_nucleus_of_all_the_mass_keeps_the_least_likely_too() -> None:
    """Though its probability is lost in the sum of the others."""
    logits = torch.tensor([[0.0, -1.0, -60.0]])
    assert bool((Sampling(top_p=1.0).probabilities(logits) > 0).all())


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_no_temperature_is_too_low(temperature: float) -> None:
    logits = torch.tensor([[3.0, 1e4, -1e4]])
    assert Sampling(temperature).probabilities(logits).tolist() == [[0.0, 1.0, 0.0]]


def test_a_penalty_makes_what_was_said_less_likely() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0, 0.0]])
    seen = torch.tensor([[True, True, False, False, True]])
    assert Sampling(repetition_penalty=2.0).penalised(logits, seen).tolist() == [[1.0, -4.0, 1.0, -1.0, 0.0]]


def test_the_penalty_is_on_all_that_a_row_holds() -> None:
    model = language_model(dtype=torch.float64).eval()
    prompt, penalty = tokens(2, 5), 1.7
    text = prompt
    for _ in range(12):
        logits = model(text)[:, -1]
        for row in range(2):
            for token in set(text[row].tolist()):
                logits[row, token] *= penalty if logits[row, token] <= 0 else 1 / penalty
        text = torch.cat((text, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(prompt, 12, temperature=0, repetition_penalty=penalty), text)


# ------------------------------------------------------------------------------------------- a processor


def test_a_processor_sees_the_text_so_far_and_its_logits_count() -> None:
    model = language_model(dtype=torch.float64)
    seen: list[Tensor] = []

    def odd_only(text: Tensor, logits: Tensor) -> Tensor:
        seen.append(text.clone())
        assert logits.shape == (2, VOCAB)
        assert logits.dtype == torch.float64
        return logits.masked_fill(torch.arange(VOCAB) % 2 == 0, -math.inf)

    options = {"key_padding_mask": padding((5, 3)), "pad_token_id": 0}
    text = model.generate(tokens(2, 5), 6, logits_processor=odd_only, **options)
    assert bool((text[0, 5:] % 2 == 1).all())
    assert bool((text[1, 3:9] % 2 == 1).all())
    assert [one.shape[1] for one in seen] == [5, 6, 7, 8, 9, 10]
    assert torch.equal(seen[4][1], torch.cat((text[1, :7], torch.zeros(2, dtype=torch.int64))))


@pytest.mark.parametrize(
    ("processor", "error", "message"),
    [
        (lambda text, logits: None, TypeError, "logits_processor: expected it to return a tensor, got NoneType"),
        (lambda text, logits: logits[:, :3], ValueError, r"logits_processor: .* logits \(1, 17\), got .* \(1, 3\)"),
        (lambda text, logits: logits.long(), ValueError, "logits_processor: .*floating-point logits.*torch.int64"),
        (lambda text, logits: logits - math.inf, ValueError, "logits_processor: expected a finite largest logit"),
        (lambda text, logits: logits * math.nan, ValueError, "logits_processor: expected a finite largest logit"),
        ("nucleus", TypeError, "logits_processor: expected a callable or None, got str"),
    ],
)
def test_a_processors_faults_are_named(processor: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        language_model().generate(tokens(1, 4), 1, logits_processor=processor)


# ------------------------------------------------------------------------------------------- a stream


def test_a_stream_yields_what_generate_returns() -> None:
    model = language_model()
    prompt, mask = tokens(2, 9), padding((9, 4))
    options = {"key_padding_mask": mask, "eos_token_id": 3, "pad_token_id": 0, **SAMPLED}
    text = model.generate(prompt, 20, generator=seeded(5), **options)
    new = list(model.stream(prompt, 20, generator=seeded(5), **options))
    assert {tuple(ids.shape) for ids in new} == {(2, 1)}
    joined = torch.cat(new, 1)
    assert torch.equal(text[0, 9:], joined[0])
    assert torch.equal(text[1, 4 : 4 + len(new)], joined[1])


def test_a_stream_computes_a_token_when_it_is_asked_for() -> None:
    model = language_model()
    with lengths_of(model) as seen:
        stream = model.stream(tokens(1, 6), 10**9)
        assert seen == []
        next(stream)
        next(stream)
        assert seen == [6, 1]
        del stream
    assert model.training


def test_between_tokens_the_model_is_as_it_was() -> None:
    """Its layers' own modes, and the caller's gradients; the prompt may even change."""
    model = language_model(dropout=0.5)
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    prompt = tokens(1, 6)
    expected = model.generate(prompt, 4, temperature=0)
    prompt_of_a_stream = prompt.clone()
    for step, ids in enumerate(model.stream(prompt_of_a_stream, 4, temperature=0)):
        assert torch.is_grad_enabled()
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(ids, expected[:, 6 + step : 7 + step])
        prompt_of_a_stream.zero_()
        ids.zero_()
    assert [module.training for module in model.modules()] == modes


def test_a_failed_generation_restores_the_modes() -> None:
    class Broken(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model = language_model()
    model.output_projection = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        model.generate(tokens(1, 4), 1)
    assert all(module.training for module in model.modules())


def test_generation_repeats_under_a_generator() -> None:
    model = language_model()
    first, second, other = (
        model.generate(tokens(2, 5), 20, temperature=1.3, top_k=9, generator=seeded(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_generates_in_inference_mode() -> None:
    model = language_model()
    expected = model.generate(tokens(2, 5), 6, temperature=0)
    with torch.inference_mode():
        assert torch.equal(model.generate(tokens(2, 5), 6, temperature=0), expected)


# ------------------------------------------------------------------------------------------- autocast, compile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decoding_under_autocast_gives_its_logits(dtype: torch.dtype) -> None:
    """To the rounding of that dtype, with a cache, rows of unequal length too."""
    model = language_model()
    prompt = tokens(3, 21)
    for options in ({}, {"key_padding_mask": padding((21, 4, 21)), "pad_token_id": 0}):
        with torch.autocast("cpu", dtype=dtype), lengths_of(model) as seen, logits_of(model) as found:
            model.generate(prompt, 12, temperature=0, logits_processor=always(2), **options)
        assert seen == [21] + 11 * [1]
        with logits_of(model) as exact:
            model.generate(prompt, 12, temperature=0, logits_processor=always(2), window=WHOLE, **options)
        if options:  # without a cache, rows of one length at a time
            continue
        for one, other in zip(found, exact, strict=True):
            assert one.dtype == dtype
            assert (one.float() - other).abs().max() < 0.1 * other.abs().max()


def test_autocast_leaves_a_float64_model_alone() -> None:
    model = language_model(dtype=torch.float64)
    expected = model.generate(tokens(2, 9), 6, temperature=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.generate(tokens(2, 9), 6, temperature=0), expected)


def test_a_stream_keeps_the_autocast_it_began_in() -> None:
    model = language_model()
    outside = list(model.stream(tokens(1, 9), 5, temperature=0))
    stream = model.stream(tokens(1, 9), 5, temperature=0)
    with torch.autocast("cpu", dtype=torch.bfloat16), logits_of(model) as found:
        assert torch.equal(torch.cat(list(stream)), torch.cat(outside))
        stream = model.stream(tokens(1, 9), 5, temperature=0)
    assert {logits.dtype for logits in found} == {torch.float32}
    with logits_of(model) as found:
        assert len(list(stream)) == 5
    assert {logits.dtype for logits in found} == {torch.bfloat16}


@pytest.mark.parametrize("part", ["model", "layers"])
def test_a_compiled_model_generates_without_compiling_a_step(part: str) -> None:
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    model = language_model(dtype=torch.float64)
    prompt = tokens(2, 9)
    expected = [model.generate(prompt, 12, temperature=0, window=window) for window in (None, 8)]
    for module in [model] if part == "model" else model.layers:
        module.compile(backend=backend, fullgraph=True)
    for window, text in zip((None, 8), expected, strict=True):
        assert torch.equal(model.generate(prompt, 12, temperature=0, window=window), text)
    assert graphs == 0
    with torch.no_grad():
        model(prompt)
    assert graphs > 0, "a call of the model is compiled still"


# ------------------------------------------------------------------------------------------- refusals

IDS = torch.zeros(2, 4, dtype=torch.int64)
SOME = torch.tensor([[False, False, False, True], [False, False, True, True]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": [1, 2]}, TypeError, "prompt: expected int64 or int32 token ids, got list"),
        ({"prompt": IDS.float()}, TypeError, "prompt: expected int64 or int32 token ids, got torch.float32"),
        ({"prompt": IDS[0]}, ValueError, r"prompt: expected \(batch, seq\), got \(4,\)"),
        ({"prompt": IDS[:, :0]}, ValueError, "prompt: expected at least one token a row, got none"),
        ({"prompt": IDS + VOCAB}, ValueError, r"prompt: expected ids in \[0, 17\), got \[17, 17\]"),
        ({"prompt": IDS - 1}, ValueError, r"prompt: expected ids in \[0, 17\), got \[-1, -1\]"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: expected 0 or more, got -1"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens: expected an int, got 2.0 of type float"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens: expected an int, got True of type bool"),
        ({"window": 1}, ValueError, "window: expected at least 2 tokens, got 1"),
        ({"window": 8.0}, TypeError, "window: expected an int, got 8.0 of type float"),
        ({"temperature": -1}, ValueError, "temperature: expected a finite number >= 0, got -1"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a finite number >= 0, got nan"),
        ({"temperature": math.inf}, ValueError, "temperature: expected a finite number >= 0, got inf"),
        ({"temperature": None}, TypeError, "temperature: expected a number, got None of type NoneType"),
        ({"top_k": 0}, ValueError, "top_k: expected at least 1, got 0"),
        ({"top_k": 18}, ValueError, "top_k: expected 1 to vocab_size=17, got 18"),
        ({"top_k": 2.0}, TypeError, "top_k: expected an int or None, got 2.0"),
        ({"top_p": 0.0}, ValueError, r"top_p: expected a share of the mass in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, ValueError, r"top_p: expected a share of the mass in \(0, 1\], got 1.1"),
        ({"top_p": "0.9"}, TypeError, "top_p: expected a number, got '0.9' of type str"),
        ({"min_p": -0.1}, ValueError, r"min_p: expected a share of the likeliest in \[0, 1\], got -0.1"),
        ({"min_p": math.nan}, ValueError, r"min_p: expected a share of the likeliest in \[0, 1\], got nan"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty: expected a finite number > 0, got 0.0"),
        ({"repetition_penalty": True}, TypeError, "repetition_penalty: expected a number, got True of type bool"),
        ({"eos_token_id": 17}, ValueError, r"eos_token_id: expected an id in \[0, 17\), got 17"),
        ({"eos_token_id": [3, -1]}, ValueError, r"eos_token_id: expected an id in \[0, 17\), got -1"),
        ({"eos_token_id": []}, ValueError, "eos_token_id: expected an id, several or None, got an empty sequence"),
        ({"eos_token_id": "7"}, TypeError, "eos_token_id: expected a token id, an int, got '7' of type str"),
        ({"eos_token_id": [2.0]}, TypeError, "eos_token_id: expected a token id, an int, got 2.0 of type float"),
        ({"pad_token_id": 17}, ValueError, r"pad_token_id: expected an id in \[0, 17\), got 17"),
        ({"pad_token_id": [1]}, TypeError, r"pad_token_id: expected a token id, an int, got \[1\] of type list"),
        ({"generator": 3}, TypeError, "generator: expected a torch.Generator or None, got int"),
        ({"key_padding_mask": SOME.int()}, TypeError, "key_padding_mask: expected a bool tensor, got torch.int32"),
        ({"key_padding_mask": [True]}, TypeError, "key_padding_mask: expected a bool tensor, got list"),
        ({"key_padding_mask": SOME[:, 1:]}, ValueError, r"key_padding_mask: expected \(batch, seq\) = \(2, 4\)"),
        ({"key_padding_mask": SOME.flip(1)}, ValueError, "key_padding_mask: .* on the right only, .* in row 0"),
        ({"key_padding_mask": SOME | True}, ValueError, "key_padding_mask: expected at least one token.* in row 0"),
        ({"key_padding_mask": SOME}, ValueError, "pad_token_id: expected an id, to fill shorter rows"),
    ],
)
def test_refusals_name_the_argument_at_the_call(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    model = language_model()
    given = {"prompt": IDS, "max_new_tokens": 1, **arguments}
    with pytest.raises(error, match=message):
        model.generate(**given)
    with pytest.raises(error, match=message):
        model.stream(**given)
