"""Models in folders: what goes in comes out, to the bit, and nothing that does not fit comes out at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dilated_core.measure import peak_memory
from dilated_factory import Policy
from dilated_factory.models import LongNet, LongNetLM

safetensors = pytest.importorskip("safetensors.torch")

SIZES = (16, 2, 2, (8, 32), (1, 2))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def language_model(**options: object) -> LongNetLM:
    torch.manual_seed(1)
    return LongNetLM(17, *SIZES, **options)


def encoder(**options: object) -> LongNet:
    torch.manual_seed(1)
    return LongNet(*SIZES, **options)


def changed(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    """The config in the folder, changed."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """The weights in the folder, changed."""
    path = folder / "model.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = safetensors.load_file(path)
    change(weights)
    safetensors.save_file(weights, path, metadata=metadata)


# ------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_language_model_comes_back_to_the_bit(tie: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = language_model(tie_embeddings=tie, dtype=dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = LongNetLM.from_pretrained(tmp_path / "new" / "folder")
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.output_projection.weight is loaded.embed_tokens.weight) == tie
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    ids = torch.arange(17)[None]
    assert torch.equal(loaded(ids), model.eval()(ids))


OPTIONS = {
    "positions": "rotary",
    "drop_path": 0.25,
    "layer_norm_eps": 1e-3,
    "checkpoint_activations": True,
    "ffn_dim": 24,
    "dropout": 0.1,
    "attention_dropout": 0.2,
    "activation_dropout": 0.3,
    "activation": "silu",
    "layer_norm": False,
    "kv_heads": 1,
    "attention_type": "standard",
    "sequence_length": 40,
    "semantics": "grouped",
    "softmax_scale": 0.5,
    "bias": False,
}


def test_every_argument_comes_back(tmp_path: Path) -> None:
    model = encoder(**OPTIONS)
    model.save_pretrained(tmp_path)
    loaded = LongNet.from_pretrained(tmp_path)
    for name, value in OPTIONS.items():
        assert loaded.arguments[name] == model.arguments[name] == value
    assert str(loaded) == str(model)
    embeddings = torch.randn(2, 40, 16)
    assert torch.equal(loaded(embeddings), model.eval()(embeddings))
    assert loaded.layers[1].self_attn.decision == model.layers[1].self_attn.decision


def test_the_config_holds_defaults_too_and_says_what_it_is(tmp_path: Path) -> None:
    """Another release may have other defaults."""
    language_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["format"], config["format_version"], config["class"]) == ("dilated-factory model", 1, "LongNetLM")
    expected = {"vocab_size": 17, "num_layers": 2, "dilation_rates": [1, 2], "dropout": 0.0, "activation": "gelu"}
    expected |= {"tie_embeddings": False, "positions": "xpos", "kv_heads": None, "layer_norm_eps": 1e-5}
    assert expected.items() <= config["arguments"].items()


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    language_model(tie_embeddings=True).save_pretrained(tmp_path)
    names = set(safetensors.load_file(tmp_path / "model.safetensors"))
    assert "embed_tokens.weight" in names
    assert "output_projection.weight" not in names


def test_a_tied_model_learns_as_one_matrix_after_loading(tmp_path: Path) -> None:
    language_model(tie_embeddings=True).save_pretrained(tmp_path)
    loaded = LongNetLM.from_pretrained(tmp_path)
    logits = loaded(torch.arange(17)[None])
    logits.backward(torch.randn_like(logits))
    assert len(list(loaded.parameters())) == len(loaded.state_dict()) - 1
    assert all(parameter.grad is not None for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dtype_can_be_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    model = encoder()
    model.save_pretrained(tmp_path)
    loaded = LongNet.from_pretrained(tmp_path, device="cpu", dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype)), name


def test_weights_of_several_dtypes_keep_them(tmp_path: Path) -> None:
    model = encoder(dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    model.save_pretrained(tmp_path)
    loaded = LongNet.from_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name


def test_arguments_can_be_given_in_place_of_the_saved(tmp_path: Path) -> None:
    encoder(dropout=0.5).save_pretrained(tmp_path)
    policy = Policy(pattern_cache=False)
    loaded = LongNet.from_pretrained(tmp_path, dropout=0.0, checkpoint_activations=True, policy=policy)
    assert loaded.layers[0].dropout.p == 0.0
    assert loaded.checkpoint_activations
    assert not loaded.layers[0].self_attn.decision.pattern_cache


def test_what_is_the_machines_affair_is_left_out(tmp_path: Path) -> None:
    encoder(policy=Policy(), kernel="math", enable_pattern_cache=False, device="cpu").save_pretrained(tmp_path)
    arguments = json.loads((tmp_path / "config.json").read_text())["arguments"]
    assert not {"policy", "kernel", "enable_pattern_cache", "device", "dtype"} & set(arguments)
    decision = LongNet.from_pretrained(tmp_path).layers[0].self_attn.decision
    assert decision == encoder().layers[0].self_attn.decision


def test_a_loaded_model_is_in_eval_mode_and_owns_its_weights(tmp_path: Path) -> None:
    encoder(dropout=0.5).save_pretrained(tmp_path)
    loaded = LongNet.from_pretrained(tmp_path)
    assert not any(module.training for module in loaded.modules())
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def test_loading_draws_no_random_number(tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    LongNetLM.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_holds_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    model = LongNet(64, 2, 12, (8, 32), (1, 2))
    model.save_pretrained(tmp_path)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    # Once in the model; the profiler counts the file, which is mapped, as memory too.
    assert peak_memory(lambda: LongNet.from_pretrained(tmp_path)) < 2.2 * nbytes


def test_a_trained_and_compiled_model_is_saved_as_it_is(tmp_path: Path) -> None:
    model = language_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(torch.arange(17)[None])
    logits.backward(torch.randn_like(logits))
    optimizer.step()
    torch.compile(model, backend="eager").save_pretrained(tmp_path)
    loaded = LongNetLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


# ------------------------------------------------------------------------------------------- saving


def test_saving_again_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path)
    model = encoder(positions="rotary")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(
        LongNet.from_pretrained(tmp_path).state_dict()["layer_norm.weight"], model.state_dict()["layer_norm.weight"]
    )


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    model = encoder()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.arguments["semantics"] = nn.Identity()
    with pytest.raises(
        TypeError, match=r"semantics: expected None, a bool, .* to be saved in config\.json, got Identity"
    ):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_cannot_be_put_in_its_place_leaves_nothing_beside(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        encoder().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def with_another_layer() -> LongNet:
    model = encoder()
    model.layers.append(nn.Linear(4, 4))
    return model


def with_fewer_ids() -> LongNetLM:
    model = language_model()
    model.embed_tokens = nn.Embedding(11, 16)
    return model


def tied_by_hand() -> LongNetLM:
    model = language_model()
    model.output_projection.weight = model.embed_tokens.weight
    return model


class Own(Tensor):
    """As a sharded weight is, no plain tensor."""


def of_another_kind() -> LongNet:
    model = encoder()
    model.layer_norm.weight = nn.Parameter(torch.ones(16).as_subclass(Own))
    return model


def of_another_dtype() -> LongNet:
    model = encoder()
    model.layer_norm.weight = nn.Parameter(torch.ones(16, dtype=torch.complex64))
    return model


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (with_another_layer, ValueError, r"LongNet: .* unexpected weights: layers\.2\.weight, layers\.2\.bias"),
        (with_fewer_ids, ValueError, r"another shape: embed_tokens\.weight: expected \(17, 16\), got \(11, 16\)"),
        (tied_by_hand, ValueError, r"tied as its arguments say, none, got \{'output_projection\.weight': 'embed_"),
        (of_another_kind, TypeError, r"layer_norm\.weight: expected a plain tensor, got Own; gather a sharded model"),
        (lambda: encoder(device="meta"), ValueError, r"layers\.0\..*: expected a weight with values, .* meta device"),
        (of_another_dtype, TypeError, r"layer_norm\.weight: expected float64, .* got torch\.complex64"),
    ],
)
def test_a_model_that_could_not_be_loaded_is_not_saved(
    model: Callable[[], LongNet], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        model().save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_json_has_no_word_for_is_refused(value: float, tmp_path: Path) -> None:
    model = encoder()
    model.arguments["softmax_scale"] = value
    with pytest.raises(ValueError, match="softmax_scale: expected a finite number"):
        model.save_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update({"class": "LongNetLM"}), "class: expected LongNet, got 'LongNetLM'; call"),
        (lambda config: config.update(format="other"), "format: expected 'dilated-factory model', got 'other'"),
        (lambda config: config.pop("format"), "format: expected 'dilated-factory model', got None"),
        (
            lambda config: config.update(format_version=2, dilated_factory="9.0"),
            r"format_version: expected 1, got 2 \(written by dilated-factory 9\.0\)",
        ),
        (lambda config: config.pop("save_id"), "save_id: expected this field, found none"),
        (lambda config: config.update(extra=1), "extra: expected one of format, format_version, class"),
        (lambda config: config.update(arguments=[1]), "arguments: expected an object, got list"),
        (lambda config: config.update(save_id="0"), "save_id: expected '0', config.json's, got .* not saved together"),
        (lambda config: config["arguments"].update(policy={}), "arguments: policy: expected it to be given to"),
        (lambda config: config["arguments"].update(activation="tanh"), "arguments: activation: expected one of 'gelu'"),
        (lambda config: config["arguments"].update(num_layers=3), r"missing weights: layers\.2\.self_attn.* 12 more"),
        (lambda config: config["arguments"].update(num_layers=1), r"unexpected weights: layers\.1\.ffn\.fc1\.bias"),
        (
            lambda config: config["arguments"].update(ffn_dim=8),
            r"weights of another shape: layers\.0\.ffn\.fc1\.weight: expected \(8, 16\), got \(64, 16\)",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    change: Callable[[dict[str, object]], object], message: str, tmp_path: Path
) -> None:
    encoder().save_pretrained(tmp_path)
    changed(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        LongNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [{"depth": 3}, {"vocab_size": 3}, {"rotary": None}], ids=str)
def test_an_unknown_argument_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    encoder().save_pretrained(tmp_path)
    changed(tmp_path, lambda config: config["arguments"].update(change))
    with pytest.raises(TypeError, match=rf"config\.json: arguments: .*{next(iter(change))}"):
        LongNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("layer_norm.weight"), r"missing weights: layer_norm\.weight$"),
        (lambda weights: weights.update(more=torch.ones(2)), "unexpected weights: more$"),
        (
            lambda weights: weights.update({"layer_norm.bias": torch.ones(3)}),
            r"layer_norm\.bias: expected \(16,\), got \(3,\)",
        ),
        (
            lambda weights: weights.update({"layer_norm.bias": torch.ones(16, dtype=torch.int32)}),
            r"layer_norm\.bias: expected one of F64, F32, BF16, F16, got I32",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    encoder().save_pretrained(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        LongNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_or_broken_file_is_named(name: str, tmp_path: Path) -> None:
    encoder().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=rf"{name}: expected (JSON|a safetensors file): "):
        LongNet.from_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: expected the \w+ that save_pretrained writes"):
        LongNet.from_pretrained(tmp_path)


def test_a_wrong_dtype_or_device_is_refused(tmp_path: Path) -> None:
    encoder().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"dtype: expected float64, .* got torch\.int8"):
        LongNet.from_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="nowhere"):
        LongNet.from_pretrained(tmp_path, device="nowhere")


def test_without_safetensors_the_extra_is_named_and_the_rest_works(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["safetensors"] = None
import torch
from dilated_factory.models import LongNet
model = LongNet(16, 2, 1, [8], [1])
model(torch.zeros(1, 9, 16))
for call in (model.save_pretrained, LongNet.from_pretrained):
    try:
        call(sys.argv[1])
    except ImportError as error:
        print(error)
"""
    folder = tmp_path / "folder"
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.count('pip install "dilated-factory[safetensors]"') == 2, done.stderr
    assert not folder.exists()
