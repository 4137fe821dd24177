"""`report`: what it finds in a model, its text, its JSON and its picture, and that asking changes nothing."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dilated_factory
from dilated_core import DilatedAttention
from dilated_factory import (
    Decision,
    LongNetLM,
    Policy,
    Report,
    SharedResources,
    create_dilated_attention,
    create_multihead_dilated_attention,
    report,
    shared_resources,
)
from dilated_factory.reporting import ModuleReport
from dilated_factory.reporting.layers import grouped
from dilated_factory.reporting.text import WIDTH, size
from dilated_memory_pool import MemoryPool
from dilated_memory_pool.attention import AttentionBufferManager
from dilated_pattern_cache import PatternCache

# No segment covers a whole number of times what these tests attend, so that results are summed in lent memory.
PATTERN: dict[str, Any] = {"segment_lengths": [60, 128], "dilation_rates": [1, 3]}
SHORT = Policy(pool_lightweight_from=50, pool_full_from=150)


def attention(**options: Any) -> nn.Module:
    return create_dilated_attention("improved", **{**PATTERN, "policy": SHORT, "profile": None, **options})


def multihead(**options: Any) -> nn.Module:
    sizes = {"embed_dim": 16, "num_heads": 4}
    return create_multihead_dilated_attention(
        "improved", **{**sizes, **PATTERN, "policy": SHORT, "profile": None, **options}
    )


def run(module: nn.Module, length: int = 101) -> None:
    module(*torch.randn(3, 1, length, 2, 4))


@pytest.fixture
def resources() -> SharedResources:
    return SharedResources("64MiB", min_bytes=0)


def test_every_decided_module_is_found_by_its_name(resources: SharedResources) -> None:
    model = nn.ModuleDict({"one": attention(resources=resources), "two": nn.Sequential(multihead(resources=resources))})
    found = report(model)
    assert found.title == "ModuleDict"
    assert [(one.name, one.class_name) for one in found.modules] == [
        ("one", "DilatedAttention"),
        ("two.0", "MultiheadDilatedAttention"),
    ]
    assert [one.decision for one in found.modules] == [model["one"].decision, model["two"][0].decision]
    assert [one.resources for one in found.modules] == [0, 0]
    assert len(found.resources) == 1


def test_numbers_are_those_of_the_pools_and_of_the_cache(resources: SharedResources) -> None:
    module = attention(resources=resources)
    for length in (101, 101, 201):
        run(module, length)
    (found,) = report(module).resources
    assert found.pools == resources.statistics()
    assert set(found.pools) == {("cpu", "lightweight"), ("cpu", "full")}
    assert found.kinds == {}
    assert (found.limit, found.limits, found.of_process) == ("64MiB", {"cpu": 2**26}, False)
    assert found.backends == resources.reasons()
    assert found.cache == resources.cache_info()
    assert found.cache.hits > 0


def test_kinds_of_buffers_are_told_apart_from_pools(resources: SharedResources) -> None:
    module = attention(resources=resources, buffer_manager=True)
    run(module)
    (found,) = report(module).resources
    assert found.pools == {}
    assert ("cpu", "output") in found.kinds
    assert "by kind" in str(report(module))
    assert "cpu output" in str(report(module))


def test_what_callers_gave_is_reported_beside() -> None:
    with MemoryPool("host", min_bytes=0) as pool, AttentionBufferManager("host") as manager:
        store = PatternCache()
        model = nn.ModuleList(
            [
                attention(allocator=pool, patterns=store),
                attention(allocator=pool, patterns=store),
                attention(allocator=manager, enable_pattern_cache=False),
                # Made without the factory, so without a decision.
                DilatedAttention([60, 128], [1, 3], allocator=pool),
            ]
        )
        for module in model:
            run(module)
        found = report(model)
        assert [(one.name, one.resources, one.own) for one in found.modules] == [
            ("0", None, ("allocator", "patterns")),
            ("1", None, ("allocator", "patterns")),
            ("2", None, ("allocator",)),
        ]
        assert found.resources == ()
        by_class = {one.class_name: one for one in found.own}
        assert by_class["MemoryPool"].modules == ("0", "1", "3")
        assert by_class["MemoryPool"].pools == {"": pool.statistics()}
        assert set(by_class["AttentionBufferManager"].pools) == {kind.value for kind in manager.statistics()}
        assert by_class["PatternCache"].cache == store.info()
        text = str(found)
    assert "MemoryPool of the caller's own, for 0, 1, 3" in text
    assert "PatternCache of the caller's own, for 0, 1" in text


def test_an_allocator_without_numbers_is_named_and_no_more() -> None:
    class Plain:
        def empty(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        def statistics(self) -> str:
            return "none to speak of"

    found = report(attention(allocator=Plain(), enable_pattern_cache=False))
    assert found.modules[0].own == ("allocator",)
    assert found.own == ()


def test_several_sets_of_resources_are_told_apart(resources: SharedResources) -> None:
    other = SharedResources(min_bytes=0)
    first, second = attention(resources=resources), attention(resources=other)
    run(first)
    found = report([first, second])
    assert found.title == "2 models"
    assert [(one.name, one.resources) for one in found.modules] == [("0", 0), ("1", 1)]
    assert [set(one.pools) for one in found.resources] == [{("cpu", "lightweight")}, set()]
    text = str(found)
    assert "Shared resources, set 0, of the caller's own" in text
    assert "Shared resources, set 1, of the caller's own" in text


def test_the_process_s_own_set_is_named_so() -> None:
    found = report(attention())
    assert found.resources[0].of_process
    assert "Shared resources, of this process" in str(found)


def test_a_module_in_two_places_counts_once(resources: SharedResources) -> None:
    shared = attention(resources=resources)
    assert len(report([shared, nn.Sequential(shared)]).modules) == 1


class Wrapper(nn.Module):
    """Answers with what it wraps, as torch.compile's modules do."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "wrapped" else getattr(self.wrapped, name)


def test_a_wrapped_module_counts_once(resources: SharedResources) -> None:
    wrapper = Wrapper(attention(resources=resources))
    assert isinstance(wrapper.decision, Decision)
    found = report(wrapper)
    assert [one.name for one in found.modules] == ["wrapped"]
    assert len(found.resources) == 1


def test_asking_changes_nothing(resources: SharedResources) -> None:
    module = attention(resources=resources)
    before = (set(vars(module)), dict(resources.statistics()), resources.cache_info(), module.decision)
    process = (shared_resources().statistics(), shared_resources().cache_info())
    str(report(module))
    report(module).to_json()
    assert before == (set(vars(module)), resources.statistics(), resources.cache_info(), module.decision)
    assert process == (shared_resources().statistics(), shared_resources().cache_info())
    assert resources.statistics() == {}
    run(module)
    numbers, lookups = resources.statistics(), resources.cache_info()
    assert numbers
    str(report(module))
    assert (numbers, lookups) == (resources.statistics(), resources.cache_info())


def test_a_model_without_a_decision_says_so() -> None:
    found = report(nn.Linear(2, 2))
    assert found == Report("Linear")
    assert str(found).startswith("Linear: no module with a decision; the creators of dilated_factory")
    assert found.to_dict()["modules"] == []


def test_a_whole_language_model(resources: SharedResources) -> None:
    model = LongNetLM(32, 16, 4, 12, [60, 128], [1, 3], resources=resources, policy=SHORT, profile=None)
    model(torch.zeros(1, 101, dtype=torch.int64))
    found = report(model)
    assert len(found.modules) == 12
    text = str(found)
    assert "LongNetLM: 12 modules with a decision" in text
    row = next(line for line in text.splitlines() if "layers.0-11.self_attn  x12" in line)
    assert row.split()[2:] == ["improved", found.modules[0].decision.kernel, "lightweight", "on", "101"]
    assert "pool: lightweight, 101 tokens is at or above 50 and below 150" in text
    (line,) = (line for line in text.splitlines() if line.strip().startswith("cpu lightweight"))
    now = resources.statistics()["cpu", "lightweight"]
    assert line.split()[2:] == [
        *size(now.allocated_bytes).split(),
        *size(now.reserved_bytes).split(),
        *size(now.peak_reserved_bytes).split(),
        f"{now.hit_rate:.1%}",
        "-",
        str(now.bypasses),
        "0",
    ]
    hits = resources.cache_info().hits
    assert f"({hits:,} hits" in text.replace("\n ", "")


def fixed(name: str, **changes: Any) -> ModuleReport:
    return ModuleReport(name, "Attention", replace(Decision("improved", "auto", "off", False, ("why",)), **changes))


def test_alike_layers_are_one_row() -> None:
    names = [f"blocks.{block}.layers.{layer}.attn" for block in range(2) for layer in (0, 1, 2, 5)]
    (group,) = grouped(tuple(map(fixed, names)))
    assert (group.name, len(group.modules)) == ("blocks.0-1.layers.0-2,5.attn", 8)


def test_a_range_names_no_layer_that_differs() -> None:
    layers = tuple(fixed(f"layers.{n}", pool_mode="full" if n == 2 else "off") for n in range(4))
    assert [group.name for group in grouped(layers)] == ["layers.0-1,3", "layers.2"]
    uneven = tuple(fixed(name) for name in ("a.0.b.0", "a.0.b.1", "a.1.b.0"))
    assert [group.name for group in grouped(uneven)] == ["a.0.b.0-1", "a.1.b.0"]
    assert [group.name for group in grouped((fixed(""),))] == ["(Attention)"]


def test_text_is_at_most_100_columns() -> None:
    long = ".".join(["transformer_encoder_with_a_long_name"] * 4)
    decision = Decision(
        "block_sparse_ring",
        "cuda_efficient",
        "lightweight",
        True,
        ("pool: " + "many words " * 30, "profile: " + "/a/long/path" * 20),
        sequence_length=123_456_789,
        unwired=("memory pool", "pattern cache"),
    )
    found = Report("Model", (ModuleReport(f"{long}.0", "Attention", decision),))
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= WIDTH == 100
    assert "lightweight*" in str(found)
    assert "* wished for by the policy and not wired" in str(found)


def test_json_has_a_version_and_everything(resources: SharedResources) -> None:
    module = attention(resources=resources)
    run(module)
    found = report(module)
    read = json.loads(found.to_json())
    assert read == json.loads(json.dumps(found.to_dict()))
    assert read["format"] == 1
    assert read["modules"][0]["decision"]["reasons"] == list(module.decision.reasons)
    assert read["modules"][0]["summary"] == module.decision.summary()
    (pool,) = read["resources"][0]["pools"]
    numbers = resources.statistics()["cpu", "lightweight"]
    assert (pool["device"], pool["mode"], pool["hits"]) == ("cpu", "lightweight", numbers.hits)
    assert (pool["hit_rate"], pool["waste"]) == (numbers.hit_rate, numbers.waste)
    assert read["resources"][0]["cache"]["misses"] == resources.cache_info().misses
    assert read["totals"]["hits"] == numbers.hits
    assert read["totals"]["reserved_bytes"] == numbers.reserved_bytes > 0


def test_totals_are_sums_over_pools(resources: SharedResources) -> None:
    one, by_kind = attention(resources=resources), attention(resources=resources, buffer_manager=True)
    for module in (one, by_kind):
        run(module)
        run(module, 201)
    totals = report([one, by_kind]).totals()
    numbers = resources.statistics().values()
    assert totals["misses"] == sum(now.misses for now in numbers)
    assert totals["bypasses"] == sum(now.bypasses for now in numbers)
    assert totals["cache_hits"] == resources.cache_info().hits


@pytest.mark.parametrize("model", [1, "model", [nn.Linear(1, 1), 2], None])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"^model: expected an nn.Module or several, got "):
        report(model)


def test_it_is_imported_when_asked_for() -> None:
    assert dilated_factory.report is report
    assert {"report", "Report"} <= set(dilated_factory.__all__)


def pixels(path: Path) -> Any:
    image = pytest.importorskip("matplotlib.image")
    return image.imread(path)


@pytest.mark.slow
def test_the_picture_shows_what_was_found(tmp_path: Path, resources: SharedResources) -> None:
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the import of matplotlib says about its own dependencies
        empty = pixels(report(nn.Linear(1, 1)).save_picture(tmp_path / "empty.png"))
    model = nn.ModuleList([attention(resources=resources), attention(resources=resources, buffer_manager=True)])
    for module in model:
        run(module)
    path = report(model).save_picture(str(tmp_path / "full.png"))
    assert path == tmp_path / "full.png"
    drawn = pixels(path)
    assert drawn.shape[1] == empty.shape[1] == 12 * 144

    def share(image: Any, colour: str) -> float:
        red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        near = abs(image[..., 0] - red) + abs(image[..., 1] - green) + abs(image[..., 2] - blue) < 0.02
        return float(near.mean())

    sky, green = "#56B4E9", "#009E73"
    assert share(drawn, sky) > 0.01  # the module with a lightweight pool
    assert share(drawn, green) > 0.01  # the one by kind, and the hit rates
    assert share(empty, sky) == share(empty, green) == 0


def test_without_matplotlib_a_picture_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'needs matplotlib, .*pip install "dilated-factory\[bench\]"'):
        Report("Model").save_picture(tmp_path / "never.png")
    assert not list(tmp_path.iterdir())
