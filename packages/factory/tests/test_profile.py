"""The profile's file: what is read, what is refused with one warning, and who wins over it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_factory import Hardware, Policy, Profile, SharedResources, create_dilated_attention
from dilated_factory import profile as profiles
from dilated_factory.profile import AUTO, FORMAT, MEASURED_WITH, NEVER_BYTES, VARIABLE, KernelRule, load, users_profile

WAIT = 120.0  # seconds after which processes that hang fail


def fitting(**changes: Any) -> Profile:
    """One that holds on this machine's CPU, now."""
    versions = {name: profiles.installed_version(name) or "" for name in MEASURED_WITH}
    plain = Profile(
        Hardware.detect("cpu").key(),
        "cpu",
        versions=versions,
        created="2026-01-01T00:00:00+00:00",
        pool_min_bytes=2**25,
        pool_thresholds=(64, 128),
        kernels=(KernelRule("float32", 32, "math"), KernelRule("float32", 256, AUTO)),
        block_size=(128, 64),
        measurements=({"part": "pool_bytes", "bytes": 65536, "left_out": "no time"},),
    )
    return replace(plain, **changes)


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's profile is to be found."""
    place = tmp_path / "profile.json"
    monkeypatch.setenv(VARIABLE, str(place))
    return place


def created(**options: Any) -> torch.nn.Module:
    return create_dilated_attention("improved", [16, 64], [1, 4], **{"sequence_length": 64, **options})


def one_warning_of_many_creations(match: str) -> None:
    """Many modules, and calls that use the shared resources, warn once and have no profile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (8, 64, 4096, 8192):
            assert created(sequence_length=length).decision.profile is None
            assert users_profile() is None
            assert SharedResources().pool("cpu").min_bytes == 2**20
    assert [one.category for one in caught] == [UserWarning]
    assert match in str(caught[0].message)


def test_what_is_saved_is_loaded_equal(tmp_path: Path) -> None:
    place = fitting().save(tmp_path / "folder" / "deep" / "profile.json")
    assert replace(load(place), path="") == fitting()
    assert load(place).measurements == fitting().measurements
    assert load(place).path == str(place)
    assert [one.name for one in place.parent.iterdir()] == ["profile.json"]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "profile.json").mkdir()
    with pytest.raises(OSError, match=r"profile\.json"):
        fitting().save(tmp_path / "profile.json")
    assert [one.name for one in tmp_path.iterdir()] == ["profile.json"]


def test_a_created_module_follows_the_users_profile(users: Path) -> None:
    fitting().save(users)
    module = created(sequence_length=64)
    assert module.decision.profile == str(users)
    assert any(str(users) in reason for reason in module.decision.reasons)
    for length, mode, kernel in ((16, "off", "auto"), (64, "lightweight", "math"), (256, "full", "auto")):
        module(*torch.zeros(3, 1, length, 2, 8))
        assert (module.decision.pool_mode, module.decision.kernel) == (mode, kernel), length
    assert SharedResources().pool("cpu").min_bytes == 2**25


def test_the_default_place_is_in_the_users_folder_for_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    place = profiles.default_path()
    assert tmp_path in place.parents
    assert place.name == "profile.json"
    assert users_profile("cpu") is None
    fitting().save()
    found = users_profile("cpu")
    assert found is not None
    assert found.path == str(place)


def test_off_uses_no_profile(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitting().save(users)
    monkeypatch.setenv(VARIABLE, "off")
    assert users_profile("cpu") is None
    assert created().decision.profile is None


def test_no_profile_is_no_reason_to_warn_and_a_named_one_is(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_warning_of_many_creations(f"{VARIABLE} names is not used")
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(users.parent / "nothing"))
    monkeypatch.setenv("HOME", str(users.parent / "nothing"))
    assert users_profile("cpu") is None


def test_a_changed_file_is_read_again(users: Path) -> None:
    fitting().save(users)
    assert created().decision.pool_mode == "lightweight"
    fitting(pool_thresholds=(None, 64)).save(users)
    assert created().decision.pool_mode == "full"
    users.unlink()
    with pytest.warns(UserWarning, match="names is not used"):
        assert created().decision.pool_mode == "off"


def test_another_number_of_threads_is_another_machine(users: Path) -> None:
    fitting().save()
    threads = torch.get_num_threads()
    assert users_profile("cpu") is not None
    try:
        torch.set_num_threads(threads + 1)
        with pytest.warns(UserWarning, match=f"and this is .* {threads + 1} threads"):
            assert users_profile("cpu") is None
    finally:
        torch.set_num_threads(threads)
    assert users_profile("cpu") is not None


def test_of_two_files_written_in_the_same_instant_the_later_counts(users: Path) -> None:
    fitting().save(users)
    instant = users.stat().st_mtime_ns
    assert created().decision.pool_mode == "lightweight"
    fitting(pool_thresholds=(None, 32)).save(users)
    os.utime(users, ns=(instant, instant))
    assert created().decision.pool_mode == "full"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hardware": "cpu Another, AVX2, 8 GiB, 4 threads"}, "it was measured on cpu Another"),
        ({"versions": {"torch": "1.9.0", "dilated-core": "0.1", "dilated-memory-pool": "0.1"}}, "with torch 1.9.0"),
        ({"versions": {}}, "with torch of an unknown version"),
    ],
    ids=["foreign", "stale", "of nothing"],
)
def test_a_stale_or_foreign_profile_is_ignored_with_one_warning(
    users: Path, changes: dict[str, Any], match: str
) -> None:
    fitting(**changes).save(users)
    one_warning_of_many_creations(match)


def test_a_profile_is_judged_again_where_the_number_of_threads_changes(users: Path) -> None:
    threads = torch.get_num_threads()
    profile = fitting()
    profile.save()
    try:
        assert users_profile("cpu") is not None
        torch.set_num_threads(threads + 1)
        with pytest.warns(UserWarning, match=f"and this is .*, {threads + 1} threads"):
            assert users_profile("cpu") is None
        torch.set_num_threads(threads)
        assert users_profile("cpu") is not None
    finally:
        torch.set_num_threads(threads)


def test_another_patch_of_torch_is_not_another_torch(users: Path) -> None:
    versions = dict(fitting().versions)
    versions["torch"] = ".".join(versions["torch"].split(".")[:2]) + ".99+local"
    fitting(versions=versions).save(users)
    assert created().decision.profile == str(users)


def test_a_profile_of_this_machines_other_device_is_left_alone_without_a_word(users: Path) -> None:
    fitting(device_type="cuda", hardware="cuda GPU").save(users)
    assert users_profile("cpu") is None


def test_a_profile_holds_for_the_card_that_is_asked_for(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {"cuda:0": Hardware("cuda", "Older", "8.0"), "cuda:1": Hardware("cuda", "Newer", "9.0")}
    fitting(device_type="cuda", hardware=cards["cuda:1"].key()).save(users)
    monkeypatch.setattr(Hardware, "detect", lambda device: cards[str(device)])
    assert users_profile("cuda:1") is not None
    with pytest.warns(UserWarning, match="measured on cuda Newer.* and this is cuda Older"):
        assert users_profile(torch.device("cuda", 0)) is None
    assert users_profile("cuda:1") is not None


def content(**changes: Any) -> str:
    return json.dumps({**fitting().content(), **changes})


def without(name: str) -> str:
    return json.dumps({key: value for key, value in fitting().content().items() if key != name})


BROKEN = {
    "empty": "",
    "cut": content()[:-40],
    "no object": "[1, 2]",
    "too deep": "[" * 200_000,
    "a number too long": content(pool_min_bytes=1)[:-1] + ', "x": ' + "9" * 5000 + "}",
    "null": "null",
    "not text": b"\xff\xfe\x00",
    "another format": content(format=FORMAT + 1),
    "no format": without("format"),
    "unknown field": content(pool_colour="blue"),
    "path": content(path="elsewhere"),
    "missing field": without("kernels"),
    "thresholds out of order": content(pool_thresholds=[128, 64]),
    "one threshold": content(pool_thresholds=[128]),
    "thresholds of text": content(pool_thresholds="ab"),
    "negative threshold": content(pool_thresholds=[-1, None]),
    "thresholds that are true": content(pool_thresholds=[True, None]),
    "block size with a hole": content(block_size=[128, None]),
    "kernels that are no list": content(kernels=5),
    "kernel rule with too much": content(kernels=[{"dtype": "float32", "from_length": 1, "kernel": "math", "x": 1}]),
    "kernel rule with text for a length": content(kernels=[{"dtype": "float32", "from_length": "1", "kernel": "math"}]),
    "kernel rule that is no object": content(kernels=["math"]),
    "bytes of text": content(pool_min_bytes="1MiB"),
    "versions that are no text": content(versions={"torch": 2}),
    "versions that are no object": content(versions=["torch"]),
    "hardware that is no text": content(hardware=None),
    "measurements that are no objects": content(measurements=[1]),
    "measurements that are no list": content(measurements=7),
}


@pytest.mark.parametrize("what", BROKEN, ids=[name.replace(" ", "_") for name in BROKEN])
def test_a_broken_file_is_one_warning_and_no_crash(users: Path, what: str) -> None:
    text = BROKEN[what]
    users.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"profile\.json: "):
        load(users)
    one_warning_of_many_creations(str(users))


def test_a_folder_in_its_place_is_one_warning_and_no_crash(users: Path) -> None:
    users.mkdir()
    one_warning_of_many_creations(str(users))


# Writes until it is told to stop.
WRITER = """
import sys
from pathlib import Path
from dilated_factory.profile import Profile

here = Profile("here", "cpu", measurements=tuple({"part": sys.argv[2], "n": n} for n in range(2000)))
while not Path(sys.argv[3]).exists():
    here.save(sys.argv[1])
"""


def test_of_two_processes_that_write_at_once_one_leaves_a_whole_file(tmp_path: Path) -> None:
    place, enough = tmp_path / "folder" / "profile.json", tmp_path / "enough"
    place.parent.mkdir()
    command = [sys.executable, "-c", WRITER, str(place)]
    writers = [subprocess.Popen([*command, who, str(enough)]) for who in ("one", "two")]
    seen: list[str] = []
    deadline = time.monotonic() + WAIT
    try:
        # Each has written while the other did.
        while not (seen.count("one") >= 10 and seen.count("two") >= 10):
            assert all(writer.poll() is None for writer in writers), "a writer failed"
            assert time.monotonic() < deadline, f"seen so far: {seen}"
            if place.exists():
                [who] = {one["part"] for one in load(place).measurements}
                seen.append(who)
        enough.touch()
        assert [writer.wait(timeout=WAIT) for writer in writers] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert len(load(place).measurements) == 2000
    assert [one.name for one in place.parent.iterdir()] == ["profile.json"]


def test_a_profile_of_ones_own_wins_over_the_users(users: Path) -> None:
    fitting().save(users)
    module = created(profile=fitting(pool_thresholds=(None, 16), kernels=()))
    assert module.decision.pool_mode == "full"
    assert module.decision.profile == "as given"
    module(*torch.zeros(3, 1, 64, 2, 8))
    assert module.decision.kernel == "auto"


def test_profile_none_leaves_the_policy(users: Path) -> None:
    fitting().save(users)
    module = created(profile=None)
    module(*torch.zeros(3, 1, 64, 2, 8))
    assert (module.decision.profile, module.decision.pool_mode, module.decision.kernel) == (None, "off", "auto")


def test_policy_wins_over_the_profiles_thresholds_and_not_over_its_kernels(users: Path) -> None:
    fitting().save(users)
    module = created(policy=Policy(pool_lightweight_from=None, pool_full_from=None))
    module(*torch.zeros(3, 1, 64, 2, 8))
    assert (module.decision.pool_mode, module.decision.kernel) == ("off", "math")
    assert module.decision.profile == str(users)


def test_the_callers_kernel_and_pool_win_over_the_profile(users: Path) -> None:
    fitting().save(users)
    module = created(kernel="cpu_flash", enable_memory_pool=False)
    module(*torch.zeros(3, 1, 128, 2, 8))
    assert (module.decision.pool_mode, module.decision.kernel) == ("off", "cpu_flash")


def test_never_is_a_size_that_no_tensor_reaches(users: Path) -> None:
    fitting(pool_min_bytes=NEVER_BYTES, pool_thresholds=(None, 1)).save(users)
    resources = SharedResources()
    allocator = created(resources=resources).allocator
    assert allocator.empty((2**24,), dtype=torch.float32, device=torch.device("cpu")).shape == (2**24,)
    assert resources.statistics()["cpu", "full"].bypasses == 1


def test_what_is_no_profile_is_refused() -> None:
    with pytest.raises(TypeError, match='profile: expected a Profile, None or "user"'):
        created(profile="mine")
