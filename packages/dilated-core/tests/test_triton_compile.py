"""The Triton programs compile for sm_80 and sm_90, fit, and use the matrix units: what can be shown without a card.

`nox -s tests` compiles the corners; `nox -s fuzz` every program for every head_dim, precision and card.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_compile import REGISTERS_PER_THREAD, SHARED_PER_BLOCK, Case, Compiled, compile_cases

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_triton_compile

pytest.importorskip("triton")

CORNERS = [
    Case("row_stats", 80, 48, "bfloat16"),
    Case("forward", 80, 16, "bfloat16", ordered=False),
    Case("forward", 90, 48, "float16", torchscale=True, masked=True),
    Case("forward", 90, 64, "bfloat16", is_causal=True, masked=True, packed=True, grouped=True),
    Case("forward", 90, 256, "bfloat16", is_causal=True),
    Case("forward", 80, 64, "float32"),
    Case("forward", 90, 64, "float32", tf32=True),
    Case("grad_query", 80, 64, "float16", torchscale=True, masked=True, packed=True),
    Case("grad_query", 90, 128, "bfloat16", is_causal=True),
    Case("grad_key_value", 80, 64, "bfloat16", is_causal=True, masked=True, packed=True, grouped=True),
    Case("grad_key_value", 90, 48, "bfloat16", torchscale=True),
    Case("grad_key_value", 80, 256, "bfloat16", is_causal=True),
]

# More stages than shared memory holds. Were this found to fit, the others would show nothing.
TOO_LARGE = Case("forward", 80, 256, "bfloat16", blocks=(16, 64, 4, 5))

PROGRAMS = ("forward", "grad_query", "grad_key_value")
PRECISIONS: dict[str, dict[str, object]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "tf32": {"dtype": "float32", "tf32": True},
    "float32": {"dtype": "float32"},
}
OPTIONS: list[dict[str, bool]] = [
    {"ordered": False},
    {"is_causal": True},
    {"is_causal": True, "masked": True, "packed": True, "grouped": True},
    {"torchscale": True, "masked": True, "packed": True, "grouped": True},
]

# Instructions that spill or fill registers, in all loops over blocks: few beside the 400 to 1,600 of one such loop.
# Triton's versions differ by some tens.
MOST_LOOP_SPILLS = 64
# wgmma takes 64 rows of a block at least.
WGMMA_ROWS = 64


def faults(case: Case, made: Compiled) -> list[str]:
    """What is wrong with what the compiler made; nothing where all is well."""
    precision = "tf32" if case.tf32 else "float32" if case.dtype == "float32" else "half"
    found = made.instructions
    products = found["wgmma"] + found["mma"] + found["tf32"]
    warp_group = case.arch == 90 and made.blocks[0] >= WGMMA_ROWS
    pipelined = made.blocks[3] > 1
    checks = {
        "shared memory": 0 <= made.shared <= SHARED_PER_BLOCK[case.arch],
        "registers": 0 < made.registers <= REGISTERS_PER_THREAD,
        "a block fits a multiprocessor": made.blocks_per_processor(case.arch) >= 1,
    }
    if case.program != "row_stats":
        checks |= {
            "loops with a mask and without": made.loops >= 2,
            "spills in loops": made.loop_spills <= MOST_LOOP_SPILLS,
            "wgmma": precision != "half" or (found["wgmma"] > 0) == warp_group,
            "mma.sync": precision != "half" or (found["mma"] > 0) != warp_group,
            "tf32 where asked for only": (found["tf32"] > 0) == (precision == "tf32"),
            "exact float32 without matrix units": precision != "float32" or products == 0,
            "asynchronous copies": not pipelined or found["cp_async"] > 0,
        }
    return [what for what, holds in checks.items() if not holds]


@pytest.fixture(scope="module")
def corners(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Compiled]:
    return dict(compile_cases([*CORNERS, TOO_LARGE], tmp_path_factory.mktemp("triton"), processes=1, timeout=1200))


@pytest.mark.slow
@pytest.mark.parametrize("case", CORNERS, ids=str)
def test_a_program_fits_the_card_and_uses_its_matrix_units(case: Case, corners: dict[Case, Compiled]) -> None:
    assert not faults(case, corners[case]), corners[case]


@pytest.mark.slow
def test_what_does_not_fit_is_found(corners: dict[Case, Compiled]) -> None:
    assert {"shared memory", "a block fits a multiprocessor"} <= set(faults(TOO_LARGE, corners[TOO_LARGE]))


def test_no_length_and_no_batch_compiles_anything_new() -> None:
    ask = """
from triton_compile import Case, variants
sizes = [(2, 4096), (2, 4095), (1, 16), (3, 17), (1, 2), (16, 1000)]
for program in ("forward", "row_stats", "grad_query", "grad_key_value"):
    for options in ({}, {"is_causal": True, "masked": True, "packed": True, "grouped": True}, {"torchscale": True}):
        if program != "row_stats" or not options:
            print(variants(Case(program, 90, 64, "bfloat16", **options), sizes))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", ask]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["1"] * 10


@pytest.mark.slow
def test_the_table_says_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--programs=forward", "--cards=90", "--head-dims=16", "--precisions=bfloat16", "--processes=1"]
    monkeypatch.setattr(sys, "argv", ["bench_triton_compile.py", *options, f"--output={tmp_path}"])
    bench_triton_compile.main()
    rows = json.loads((tmp_path / "triton_compile.json").read_text())["rows"]
    assert [row["options"] for row in rows] == ["none", "all"]
    assert all(0 < row["shared"] <= row["shared_limit"] and row["blocks_per_processor"] >= 1 for row in rows)
    assert (tmp_path / "triton_compile.md").read_text().count("\n| forward | sm_90 | 16 | bfloat16 |") == 2


@pytest.mark.fuzz
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("arch", SHARED_PER_BLOCK)
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_head_dim_and_option(program: str, arch: int, precision: str, tmp_path: Path) -> None:
    cases = [
        Case(program, arch, head_dim, **PRECISIONS[precision], **options)
        for head_dim, options in itertools.product((16, 48, 64, 128, 256), OPTIONS)
    ]
    wrong = {
        str(case): (found, made)
        for case, made in compile_cases(cases, tmp_path, timeout=3600)
        if (found := faults(case, made))
    }
    assert not wrong
