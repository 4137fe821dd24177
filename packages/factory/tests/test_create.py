"""The creators: what they build, what they decide, and what they refuse."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_core import DilatedAttention, DilatedPattern, MultiheadDilatedAttention, reference
from dilated_factory import (
    Decision,
    Hardware,
    Policy,
    create_dilated_attention,
    create_multihead_dilated_attention,
)
from dilated_factory.hooks import FollowCalls

TYPES = ("standard", "improved", "auto")
FORMS = ("attention", "multihead")


def make(form: str, attention_type: str = "auto", **options: Any) -> torch.nn.Module:
    sizes = {"segment_lengths": [4, 16], "dilation_rates": [1, 3]}
    if form == "attention":
        return create_dilated_attention(attention_type, **{**sizes, **options})
    return create_multihead_dilated_attention(attention_type, **{"embed_dim": 16, "num_heads": 4, **sizes, **options})


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("attention_type", TYPES)
def test_every_type_is_the_definition(attention_type: str, is_causal: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 37, 5, 8, dtype=torch.float64).requires_grad_().unbind()
    cotangent = torch.randn_like(query)
    attention = make("attention", attention_type, is_causal=is_causal)
    expected, _ = reference.dilated_attention(query, key, value, [4, 16], [1, 3], is_causal=is_causal)
    out = attention(query, key, value)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grads = torch.autograd.grad(out, (query, key, value), cotangent)
    wanted = torch.autograd.grad(expected, (query, key, value), cotangent)
    for name, grad, want in zip("qkv", grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-12, msg=lambda text, n=name: f"d{n}: {text}")


def test_standard_and_improved_agree_with_the_same_weights() -> None:
    torch.manual_seed(0)
    standard, improved = make("multihead", "standard"), make("multihead", "improved")
    improved.load_state_dict(standard.state_dict())
    x = torch.randn(2, 23, 16)
    for is_causal in (False, True):
        torch.testing.assert_close(standard(x, x, x, is_causal=is_causal)[0], improved(x, x, x, is_causal=is_causal)[0])


@pytest.mark.parametrize(("attention_type", "fused"), [("standard", False), ("improved", True), ("auto", True)])
def test_the_module_is_the_types_own(attention_type: str, fused: bool) -> None:
    single, multihead = (make(form, attention_type) for form in FORMS)
    assert type(single) is DilatedAttention
    assert type(multihead) is MultiheadDilatedAttention
    assert single.fused is multihead.attention.fused is fused
    for created, direct in (
        (single, DilatedAttention([4, 16], [1, 3])),
        (multihead, MultiheadDilatedAttention(16, 4, [4, 16], [1, 3])),
    ):
        assert created.state_dict().keys() == direct.state_dict().keys()
        # One attribute more, and one hook that follows the calls' lengths.
        assert set(vars(created)) - set(vars(direct)) == {"decision"}
        assert not created._forward_hooks
        assert [type(hook.__self__) for hook in created._forward_pre_hooks.values()] == [FollowCalls] * fused


def test_where_everything_is_settled_there_is_no_hook() -> None:
    for options in ({"enable_memory_pool": False}, {"enable_memory_pool": True, "lightweight_pool": True}):
        assert not make("attention", "improved", profile=None, **options)._forward_pre_hooks


def test_the_papers_pattern_is_the_default() -> None:
    assert create_dilated_attention().pattern == DilatedPattern.longnet()


@pytest.mark.parametrize("form", FORMS)
def test_the_decision_survives_copies(form: str) -> None:
    module = make(form)
    assert copy.deepcopy(module).decision == module.decision
    assert pickle.loads(pickle.dumps(module)).decision == module.decision


@pytest.mark.parametrize("attention_type", TYPES)
@pytest.mark.parametrize("form", FORMS)
def test_it_compiles_in_one_graph(form: str, attention_type: str) -> None:
    torch._dynamo.reset()
    module = make(form, attention_type)
    inputs = torch.randn(3, 2, 16, 4, 8) if form == "attention" else torch.randn(1, 2, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the compiler says about itself is not ours to judge
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), module(*inputs))


def test_options_reach_the_module() -> None:
    module = make("multihead", "improved", kv_heads=2, layer_norm=False, bias=False, kernel="math", dtype=torch.float64)
    assert module.kv_heads == 2
    assert module.inner_attn_ln is None
    assert module.q_proj.bias is None
    assert module.q_proj.weight.dtype == torch.float64
    assert module.decision.kernel == "math"
    assert make("attention", softmax_scale=0.5).softmax_scale == 0.5


@pytest.mark.parametrize(
    ("length", "mode"), [(512, "off"), (4095, "off"), (4096, "lightweight"), (8191, "lightweight"), (8192, "full")]
)
@pytest.mark.parametrize("attention_type", TYPES)
@pytest.mark.parametrize("form", FORMS)
def test_the_decision_goes_by_the_given_length(form: str, attention_type: str, length: int, mode: str) -> None:
    decision = make(form, attention_type, sequence_length=length).decision
    assert decision.attention_type == ("improved" if attention_type == "auto" else attention_type)
    assert (decision.pool_mode, decision.sequence_length) == (mode, length)


def test_a_length_of_another_kind_of_integer_is_held_as_an_int() -> None:
    decision = make("attention", sequence_length=torch.tensor(4096)).decision
    assert type(decision.sequence_length) is int
    assert (decision.pool_mode, decision.sequence_length) == ("lightweight", 4096)


def test_the_length_is_never_taken_from_the_segments() -> None:
    decision = create_dilated_attention("auto", [65536], [1]).decision
    assert decision.pool_mode == "off"
    assert decision.attention_type == "improved"
    assert sum("no sequence length is known" in reason for reason in decision.reasons) == 2


def test_what_the_policy_wishes_for_is_wired() -> None:
    decision = make("attention", sequence_length=10_000).decision
    assert (decision.pool_mode, decision.pattern_cache, decision.unwired) == ("full", True, ())
    assert "pool full, pattern cache on" in str(decision)
    quiet = make("attention", sequence_length=10_000, enable_memory_pool=False, enable_pattern_cache=False)
    assert (quiet.allocator, quiet.patterns) == (None, None)
    assert "pool off, pattern cache off" in str(quiet.decision)


def test_a_full_pool_was_not_asked_for_outright() -> None:
    assert make("attention", lightweight_pool=False, sequence_length=4096).decision.pool_mode == "full"
    assert make("attention", lightweight_pool=False, sequence_length=512).decision.pool_mode == "off"


def test_kernel_is_foreseen_where_it_can_be() -> None:
    assert make("attention").decision.kernel == "auto"
    cpu = make("multihead", device="cpu").decision
    assert cpu.kernel in ("cpu_flash", "math")
    assert "torch.float32 with head_dim 4 on cpu" in str(cpu)
    assert '"math" while training' in str(make("multihead", device="cpu", dropout=0.1).decision)
    if not torch.cuda.is_available():
        fallback = make("multihead", hardware=Hardware("cuda")).decision
        assert fallback.kernel == "math"
        assert "cpu_flash: it runs on the CPU, not on cuda" in str(fallback)


def test_memory_is_weighed_by_what_training_must_hold() -> None:
    # 8 tensors x 8,192 tokens x 16 channels x 4 bytes = 4 MiB
    for budget, word in ((4 * 2**20, "4,194,304 bytes fit"), (4 * 2**20 - 1, "4,194,304 bytes would be held")):
        hardware = Hardware("cpu", memory_total=budget)
        assert word in str(make("multihead", sequence_length=8192, hardware=hardware).decision)
    half = make("multihead", sequence_length=8192, hardware=Hardware("cpu", memory_total=1), dtype=torch.bfloat16)
    assert "2,097,152 bytes would be held" in str(half.decision)


def test_a_policy_of_ones_own() -> None:
    policy = Policy(pool_lightweight_from=100, pool_full_from=200, pattern_cache=False)
    decision = make("attention", sequence_length=150, policy=policy).decision
    assert (decision.pool_mode, decision.pattern_cache) == ("lightweight", False)


def test_an_approximation_is_never_chosen_silently() -> None:
    decision = create_dilated_attention("auto", sequence_length=100_000).decision
    assert decision.attention_type == "improved"
    assert "allow_sparse=True was not given" in str(decision)


@pytest.mark.usefixtures("bare")
def test_an_approximation_that_is_not_installed_is_not_chosen() -> None:
    decision = create_dilated_attention("auto", sequence_length=100_000, allow_sparse=True).decision
    assert decision.attention_type == "improved"
    assert "dilated-factory[block-sparse]" in str(decision)


def test_a_decision_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="dilated_factory"):
        module = make("attention", sequence_length=16)
        for _ in range(2):
            module(*torch.randn(3, 1, 16, 2, 4))
    info, debug = caplog.records
    assert (info.levelno, debug.levelno) == (logging.INFO, logging.DEBUG)
    assert info.getMessage() == module.decision.summary()
    assert "\n" not in info.getMessage()
    assert debug.getMessage() == str(module.decision)


def test_a_decision_is_a_value() -> None:
    decision = make("attention").decision
    assert isinstance(decision, Decision)
    assert decision == make("attention").decision
    assert hash(decision) == hash(make("attention").decision)
    assert str(decision).splitlines()[1:] == [f"  - {reason}" for reason in decision.reasons]


def test_hardware_sees_the_process_group(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    assert (Hardware.detect().process_group, Hardware.detect().world_size) == (False, 1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert Hardware.detect("cpu").process_group
        decision = make("attention", sequence_length=8192).decision
        assert decision.attention_type == "improved"  # its ranks may well have a sequence each
    finally:
        torch.distributed.destroy_process_group()


def test_hardware_of_the_cpu() -> None:
    hardware = Hardware.detect("cpu")
    assert hardware.device_type == "cpu"
    assert hardware.device_name
    assert hardware.threads == torch.get_num_threads()
    assert hardware.memory_total is None or hardware.memory_total > 2**20


@pytest.mark.gpu
def test_hardware_of_the_gpu() -> None:
    hardware = Hardware.detect()
    assert hardware == Hardware.detect("cuda")
    assert hardware.device_name == torch.cuda.get_device_name()
    assert hardware.capability == ".".join(map(str, torch.cuda.get_device_capability()))
    assert hardware.memory_total == torch.cuda.get_device_properties(0).total_memory


@pytest.mark.gpu
@pytest.mark.parametrize("attention_type", TYPES)
def test_every_type_runs_on_the_gpu(attention_type: str) -> None:
    module = make("multihead", attention_type, embed_dim=64, device="cuda", dtype=torch.bfloat16, sequence_length=4096)
    x = torch.randn(2, 37, 64, device="cuda", dtype=torch.bfloat16)
    assert module(x, x, x)[0].isfinite().all()
    assert module.decision.kernel.startswith("cuda_")


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("attention", {"causal": True}, TypeError, '^causal: .*only softmax_scale.*did you mean "is_causal"'),
    ("attention", {"embed_dim": 8}, TypeError, "^embed_dim: .*create_multihead_dilated_attention has it"),
    ("attention", {"fused": False}, TypeError, "^fused: .*no such option"),
    ("attention", {"dropout": 0.0}, TypeError, '^dropout: .*did you mean "attention_dropout"'),
    ("attention", {"scale": 1.0}, TypeError, '^scale: .*did you mean "softmax_scale"'),
    ("attention", {"seq_length": 64}, TypeError, '^seq_length: .*did you mean "sequence_length"'),
    ("multihead", {"heads": 4}, TypeError, '^heads: .*only dropout, bias.*did you mean "num_heads"'),
    ("multihead", {"xyzzy": 4}, TypeError, "^xyzzy: .*, kernel, "),
    ("multihead", {"gama_init": 4}, TypeError, 'did you mean "gamma_init"'),
    ("multihead", {"embed_dim": None}, TypeError, "^embed_dim: expected a positive int, got None"),
    ("multihead", {"num_heads": None}, TypeError, "^num_heads: expected a positive int, got None"),
    ("multihead", {"embed_dim": 16.0}, TypeError, "^embed_dim: expected a positive int, got 16.0 of type float"),
    ("multihead", {"num_heads": 0}, ValueError, "^num_heads: expected a positive int, got 0"),
    ("multihead", {"num_heads": 3}, ValueError, "^embed_dim: expected a multiple of num_heads = 3, got 16"),
    ("multihead", {"dtype": "float32"}, TypeError, "^dtype: expected a torch.dtype or None, got 'float32'"),
    ("multihead", {"device": "gpu"}, ValueError, "^device: .*gpu"),
    ("attention", {"sequence_length": 0}, ValueError, "^sequence_length: expected a positive int, got 0"),
    ("attention", {"sequence_length": 8e3}, TypeError, "^sequence_length: expected a positive int, got 8000.0"),
    ("attention", {"sequence_length": True}, TypeError, "^sequence_length: expected a positive int"),
    ("attention", {"enable_memory_pool": 1}, TypeError, "^enable_memory_pool: expected True, False or None"),
    ("attention", {"lightweight_pool": "no"}, TypeError, "^lightweight_pool: expected True, False or None"),
    ("attention", {"enable_pattern_cache": 0}, TypeError, "^enable_pattern_cache: expected True, False or"),
    ("attention", {"allow_sparse": None}, TypeError, "^allow_sparse: expected a bool"),
    ("attention", {"policy": {"sparse_above": 1}}, TypeError, "^policy: expected a Policy or None"),
    ("attention", {"hardware": "cpu"}, TypeError, "^hardware: expected a Hardware or None"),
    ("attention", {"enable_memory_pool": False, "lightweight_pool": True}, ValueError, "contradict"),
    ("attention", {"segment_lengths": None}, ValueError, "^segment_lengths: expected one entry a branch"),
    ("attention", {"dilation_rates": None}, ValueError, "^dilation_rates: expected one entry a branch"),
    ("attention", {"segment_lengths": 4}, TypeError, "^segment_lengths: expected a sequence"),
    ("attention", {"segment_lengths": []}, ValueError, "^segment_lengths: expected at least one"),
    ("attention", {"dilation_rates": [1]}, ValueError, "expected one rate a segment length"),
    ("attention", {"dilation_rates": [1, 0]}, ValueError, r"^dilation_rates\[1\]: expected a positive int"),
    ("attention", {"dilation_rates": [1, 17]}, ValueError, r"^dilation_rates\[1\]: expected at most"),
    ("attention", {"kernel": "no_such"}, ValueError, "^kernel: expected one of"),
    ("attention", {"semantics": "no_such"}, ValueError, "^semantics: expected one of"),
]


@pytest.mark.parametrize(("form", "options", "error", "words"), BAD, ids=[f"{b[0]}-{b[1]}" for b in BAD])
def test_a_mistake_is_named(form: str, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(form, **options)


@pytest.mark.parametrize(
    "create",
    [
        lambda: create_dilated_attention("improved", [1, 2, 4], [2048, 4096, 8192]),
        lambda: create_multihead_dilated_attention("improved", 8, 2, [1, 2, 4], [2048, 4096, 8192]),
    ],
)
def test_swapped_lengths_and_rates_are_put_right(create: Callable[[], object]) -> None:
    cure = r"swapped: write segment_lengths=\[2048, 4096, 8192\], dilation_rates=\[1, 2, 4\]"
    with pytest.raises(ValueError, match=cure):
        create()
