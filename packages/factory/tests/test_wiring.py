"""What a created module is wired to: at every boundary of the policy, for every type, under every word of the caller.

The pools and the cache are the real ones, with no size below which a pool steps aside. Types over many devices run in a
group of one.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import multiprocessing
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from dilated_core import kernels
from dilated_core.kernels import Needs
from dilated_core.kernels.cpu_flash import CPUFlash
from dilated_factory import (
    Decision,
    LongNet,
    LongNetLM,
    Policy,
    Profile,
    SharedResources,
    create_dilated_attention,
    create_multihead_dilated_attention,
    registry,
    shared_resources,
)
from dilated_factory.hooks import PrecisionOfFloat32
from dilated_factory.hooks.calls import holder_of_kernel
from dilated_factory.hooks.lock import SWITCHING
from dilated_factory.profile import KernelRule
from dilated_factory.resources.handles import CachedPatterns, PooledAllocator
from dilated_memory_pool import MemoryPool
from dilated_memory_pool.attention import AttentionBufferManager
from dilated_pattern_cache import PatternCache

# Composed of torch operations, which allocate and plan for themselves: there is nothing to wire.
UNWIRED = ("standard",)
ALWAYS = ("ring", "distributed", "block_sparse", "block_sparse_ring")
WIRED = ("improved", *ALWAYS)
TYPES = (*UNWIRED, *WIRED)
LENGTHS = (511, 512, 2048, 4095, 4096, 8191, 8192, 65536)
WORDS = (None, True, False)
# No length above is a whole number of these segments, so that results are summed in lent memory.
PATTERN: dict[str, Any] = {"segment_lengths": [48, 200], "dilation_rates": [1, 4]}
# Quicker to compose; nothing is lent there.
LONGER: dict[str, Any] = {"segment_lengths": [128, 512], "dilation_rates": [1, 4]}
# The same three classes of length with shorter sequences.
SHORT = Policy(pool_lightweight_from=100, pool_full_from=200)
BY_CLASS = {"off": 51, "lightweight": 101, "full": 201}

every_type = pytest.mark.parametrize("name", TYPES)
every_wired_type = pytest.mark.parametrize("name", WIRED)
both_forms = pytest.mark.parametrize("form", ["attention", "multihead"])


@pytest.fixture(scope="module", autouse=True)
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The default group of the types over many devices."""
    if not distributed.is_available():
        yield
        return
    file = tmp_path_factory.mktemp("group") / "rendezvous"
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def resources() -> SharedResources:
    return SharedResources(min_bytes=0)


def make(name: str = "improved", form: str = "attention", **options: Any) -> nn.Module:
    if name not in registry.installed():
        pytest.skip(f"{name} is not installed")
    if "ring" in name and not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    pattern = LONGER if name in UNWIRED else PATTERN
    options = {**pattern, "profile": None, **options}
    if form == "attention":
        return create_dilated_attention(name, **options)
    return create_multihead_dilated_attention(name, **{"embed_dim": 8, "num_heads": 2, **options})


def run(module: nn.Module, length: int, heads: int = 1) -> Tensor:
    """One call without gradients."""
    with torch.no_grad():
        multihead = hasattr(module, "embed_dim")
        shape = (1, length, module.embed_dim) if multihead else (1, length, heads, 4)
        out = module(*torch.randn(3, *shape))
    result: Tensor = out[0] if multihead else out
    return result


def served(resources: SharedResources) -> set[str]:
    """The pools that have served requests; every pool there is has."""
    numbers = resources.statistics()
    assert all(now.hits + now.misses > 0 for now in numbers.values())
    assert all(device == "cpu" for device, _ in numbers)
    return {mode for _, mode in numbers}


def by_the_rule(name: str, length: int) -> str:
    """Off below 4,096 tokens, full from 8,192, lightweight between; never off for types that always have a pool."""
    if length >= 8192:
        return "full"
    return "lightweight" if length >= 4096 or name in ALWAYS else "off"


def by_the_words(name: str, length: int, enable: bool | None, lightweight: bool | None) -> str:
    """The caller's word first, then the rule."""
    mode = by_the_rule(name, length)
    if enable is False:
        return "off"
    if lightweight is True:
        return "lightweight"
    if enable is None and mode == "off":
        return "off"
    if lightweight is False:
        return "full"
    return "lightweight" if mode == "off" else mode


def active(mode: str) -> set[str]:
    return set() if mode == "off" else {mode}


# ------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("length", LENGTHS)
@every_type
def test_every_boundary_has_its_pool(name: str, length: int, resources: SharedResources) -> None:
    mode = by_the_rule(name, length)
    module = make(name, sequence_length=length, resources=resources)
    created = module.decision
    assert (created.attention_type, created.pool_mode, created.sequence_length) == (name, mode, length)
    assert resources.statistics() == {}  # made when used
    run(module, length)
    assert module.decision == created
    if name in UNWIRED:
        assert set(module.decision.unwired) == {"pattern cache", *(["memory pool"] if mode != "off" else [])}
        assert resources.statistics() == {}
        return
    assert module.decision.unwired == ()
    assert served(resources) == active(mode)
    hits = resources.cache_info().hits
    run(module, length)
    assert resources.cache_info().hits > hits


@pytest.mark.parametrize("length", [511, 4096, 8192])
@every_wired_type
def test_without_a_given_length_the_first_call_decides(name: str, length: int, resources: SharedResources) -> None:
    module = make(name, resources=resources)
    assert module.decision.sequence_length is None
    assert module.decision.pool_mode == ("lightweight" if name in ALWAYS else "off")
    run(module, length)
    mode = by_the_rule(name, length)
    assert (module.decision.pool_mode, module.decision.sequence_length) == (mode, length)
    assert served(resources) == active(mode)


@pytest.mark.parametrize("lightweight", WORDS)
@pytest.mark.parametrize("enable", WORDS)
@every_type
def test_the_callers_word_wins(name: str, enable: bool | None, lightweight: bool | None) -> None:
    words = {"enable_memory_pool": enable, "lightweight_pool": lightweight}
    if enable is False and lightweight is True:
        with pytest.raises(ValueError, match="enable_memory_pool=False and lightweight_pool=True contradict"):
            make(name, **words)
        return
    if name in UNWIRED and (enable or lightweight):
        word = "enable_memory_pool" if enable else "lightweight_pool"
        with pytest.raises(TypeError, match=f'^{word}: attention type "{name}" has no option allocator'):
            make(name, **words)
        return
    for length in (511, 8192) if name in UNWIRED else (511, 4096, 8192):
        resources = SharedResources(min_bytes=0)
        module = make(name, sequence_length=length, resources=resources, **words)
        mode = by_the_words(name, length, enable, lightweight)
        assert module.decision.pool_mode == mode
        run(module, length)
        assert module.decision.pool_mode == mode
        assert served(resources) == (set() if name in UNWIRED else active(mode))


@pytest.mark.parametrize("wanted", WORDS)
@every_type
def test_the_cache_is_on_unless_it_is_refused(name: str, wanted: bool | None, resources: SharedResources) -> None:
    if name in UNWIRED and wanted:
        with pytest.raises(TypeError, match=r'^enable_pattern_cache: attention type ".*" has no option patterns'):
            make(name, enable_pattern_cache=wanted)
        return
    module = make(name, enable_pattern_cache=wanted, resources=resources)
    on = wanted is not False
    assert module.decision.pattern_cache is on
    for _ in range(2):
        run(module, 511)
    assert (resources.cache_info().hits > 0) == (on and name not in UNWIRED)
    assert make(name, policy=Policy(pattern_cache=False)).decision.pattern_cache is False


@both_forms
@every_wired_type
def test_both_forms_are_wired(name: str, form: str, resources: SharedResources) -> None:
    module = make(name, form, policy=SHORT, resources=resources)
    for mode, length in BY_CLASS.items():
        run(module, length)
        assert module.decision.pool_mode == ("lightweight" if mode == "off" and name in ALWAYS else mode)
    assert served(resources) == {"lightweight", "full"}


@every_wired_type
def test_buffers_by_their_kind(name: str, resources: SharedResources) -> None:
    module = make(name, buffer_manager=True, sequence_length=511, resources=resources)
    assert module.decision.buffer_manager
    assert "pool by kind of buffer" in module.decision.summary()
    run(module, 511)
    numbers = resources.statistics()
    assert "output" in {kind for _, kind in numbers}
    assert not {kind for _, kind in numbers} & {"lightweight", "full"}
    assert all(now.hits + now.misses + now.bypasses > 0 for now in numbers.values())


def test_a_large_buffer_is_served_by_the_pool_of_its_kind(resources: SharedResources) -> None:
    module = make(buffer_manager=True, resources=resources)
    run(module, 65536, heads=2)
    assert resources.statistics()["cpu", "output"].misses > 0


def test_buffers_by_kind_need_a_type_that_takes_them() -> None:
    with pytest.raises(TypeError, match=r'^buffer_manager: attention type "standard" has no option allocator'):
        make("standard", buffer_manager=True)


@every_wired_type
def test_an_allocator_and_a_store_of_ones_own_win(name: str, resources: SharedResources) -> None:
    store = PatternCache()
    with MemoryPool("host", mode="lightweight", min_bytes=0) as pool:
        module = make(name, sequence_length=8192, allocator=pool, patterns=store, resources=resources)
        assert module.decision.pool_mode == "lightweight"  # the mode of the pool that was given
        for _ in range(2):
            run(module, 511)
        assert (module.decision.pool_mode, module.decision.pattern_cache) == ("lightweight", True)
        assert any("the caller's allocator" in reason for reason in module.decision.reasons)
        assert pool.statistics().misses > 0
    assert store.info().hits > 0
    assert resources.statistics() == {}
    assert resources.cache_info().misses == 0


def test_a_manager_of_ones_own_is_told_the_kinds(resources: SharedResources) -> None:
    with AttentionBufferManager("host") as manager:
        run(make(allocator=manager, resources=resources), 511)
        assert "output" in {kind.value for kind in manager.statistics()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"allocator": MemoryPool("host"), "enable_memory_pool": True},
            "^enable_memory_pool: expected None beside alloc",
        ),
        (
            {"allocator": MemoryPool("host"), "lightweight_pool": True},
            "^lightweight_pool: expected None beside allocator",
        ),
        ({"allocator": MemoryPool("host"), "buffer_manager": True}, "^buffer_manager: expected None beside allocator"),
        (
            {"patterns": PatternCache(), "enable_pattern_cache": True},
            "^enable_pattern_cache: expected None beside patt",
        ),
        (
            {"allocator": MemoryPool("host"), "enable_memory_pool": False},
            "^enable_memory_pool: expected None beside allocator, which is what is used, got False",
        ),
        ({"allocator": MemoryPool("host"), "lightweight_pool": False}, "^lightweight_pool: expected None beside alloc"),
        (
            {"patterns": PatternCache(), "enable_pattern_cache": False},
            "^enable_pattern_cache: expected None beside patterns, which is what is used, got False",
        ),
        ({"buffer_manager": True, "enable_memory_pool": False}, "^buffer_manager=True and enable_memory_pool=False"),
        ({"buffer_manager": True, "lightweight_pool": True}, "^buffer_manager=True and lightweight_pool contradict"),
    ],
)
def test_words_that_contradict_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"allocator": object()}, "^allocator: expected an object with empty, or None, got object"),
        ({"patterns": {}}, "^patterns: expected an object with get_or_create, or None, got dict"),
        ({"resources": {}}, "^resources: expected a SharedResources or None, got {}"),
        ({"profile": "mine"}, "^profile: expected a Profile, None or .user., got 'mine'"),
        ({"buffer_manager": None}, "^buffer_manager: expected a bool, got None"),
    ],
)
def test_what_is_no_resource_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        make(**options)


# ------------------------------------------------------------------------------------------------ results


def results(module: nn.Module, length: int, seed: int = 0) -> list[Tensor]:
    """Output and gradients, of inputs by a seed."""
    torch.manual_seed(seed)
    query, key, value = torch.randn(3, 1, length, 2, 4).requires_grad_().unbind()
    out = module(query, key, value)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), torch.randn_like(out))]


@pytest.mark.parametrize(("name", "is_causal"), [*((name, False) for name in WIRED), ("improved", True)])
def test_pools_change_no_bit(name: str, is_causal: bool, resources: SharedResources) -> None:
    plain = make(name, is_causal=is_causal, enable_memory_pool=False, enable_pattern_cache=False)
    expected = {length: results(plain, length) for length in BY_CLASS.values()}
    by_words = {
        "lightweight": {"lightweight_pool": True},
        "full": {"enable_memory_pool": True, "lightweight_pool": False},
        "by length": {"policy": SHORT},
        "by kind": {"buffer_manager": True},
    }
    for words, options in by_words.items():
        module = make(name, is_causal=is_causal, resources=resources, **options)
        # Some again: the second time in memory that holds what others left.
        for length in (51, 101, 201, 101) if words == "by length" else (101, 101):
            for place, (one, other) in enumerate(zip(results(module, length), expected[length], strict=True)):
                assert torch.equal(one, other), (words, length, ("out", "dq", "dk", "dv")[place])
    assert {"lightweight", "full", "output"} <= {mode_or_kind for _, mode_or_kind in resources.statistics()}


# ------------------------------------------------------------------------------------------------ calls that change


@every_wired_type
def test_calls_of_another_class_are_decided_anew(name: str, resources: SharedResources) -> None:
    module = make(name, policy=SHORT, resources=resources)
    short = "lightweight" if name in ALWAYS else "off"
    for mode in ("off", "lightweight", "full", "off", "full"):
        before = resources.statistics()
        run(module, BY_CLASS[mode])
        expected = short if mode == "off" else mode
        assert module.decision.pool_mode == expected
        after = resources.statistics()
        grown = {key[1] for key, now in after.items() if key not in before or now.hits > before[key].hits}
        assert grown == active(expected)
    assert f"pool: full, {'' if name not in ALWAYS else f'{name} always uses a pool; '}201 tokens" in str(
        module.decision
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_fork_decides_though_a_thread_was_deciding(resources: SharedResources) -> None:
    module = make(policy=SHORT, resources=resources)
    (hook,) = module._forward_pre_hooks.values()
    query = torch.empty(1, 101, 2, 4)
    child = multiprocessing.get_context("fork").Process(target=hook, args=(module, (query,), {}))
    with warnings.catch_warnings(), SWITCHING:  # as another thread does for a moment
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks of a process with threads
        child.start()
    child.join(20)
    if child.is_alive():
        child.kill()
        child.join(20)
    assert child.exitcode == 0


def test_a_class_keeps_its_decision(resources: SharedResources) -> None:
    module = make(policy=SHORT, resources=resources)
    run(module, 101)
    first = module.decision
    assert first.sequence_length == 101
    run(module, 150)
    assert module.decision is first
    run(module, 201)
    run(module, 199)
    assert module.decision is first


def test_what_does_not_go_by_length_stays_in_the_reasons(resources: SharedResources) -> None:
    module = make(policy=SHORT, sequence_length=51, resources=resources)
    before = module.decision
    run(module, 201)
    kept = [reason for reason in before.reasons if not reason.startswith("pool:")]
    assert [reason for reason in module.decision.reasons if not reason.startswith("pool:")] == kept
    assert len(module.decision.reasons) == len(before.reasons)


def test_one_line_at_creation_and_one_for_a_new_class(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="dilated_factory"):
        module = make(policy=SHORT, sequence_length=51, resources=SharedResources(min_bytes=0))
        info, debug = caplog.records
        assert (info.levelno, info.getMessage()) == (logging.INFO, module.decision.summary())
        assert (debug.levelno, debug.getMessage()) == (logging.DEBUG, str(module.decision))
        caplog.clear()
        run(module, 51)
        run(module, 99)
        assert caplog.records == []
        run(module, 101)
        info, debug = caplog.records
        assert (info.levelno, debug.levelno) == (logging.INFO, logging.DEBUG)
        assert info.getMessage() == f"at 101 tokens: {module.decision.summary()}"
        assert "pool: lightweight, 101 tokens is at or above 100 and below 200" in debug.getMessage()
        caplog.clear()
        for length in (101, 51, 199, 99, 101):
            run(module, length)
        assert caplog.records == []


def test_info_alone_has_no_reasons(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dilated_factory"):
        run(make(policy=SHORT, resources=SharedResources(min_bytes=0)), 201)
    assert len(caplog.records) == 2
    assert not any("\n" in record.getMessage() for record in caplog.records)


# ------------------------------------------------------------------------------------------------ copies


@both_forms
@every_wired_type
def test_a_copy_shares_the_resources_and_not_the_mode(name: str, form: str, resources: SharedResources) -> None:
    module = make(name, form, policy=SHORT, resources=resources)
    run(module, 101)
    twin = copy.deepcopy(module)
    assert twin.decision == module.decision
    run(twin, 201)
    assert (module.decision.pool_mode, twin.decision.pool_mode) == ("lightweight", "full")
    assert served(resources) == {"lightweight", "full"}
    before = resources.statistics()["cpu", "full"]
    run(module, 101)  # the twin's switch is its own
    assert resources.statistics()["cpu", "full"] == before


@both_forms
@pytest.mark.parametrize("name", ["standard", "improved", "ring", "block_sparse"])
def test_a_pickled_module_takes_the_process_s_own(name: str, form: str) -> None:
    module = make(name, form, policy=SHORT)
    run(module, 101)
    loaded = pickle.loads(pickle.dumps(module))
    assert loaded.decision == module.decision
    run(loaded, 201)
    if name in UNWIRED:
        return
    assert (module.decision.pool_mode, loaded.decision.pool_mode) == ("lightweight", "full")
    for part in loaded.modules():
        for handle in vars(part).values():
            if isinstance(handle, (PooledAllocator, CachedPatterns)):
                assert handle.resources is shared_resources()


def test_a_module_with_resources_of_its_own_is_not_pickled(resources: SharedResources) -> None:
    with pytest.raises(
        TypeError, match=r"of one's own cannot be pickled.*save its state_dict, or leave resources= out"
    ):
        pickle.dumps(make(resources=resources))


def test_a_state_dict_knows_nothing_of_the_wiring(resources: SharedResources) -> None:
    wired, plain = (
        make(form="multihead", resources=resources, enable_memory_pool=enable, fp32_precision="ieee")
        for enable in (True, False)
    )
    plain.load_state_dict(wired.state_dict())
    torch.manual_seed(0)
    x = torch.randn(1, 101, 8)
    assert torch.equal(wired(x, x, x)[0], plain(x, x, x)[0])


# ------------------------------------------------------------------------------------------------ tracing and modes


def quietly(work: Callable[[], Any]) -> Any:
    """What compilers say about themselves is not ours to judge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"), [("improved", "attention"), ("improved", "multihead"), ("block_sparse", "attention")]
)
def test_it_compiles_in_one_graph(name: str, form: str, resources: SharedResources) -> None:
    torch._dynamo.reset()
    module = make(name, form, policy=SHORT, resources=resources)
    inputs = torch.randn(3, 1, 101, 2, 4) if form == "attention" else torch.randn(3, 1, 101, 8)
    expected = module(*inputs)
    numbers = resources.statistics()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(quietly(lambda: compiled(*inputs)), expected)
    assert resources.statistics() == numbers  # pools step aside
    assert module.decision.pool_mode == "lightweight"


@both_forms
def test_it_exports(form: str, resources: SharedResources) -> None:
    module = make(form=form, policy=SHORT, resources=resources).eval()
    inputs = tuple(torch.randn(3, 1, 101, 2, 4) if form == "attention" else torch.randn(3, 1, 101, 8))
    exported = quietly(lambda: torch.export.export(module, inputs))
    torch.testing.assert_close(exported.module()(*inputs), module(*inputs))


@both_forms
def test_autocast(form: str, resources: SharedResources) -> None:
    wired = make(form=form, policy=SHORT, resources=resources)
    plain = make(form=form, enable_memory_pool=False, enable_pattern_cache=False)
    plain.load_state_dict(wired.state_dict())
    torch.manual_seed(0)
    inputs = torch.randn(3, 1, 101, 2, 4) if form == "attention" else torch.randn(3, 1, 101, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = wired(*inputs), plain(*inputs)
    if form == "multihead":
        out, expected = out[0], expected[0]
    assert torch.equal(out, expected)
    assert served(resources) == {"lightweight"}


def test_modules_move_and_change_their_dtype(resources: SharedResources) -> None:
    module = make(form="multihead", policy=SHORT, resources=resources)
    for dtype in (torch.float64, torch.bfloat16):
        module = module.to("cpu").to(dtype)
        x = torch.randn(1, 101, 8, dtype=dtype)
        assert module(x, x, x)[0].dtype is dtype
    module.half()
    assert module.decision.pool_mode == "lightweight"


def test_meta_tensors_need_no_pool(resources: SharedResources) -> None:
    module = make(form="multihead", policy=SHORT, resources=resources).to("meta")
    x = torch.empty(1, 101, 8, device="meta")
    assert module(x, x, x)[0].shape == x.shape
    assert resources.statistics() == {}


def test_a_default_device_of_meta_reaches_no_pool(resources: SharedResources) -> None:
    torch.set_default_device("meta")
    try:
        module = make(policy=SHORT, resources=resources)
        inputs = torch.randn(3, 1, 101, 2, 4, device="cpu")
        out = module(*inputs)
    finally:
        torch.set_default_device(None)
    assert out.device.type == "cpu"
    assert torch.equal(out, make(enable_memory_pool=False)(*inputs))
    assert served(resources) == {"lightweight"}


def test_training_after_inference_mode(resources: SharedResources) -> None:
    module = make(policy=SHORT, resources=resources)
    with torch.inference_mode():
        out = module(*torch.randn(3, 1, 101, 2, 4))
    del out
    first = results(module, 101)
    hits = resources.statistics()["cpu", "lightweight"].hits
    assert hits > 0  # in memory that inference used
    assert all(torch.equal(one, other) for one, other in zip(first, results(make(), 101), strict=True))


# ------------------------------------------------------------------------------------------------ types of others

OTHERS = """
from torch import nn

class Plain(nn.Module):
    def forward(self, query, key, value):
        return value

def attention(segment_lengths, dilation_rates):
    return Plain()

def multihead(embed_dim, num_heads, segment_lengths, dilation_rates):
    return Plain()
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A type that another distribution registers, without options."""
    info = tmp_path / "foreign_types-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-types\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\nforeign = foreign_types\n")
    (tmp_path / "foreign_types.py").write_text(OTHERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "foreign_types", raising=False)


@both_forms
@pytest.mark.usefixtures("foreign")
def test_what_a_type_cannot_take_is_said(form: str, resources: SharedResources) -> None:
    decision = make("foreign", form, sequence_length=8192, resources=resources).decision
    assert decision.unwired == ("memory pool", "pattern cache")
    assert "pool full (not wired), pattern cache on (not wired)" in decision.summary()
    assert sum("not wired" in reason for reason in decision.reasons) == 2
    quiet = make("foreign", form, enable_memory_pool=False, enable_pattern_cache=False).decision
    assert quiet.unwired == ()


@pytest.mark.parametrize("word", ["enable_memory_pool", "lightweight_pool", "enable_pattern_cache", "buffer_manager"])
@both_forms
@pytest.mark.usefixtures("foreign")
def test_what_was_asked_for_and_a_type_cannot_take_raises(form: str, word: str) -> None:
    with pytest.raises(TypeError, match=f'^{word}: attention type "foreign" has no option'):
        make("foreign", form, **{word: True})


# ------------------------------------------------------------------------------------------------ profiles


def profile(*rules: KernelRule, thresholds: tuple[int | None, int | None] | None = None) -> Profile:
    return Profile("here", "cpu", pool_thresholds=thresholds, kernels=rules, path="/profiles/mine.json")


TWO_KERNELS = profile(KernelRule("float32", 1, "math"), KernelRule("float32", 100, "cpu_flash"))


def kernel_of(module: nn.Module) -> str:
    name: str = holder_of_kernel(module).kernel
    return name


def kernels_used(module: nn.Module) -> list[str]:
    """The kernel that each call of the module has, as they come; outside of calls a profile leaves no trace."""
    used: list[str] = []
    module.register_forward_pre_hook(lambda called, _: used.append(kernel_of(called)))
    return used


@both_forms
@pytest.mark.parametrize("name", ["improved", "ring", "block_sparse"])
def test_a_profile_chooses_the_kernel_by_length_and_dtype(name: str, form: str) -> None:
    module = make(name, form, profile=TWO_KERNELS, resources=SharedResources(min_bytes=0))
    if module.decision.kernel not in ("auto", "cpu_flash"):
        pytest.skip("this CPU has no flash kernel")
    used = kernels_used(module)
    for length, kernel in ((51, "math"), (101, "cpu_flash"), (51, "math")):
        run(module, length)
        assert (module.decision.kernel, used[-1], kernel_of(module)) == (kernel, kernel, "auto")
        assert f"kernel: {kernel}, the profile's for float32 at {length:,} tokens" in module.decision.reasons
    assert module.decision.profile == "/profiles/mine.json"
    module.double()
    with torch.no_grad():
        module(*torch.randn(3, 1, 101, *((2, 4) if form == "attention" else (8,)), dtype=torch.float64))
    assert used[-1] == "auto"


def test_a_profiles_kernel_ends_with_the_call() -> None:
    module = make(profile=TWO_KERNELS, resources=SharedResources(min_bytes=0))
    run(module, 51)
    assert module.decision.kernel == "math"
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")  # where no hook looks
    inputs = torch.randn(3, 1, 51, 2, 4)
    torch.testing.assert_close(compiled(*inputs), make(profile=None)(*inputs))
    with pytest.raises(ValueError, match="value: expected the shape of key"):
        module(inputs[0], inputs[1, :, :7], inputs[2])
    assert kernel_of(module) == "auto"


def test_replicas_and_copies_of_a_module_choose_alike() -> None:
    module = make(profile=TWO_KERNELS, resources=SharedResources(min_bytes=0))
    for replica in (module._replicate_for_data_parallel(), copy.copy(module), copy.deepcopy(module)):
        used = kernels_used(replica)
        run(replica, 51)
        run(replica, 51)
        assert used[-1] == "math"


def test_a_profiles_thresholds_replace_the_policys(resources: SharedResources) -> None:
    measured = profile(thresholds=(None, 60))
    module = make(profile=measured, resources=resources)
    run(module, 59)
    assert module.decision.pool_mode == "off"
    run(module, 61)
    assert module.decision.pool_mode == "full"
    assert served(resources) == {"full"}
    own = make(profile=measured, policy=Policy(), sequence_length=61)
    assert own.decision.pool_mode == "off"  # the caller's policy goes before it


def test_a_kernel_of_the_callers_is_left_alone() -> None:
    module = make(profile=TWO_KERNELS, kernel="math", resources=SharedResources())
    run(module, 101)
    assert module.decision.kernel == kernel_of(module) == "math"


def test_a_kernel_that_cannot_run_is_not_taken() -> None:
    module = make(profile=profile(KernelRule("float32", 1, "cuda_flash")), resources=SharedResources())
    used = kernels_used(module)
    run(module, 51)
    assert module.decision.kernel == used[-1] == "auto"
    assert any("not cuda_flash, the profile's" in reason for reason in module.decision.reasons)


def test_a_profile_of_another_device_chooses_no_kernel() -> None:
    other = Profile("there", "cuda", kernels=(KernelRule("float32", 1, "math"),))
    module = make(profile=other, resources=SharedResources())
    used = kernels_used(module)
    run(module, 51)
    assert used[-1] == "auto"


def test_a_profiles_kernel_that_takes_no_mask_is_not_taken_beside_one(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = profile(KernelRule("float32", 1, "cpu_flash"))
    plain = kernels.table()[1].refusal
    inputs, real = torch.randn(3, 1, 51, 2, 4), torch.arange(51)[None] < 40
    module = make(profile=measured, resources=SharedResources())
    used = kernels_used(module)
    if module(*inputs) is None or used[-1] != "cpu_flash":
        pytest.skip("this CPU has no flash kernel")

    def refusal(self: Any, device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs) -> str | None:
        return "it takes no key padding mask" if needs.mask else plain(device, dtype, head_dim, needs)

    monkeypatch.setattr(CPUFlash, "refusal", refusal)  # as those for CUDA do
    out = module(*inputs, key_padding_mask=real)
    assert used[-1] == module.decision.kernel == "auto"
    assert torch.equal(out, make(kernel="math")(*inputs, key_padding_mask=real))
    module(*inputs)
    assert used[-1] == module.decision.kernel == "cpu_flash"
    layer = make(form="multihead", profile=measured, resources=SharedResources())
    layer(*torch.randn(3, 1, 51, 8), ~real)  # by its place
    assert layer.decision.kernel == "auto"


def test_meta_tensors_need_no_kernel_of_a_profile() -> None:
    module = make(profile=TWO_KERNELS, resources=SharedResources())
    assert module(*torch.empty(3, 1, 101, 2, 4, device="meta")).shape == (1, 101, 2, 4)
    assert kernel_of(module) == "auto"


@both_forms
@pytest.mark.parametrize("called", [False, True])
def test_a_kernel_set_after_creation_is_left_alone(form: str, called: bool) -> None:
    module = make("improved", form, profile=TWO_KERNELS, policy=SHORT, resources=SharedResources(min_bytes=0))
    if called:
        run(module, 101)
    (module if form == "attention" else module.attention).kernel = "cpu_matmul" if called else "math"
    word = kernel_of(module)
    for length, mode in ((51, "off"), (201, "full"), (101, "lightweight")):
        with contextlib.suppress(ValueError):  # that kernel takes bfloat16
            run(module, length)
        assert (kernel_of(module), module.decision.kernel, module.decision.pool_mode) == (word, word, mode)
    assert f'kernel: "{word}" was set on the module' in module.decision.reasons


KERNEL_OF_ITS_OWN = OTHERS.replace("dilation_rates):", "dilation_rates, kernel=3):")


@both_forms
@pytest.mark.usefixtures("foreign")
def test_a_kernel_that_means_something_else_is_left_alone(form: str, tmp_path: Path) -> None:
    (tmp_path / "foreign_types.py").write_text(KERNEL_OF_ITS_OWN)
    module = make("foreign", form, profile=TWO_KERNELS)
    assert torch.equal(module(*torch.ones(3, 1, 101, 2, 4)), torch.ones(1, 101, 2, 4))
    assert not module._forward_pre_hooks


@both_forms
@pytest.mark.usefixtures("foreign")
def test_a_kernel_of_a_type_with_any_option_is_not_foreseen(form: str, tmp_path: Path) -> None:
    (tmp_path / "foreign_types.py").write_text(OTHERS.replace("dilation_rates):", "dilation_rates, **options):"))
    decision = make("foreign", form).decision
    assert decision.kernel == "auto"
    assert "kernel: left to the type, which has no kernel option" in decision.reasons


# ------------------------------------------------------------------------------------------------ float32 precision


def switch() -> Any:
    return torch.backends.mkldnn.matmul


def seen_by(module: nn.Module) -> list[str]:
    """The precisions during the calls of a multi-head module."""
    found: list[str] = []
    module.q_proj.register_forward_hook(lambda *_: found.append(switch().fp32_precision))
    return found


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_a_precision_is_of_the_call_alone(precision: str) -> None:
    before = switch().fp32_precision
    module = make(form="multihead", fp32_precision=precision)
    found = seen_by(module)
    run(module, 51)
    assert found == [precision]
    assert switch().fp32_precision == before
    with pytest.raises((TypeError, ValueError)):
        module(torch.randn(1, 51, 9), torch.randn(1, 51, 9), torch.randn(1, 51, 9))
    assert switch().fp32_precision == before


def test_a_call_inside_a_call_has_its_own_precision() -> None:
    before = switch().fp32_precision
    outer = make(form="multihead", fp32_precision="tf32")
    inner = make(form="multihead", fp32_precision="ieee")
    found, inside = seen_by(outer), seen_by(inner)

    def call_inner(*_: Any) -> None:
        run(inner, 51)

    outer.q_proj.register_forward_pre_hook(call_inner)
    run(outer, 51)
    assert (found, inside) == (["tf32"], ["ieee"])
    assert switch().fp32_precision == before


def test_calls_that_overlap_leave_the_switch_as_it_was() -> None:
    before = switch().fp32_precision
    first, second = PrecisionOfFloat32("tf32"), PrecisionOfFloat32("ieee")
    module, args = nn.Identity(), (torch.zeros(1),)
    first.enter(module, args, {})
    second.enter(module, args, {})
    first.leave(module, args, None)
    assert switch().fp32_precision == "ieee"  # the second call is still under way
    second.leave(module, args, None)
    assert switch().fp32_precision == before


def test_a_precision_reached_by_keywords() -> None:
    module = make(form="multihead", fp32_precision="tf32")
    found = seen_by(module)
    x = torch.randn(1, 51, 8)
    module(query=x, key=x, value=x)
    assert found == ["tf32"]


@pytest.mark.parametrize("precision", ["TF32", "fp32", "", True])
def test_a_precision_that_is_none_is_refused(precision: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^fp32_precision: expected None or one of"):
        make(fp32_precision=precision)


def test_a_compiled_graph_cannot_switch_the_precision() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(make(fp32_precision="tf32"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"fp32_precision: a compiled graph cannot switch it; leave it out"):
        quietly(lambda: compiled(*torch.randn(3, 1, 51, 2, 4)))


# ------------------------------------------------------------------------------------------------ layouts


def test_heads_in_the_place_of_the_sequence_warn_once() -> None:
    module = make(sequence_length=300, resources=SharedResources())
    with pytest.warns(
        UserWarning, match=r"300 heads of 4 tokens; if it is \(batch, heads, seq, head_dim\), write query"
    ):
        module(*torch.randn(3, 1, 4, 300, 8))
    module(*torch.randn(3, 1, 4, 300, 8))  # the class of length is known now


def test_more_heads_than_any_model_has_warn_without_a_length() -> None:
    with pytest.warns(UserWarning, match=r"got \(1, 4, 257, 8\)"):
        make(resources=SharedResources())(*torch.randn(3, 1, 4, 257, 8))


def test_a_warning_names_the_line_of_the_call() -> None:
    module = make(sequence_length=16)
    with pytest.warns(UserWarning, match="write query.transpose") as caught:
        module(*torch.zeros(3, 1, 2, 16, 4))
    assert caught[0].filename == __file__


def test_a_step_of_generation_has_one_token_without_a_warning() -> None:
    module = make(form="multihead", sequence_length=8, is_causal=True).eval()
    with torch.no_grad():
        module(torch.randn(8, 1, 8), cache=module.new_cache(8))


def test_a_batch_in_the_place_of_the_sequence_warns() -> None:
    module = make(form="multihead", sequence_length=51, resources=SharedResources())
    x = torch.randn(51, 2, 8)
    with pytest.warns(UserWarning, match=r"51 sequences of 2 tokens.*write query.transpose\(0, 1\)"):
        module(x, x, x)


@pytest.mark.parametrize(
    ("length", "shape"), [(51, (1, 51, 51, 4)), (51, (51, 51, 2, 4)), (51, (1, 99, 2, 4)), (None, (1, 4, 256, 4))]
)
def test_a_layout_that_may_be_meant_does_not_warn(length: int | None, shape: tuple[int, ...]) -> None:
    make(sequence_length=length, resources=SharedResources())(*torch.randn(3, *shape))  # warnings are errors here


# ------------------------------------------------------------------------------------------------ models


def test_a_language_model_trains_and_generates_with_pools(resources: SharedResources) -> None:
    def model(**options: Any) -> LongNetLM:
        torch.manual_seed(0)
        return LongNetLM(32, 16, 4, 2, [48, 200], [1, 4], policy=SHORT, profile=None, resources=resources, **options)

    wired, plain = model(), model(enable_memory_pool=False, enable_pattern_cache=False)
    tokens = torch.randint(0, 32, (1, 101), generator=torch.Generator().manual_seed(1))
    cotangent = torch.randn(1, 101, 32, generator=torch.Generator().manual_seed(2))
    for each in (wired, plain):
        (each(tokens) * cotangent).sum().backward()
    for (name, one), other in zip(wired.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None, name
        assert torch.equal(one.grad, other.grad), name
    assert served(resources) == {"lightweight"}
    assert torch.equal(*(each.generate(tokens, 3, temperature=0.0) for each in (wired, plain)))
    decisions = [module.decision for module in wired.modules() if isinstance(vars(module).get("decision"), Decision)]
    assert len(decisions) == 2
    assert len(set(decisions)) == 1


def test_an_encoder_takes_the_options_too(resources: SharedResources) -> None:
    encoder = LongNet(16, 4, 1, [48, 200], [1, 4], policy=SHORT, profile=None, resources=resources)
    encoder(torch.randn(2, 201, 16))
    assert served(resources) == {"full"}
