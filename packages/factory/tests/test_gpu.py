"""What a device shows of the factory: every type, pools, models, tune, bench, ranks and transformers' models.

Nearly all of it runs on the CPU too, at the same sizes, so that what is run on a card is right here; tune and bench
have files of their own for that.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from dilated_core import reference
from dilated_factory import SharedResources, create_dilated_attention, create_multihead_dilated_attention, tune
from dilated_factory.coordination import PoolCoordinator
from dilated_factory.models import LongNet, LongNetLM

# Without it matrix products are refused where a user asks for deterministic algorithms; cuBLAS reads it when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PATTERN = ([32, 128], [1, 4])
# Largest differences from the float64 definition, of outputs and gradients of unit normal tensors.
ATOL = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 1e-1}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # What is computed here is too small for more, and waits where others compute.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def group(device: str, tmp_path: Path) -> Iterator[None]:
    """The default group, of this process alone: NCCL's on CUDA, gloo's on the CPU."""
    place: dict[str, Any] = {"device_id": torch.device("cuda", 0)} if device == "cuda" else {}
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{tmp_path}/store",
        timeout=timedelta(seconds=60),
        rank=0,
        world_size=1,
        **place,
    )
    yield
    distributed.destroy_process_group()


def with_gradients(attention: Any, tensors: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out))]


def exact(tensors: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    def definition(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference.dilated_attention(query, key, value, *PATTERN)[0]

    return with_gradients(definition, [tensor.cpu().double() for tensor in tensors], cotangent.cpu())


# ------------------------------------------------------------------------------------------------ types and pools


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize("attention_type", ["standard", "improved", "auto", "ring", "distributed"])
@pytest.mark.parametrize("device", DEVICES)
def test_every_type_is_the_definition(attention_type: str, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    *tensors, cotangent = torch.randn(4, 2, 150, 4, 32, device=device).to(dtype).unbind()
    found = with_gradients(create_dilated_attention(attention_type, *PATTERN), tensors, cotangent)
    for name, one, wanted in zip(("out", "dq", "dk", "dv"), found, exact(tensors, cotangent), strict=True):
        assert one.device.type == device
        torch.testing.assert_close(
            one.double().cpu(), wanted, rtol=0, atol=ATOL[dtype], msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("attention_type", ["block_sparse", "block_sparse_ring"])
@pytest.mark.parametrize("device", DEVICES)
def test_block_sparse_types_are_those_of_the_cpu(attention_type: str, device: str) -> None:
    torch.manual_seed(0)
    *tensors, cotangent = torch.randn(4, 1, 300, 4, 32).unbind()
    options = {"backend": "tiles"} if attention_type == "block_sparse" else {}
    module = create_dilated_attention(attention_type, *PATTERN, **options)
    here = create_dilated_attention("block_sparse", *PATTERN, backend="tiles")
    found = with_gradients(module, [tensor.to(device) for tensor in tensors], cotangent)
    for one, wanted in zip(found, with_gradients(here, list(tensors), cotangent), strict=True):
        torch.testing.assert_close(one.cpu(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", ["host", "cupy", "torch"])
@pytest.mark.parametrize("device", DEVICES)
def test_pools_on_the_device_change_nothing_and_serve(device: str, backend: str) -> None:
    if (backend == "host") != (device == "cpu"):
        pytest.skip(f"{backend} memory is not that of {device}")
    if backend == "cupy":
        pytest.importorskip("cupy")
    torch.manual_seed(0)
    *tensors, cotangent = torch.randn(4, 1, 2048, 8, 32, device=device).unbind()
    plain = with_gradients(create_dilated_attention("improved", *PATTERN, enable_memory_pool=False), tensors, cotangent)
    for options in (
        {"enable_memory_pool": True, "lightweight_pool": True},
        {"enable_memory_pool": True, "lightweight_pool": False},
        {"buffer_manager": True},
    ):
        resources = SharedResources(min_bytes=1024, backend=lambda place: backend)
        pooled = create_dilated_attention("improved", *PATTERN, resources=resources, **options)
        for _ in range(3):  # memory that comes back is used again
            for found, wanted in zip(with_gradients(pooled, tensors, cotangent), plain, strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        numbers = resources.statistics()
        assert {torch.device(place).type for place, _ in numbers} == {device}
        assert sum(one.hits for one in numbers.values())
        del found
        resources.trim()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("device", DEVICES)
def test_a_coordinator_of_one_rank_counts_the_devices_memory(device: str) -> None:
    """Its messages go through the group's store, so that any backend will do."""
    place = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    scope: dict[str, Any] = {"scope": "device"} if device == "cuda" else {}
    with PoolCoordinator(limit="64MiB", **scope) as coordinator:
        resources = SharedResources(
            min_bytes=1, coordinator=coordinator, backend=lambda place: "torch" if device == "cuda" else "host"
        )
        rows = resources.pool(place).empty((1 << 20,), dtype=torch.float32, device=place)
        assert sum(coordinator.reserved().values()) >= rows.nbytes
        with pytest.raises(MemoryError):
            resources.pool(place).empty((1 << 25,), dtype=torch.float32, device=place)
        del rows


@pytest.mark.parametrize("device", DEVICES)
def test_float32_precision_is_switched_for_a_call(device: str) -> None:
    switch = (torch.backends.cuda if device == "cuda" else torch.backends.mkldnn).matmul
    before, seen = switch.fp32_precision, list[str]()
    module = create_multihead_dilated_attention("improved", 64, 4, *PATTERN, fp32_precision="ieee", device=device)
    module.out_proj.register_forward_hook(lambda *call: seen.append(switch.fp32_precision))
    module(torch.randn(1, 100, 64, device=device))
    assert seen == ["ieee"]
    assert switch.fp32_precision == before


# ------------------------------------------------------------------------------------------------ models


def language_model(**options: Any) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(97, 64, 4, 2, *PATTERN, **options)


def moved(model: Any, device: str) -> Any:
    copy = type(model)(**model.arguments).to(device, next(model.parameters()).dtype)
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize("device", DEVICES)
def test_a_training_step_is_that_of_the_cpu(device: str) -> None:
    here = language_model().double()
    there = moved(here, device)
    tokens = torch.randint(97, (2, 150))
    for model in (here, there):
        ids = tokens.to(next(model.parameters()).device)
        logits = model(ids[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for (name, one), other in zip(there.named_parameters(), here.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(
            one.grad.cpu(), other.grad, rtol=0, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_learns_under_autocast(device: str) -> None:
    """A short text, by heart: forward, backward, AdamW, with activations recomputed."""
    model = language_model(checkpoint_activations=True).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    tokens = torch.randint(97, (1, 130), device=device)
    losses = []
    for _ in range(8):
        with torch.autocast(device, torch.bfloat16):
            logits = model(tokens[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("lengths", [(40, 40), (40, 17, 1)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_generation_is_that_of_the_cpu(device: str, lengths: tuple[int, ...]) -> None:
    """The prompt at once, then token by token from the caches; rows of unequal lengths too."""
    here = language_model().double().eval()
    there = moved(here, device)
    prompt = torch.randint(97, (len(lengths), max(lengths)))
    padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    options = {"temperature": 0, "repetition_penalty": 1.2, "pad_token_id": 0}
    expected = here.generate(prompt, 12, key_padding_mask=padding, **options)
    found = there.generate(prompt.to(device), 12, key_padding_mask=padding.to(device), **options)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_samples_of_one_seed_are_the_same_also_where_algorithms_must_be_deterministic(device: str) -> None:
    model = language_model().to(device).eval()
    prompt = torch.randint(97, (2, 20), device=device)

    def sample() -> Tensor:
        generator = torch.Generator(device).manual_seed(7)
        return model.generate(prompt, 16, top_k=20, top_p=0.9, min_p=0.01, generator=generator)

    first = sample()
    torch.use_deterministic_algorithms(True)
    try:
        again = sample()
    finally:
        torch.use_deterministic_algorithms(False)
    assert first.shape == again.shape == (2, 36)
    assert torch.equal(sample(), first)


@pytest.mark.parametrize("device", DEVICES)
def test_an_encoder_in_half_precision_is_near_that_of_the_cpu(device: str) -> None:
    torch.manual_seed(0)
    here = LongNet(64, 4, 2, *PATTERN, positions="rotary").eval()
    hidden = torch.randn(2, 150, 64)
    padding = torch.arange(150) >= torch.tensor([[150], [90]])
    with torch.no_grad():
        expected = here(hidden, padding)[~padding]
        there = moved(here, device).to(torch.bfloat16).eval()
        found = there(hidden.to(device, torch.bfloat16), padding.to(device))[~padding.to(device)]
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0, atol=0.15)


# ------------------------------------------------------------------------------------------------ measuring


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_tune_measures_the_device(device: str) -> None:
    profile = tune(device, budget_seconds=6.0, dtypes=["float32", "bfloat16"], heads=8, head_dim=16, lengths=[256])
    assert profile.device_type == device
    measured = [one for one in profile.measurements if "figures" in one]
    assert {"pool_bytes", "kernels"} <= {one["part"] for one in measured}
    wrong = [why for one in profile.measurements for why in one.get("dropped", {}).values() if "wrong" in why]
    assert not wrong


@pytest.mark.gpu
@pytest.mark.parametrize("report", ["pool-modes", "ring-sizes", "stages"])
@pytest.mark.parametrize("device", ["cuda"])
def test_bench_finds_nothing_wrong_on_the_device(device: str, report: str, tmp_path: Path) -> None:
    console = pytest.importorskip("rich.console")
    pytest.importorskip("matplotlib")
    from dilated_factory.bench import run
    from dilated_factory.bench.settings import BenchSettings
    from dilated_factory.demo.screen import Screen

    class Silent(Screen):
        @contextmanager
        def bar(self, name: str, total: float) -> Iterator[Any]:
            yield lambda done, words: None

    tiny = BenchSettings(
        heads=4,
        head_dim=16,
        longest=1024,
        ring_tokens=128,
        longest_dense=512,
        buffer_mebibytes=(1, 2),
        checked_rows=4,
        lookups=2,
        fewest=1,
        most=1,
        seconds=60.0,
    )
    screen = Silent(console.Console(file=io.StringIO(), force_terminal=False, width=200))
    results = run([report], device=device, output=tmp_path, settings=tiny, screen=screen)
    assert not results.failed
    assert any(row.seconds for row in results.rows)
    assert all(row.check is not None and row.check.passed for row in results.rows if row.seconds)


# ------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("name", ["dilated", "block_sparse"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_model_of_transformers_is_that_of_the_cpu(device: str, name: str) -> None:
    """Padding on the left, logits of real tokens, and greedy text by the model's own cache."""
    transformers = pytest.importorskip("transformers")
    from dilated_factory.interop.transformers import register_transformers

    register_transformers()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=61,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=None,
        dilated={"segment_lengths": [16, 64], "dilation_rates": [1, 3]},
        block_sparse={"patterns": [{"name": "local", "window": 1}], "block_size": 8, "backend": "tiles"},
    )
    here = transformers.LlamaForCausalLM(config).eval()
    here.set_attn_implementation(name)
    ids = torch.randint(1, 61, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with torch.no_grad():
        expected = here(ids, attention_mask=mask).logits[mask.bool()]
        text = here.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        there = here.to(device)
        place = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        found = there(**place).logits[mask.bool().to(device)]
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)
        assert torch.equal(there.generate(**place, max_new_tokens=6, do_sample=False).cpu(), text)
