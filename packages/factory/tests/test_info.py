"""The command line: its answers, its speed of import, and what it says where something is missing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from dilated_core import kernels
from dilated_factory import registry
from dilated_factory.cli import main
from dilated_factory.cli.info import DISTRIBUTIONS, gather, render


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_info_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("Python", "Versions", "Device cpu", "Kernels on cpu", "Attention types", torch.__version__):
        assert word in text
    for name in (*DISTRIBUTIONS, *registry.KNOWN, "auto", *(kernel.name for kernel in kernels.table())):
        assert f"  {name} " in text
    assert "it runs on CUDA, not on cpu" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["torch"] == torch.__version__
    assert info["versions"]["dilated-core"]
    cpu = info["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["hardware"]["device_type"] == "cpu"
    rows = {row["name"]: row for row in cpu["kernels"]}
    assert list(rows) == [kernel.name for kernel in kernels.table()]
    assert rows["math"] == {
        "name": "math",
        "dtypes": ["float64", "float32", "bfloat16", "float16"],
        "refusals": {},
    }
    for row in rows.values():
        assert len(row["dtypes"]) + len(row["refusals"]) == 4
    types = {row["name"]: row for row in info["attention_types"]}
    assert types["improved"]["installed"]
    assert set(types) >= set(registry.KNOWN)
    for row in types.values():
        assert row["installed"] == (row["install"] is None)


def test_columns_are_aligned() -> None:
    section = render(gather()).split("Attention types\n")[1].splitlines()
    starts = {len(line) - len(line[2:].split(maxsplit=1)[1]) for line in section}
    assert len(starts) == 1


@pytest.mark.gpu
def test_info_shows_the_gpu() -> None:
    device = gather().devices[1]
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
