"""LongNet and LongNetLM: what may depend on what, how they start, that they learn, compile, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.export import Dim
from torch.nn import functional

from dilated_core.measure import peak_memory
from dilated_factory.models import (
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
    FeedForward,
    LongNet,
    LongNetLM,
    XPOSPositions,
)

VOCAB, EMBED, HEADS, LAYERS = 17, 16, 2, 2
SEGMENTS, RATES = (8, 32), (1, 2)


def language_model(num_layers: int = LAYERS, **options: object) -> LongNetLM:
    torch.manual_seed(1)
    return LongNetLM(VOCAB, EMBED, HEADS, num_layers, SEGMENTS, RATES, **options)


def encoder(**options: object) -> LongNet:
    torch.manual_seed(1)
    return LongNet(EMBED, HEADS, LAYERS, SEGMENTS, RATES, **options)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))


# ------------------------------------------------------------------------------------------- dependence


@pytest.mark.parametrize("positions", ["xpos", "rotary", "none"])
def test_a_changed_token_never_changes_earlier_logits(positions: str) -> None:
    model = language_model(positions=positions, dtype=torch.float64)
    before = tokens(1, 61)
    logits = model(before)
    for changed in (0, 7, 8, 31, 32, 60):
        after = before.clone()
        after[0, changed] = (after[0, changed] + 1) % VOCAB
        difference = (model(after) - logits).abs().amax(-1)[0]
        assert torch.equal(difference[:changed], torch.zeros(changed, dtype=torch.float64))
        assert difference[changed] > 1e-6


def test_the_encoder_looks_both_ways() -> None:
    model = encoder(dtype=torch.float64)
    embeddings = torch.randn(1, 61, EMBED, dtype=torch.float64)
    changed = embeddings.clone()
    changed[0, 30] += torch.randn(EMBED, dtype=torch.float64)  # a constant would be normalised away
    difference = (model(changed) - model(embeddings)).abs().amax(-1)[0]
    assert difference[24:32].min() > 1e-9, "the segment of 8 around the change"
    assert torch.equal(difference[32:], torch.zeros(29, dtype=torch.float64)), "no branch crosses 32"


def test_batch_rows_do_not_meet() -> None:
    model = language_model(dtype=torch.float64)
    pair = tokens(2, 40)
    alone = torch.cat([model(pair[:1]), model(pair[1:])])
    assert torch.allclose(model(pair), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 31, 64])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_shapes(batch: int, length: int) -> None:
    assert language_model()(tokens(batch, length)).shape == (batch, length, VOCAB)
    assert encoder()(torch.zeros(batch, length, EMBED)).shape == (batch, length, EMBED)


# ------------------------------------------------------------------------------------------- padding

REAL = (61, 40, 7, 1)  # tokens of each sequence in a batch of 61


def padding(lengths: tuple[int, ...]) -> Tensor:
    """(batch, seq), True where a position is padding."""
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("semantics", ["paper", "grouped"])
def test_an_encoders_real_rows_do_not_know_of_the_padding(semantics: str, positions: str) -> None:
    """Whatever the padding holds."""
    model = encoder(semantics=semantics, positions=positions, dtype=torch.float64)
    embeddings = torch.randn(len(REAL), max(REAL), EMBED, dtype=torch.float64)
    together = model(embeddings, padding(REAL))
    other = model(embeddings.masked_fill(padding(REAL).unsqueeze(-1), 1e3), padding(REAL))
    for row, length in enumerate(REAL):
        alone = model(embeddings[row : row + 1, :length])[0]
        for hidden in (together, other):
            assert torch.allclose(hidden[row, :length], alone, rtol=0, atol=1e-10)
    assert together.isfinite().all()


def test_gradients_do_not_know_of_the_padding() -> None:
    model = encoder(dtype=torch.float64)
    embeddings, cotangent = torch.randn(2, len(REAL), max(REAL), EMBED, dtype=torch.float64).unbind()
    cotangent.masked_fill_(padding(REAL).unsqueeze(-1), 0.0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    together = torch.autograd.grad(model(embeddings, padding(REAL)), parameters, cotangent)
    alone = [torch.zeros_like(parameter) for parameter in parameters]
    for row, length in enumerate(REAL):
        single = (slice(row, row + 1), slice(length))
        for total, grad in zip(
            alone, torch.autograd.grad(model(embeddings[single]), parameters, cotangent[single]), strict=True
        ):
            total += grad
    for name, found, expected in zip(names, together, alone, strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-10), name


@pytest.mark.parametrize("positions", ["xpos", "rotary", "none"])
def test_a_language_model_takes_padding_on_the_right(positions: str) -> None:
    model = language_model(positions=positions, dtype=torch.float64)
    ids = tokens(len(REAL), max(REAL))
    together = model(ids, padding(REAL))
    for row, length in enumerate(REAL):
        assert torch.allclose(together[row, :length], model(ids[row : row + 1, :length])[0], rtol=0, atol=1e-10)


def test_no_tokens_no_logits() -> None:
    assert language_model()(torch.zeros(1, 0, dtype=torch.int64)).shape == (1, 0, VOCAB)


# ------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_every_parameter_has_a_gradient(tie: bool) -> None:
    model = language_model(tie_embeddings=tie)
    logits = model(tokens(1, 64))
    logits.backward(torch.randn_like(logits))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("attention_type", ["standard", "improved"])
def test_checkpointing_changes_no_gradient(attention_type: str) -> None:
    """Dropout of every kind draws the same again; so do hooks that users put on, and the factory's own."""
    options = {"dropout": 0.1, "attention_dropout": 0.2, "activation_dropout": 0.1, "drop_path": 0.3}
    options |= {"attention_type": attention_type, "dtype": torch.float64}
    gradients, calls = [], []
    for recomputed in (False, True):
        model = language_model(checkpoint_activations=recomputed, **options)
        calls.append([])
        for layer in model.layers:
            layer.self_attn.register_forward_pre_hook(lambda _, args, calls=calls[-1]: calls.append(args[0].shape))
        torch.manual_seed(5)
        logits = model(tokens(2, 40), padding((40, 33)))
        logits.backward(torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6)))
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-12, atol=1e-14), name
    assert [len(shapes) for shapes in calls] == [LAYERS, 2 * LAYERS]


def test_checkpointing_is_for_training_only() -> None:
    model = language_model(checkpoint_activations=True).eval()
    called: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda *_: called.append(1))
    logits = model(tokens(1, 20))
    logits.backward(torch.randn_like(logits))
    assert called == [1]


def test_checkpointing_saves_memory() -> None:
    def peak(checkpointed: bool) -> int:
        torch.manual_seed(0)
        model = LongNet(32, 2, 6, SEGMENTS, RATES, checkpoint_activations=checkpointed)
        embeddings = torch.randn(1, 512, 32)

        def step() -> None:
            states = model(embeddings)
            states.backward(torch.ones_like(states))

        step()  # what is made once, and the gradients, are there
        return peak_memory(step)

    kept, recomputed = peak(False), peak(True)
    # Of 6 layers, the inputs of all and the activations of one: more than 3 times less.
    assert recomputed < 0.4 * kept, (kept, recomputed)


DROPPING = {"dropout": 0.1, "attention_dropout": 0.2, "checkpoint_activations": True}


# Inductor has a C++ compiler make every kernel, seconds each: of one layer, and of what its losses need alone.
BARE = {"num_layers": 1, "positions": "none", "layer_norm": False, "bias": False, "activation": "relu"}


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "options"), [("aot_eager", {}), ("inductor", BARE)], ids=["aot_eager", "inductor"])
def test_training_with_a_compiled_loss_is_training(backend: str, options: dict[str, object]) -> None:
    """Two steps, the forward pass and the loss in one graph: the losses of eager steps."""
    losses: dict[bool, list[float]] = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        model = language_model(**DROPPING, **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

        def loss_of(text: Tensor, model: LongNetLM = model) -> Tensor:
            return functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

        call = torch.compile(loss_of, fullgraph=True, backend=backend) if compiled else loss_of
        torch.manual_seed(5)
        losses[compiled] = []
        # torch's own generator in inductor's kernels too, so that both drop the same.
        with torch._inductor.config.patch(fallback_random=True):
            for _ in range(2):
                loss = call(tokens(2, 40))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[compiled].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


@pytest.fixture
def _a_group_of_one() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_a_group_of_one")
def test_sharded_layers_have_the_same_gradients() -> None:
    """FSDP2, a unit a layer, as it is applied to such models; with a mask, and layers computed again in backward."""
    gradients = []
    for sharded in (False, True):
        model = language_model(checkpoint_activations=True, dtype=torch.float64)
        if sharded:
            for module in (*model.layers, model):
                fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        logits = model(tokens(2, 40), padding((40, 33)))
        logits.backward(torch.ones_like(logits) / 7)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[1].items():
        assert torch.allclose(gradient.full_tensor(), gradients[0][name], rtol=1e-12, atol=1e-14), name


def test_a_compiled_loss_is_one_graph() -> None:
    torch._dynamo.reset()
    model = language_model(**DROPPING)
    explained = torch._dynamo.explain(lambda text: functional.cross_entropy(model(text).flatten(0, 1), text.flatten()))
    found = explained(tokens(2, 40))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.slow
def test_a_compiled_model_serves_every_length_without_compiling_again() -> None:
    """Forward and backward, fullgraph; outputs and gradients of the model as it is."""
    graphs = 0
    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    model = LongNetLM(VOCAB, EMBED, HEADS, 1, SEGMENTS, RATES, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counted)
    parameters = list(model.parameters())
    at_first = 0
    for length in (40, 57, 33, 100):
        expected, found = model(tokens(2, length)), compiled(tokens(2, length))
        assert torch.allclose(found, expected, rtol=0, atol=1e-10), length
        cotangent = torch.randn_like(expected)
        for one, other in zip(
            torch.autograd.grad(found, parameters, cotangent),
            torch.autograd.grad(expected, parameters, cotangent),
            strict=True,
        ):
            assert torch.allclose(one, other, rtol=0, atol=1e-9), length
        at_first = at_first or graphs
    assert graphs == at_first > 0


def test_an_exported_model_serves_every_length() -> None:
    for model, inputs in ((language_model(), tokens), (encoder(), lambda batch, n: torch.randn(batch, n, EMBED))):
        model.eval()
        shapes = ({0: Dim("batch", min=1, max=64), 1: Dim("seq", min=2, max=4096)},)
        with torch.no_grad():
            program = torch.export.export(model, (inputs(3, 40),), dynamic_shapes=shapes).module()
            for batch, length in ((3, 40), (2, 57), (5, 9), (1, 130)):
                given = inputs(batch, length)
                assert torch.allclose(program(given), model(given), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------- beginning

LAYER_KEYS = {
    f"{module}.{kind}"
    for module in [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "self_attn.inner_attn_ln",
        "self_attn_layer_norm",
        "ffn.fc1",
        "ffn.ffn_layernorm",
        "ffn.fc2",
        "final_layer_norm",
    ]
    for kind in ("weight", "bias")
}


def test_state_dict_is_as_documented() -> None:
    stack = {f"layers.{depth}.{key}" for depth in range(LAYERS) for key in LAYER_KEYS}
    stack |= {"layer_norm.weight", "layer_norm.bias"}
    assert set(encoder(positions="rotary").state_dict()) == stack
    language = stack | {"embed_tokens.weight", "output_projection.weight"}
    assert set(language_model().state_dict()) == language
    assert set(DilatedTransformerEncoderLayer(EMBED, HEADS, SEGMENTS, RATES).state_dict()) == LAYER_KEYS


def test_a_state_dict_moves_between_position_kinds() -> None:
    first, second = language_model(positions="xpos"), language_model(positions="rotary")
    second.load_state_dict(first.state_dict())


def test_a_seed_decides_the_weights() -> None:
    first, second = language_model().state_dict(), language_model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("num_layers", [1, 6])
def test_initial_variances_are_magnetos(num_layers: int) -> None:
    """Variance gain^2 * 2 / (fan in + fan out), the gain 1 for q and k, sqrt(log 2N) for v, out, fc1 and fc2."""
    torch.manual_seed(0)
    width, inner = 192, 384
    model = LongNet(width, 2, num_layers, [64], [1], ffn_dim=inner)
    gain = math.sqrt(math.log(2 * num_layers))
    for layer in model.layers:
        expected = {
            layer.self_attn.q_proj: 2 / (2 * width),
            layer.self_attn.k_proj: 2 / (2 * width),
            layer.self_attn.v_proj: gain**2 * 2 / (2 * width),
            layer.self_attn.out_proj: gain**2 * 2 / (2 * width),
            layer.ffn.fc1: gain**2 * 2 / (width + inner),
            layer.ffn.fc2: gain**2 * 2 / (width + inner),
        }
        for linear, variance in expected.items():
            # Of 36,864 draws and more, the sample variance is within 4 % of the true one but once in a million.
            assert math.isclose(linear.weight.var().item(), variance, rel_tol=0.04)
            assert torch.equal(linear.bias, torch.zeros_like(linear.bias))


def test_hidden_states_start_at_unit_scale_and_logits_too() -> None:
    torch.manual_seed(0)
    model = LongNetLM(256, 64, 4, 3, [32, 128], [1, 4])
    ids = torch.randint(256, (1, 128))
    assert math.isclose((model.embed_tokens(ids) * 8).var().item(), 1.0, rel_tol=0.1)
    assert math.isclose(model(ids).var().item(), 1.0, rel_tol=0.2)


def test_tied_embeddings_are_one_matrix() -> None:
    model = language_model(tie_embeddings=True)
    assert model.output_projection.weight is model.embed_tokens.weight
    assert sum(parameter is model.embed_tokens.weight for parameter in model.parameters()) == 1


def test_drop_path_grows_with_depth_and_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = LongNet(EMBED, HEADS, 3, SEGMENTS, RATES, drop_path=0.5)
    assert [layer.drop_path.p for layer in model.layers] == [0.0, 0.25, 0.5]
    update = torch.ones(4000, 1, 1)
    drop_path = model.layers[2].drop_path
    dropped = drop_path(update)
    assert set(dropped.flatten().tolist()) == {0.0, 2.0}
    assert abs(dropped.mean().item() - 1.0) < 0.1
    assert torch.equal(drop_path.eval()(update), update)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_acts_in_training_only(name: str) -> None:
    model = language_model(**{name: 0.5})
    ids = tokens(1, 20)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_grouped_heads_and_the_factorys_options_pass_through() -> None:
    options = {"kernel": "math", "semantics": "grouped", "attention_type": "standard", "sequence_length": 64}
    model = language_model(kv_heads=1, **options)
    attention = model.layers[0].self_attn
    assert (attention.attention.kernel, attention.attention.semantics) == ("math", "grouped")
    assert attention.k_proj.weight.shape == (EMBED // HEADS, EMBED)
    assert (attention.decision.attention_type, attention.decision.kernel) == ("standard", "math")
    model(tokens(1, 40))


# ------------------------------------------------------------------------------------------- learning


def test_learns_a_repeating_text_by_heart() -> None:
    torch.manual_seed(0)
    model = LongNetLM(VOCAB, 32, 2, 2, SEGMENTS, RATES)
    text = tokens(1, 13).repeat(1, 10)[:, :97]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        logits = model(text[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 2.0
    assert losses[-1] < 0.3
    assert torch.equal(model.generate(text[:, :26], 13, temperature=0)[:, 26:], text[:, 26:39])


def test_bfloat16_autocast_is_finite_and_close() -> None:
    model = language_model()
    ids = tokens(2, 64)
    exact = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids)
        loss = functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


# ------------------------------------------------------------------------------------------- refusals

IDS = torch.zeros(1, 4, dtype=torch.int64)
HIDDEN = torch.zeros(1, 4, EMBED)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: language_model(positions="alibi"), ValueError, "positions: expected one of 'xpos'.*got 'alibi'"),
        (lambda: encoder(xpos_scale_base=64), ValueError, "xpos_scale_base: only XPOS .* 64 with positions='none'"),
        (lambda: encoder(positions="xpos"), ValueError, "rotary: XPOS .* needs a causal layer"),
        (lambda: LongNetLM(0, 16, 2, 1, [8], [1]), ValueError, "vocab_size: expected a positive int, got 0"),
        (lambda: LongNet(16, 3, 1, [8], [1]), ValueError, "num_heads: expected a positive divisor of embed_dim=16"),
        (lambda: LongNet(16, 0, 1, [8], [1]), ValueError, "num_heads: expected a positive divisor"),
        (lambda: LongNet(16, 2, 0, [8], [1]), ValueError, "num_layers: expected a positive int, got 0"),
        (lambda: LongNet(16, 2, 1, [8], [1, 2]), ValueError, "segment_lengths"),
        (lambda: encoder(activation="tanh"), ValueError, "activation: expected one of 'gelu', 'relu', 'silu'"),
        (lambda: encoder(ffn_dim=0), ValueError, "ffn_dim: expected a positive int, got 0"),
        (lambda: encoder(dropout=1.0), ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        (lambda: encoder(drop_path=-0.1), ValueError, r"drop_path: expected a probability in \[0, 1\), got -0.1"),
        (lambda: encoder(attention_dropout=2.0), ValueError, "attention_dropout: expected a probability"),
        (lambda: encoder(activation_dropout=2.0), ValueError, "activation_dropout: expected a probability"),
        (lambda: encoder(depth=3), TypeError, "depth"),
        (lambda: encoder(attention_type="magic"), ValueError, "magic"),
        (lambda: FeedForward(8, 0), ValueError, "ffn_dim"),
        (lambda: DilatedTransformerEncoderLayer(16, 2, [8], [1], rotary=XPOSPositions(8)), ValueError, "rotary: XPOS"),
        (lambda: DilatedTransformerDecoderLayer(16, 2, [8], [1])(IDS), TypeError, "hidden: expected a floating-point"),
        (lambda: encoder()(HIDDEN[0]), ValueError, r"hidden: expected \(batch, seq, embed_dim=16\), got \(4, 16\)"),
        (lambda: encoder()(HIDDEN[..., :8]), ValueError, r"hidden: expected .*got \(1, 4, 8\)"),
        (lambda: encoder()(HIDDEN, HIDDEN[..., 0]), TypeError, "key_padding_mask: expected a bool tensor"),
        (lambda: encoder()(HIDDEN, IDS[:, :3].bool()), ValueError, r"key_padding_mask: .*= \(1, 4\), got \(1, 3\)"),
        (lambda: encoder(semantics="latex"), ValueError, "semantics: expected one of .*'torchscale'"),
        (lambda: encoder()(None), TypeError, "hidden: expected a floating-point tensor, got NoneType"),
        (
            lambda: language_model()(IDS.float()),
            TypeError,
            "tokens: expected int64 or int32 token ids, got torch.float32",
        ),
        (lambda: language_model()([1, 2]), TypeError, "tokens: expected .*got list"),
        (lambda: language_model()(IDS[0]), ValueError, r"tokens: expected \(batch, seq\), got \(4,\)"),
    ],
)
def test_refusals_name_the_argument(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
