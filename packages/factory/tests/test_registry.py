"""Discovery through real metadata: distributions written to a folder that is put on the path."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dilated_factory import NotInstalledError, create_dilated_attention, create_multihead_dilated_attention, registry

MODULE = """
from torch import nn

class Answer(nn.Module):
    def __init__(self, **made_with):
        super().__init__()
        self.made_with = made_with

    def forward(self, query, key, value):
        return value

def attention(segment_lengths, dilation_rates, *, window=3, group=None):
    return Answer(segment_lengths=segment_lengths, dilation_rates=dilation_rates, window=window)

def multihead(embed_dim, num_heads, segment_lengths, dilation_rates, **options):
    return Answer(embed_dim=embed_dim, num_heads=num_heads, **options)
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Write a distribution with one module and the given entry points, and put it on the path."""

    def write(distribution: str, module: str, source: str = MODULE, **entries: str) -> None:
        folder = tmp_path / distribution
        info = folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        lines = [f"{name} = {target}" for name, target in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines]) + "\n")
        (folder / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return write


def test_what_this_distribution_provides() -> None:
    found = registry.installed()
    assert list(found)[:2] == ["standard", "improved"]
    for name in ("standard", "improved"):
        assert found[name].target == f"dilated_factory.types:{name}"
        assert found[name].distribution == "dilated-factory"


def test_a_third_party_type_is_built_like_any_other(install: Install) -> None:
    install("Other.Attention", "other_attention_a", windowed="other_attention_a")
    assert registry.installed()["windowed"] == registry.Registration(
        "windowed", "other_attention_a", "other-attention", "1.2"
    )
    assert "other_attention_a" not in sys.modules, "looking must not import"

    single = create_dilated_attention("windowed", [4, 8], [1, 2], window=5, sequence_length=4096)
    assert single.made_with == {"segment_lengths": (4, 8), "dilation_rates": (1, 2), "window": 5}
    assert single.decision.attention_type == "windowed"
    assert single.decision.pool_mode == "lightweight"
    assert "no kernel option" in str(single.decision)

    multihead = create_multihead_dilated_attention("windowed", 8, 2, [4], [1], anything=1)
    assert multihead.made_with == {"embed_dim": 8, "num_heads": 2, "anything": 1}

    with pytest.raises(TypeError, match='width: attention type "windowed" has no such option, only window'):
        create_dilated_attention("windowed", [4], [1], width=5)


def test_nothing_is_imported_until_asked_for(install: Install) -> None:
    install("breaks", "breaks_on_import", "raise RuntimeError('imported')", fragile="breaks_on_import")
    assert "fragile" in registry.installed()
    create_dilated_attention("improved", [4], [1])
    with pytest.raises(RuntimeError, match="imported"):
        create_dilated_attention("fragile", [4], [1])


@pytest.mark.parametrize(
    ("source", "target", "error", "words"),
    [
        ("import no_such_module", "bad_type", ImportError, r"of bad-type \(bad_type\) cannot be imported: No mod"),
        ("", "bad_type:missing", ImportError, "cannot be imported: .*has no attribute 'missing'"),
        ("", "bad_type", TypeError, "expected callables attention and multihead, attention is none"),
        ("def attention(): pass", "bad_type", TypeError, "multihead is none"),
    ],
)
def test_a_type_that_does_not_load_names_its_distribution(
    install: Install, source: str, target: str, error: type[Exception], words: str
) -> None:
    install("bad-type", "bad_type", source, bad=target)
    with pytest.raises(error, match=words):
        create_dilated_attention("bad", [4], [1])


def test_a_duplicate_name_warns_and_says_who_won(install: Install) -> None:
    install("zebra", "zebra_types", twice="zebra_types")
    install("aardvark", "aardvark_types", twice="aardvark_types")
    with pytest.warns(UserWarning, match='"twice" is registered by aardvark and by zebra; aardvark wins'):
        found = registry.installed()
    assert found["twice"].outvoted == ("zebra",)
    assert found["twice"].target == "aardvark_types"


def test_the_projects_own_distribution_wins_its_names(install: Install) -> None:
    install("aardvark", "aardvark_improved", improved="aardvark_improved")
    with pytest.warns(UserWarning, match="dilated-factory and by aardvark; dilated-factory wins"):
        attention = create_dilated_attention("improved", [4], [1])
    assert type(attention).__name__ == "DilatedAttention"


def test_auto_is_the_factorys_own_word(install: Install) -> None:
    install("aardvark", "aardvark_auto", auto="aardvark_auto")
    with pytest.warns(UserWarning, match='"auto" is registered by aardvark, which is ignored'):
        assert "auto" not in registry.installed()


def test_an_installed_ring_is_found_and_used_by_auto(install: Install) -> None:
    from dilated_factory import Hardware

    install("dilated-ring", "ring_types", ring="ring_types")
    grouped = Hardware("cpu", process_group=True, world_size=2)
    decision = create_dilated_attention("auto", sequence_length=8192, hardware=grouped).decision
    assert decision.attention_type == "improved"
    assert "not ring, though a process group of 2 ranks is initialised" in str(decision)
    for length, mode in ((511, "lightweight"), (8192, "full")):
        decision = create_dilated_attention("auto", sequence_length=length, hardware=grouped, group="world").decision
        assert (decision.attention_type, decision.pool_mode) == ("ring", mode)
    assert create_dilated_attention("ring", sequence_length=511).decision.pool_mode == "lightweight"


def test_an_installed_block_sparse_is_found_and_chosen_only_where_that_is_allowed(install: Install) -> None:
    entries = {"block_sparse": "sparse_types", "block_sparse_ring": "sparse_types"}
    install("dilated-ring", "dilated_ring", ring="dilated_ring")
    install("dilated-block-sparse", "sparse_types", **entries)
    assert [name for name in registry.installed() if name.startswith("block")] == list(entries)
    decision = create_dilated_attention("block_sparse", [4], [1], window=5).decision
    assert (decision.attention_type, decision.pool_mode) == ("block_sparse", "lightweight")
    assert create_dilated_attention("auto", sequence_length=100_000).decision.attention_type == "improved"
    allowed = create_multihead_dilated_attention("auto", 8, 2, sequence_length=100_000, allow_sparse=True)
    assert (allowed.decision.attention_type, allowed.decision.pool_mode) == ("block_sparse", "full")
    sharded = create_dilated_attention("auto", sequence_length=100_000, allow_sparse=True, group="world")
    assert sharded.decision.attention_type == "block_sparse_ring"


@pytest.mark.usefixtures("bare")
def test_block_sparse_ring_is_not_there_without_a_ring(install: Install) -> None:
    install("dilated-block-sparse", "sparse_types", block_sparse="sparse_types", block_sparse_ring="sparse_types")
    assert "block_sparse" in registry.installed()
    assert "block_sparse_ring" not in registry.installed()
    with pytest.raises(NotInstalledError, match=r"needs dilated-ring, which is not installed: .*\[block-sparse,ring\]"):
        create_dilated_attention("block_sparse_ring", [4], [1])
    with pytest.raises(NotInstalledError, match=r'"ring" is provided by dilated-ring, which is not installed'):
        create_dilated_attention("auto", sequence_length=100_000, allow_sparse=True, group="world")


@pytest.mark.usefixtures("bare")
def test_another_distributions_block_sparse_ring_needs_no_ring_of_ours(install: Install) -> None:
    install("other-attention", "other_types", block_sparse_ring="other_types")
    assert registry.installed()["block_sparse_ring"].distribution == "other-attention"


@pytest.mark.usefixtures("bare")
def test_a_distribution_installed_later_is_found(install: Install) -> None:
    with pytest.raises(NotInstalledError):
        create_dilated_attention("ring", [4], [1])
    install("dilated-ring", "later_ring", ring="later_ring")
    assert create_dilated_attention("ring", [4], [1]).decision.attention_type == "ring"


@pytest.mark.parametrize(
    ("name", "distribution", "command"),
    [
        ("ring", "dilated-ring", 'pip install "dilated-factory[ring]"'),
        ("distributed", "dilated-ring", 'pip install "dilated-factory[ring]"'),
        ("block_sparse", "dilated-block-sparse", 'pip install "dilated-factory[block-sparse]"'),
        ("block_sparse_ring", "dilated-block-sparse", 'pip install "dilated-factory[block-sparse,ring]"'),
    ],
)
@pytest.mark.usefixtures("bare")
def test_a_known_type_that_is_not_installed_names_the_extra(name: str, distribution: str, command: str) -> None:
    for create in (
        lambda: create_dilated_attention(name, [4], [1]),
        lambda: create_multihead_dilated_attention(name, 8, 2, [4], [1]),
    ):
        with pytest.raises(NotInstalledError) as raised:
            create()
        assert isinstance(raised.value, ImportError)
        assert distribution in str(raised.value)
        assert command in str(raised.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("improve", "improved"),
        ("Standard", "standard"),
        ("block-sparse", "block_sparse"),
        ("rings", "ring"),
        ("atuo", "auto"),
    ],
)
def test_an_unknown_name_gets_the_list_and_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f'did you mean "{near}"') as raised:
        create_dilated_attention(name, [4], [1])
    for known in ("auto", *registry.KNOWN):
        assert f"'{known}'" in str(raised.value)


def test_a_name_like_no_other_gets_the_list_alone() -> None:
    with pytest.raises(ValueError, match="expected one of") as raised:
        create_dilated_attention("xyzzy", [4], [1])
    assert "did you mean" not in str(raised.value)


@pytest.mark.parametrize("name", [None, 3, torch.nn.Linear])
def test_a_name_that_is_no_string(name: object) -> None:
    with pytest.raises(TypeError, match="attention_type: expected a str"):
        create_dilated_attention(name, [4], [1])  # type: ignore[arg-type]


def test_the_usual_case_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.installed()
