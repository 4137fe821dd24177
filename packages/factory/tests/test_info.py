"""The command line: its answers, its speed of import, and what it says where something is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dilated_core import kernels
from dilated_factory import profile, registry
from dilated_factory.cli import main
from dilated_factory.cli.info import devices, machine, text
from dilated_factory.hardware import Hardware
from dilated_factory.hardware.host import Host
from dilated_factory.hardware.nvidia import Nvidia, NvidiaDevice


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_info_needs_no_torch(arguments: list[str]) -> None:
    ran = python(
        "-c",
        "import sys\n"
        "from dilated_factory.cli import main\n"
        f"assert main(['info', *{arguments}]) == 0\n"
        "heavy = {'torch', 'numpy', 'rich', 'dilated_core', 'dilated_ring', 'dilated_memory_pool'} & set(sys.modules)\n"
        "assert not heavy, heavy",
    )
    assert ran.returncode == 0, ran.stderr
    # The build is part of torch's version, and is known without importing it.
    assert torch.__version__ in ran.stdout


def test_info_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    written = capsys.readouterr().out
    for title in ("Python ", "Platform ", "Profile ", "Versions", "CPU", "NVIDIA devices", "Attention types"):
        assert f"\n{title}" in f"\n{written}"
    for name in (*machine.DISTRIBUTIONS, *registry.KNOWN, "auto", "cores", "memory", "vectors", "NUMA nodes"):
        assert f"\n  {name} " in written
    assert "Kernels on" not in written
    assert written.endswith("as torch sees them: dilated info --kernels\n")
    assert all(line == line.rstrip() for line in written.splitlines())


def test_info_with_kernels_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--kernels"]) == 0
    written = capsys.readouterr().out
    for title in ("Versions", "CPU", "Device cpu", "Kernels on cpu, head_dim 64", "Attention types"):
        assert f"\n{title}\n" in written
    for kernel in kernels.table():
        assert f"\n  {kernel.name} " in written
    assert "it runs on CUDA, not on cpu" in written
    assert "--kernels" not in written
    assert all(line == line.rstrip() for line in written.splitlines())


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["torch"] == torch.__version__
    assert info["versions"]["dilated-core"]
    assert info["host"]["logical_cores"] >= 1
    assert info["devices"] is None
    assert info["nvidia"].keys() == {"driver", "devices", "source", "problem"}
    assert info["profile"].keys() == {"path", "state"}
    types = {row["name"]: row for row in info["attention_types"]}
    assert types["improved"]["installed"]
    assert set(types) >= set(registry.KNOWN)
    for row in types.values():
        assert row["installed"] == (row["install"] is None)
    for row in info["lacking"]:
        assert row["missing"]
        assert row["install"].startswith("pip install ")


def test_info_with_kernels_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json", "--kernels"]) == 0
    info = json.loads(capsys.readouterr().out)
    cpu = info["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["hardware"]["device_type"] == "cpu"
    assert cpu["key"].startswith("cpu ")
    rows = {row["name"]: row for row in cpu["kernels"]}
    assert list(rows) == [kernel.name for kernel in kernels.table()]
    assert rows["math"] == {
        "name": "math",
        "dtypes": ["float64", "float32", "bfloat16", "float16"],
        "refusals": {},
    }
    for row in rows.values():
        assert len(row["dtypes"]) + len(row["refusals"]) == 4


def test_columns_are_aligned() -> None:
    sections = text.render(machine.gather(), devices.gather()).split("\n\n")
    for title, *rows in (section.splitlines() for section in sections[1:]):
        assert not title.startswith(" ")
        # Every value starts in one column: what stands before it ends in at least two spaces.
        starts = {len(row) - len(row[2:].split("  ", 1)[-1].lstrip()) for row in rows if row[2] != " "}
        assert len(starts) == 1, rows


def a_large_machine() -> machine.Info:
    host = Host("AMD EPYC 9654 96-Core Processor", 384, 192, 96, 12.5, ("avx2",) * 30, 2**40, 2**37, ("0-95", "96-191"))
    gpus = (NvidiaDevice("NVIDIA H100 80GB HBM3", 80 * 2**30, "9.0"), NvidiaDevice("NVIDIA H100 80GB HBM3"))
    return replace(
        machine.gather(),
        host=host,
        nvidia=Nvidia("570.86.15", gpus, "nvidia-smi"),
        cuda_visible_devices="0,1",
        flash=(
            machine.FlashInfo("fa2", "flash-attn", "2.8.3", True),
            machine.FlashInfo("fa3", "flash-attn-3", None, None),
            machine.FlashInfo("fa4", "flash-attn-4", "4.0.0", False),
        ),
    )


def test_a_large_machine_in_words() -> None:
    written = text.render(a_large_machine())
    for words in (
        "384 (192 physical), 96 allowed to this process, limited to 12.5 by the control group",
        "1024.0 GiB, limited to 128.0 GiB by the control group",
        "2: cores 0-95 and 96-191",
        "NVIDIA H100 80GB HBM3, 80.0 GiB, compute capability 9.0",
        'CUDA_VISIBLE_DEVICES="0,1"',
        "fa2  flash-attn 2.8.3, the device can run it",
        "fa3  flash-attn-3, device not known",
        "fa4  flash-attn-4 4.0.0, no device here can run it",
    ):
        assert words in written


def test_a_driver_with_a_problem_says_so() -> None:
    info = replace(a_large_machine(), nvidia=Nvidia(problem="nvidia-smi did not answer in 5 s"))
    assert "\n  driver   none found\n  problem  nvidia-smi did not answer in 5 s\n" in text.render(info)


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_a_narrow_terminal_wraps_and_loses_nothing(width: int) -> None:
    info, seen = a_large_machine(), devices.gather()
    whole, wrapped = text.render(info, seen), text.render(info, seen, width)
    assert wrapped.split() == whole.split()
    if width >= 80:
        assert max(map(len, wrapped.splitlines())) <= width
    assert all(line == line.rstrip() for line in wrapped.splitlines())


def test_torchs_version_falls_back_on_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch")
    (package / "version.py").write_text("import os\n__version__ = '9.8.7+cu999'\nraise SystemExit('imported')\n")
    assert machine.gather().versions["torch"] == "9.8.7+cu999"
    (package / "version.py").unlink()
    assert machine.gather().versions["torch"] == importlib.metadata.version("torch")


@pytest.fixture
def own_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the profile of this test's user is."""
    path = tmp_path / "profile.json"
    monkeypatch.setenv(profile.VARIABLE, str(path))
    return path


def test_no_profile_is_no_fault(own_profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.profile_info() == machine.ProfileInfo(str(own_profile), "none, `dilated tune` writes one")
    assert devices.gather()[0].profile == "none"
    monkeypatch.setenv(profile.VARIABLE, "off")
    assert machine.profile_info() == machine.ProfileInfo(None, f"off, by {profile.VARIABLE}")
    assert devices.gather()[0].profile == "none"


def test_a_profile_in_force_is_shown(own_profile: Path) -> None:
    key = Hardware.detect("cpu").key()
    versions = {name: profile.installed_version(name) for name in profile.MEASURED_WITH}
    made = profile.Profile(key, "cpu", {name: found for name, found in versions.items() if found}, "2026-01-02")
    made.save(own_profile)
    assert machine.profile_info().state == f"{own_profile}, of 2026-01-02, for {key}"
    assert devices.gather()[0].profile == "used"
    replace(made, hardware="elsewhere").save(own_profile)
    assert devices.gather()[0].profile.startswith("not used: it was measured on elsewhere")
    replace(made, device_type="cuda").save(own_profile)
    assert devices.gather()[0].profile == "not used: it is for cuda"


def test_a_profile_that_cannot_be_read_is_told(own_profile: Path) -> None:
    own_profile.write_text("{}")
    assert machine.profile_info().state.startswith("not used: ")
    assert devices.gather()[0].profile.startswith("not used: ")


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # how Python marks a module that cannot be imported
from dilated_factory.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_info_without_torch_says_what_is_lacking() -> None:
    ran = python("-c", WITHOUT_TORCH, "info")
    assert ran.returncode == 0, ran.stderr
    assert "  torch                  not installed\n" in ran.stdout
    assert "every attention and model" in ran.stdout
    assert "pip install torch\n" in ran.stdout


def test_kernels_without_torch_says_what_to_install() -> None:
    ran = python("-c", WITHOUT_TORCH, "info", "--kernels")
    assert ran.returncode == 1
    assert ran.stderr == (
        "dilated info --kernels needs torch, not installed here. Install with:\n    pip install torch\n"
    )


@pytest.mark.gpu
def test_info_shows_the_gpu() -> None:
    device = devices.gather()[1]
    assert device.device == "cuda:0"
    assert device.hardware.device_name == torch.cuda.get_device_name(0)
    assert any(kernel.dtypes for kernel in device.kernels if kernel.name.startswith("cuda_"))


def test_importing_the_package_and_asking_for_help_need_no_torch() -> None:
    ran = python(
        "-c",
        "import sys, dilated_factory, dilated_factory.cli\n"
        "try: dilated_factory.cli.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules",
    )
    assert ran.returncode == 0, ran.stderr
    assert "info" in ran.stdout
    assert "demo" in ran.stdout


def test_every_public_name_is_there() -> None:
    import dilated_factory

    for name in dilated_factory.__all__:
        assert getattr(dilated_factory, name).__name__ == name
    assert set(dilated_factory.__all__) <= set(dir(dilated_factory))
    with pytest.raises(AttributeError, match="no attribute 'LongNetLN'"):
        dilated_factory.LongNetLN  # noqa: B018


def test_the_module_is_the_command() -> None:
    ran = python("-m", "dilated_factory", "--version")
    assert ran.returncode == 0
    assert ran.stdout.startswith("dilated-factory ")


@pytest.mark.parametrize("arguments", [["nonsense"], [], ["info", "--nonsense"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: dilated" in capsys.readouterr().err


@pytest.mark.parametrize(("absent", "named"), [(["rich"], "rich"), (["rich", "matplotlib"], "rich and matplotlib")])
def test_demo_without_its_extra_says_what_to_install(
    absent: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("rich", "matplotlib"):
        # None in sys.modules is how Python marks a module that cannot be imported; the other one is made present.
        monkeypatch.setitem(sys.modules, module, None if module in absent else sys)
    assert main(["demo", "--quick"]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"dilated demo needs {named}, not installed here.")
    assert 'pip install "dilated-factory[bench]"' in message


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "dilated_factory", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert "Error" not in process.stderr.read()
        assert process.wait(60) == 1
