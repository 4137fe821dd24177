"""Mistakes people make, through the creators: the message names the argument, what was expected and what came.

What a newcomer types is tried on every type that can be had here; the types over many devices run on ranks that are
threads of this process, or in a group of one.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from dilated_factory import (
    NotInstalledError,
    create_dilated_attention,
    create_multihead_dilated_attention,
    registry,
)

HERE = ("standard", "improved")
OF_RANKS = ("ring", "distributed", "block_sparse_ring")
EVERY = (*HERE, *OF_RANKS, "block_sparse")
WAIT = 120.0  # seconds after which ranks that hang fail


@pytest.fixture
def others() -> None:
    """The other types, imported before anything is timed out or spawned."""
    for module in ("dilated_ring", "dilated_block_sparse"):
        importlib.import_module(module)


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    """An initialised default group in which this process is alone."""
    if not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def single(attention_type: str = "improved", **options: Any) -> torch.nn.Module:
    return create_dilated_attention(attention_type, **{"segment_lengths": [4, 16], "dilation_rates": [1, 3], **options})


def multihead(attention_type: str = "improved", **options: Any) -> torch.nn.Module:
    sizes = {"embed_dim": 16, "num_heads": 4, "segment_lengths": [4, 16], "dilation_rates": [1, 3]}
    return create_multihead_dilated_attention(attention_type, **{**sizes, **options})


def heads(number: int = 4, batch: int = 2, length: int = 16, **options: Any) -> torch.Tensor:
    return torch.randn(batch, length, number, 4, **options)


Make = Callable[[str], object]
# What is wrong, and what the message says; each is tried with every type.
AT_CREATION: dict[str, tuple[Make, type[Exception], str]] = {
    "lengths and rates swapped": (
        lambda name: single(name, segment_lengths=[1, 3], dilation_rates=[4, 16]),
        ValueError,
        "segment_lengths and dilation_rates look swapped: write segment_lengths=[4, 16], dilation_rates=[1, 3]",
    ),
    "lengths and rates swapped, multihead": (
        lambda name: multihead(name, segment_lengths=[1, 3], dilation_rates=[4, 16]),
        ValueError,
        "segment_lengths and dilation_rates look swapped: write segment_lengths=[4, 16], dilation_rates=[1, 3]",
    ),
    "one rate for two lengths": (
        lambda name: single(name, dilation_rates=[1]),
        ValueError,
        "segment_lengths and dilation_rates: expected one rate a segment length, got 2 lengths [4, 16] and 1 rates [1]",
    ),
    "heads that do not divide": (
        lambda name: multihead(name, num_heads=3),
        ValueError,
        "embed_dim: expected a multiple of num_heads = 3, got 16",
    ),
    "kv_heads that do not divide": (
        lambda name: multihead(name, kv_heads=3),
        ValueError,
        "kv_heads: expected a divisor of num_heads = 4, got 3",
    ),
    "more kv_heads than heads": (
        lambda name: multihead(name, kv_heads=8),
        ValueError,
        "kv_heads: expected a divisor of num_heads = 4, got 8",
    ),
    "kv_heads as a float": (
        lambda name: multihead(name, kv_heads=2.0),
        TypeError,
        "kv_heads: expected a positive int, got 2.0 of type float",
    ),
}

AT_THE_CALL: dict[str, tuple[Make, type[Exception], str]] = {
    "key heads that differ": (
        lambda name: single(name)(heads(), heads(2), heads(2)),
        ValueError,
        "key: expected the heads of query, 4, got 2 (grouped heads need enable_gqa=True)",
    ),
    "key heads that do not divide": (
        lambda name: single(name, enable_gqa=True)(heads(), heads(3), heads(3)),
        ValueError,
        "key: expected kv_heads that divide the 4 heads of query, got 3",
    ),
    "a key on another device": (
        lambda name: single(name)(heads(), heads(device="meta"), heads()),
        ValueError,
        "key: expected the device of query, cpu, got meta",
    ),
    "a value of another dtype": (
        lambda name: single(name)(heads(), heads(), heads(dtype=torch.float64)),
        TypeError,
        "value: expected the dtype of query, torch.float32, got torch.float64",
    ),
    "integers": (
        lambda name: single(name)(*[torch.ones(2, 16, 4, 4, dtype=torch.int32)] * 3),
        TypeError,
        "query: expected float64, float32, bfloat16 or float16, got torch.int32",
    ),
    "tokens on another device than the weights": (
        lambda name: multihead(name)(torch.randn(2, 16, 16, device="meta")),
        ValueError,
        "query: expected the device of the weights, cpu, got meta (move one of them: ",
    ),
    "tokens of another dtype than the weights": (
        lambda name: multihead(name)(torch.randn(2, 16, 16, dtype=torch.float64)),
        TypeError,
        "query: expected the dtype of the weights, torch.float32, got torch.float64 (cast one of them: ",
    ),
    "tokens of another width": (
        lambda name: multihead(name)(torch.randn(2, 16, 12)),
        ValueError,
        "query: expected shape (batch, seq, embed_dim = 16), the same for query, key and value, got (2, 16, 12)",
    ),
    "no batch": (
        lambda name: multihead(name)(torch.randn(16, 16)),
        ValueError,
        "query: expected shape (batch, seq, embed_dim = 16), the same for query, key and value, got (16, 16)",
    ),
    "a mask of numbers": (
        lambda name: multihead(name)(torch.randn(2, 16, 16), key_padding_mask=torch.ones(2, 16)),
        TypeError,
        "key_padding_mask: expected a bool tensor",
    ),
    "a mask of integers, as tokenizers give": (
        lambda name: single(name)(*[heads()] * 3, key_padding_mask=torch.ones(2, 16, dtype=torch.int64)),
        TypeError,
        "key_padding_mask: expected a bool tensor",
    ),
    "a transposed mask": (
        lambda name: multihead(name)(torch.randn(2, 16, 16), key_padding_mask=torch.zeros(16, 2, dtype=torch.bool)),
        ValueError,
        "key_padding_mask: expected shape (batch, seq) = (2, 16), got (16, 2)",
    ),
    "a mask of scores": (
        lambda name: single(name)(*[heads()] * 3, key_padding_mask=torch.ones(2, 4, 16, 16, dtype=torch.bool)),
        ValueError,
        "key_padding_mask: expected shape (batch, seq) = (2, 16), got (2, 4, 16, 16)",
    ),
    "a mask on another device": (
        lambda name: multihead(name)(
            torch.randn(2, 16, 16), key_padding_mask=torch.zeros(2, 16, dtype=torch.bool, device="meta")
        ),
        ValueError,
        "key_padding_mask: expected the device of key, cpu, got meta",
    ),
    "an attn_mask": (
        lambda name: multihead(name)(torch.randn(2, 16, 16), attn_mask=torch.zeros(16, 16)),
        ValueError,
        "attn_mask: expected None, there is no further mask (is_causal is one)",
    ),
    "weights": (
        lambda name: multihead(name)(torch.randn(2, 16, 16), need_weights=True),
        ValueError,
        "need_weights: expected False, weights are never formed",
    ),
}


def check(make: Make, name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as raised:
        make(name)
    assert str(raised.value).startswith(words)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(("make", "error", "words"), AT_CREATION.values(), ids=AT_CREATION)
def test_a_mistake_at_creation(make: Make, error: type[Exception], words: str, name: str) -> None:
    check(make, name, error, words)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(("make", "error", "words"), AT_THE_CALL.values(), ids=AT_THE_CALL)
def test_a_mistake_at_the_call(make: Make, error: type[Exception], words: str, name: str) -> None:
    check(make, name, error, words)


@pytest.mark.usefixtures("others", "group_of_one")
@pytest.mark.parametrize("name", [name for name in EVERY if name not in HERE])
def test_every_other_type_says_the_same(name: str) -> None:
    for make, error, words in (*AT_CREATION.values(), *AT_THE_CALL.values()):
        check(make, name, error, words)


def test_lengths_and_rates_that_only_look_unusual_are_taken_as_they_are() -> None:
    # Swapped they would be a pattern too, so nothing says which was meant.
    assert single(segment_lengths=[4, 8], dilation_rates=[4, 8]).pattern.dilation_rates == (4, 8)


@pytest.mark.parametrize("name", HERE)
def test_the_two_senses_of_a_mask_are_each_others_opposite(name: str) -> None:
    # A mask in the wrong sense is a valid one: nothing can refuse it. What can be shown is which sense is which.
    torch.manual_seed(0)
    x, real = torch.randn(1, 16, 16), (torch.arange(16) < 9).unsqueeze(0)
    module = multihead(name, layer_norm=False)
    out, _ = module(x, key_padding_mask=~real)
    torch.testing.assert_close(out[:, :9], module(x[:, :9])[0])
    q, k, v = torch.randn(3, 1, 16, 4, 4)
    apart = single(name)
    torch.testing.assert_close(apart(q, k, v, key_padding_mask=real)[:, :9], apart(q[:, :9], k[:, :9], v[:, :9]))


@pytest.mark.parametrize("name", HERE)
def test_a_mask_of_padding_alone_attends_nothing(name: str) -> None:
    padding = torch.ones(2, 16, dtype=torch.bool)
    attended = single(name)(*[heads()] * 3, key_padding_mask=~padding)
    assert not attended.any()
    assert multihead(name)(torch.randn(2, 16, 16), key_padding_mask=padding)[0].isfinite().all()


NAMES = {
    "imporved": "improved",
    "Improved": "improved",
    "blocksparse": "block_sparse",
    "block-sparse": "block_sparse",
    "blocksparse_ring": "block_sparse_ring",
    "Distributed": "distributed",
    "ring_attention": "ring",
    "block_sparse_attention": "block_sparse",
}


@pytest.mark.parametrize("create", [single, multihead], ids=["single", "multihead"])
@pytest.mark.parametrize("name", NAMES)
def test_a_type_misspelled(name: str, create: Make) -> None:
    with pytest.raises(ValueError, match=r"^attention_type: expected one of \['auto', 'standard', ") as raised:
        create(name)
    assert str(raised.value).endswith(f"got '{name}'; did you mean \"{NAMES[name]}\"?")


def test_a_type_that_is_like_no_other_gets_the_list_alone() -> None:
    with pytest.raises(ValueError, match=r"^attention_type: expected one of \[.*\], got 'flash'$"):
        single("flash")


OPTIONS = {"casual": "is_causal", "kvheads": "kv_heads", "layernorm": "layer_norm", "droput": "dropout"}


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_misspelled(option: str, name: str) -> None:
    with pytest.raises(TypeError, match=f'^{option}: attention type "{name}" has no such option, only ') as raised:
        multihead(name, **{option: True})
    assert str(raised.value).endswith(f'; did you mean "{OPTIONS[option]}"?')


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("name", ["ring", "distributed", "block_sparse"])
def test_an_option_misspelled_of_another_type(name: str) -> None:
    with pytest.raises(
        TypeError, match=f'^casual: attention type "{name}" has no such option.*did you mean "is_causal"'
    ):
        multihead(name, casual=True)


# Asks for each type where the packages that provide them cannot be imported, and prints what was said.
WITHOUT_EXTRAS = """
import sys
sys.modules["dilated_ring"] = sys.modules["dilated_block_sparse"] = None  # so Python marks what cannot be imported
from dilated_factory import NotInstalledError, create_dilated_attention, create_multihead_dilated_attention
for name in sys.argv[1:]:
    for sizes in ({}, {"embed_dim": 16, "num_heads": 4}):
        create = create_multihead_dilated_attention if sizes else create_dilated_attention
        try:
            create(name, segment_lengths=[4], dilation_rates=[1], **sizes)
        except NotInstalledError as error:
            print(error)
"""


def test_types_whose_extras_are_not_installed() -> None:
    names = [name for name, known in registry.KNOWN.items() if known.extra]
    if any(_has_metadata(registry.KNOWN[name].distribution) for name in names):
        pytest.skip("a distribution that is installed cannot be made to look absent")
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *names]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.splitlines()
    assert len(said) == 2 * len(names)
    for name, words in zip([name for name in names for _ in range(2)], said, strict=True):
        known = registry.KNOWN[name]
        assert words.startswith(
            f'attention_type: "{name}" is provided by {known.distribution}, which is not installed: '
        )
        assert f'pip install "dilated-factory[{known.extra}]"' in words


def _has_metadata(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.usefixtures("others")
def test_a_type_that_needs_a_second_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dilated_ring", None)  # how Python marks a module that cannot be imported
    with pytest.raises(NotInstalledError) as raised:
        single("block_sparse_ring")
    assert str(raised.value).startswith(
        'attention_type: "block_sparse_ring" needs dilated-ring, which is not installed: '
        'pip install "dilated-factory[block-sparse,ring]"'
    )


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("name", OF_RANKS)
def test_a_group_that_is_not_initialised(name: str) -> None:
    assert not distributed.is_initialized()
    cure = r"^group: expected a process group .*not initialised \(start the processes with torchrun and call "
    with pytest.raises(RuntimeError, match=cure):
        single(name)(*[heads()] * 3)
    with pytest.raises(RuntimeError, match=cure):
        multihead(name)(torch.randn(2, 16, 16))


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("name", OF_RANKS)
def test_a_group_by_its_name(name: str) -> None:
    with pytest.raises(TypeError, match=r"^group: expected a ProcessGroup, a DeviceMesh, .* or None, got str"):
        single(name, group="world")(*[heads()] * 3)


@pytest.mark.usefixtures("others", "group_of_one")
def test_a_group_that_is_too_small_for_its_bounds() -> None:
    with pytest.raises(ValueError, match=r"^bounds: expected world_size \+ 1 = 2 positions, got 3"):
        single("ring", bounds=[0, 8, 16])(*[heads(length=8)] * 3)


@pytest.mark.usefixtures("others", "group_of_one")
def test_a_shard_that_is_not_what_bounds_say() -> None:
    with pytest.raises(ValueError, match=r"^query: expected the 8 positions that bounds give rank 0, got 7"):
        single("ring", bounds=[0, 8])(*[heads(length=7)] * 3)


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([{"batch": 1}, {"batch": 2}], "batch is 1 on rank 0, 2 on rank 1"),
        ([{"number": 4}, {"number": 2}], "heads is 4 on rank 0, 2 on rank 1"),
        ([{"dtype": torch.float32}, {"dtype": torch.float64}], "dtype is .*float32.* on rank 0, .*float64.* on rank 1"),
    ],
    ids=["batch", "heads", "dtype"],
)
@pytest.mark.parametrize("name", ["ring", "block_sparse_ring"])
def test_shards_that_do_not_belong_together(name: str, shapes: list[dict[str, Any]], words: str) -> None:
    comm = pytest.importorskip("dilated_ring.comm")

    def work(rank: Any) -> torch.Tensor:
        attention = single(name, group=rank)
        output: torch.Tensor = attention(*[heads(**shapes[rank.rank])] * 3)
        return output

    with pytest.raises(ValueError, match=f"^the ranks were called with different arguments: .*{words}"):
        comm.run_ranks(2, work, timeout=WAIT)


@pytest.mark.usefixtures("others")
def test_a_rank_that_refuses_its_shard_is_named_to_the_others() -> None:
    comm = pytest.importorskip("dilated_ring.comm")

    def work(rank: Any) -> str:
        with pytest.raises(ValueError, match="8 positions that bounds give rank 1, got 7") as raised:
            single("ring", group=rank, bounds=[0, 8, 16])(*[heads(length=8 - rank.rank)] * 3)
        return str(raised.value)

    others_say, its_own = comm.run_ranks(2, work, timeout=WAIT)
    assert "rank 1 refused its arguments" in others_say
    assert its_own.startswith("query: ")
