"""What is read of a machine: tables of machines written to folders, and the real one."""

from __future__ import annotations

import os
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch

from dilated_factory.hardware import Hardware, flash, host, nvidia

GIB = 2**30
WAIT = 120.0  # seconds for a command that does answer
XEON = "".join(
    f"processor\t: {index}\nmodel name\t: Intel(R)  Xeon(R) 8480+\nphysical id\t: {index % 2}\n"
    f"core id\t\t: {index // 4}\nflags\t\t: fpu sse4_2 avx2 avx512f amx_bf16\n\n"
    for index in range(8)
)
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd sve bf16\nCPU implementer\t: 0x41\n\n"
MEMORY = {"proc/meminfo": "MemTotal:       67108864 kB\nMemFree:        1000 kB\n"}  # 64 GiB


def machine(folder: Path, files: dict[str, str]) -> Path:
    """A folder that stands for "/"."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_processor(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/cpuinfo": XEON, "proc/self/status": "Name:\tx\nCpus_allowed_list:\t0-2,7\n"})
    found = host.survey(root)
    assert found.cpu_name == "Intel(R) Xeon(R) 8480+"
    assert (found.logical_cores, found.physical_cores, found.usable_cores) == (8, 4, 4)
    assert found.vector_flags == ("sse4_2", "avx2", "avx512f", "amx_bf16")


def test_an_arm_processor_without_a_name(tmp_path: Path) -> None:
    found = host.survey(machine(tmp_path, {"proc/cpuinfo": ARM}))
    assert found.vector_flags == ("asimd", "bf16", "sve")
    assert (found.logical_cores, found.physical_cores) == (1, None)
    assert found.cpu_name


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    found = host.survey(tmp_path)
    assert (found.physical_cores, found.cpu_quota, found.memory_total, found.memory_limit) == (None,) * 4
    assert (found.vector_flags, found.numa_nodes) == ((), ())
    assert found.usable_cores == found.logical_cores == (os.cpu_count() or 1)


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
LIMITS: dict[str, tuple[dict[str, str], int | None]] = {
    "no group": ({}, None),
    "version 2, at the top": ({f"{V2}/memory.max": f"{4 * GIB}\n"}, 4 * GIB),
    "version 2, no limit": ({f"{V2}/memory.max": "max\n"}, None),
    "version 2, the own group": ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/memory.max": f"{3 * GIB}\n"}, 3 * GIB),
    "version 2, a group above is tighter": (
        {"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/memory.max": f"{GIB}\n", f"{V2}/a/b/memory.max": f"{2 * GIB}\n"},
        GIB,
    ),
    "version 2, a path outside the container": (
        {"proc/self/cgroup": "0::/../host\n", f"{V2}/memory.max": f"{GIB}\n"},
        GIB,
    ),
    "version 1": ({"proc/self/cgroup": "4:memory:/job\n", f"{V1}/job/memory.limit_in_bytes": f"{2 * GIB}\n"}, 2 * GIB),
    "version 1, at the top": ({f"{V1}/memory.limit_in_bytes": f"{2 * GIB}\n"}, 2 * GIB),
    "version 1, no limit": ({f"{V1}/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    "version 1, another controller": (
        {"proc/self/cgroup": "4:pids:/job\n", f"{V1}/job/memory.limit_in_bytes": f"{GIB}\n"},
        None,
    ),
    "a limit above the memory": ({f"{V2}/memory.max": f"{65 * GIB}\n"}, None),
}


@pytest.mark.parametrize(("files", "limit"), LIMITS.values(), ids=LIMITS)
def test_memory_and_its_limit(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    root = machine(tmp_path, {**MEMORY, **files})
    assert host.memory(root) == (64 * GIB, limit)
    assert host.usable_memory(root) == (limit or 64 * GIB)


def test_a_limit_where_the_memory_is_not_known(tmp_path: Path) -> None:
    assert host.memory(machine(tmp_path, {f"{V2}/memory.max": f"{GIB}\n"})) == (None, GIB)
    assert host.memory(machine(tmp_path, {f"{V2}/memory.max": f"{2**63}\n"})) == (None, None)


QUOTAS: dict[str, tuple[dict[str, str], float | None]] = {
    "none": ({}, None),
    "version 2": ({f"{V2}/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, no limit": ({f"{V2}/cpu.max": "max 100000\n"}, None),
    "version 1": ({f"{V2}/cpu/cpu.cfs_quota_us": "400000\n", f"{V2}/cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
    "version 1, no limit": ({f"{V2}/cpu/cpu.cfs_quota_us": "-1\n", f"{V2}/cpu/cpu.cfs_period_us": "100000\n"}, None),
    "version 1, two controllers": (
        {
            "proc/self/cgroup": "2:cpu,cpuacct:/job\n",
            f"{V2}/cpu/job/cpu.cfs_quota_us": "50000\n",
            f"{V2}/cpu/job/cpu.cfs_period_us": "100000\n",
        },
        0.5,
    ),
}


@pytest.mark.parametrize(("files", "quota"), QUOTAS.values(), ids=QUOTAS)
def test_the_quota_of_cores(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert host.cpu_quota(machine(tmp_path, files)) == quota


def test_numa_nodes_are_in_order(tmp_path: Path) -> None:
    nodes = "sys/devices/system/node"
    cores = {f"{nodes}/node{index}/cpulist": f"{index}\n" for index in (0, 10, 2, 1)}
    root = machine(tmp_path, {**cores, f"{nodes}/online": "0-2,10\n"})
    assert host.numa_nodes(root) == ("0", "1", "2", "10")
    assert Hardware.detect("cpu", root=root).numa_nodes == 4


VERSIONS = {
    "550.54.15": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n",
    "570.86.15": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version: 12\n",
    "535.104": "NVRM version: NVIDIA UNIX aarch64 Kernel Module  535.104  Wed\n",
    "": "something else\n",
}


@pytest.mark.parametrize("driver", VERSIONS)
def test_the_drivers_files(tmp_path: Path, driver: str) -> None:
    folder = "proc/driver/nvidia"
    root = machine(
        tmp_path,
        {
            f"{folder}/version": VERSIONS[driver],
            f"{folder}/gpus/0000:3b:00.0/information": "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:  \t 1\n",
            f"{folder}/gpus/0000:5e:00.0/information": "IRQ:  \t 1\n",
        },
    )
    found = nvidia.survey(root, command="/no/such/command")
    assert found.driver == driver
    assert found.devices == (
        nvidia.NvidiaDevice("NVIDIA H100 80GB HBM3"),
        nvidia.NvidiaDevice("unknown, at 0000:5e:00.0"),
    )
    assert found.source == str(tmp_path / folder)
    assert not found.problem


def command(folder: Path, body: str) -> str:
    """A program that stands for nvidia-smi."""
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return str(file)


needs_sh = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")


@needs_sh
def test_the_drivers_command(tmp_path: Path) -> None:
    path = command(tmp_path, "echo 'NVIDIA H200, 143771, 9.0, 570.86.15'; echo 'NVIDIA GB10, [N/A], [N/A], 570.86.15'")
    found = nvidia.survey(tmp_path, path, timeout=WAIT)
    assert found.driver == "570.86.15"
    assert found.devices == (
        nvidia.NvidiaDevice("NVIDIA H200", 143771 * 2**20, "9.0"),
        nvidia.NvidiaDevice("NVIDIA GB10"),
    )
    assert found.source == path


PROBLEMS = {
    "echo 'no devices were found'; exit 6": "failed with status 6: no devices were found",
    "echo 'cannot reach the driver' >&2; exit 9": "failed with status 9: cannot reach the driver",
    "echo 'Field \"compute_cap\" is not valid'": "failed with status 0: Field",
    "exec sleep 600": "did not answer in 0.2 s",
}


@needs_sh
@pytest.mark.parametrize("body", PROBLEMS)
def test_a_driver_that_fails_is_reported(tmp_path: Path, body: str) -> None:
    found = nvidia.survey(tmp_path, command(tmp_path, body), timeout=0.2 if "sleep" in body else WAIT)
    assert PROBLEMS[body] in found.problem
    assert found.devices == ()


def test_a_command_that_cannot_be_run(tmp_path: Path) -> None:
    assert "cannot be run" in nvidia.survey(tmp_path, str(tmp_path / "none")).problem


def test_a_machine_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia.survey(tmp_path) == nvidia.Nvidia()


FA2 = {"flash_attn/__init__.py": "raise SystemExit('imported')"}
FA3 = {"flash_attn_interface.py": "raise SystemExit('imported')"}
FA4 = {"flash_attn/cute/__init__.py": "raise SystemExit('imported')", "flash_attn/cute/interface.py": ""}
COMPILER = {"cutlass/__init__.py": "raise SystemExit('imported')"}
PACKAGES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "nothing": ({}, ()),
    "2": (FA2, ("fa2",)),
    "3": (FA3, ("fa3",)),
    "4 alone": ({**FA4, **COMPILER}, ("fa4",)),
    "2 with the sources of 4": ({**FA2, **FA4}, ("fa2",)),
    "all": ({**FA2, **FA3, **FA4, **COMPILER}, ("fa2", "fa3", "fa4")),
}


@pytest.mark.parametrize(("files", "names"), PACKAGES.values(), ids=PACKAGES)
def test_flash_packages_are_found_and_not_imported(
    tmp_path: Path, files: dict[str, str], names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the real path only Python's own folders stay: what this machine has must not be found.
    monkeypatch.setattr(sys, "path", [str(machine(tmp_path, files))])
    for module in ("flash_attn", "flash_attn_interface", "cutlass"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert flash.found() == names


@pytest.mark.parametrize(
    ("capability", "usable"),
    [
        ("7.5", ()),
        ("8.0", ("fa2",)),
        ("8.9", ("fa2",)),
        ("9.0", ("fa2", "fa3", "fa4")),
        ("10.0", ("fa2", "fa4")),
        ("12.0", ("fa2",)),
    ],
)
def test_what_a_device_can_run(capability: str, usable: tuple[str, ...]) -> None:
    assert flash.usable(capability, ["fa2", "fa3", "fa4"]) == usable
    assert flash.usable(capability, []) == ()
    refusals = [one.refusal(capability) for one in flash.GENERATIONS if one.name not in usable]
    assert all(refusal and refusal.endswith(f"the device has {capability}") for refusal in refusals)


def test_a_capability_that_is_refused_is_named() -> None:
    fa2, fa3, fa4 = flash.GENERATIONS
    assert fa2.refusal("7.0") == "it needs compute capability 8.0 or higher, the device has 7.0"
    assert fa3.refusal("10.0") == "it needs compute capability 9.x, the device has 10.0"
    assert fa4.refusal("8.0") == "it needs compute capability 9.x or 10.x, the device has 8.0"


def test_hardware_is_a_value_that_can_be_made_up() -> None:
    made_up = Hardware("cuda", "NVIDIA H100", "9.0", 80 * GIB, flash=("fa3",), numa_nodes=2, local_world_size=8)
    assert made_up == replace(made_up)
    assert hash(made_up) == hash(replace(made_up))
    with pytest.raises(FrozenInstanceError):
        made_up.threads = 3  # type: ignore[misc]
    assert Hardware("cpu") == Hardware(
        "cpu", "", "", None, True, 1, 1, False, flash=(), numa_nodes=1, local_world_size=None, local_rank=None
    )


H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", "9.0", 79 * GIB + 10**8, threads=16)
KEYS: dict[str, tuple[Hardware, bool]] = {
    "itself": (H100, True),
    "some MiB less": (replace(H100, memory_total=79 * GIB), True),
    "spaces in the name": (replace(H100, device_name="NVIDIA  H100 80GB HBM3 "), True),
    "a group of eight": (replace(H100, world_size=8, process_group=True, local_world_size=8, local_rank=3), True),
    "another package": (replace(H100, flash=("fa2",)), True),
    "another name": (replace(H100, device_name="NVIDIA H200"), False),
    "another capability": (replace(H100, capability="10.0"), False),
    "more memory": (replace(H100, memory_total=141 * GIB), False),
    "memory not known": (replace(H100, memory_total=None), False),
    "more threads": (replace(H100, threads=17), False),
    "a CPU": (replace(H100, device_type="cpu"), False),
}


@pytest.mark.parametrize(("other", "same"), KEYS.values(), ids=KEYS)
def test_a_key_tells_machines_apart(other: Hardware, same: bool) -> None:
    assert (other.key() == H100.key()) is same
    assert "\n" not in other.key()


def test_a_key_is_read_by_people() -> None:
    assert H100.key() == "cuda NVIDIA H100 80GB HBM3, 9.0, 79 GiB, 16 threads"
    assert Hardware("xpu").key() == "xpu, capability unknown, memory unknown, 1 threads"


def test_detect_reads_the_folder_and_the_environment_it_is_given(tmp_path: Path) -> None:
    root = machine(tmp_path, {**MEMORY, "proc/cpuinfo": XEON, f"{V2}/memory.max": f"{8 * GIB}\n"})
    found = Hardware.detect("cpu", root=root, environ={"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0"})
    assert (found.device_name, found.memory_total) == ("Intel(R) Xeon(R) 8480+", 8 * GIB)
    assert (found.local_world_size, found.local_rank) == (4, 0)
    assert (found.flash, found.numa_nodes) == ((), 1)
    assert found.capability == torch.backends.cpu.get_cpu_capability()
    alone = Hardware.detect("cpu", root=root, environ={})
    assert (alone.local_world_size, alone.local_rank) == (None, None)


@pytest.mark.parametrize(
    ("variable", "word"),
    [("LOCAL_WORLD_SIZE", "0"), ("LOCAL_WORLD_SIZE", "two"), ("LOCAL_RANK", "-1"), ("LOCAL_RANK", "")],
)
def test_a_launchers_variable_that_is_no_number(variable: str, word: str) -> None:
    with pytest.raises(
        ValueError, match=f"^{variable} in the environment: expected an int of at least ., got '{word}'"
    ):
        Hardware.detect("cpu", environ={variable: word})


def test_this_machine() -> None:
    found = Hardware.detect("cpu")
    assert found.device_type == "cpu"
    assert found.device_name
    assert found.threads == torch.get_num_threads()
    assert found.memory_total is None or found.memory_total > 2**20
    assert found.numa_nodes >= 1
    assert found.flash == ()
    assert found.key() == Hardware.detect("cpu").key()
    here = host.survey()
    assert here.logical_cores >= here.usable_cores >= 1


def test_another_device_is_named_and_nothing_is_guessed_of_it() -> None:
    found = Hardware.detect("meta")
    assert (found.device_type, found.device_name, found.memory_total, found.bf16) == ("meta", "", None, False)
    with pytest.raises(RuntimeError, match="nonsense"):
        Hardware.detect("nonsense")


@pytest.mark.gpu
def test_this_gpu() -> None:
    found = Hardware.detect("cuda")
    driver = nvidia.survey()
    assert driver.driver
    assert found.device_name in [device.name for device in driver.devices]
    assert found.flash == flash.usable(found.capability, flash.found())
    assert found.key().startswith(f"cuda {found.device_name}, {found.capability}, ")
