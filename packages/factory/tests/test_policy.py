"""Every rule of the policy over every boundary, as tables."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from itertools import product

import pytest

from dilated_factory.policy import Policy

TYPES_BY_LENGTH = ("standard", "improved", "somebody_elses")
TYPES_ALWAYS = ("ring", "distributed", "block_sparse", "block_sparse_ring")

OFF, LIGHT, FULL = "off", "lightweight", "full"
MODES_BY_LENGTH = {
    1: OFF,
    511: OFF,
    512: OFF,
    2047: OFF,
    2048: OFF,
    4095: OFF,
    4096: LIGHT,
    8191: LIGHT,
    8192: FULL,
    65535: FULL,
    65536: FULL,
    65537: FULL,
    10**9: FULL,
}
NOT_OFF = {length: LIGHT if mode == OFF else mode for length, mode in MODES_BY_LENGTH.items()}


@pytest.mark.parametrize("attention_type", TYPES_BY_LENGTH)
@pytest.mark.parametrize(("length", "mode"), [*MODES_BY_LENGTH.items(), (None, OFF)])
def test_pool_goes_by_length(attention_type: str, length: int | None, mode: str) -> None:
    assert Policy().choose_pool(attention_type, length)[0] == mode


@pytest.mark.parametrize("attention_type", TYPES_ALWAYS)
@pytest.mark.parametrize(("length", "mode"), [*NOT_OFF.items(), (None, LIGHT)])
def test_pool_is_always_on_for_some_types(attention_type: str, length: int | None, mode: str) -> None:
    assert Policy().choose_pool(attention_type, length)[0] == mode


@pytest.mark.parametrize("attention_type", TYPES_BY_LENGTH + TYPES_ALWAYS)
@pytest.mark.parametrize("length", [*MODES_BY_LENGTH, None])
def test_the_callers_word_wins(attention_type: str, length: int | None) -> None:
    policy = Policy()

    def mode(enable: bool | None, lightweight: bool | None) -> str:
        return policy.choose_pool(attention_type, length, enable=enable, lightweight=lightweight)[0]

    by_policy = mode(None, None)
    by_length = LIGHT if length is None else NOT_OFF[length]
    assert mode(False, None) == OFF
    assert mode(False, False) == OFF
    assert mode(True, None) == by_length
    assert mode(True, True) == LIGHT
    assert mode(True, False) == FULL
    assert mode(None, True) == LIGHT
    assert mode(None, False) == (OFF if by_policy == OFF else FULL)
    with pytest.raises(ValueError, match="contradict"):
        mode(False, True)


@pytest.mark.parametrize(
    ("enable", "lightweight", "words"),
    [
        (False, None, "enable_memory_pool=False"),
        (True, None, "enable_memory_pool=True"),
        (None, True, "lightweight_pool=True"),
        (True, False, "lightweight_pool=False"),
        (None, None, "below 4,096"),
    ],
)
def test_pool_reason_names_its_cause(enable: bool | None, lightweight: bool | None, words: str) -> None:
    assert words in Policy().choose_pool("improved", 512, enable=enable, lightweight=lightweight)[1]


ALL = ("standard", "improved", *TYPES_ALWAYS)
OURS = ("standard", "improved")
LENGTHS = (1, 511, 512, 2048, 4095, 4096, 8191, 8192, 65535, 65536, 65537, 10**9, None)


def expected_type(length: int | None, usable: tuple[str, ...], sharded: bool, allow_sparse: bool) -> str:
    """The rule for auto in words, one clause a line."""
    sparse = "block_sparse_ring" if sharded else "block_sparse"
    if length is not None and length > 65536 and allow_sparse and sparse in usable:
        return sparse
    return "ring" if sharded else "improved"


@pytest.mark.parametrize(
    ("length", "usable", "sharded", "over", "sparse"),
    [*product(LENGTHS, (ALL, OURS, (*OURS, "ring")), (False, True), (False, True), (False, True))],
)
def test_auto(length: int | None, usable: tuple[str, ...], sharded: bool, over: bool, sparse: bool) -> None:
    chosen, reasons = Policy().choose_type(
        length,
        installed=usable,
        sharded=sharded,
        working_set=1001 if over else 1000,
        memory_total=1000,
        allow_sparse=sparse,
    )
    assert chosen == expected_type(length, usable, sharded, sparse)
    assert reasons
    assert all(reason.startswith("auto: ") for reason in reasons)
    assert reasons[-1].startswith(f"auto: {chosen}, ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sequence_length": None, "installed": OURS}, "no sequence length is known"),
        ({"sequence_length": 100, "installed": OURS}, "no group= was given"),
        ({"sequence_length": 8192, "installed": OURS}, "what the call will hold is not known"),
        ({"sequence_length": 8192, "installed": OURS, "working_set": 5}, "the device's memory is not known"),
        ({"sequence_length": 8192, "installed": OURS, "working_set": 5, "memory_total": 6}, "5 bytes fit"),
        ({"sequence_length": 8192, "installed": OURS, "working_set": 7, "memory_total": 6}, "7 bytes would be"),
        ({"sequence_length": 8192, "installed": OURS, "world_size": 8}, "not ring, though a process group of 8 ranks"),
        ({"sequence_length": 100, "installed": OURS, "sharded": True}, "group= says that ranks hold shards"),
        ({"sequence_length": 10**5, "installed": ALL}, "allow_sparse=True was not given"),
        ({"sequence_length": 10**5, "installed": OURS, "allow_sparse": True}, "dilated-factory[block-sparse]"),
        (
            {"sequence_length": 10**5, "installed": OURS, "allow_sparse": True, "sharded": True},
            "dilated-factory[block-sparse,ring]",
        ),
    ],
)
def test_auto_says_why(arguments: dict[str, object], words: str) -> None:
    assert words in " ".join(Policy().choose_type(**arguments)[1])  # type: ignore[arg-type]


def test_thresholds_are_data() -> None:
    policy = Policy(pool_lightweight_from=10, pool_full_from=20, sparse_above=40, pool_always=())
    assert [policy.choose_pool("ring", length)[0] for length in (9, 10, 19, 20)] == [OFF, LIGHT, LIGHT, FULL]
    chosen = [policy.choose_type(length, installed=ALL, allow_sparse=True) for length in (29, 30, 40, 41)]
    assert [name for name, _ in chosen] == ["improved", "improved", "improved", "block_sparse"]
    assert hash(policy) == hash(replace(policy))
    with pytest.raises(FrozenInstanceError):
        policy.sparse_above = 1  # type: ignore[misc]


def test_a_budget_goes_before_the_devices_memory() -> None:
    policy = Policy(memory_budget_bytes=100)
    above, within = (
        policy.choose_type(8192, installed=ALL, working_set=held, memory_total=total)[1][-1]
        for held, total in ((101, 10**9), (100, 1))
    )
    assert "the budget is 100: shard the sequence" in above
    assert "100 bytes fit the budget of 100" in within


@pytest.mark.parametrize(
    ("light", "full", "modes"),
    [
        (None, None, [OFF, OFF, OFF]),
        (None, 200, [OFF, OFF, FULL]),
        (100, None, [OFF, LIGHT, LIGHT]),
        (100, 100, [OFF, FULL, FULL]),
    ],
)
def test_a_threshold_of_none_is_never_reached(light: int | None, full: int | None, modes: list[str]) -> None:
    policy = Policy(pool_lightweight_from=light, pool_full_from=full)
    assert [policy.choose_pool("improved", length)[0] for length in (99, 100, 200)] == modes
    assert policy.choose_pool("improved", 99, enable=True)[0] == LIGHT
    assert all(policy.choose_pool("improved", length)[1] for length in (99, 100, 200))


def test_a_class_of_lengths_is_what_the_pool_rules_tell_apart() -> None:
    for policy in (
        Policy(),
        Policy(pool_lightweight_from=None),
        Policy(pool_full_from=None),
        Policy(pool_full_from=4096),
    ):
        lengths = (1, 4095, 4096, 8191, 8192, 65536)
        by_class = {length: policy.length_class(length) for length in lengths}
        by_mode = {length: policy.choose_pool("improved", length)[0] for length in lengths}
        for one, other in product(lengths, lengths):
            assert (by_class[one] == by_class[other]) == (by_mode[one] == by_mode[other])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"pool_full_from": 1.5}, TypeError, "Policy.pool_full_from: expected a positive int, got 1.5"),
        ({"sparse_above": True}, TypeError, "Policy.sparse_above: expected a positive int, got True"),
        ({"sparse_above": None}, TypeError, "Policy.sparse_above: expected a positive int, got None"),
        ({"live_tensors": 0}, ValueError, "Policy.live_tensors: expected a positive int, got 0"),
        ({"memory_budget_bytes": -1}, ValueError, "Policy.memory_budget_bytes"),
        ({"pattern_cache": 1}, TypeError, "Policy.pattern_cache: expected a bool, got 1"),
        ({"pool_always": ["ring"]}, TypeError, "Policy.pool_always: expected a tuple"),
        ({"pool_always": "ring"}, TypeError, "Policy.pool_always: expected a tuple"),
        ({"pool_full_from": 4095}, ValueError, "pool_lightweight_from: expected at most pool_full_from = 4095"),
    ],
)
def test_a_policy_that_makes_no_sense(arguments: dict[str, object], error: type, words: str) -> None:
    with pytest.raises(error, match=words.replace("[", r"\[")):
        Policy(**arguments)  # type: ignore[arg-type]
