"""Every figure that a page quotes is what its recorded run gives, and every recorded run can be made again."""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from evidence import records  # noqa: E402
from evidence.claim import Claim, Quote  # noqa: E402
from evidence.claims import CLAIMS  # noqa: E402
from evidence.page import PAGE, page  # noqa: E402
from evidence.quotes import differences, unclaimed  # noqa: E402

NAMES = records.names()
DECODING = Claim("dilated-core", "a token in {ms:.1f} ms", "decode", lambda _: {"ms": 0.87, "times": 174.0})


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ figures


def test_every_page_says_what_the_records_give() -> None:
    assert differences(CLAIMS) == []


def test_the_performance_page_is_the_one_that_the_records_give() -> None:
    assert text(PAGE) == page(CLAIMS), "write it again with: python docs/evidence"


def test_a_changed_number_is_found_and_both_are_told() -> None:
    claim = Claim(**{**vars(DECODING), "quotes": (Quote("a.md", "takes {ms:.1f} ms, {times:.0f} times less"),)})
    right = {"a.md": "A token takes 0.9 ms,\n174 times\nless."}
    assert differences([claim], right) == []
    [found] = differences([claim], {"a.md": "A token takes 0.8 ms, 174 times less."})
    said, given = "“takes 0.8 ms, 174 times less”", "“takes 0.9 ms, 174 times less”"
    assert found == f"a.md: says {said}, and the record gives {given} (decode.json)"


def test_a_figure_within_a_longer_number_is_another_figure() -> None:
    for words, right, wrong in (
        ("{ms:.1f} ms", "takes 0.9 ms.", "takes 10.9 ms."),
        ("{times:.0f} times", "costs 174 times", "costs 2,174 times"),
        ("a ratio of {times:.0f}", "a ratio of 174, or", "a ratio of 174.5, or"),
    ):
        claim = Claim(**{**vars(DECODING), "quotes": (Quote("a.md", words),)})
        assert differences([claim], {"a.md": right}) == []
        assert differences([claim], {"a.md": wrong}) != []


def test_words_that_are_gone_are_found() -> None:
    claim = Claim(**{**vars(DECODING), "quotes": (Quote("a.md", "takes {ms:.1f} ms"),)})
    assert differences([claim], {"a.md": "A token is fast."}) == ["a.md: does not say “takes 0.9 ms” (decode.json)"]


def test_a_changed_record_changes_what_every_claim_says() -> None:
    for claim in CLAIMS:
        assert re.search(r"\d", claim.text()), claim.statement
        assert claim.statement != claim.text(), "a claim without a field cannot be wrong"


def test_a_figure_without_a_claim_is_listed() -> None:
    everything, nothing = unclaimed([]), unclaimed(CLAIMS)
    assert len(nothing) < len(everything)
    times = next(claim.fields()["times"] for claim in CLAIMS if claim.record == "decode")
    words = f"{times:.0f} times less than with a dense cache"
    assert any(words in line for line in everything)
    assert not any(words in line for line in nothing)


def test_tolerances_in_the_readmes_are_those_of_the_tests() -> None:
    for package, cases in (("dilated-core", "core_cases"), ("ring", "ring_cases"), ("block-sparse", "sparse_cases")):
        readme = " ".join(text(f"packages/{package}/README.md").split())
        source = text(f"packages/{package}/tests/{cases}.py")
        forward, gradient = (
            dict(re.findall(r"torch\.(\w+): ([\d.e-]+)", re.search(rf"^{name} = (.*)$", source, re.MULTILINE)[1]))
            for name in ("FORWARD_TOLERANCE", "GRADIENT_TOLERANCE")
        )
        assert f"within {forward['float64']}" in readme
        if "float32 within" in readme:
            assert f"float32 within {forward['float32']} (gradients {gradient['float32']})" in readme


# ------------------------------------------------------------------------------------------------ records


@pytest.mark.parametrize("name", NAMES)
def test_a_page_ends_with_its_raw_data_and_its_command(name: str) -> None:
    assert text(f"docs/benchmarks/{name}.md").splitlines()[-1] == records.source_line(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_options_of_a_recorded_command_still_exist(name: str) -> None:
    script, typed = records.script(name), records.command(name).split()
    parser = argparse.ArgumentParser()
    if typed[:4] == ["nox", "-s", "interop", "--"]:
        conftest = runpy.run_path(str(ROOT / "tests" / "interop" / "conftest.py"))
        conftest["pytest_addoption"](SimpleNamespace(addoption=parser.add_argument))
        parser.parse_args(typed[4:])
        return
    if script is None:  # a command of the factory: demo or bench
        importlib.import_module(f"dilated_factory.{Path(name).parent}.command").add_arguments(parser)
        parser.parse_args(typed[typed.index("--output") :])
        return
    sources = "".join(path.read_text(encoding="utf-8") for path in script.parent.glob("*.py"))
    for option in typed:
        assert not option.startswith("--") or f'"{option}"' in sources


@pytest.mark.parametrize("path", [path for name in NAMES for path in (f"{name}.json", f"{name}.md")])
def test_a_record_names_no_folder_of_the_machine(path: str) -> None:
    found = re.search(r"""(?<![\w.)\]>])/[A-Za-z_.-]+/[\w./-]+|\b[A-Z]:\\\\""", text(f"docs/benchmarks/{path}"))
    assert found is None or found[0].startswith("/sys/"), found


def test_every_record_and_picture_is_on_the_performance_page_or_on_its_own() -> None:
    for name in NAMES:
        assert f"(benchmarks/{name}.json)" in text(PAGE)
    for picture in (ROOT / "docs/benchmarks").rglob("*.png"):
        assert any(f"]({picture.name})" in each.read_text() for each in picture.parent.glob("*.md")), picture


# What a script's page function takes from the record. Left out are pages of older scripts, kept as they were recorded
# (decode, gigapath, short), those that are written row by row (memory_pool_*, pattern_cache_*), and three that need
# more than the record holds.
PAGES: dict[str, Callable[[ModuleType, Any], str]] = {
    "block_sparse_layouts": lambda module, record: module.page(record["layouts"], record["environment"], 9583),
    "block_sparse_recall": lambda module, record: module.page(record, record["environment"], "block_sparse_recall.png"),
    "cpu_matmul": lambda module, record: module.report(record["rows"], record["environment"], 33_554_432),
    "dilated_attention": lambda module, record: module.report(record["rows"], record["environment"]),
    "minilm": lambda module, record: module.report(record, record["environment"]),
    "overhead": lambda module, record: module.report(record, record["environment"]),
    "ring_ranks": lambda module, record: module.report(record),
    "ring_streaming": lambda module, record: module.report(record["rows"], record["environment"]),
    "ring_traffic": lambda module, record: module.page(record, record["environment"], "ring_traffic.png"),
    "semantics": lambda module, record: module.report(record, record["environment"]),
    "train_64k": lambda module, record: module.page(record),
    "triton_work": lambda module, record: module.report(record["rows"], record["environment"]),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_its_benchmark_makes_of_the_record(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = records.script(name)
    assert script is not None
    monkeypatch.syspath_prepend(script.parent)
    assert PAGES[name](importlib.import_module(script.stem), records.load(name)) == text(f"docs/benchmarks/{name}.md")
