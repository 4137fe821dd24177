"""Every command on every page: sessions, options, files and packages are real, and what is marked to run is run.

A block that opens with ```console run is executed, in a folder of its own that holds the repository's packages and
examples. Words after "run" are modules without which it is left out. If the next block under the same heading is
```text, its lines must be among what was printed; `...` in a line stands for anything.

Commands quoted in prose (`nox -s demo`) are checked like those in ```console blocks.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pages
import pytest
from commands import ROOT, Command, Question, claims, commands, logical_lines, simple_commands

SECONDS = 300.0  # for what takes seconds, on a slow and busy machine


@pytest.fixture(scope="module")
def help_texts() -> dict[Question, str]:
    """What everything that pages give options to says of its options: asked once, in one process."""
    wanted: set[Question] = set()
    for page in pages.pages():
        # What is wrong in itself fails in the test before.
        with contextlib.suppress(AssertionError, ValueError):
            for command in commands(page):
                wanted.update(question for claim in claims(command) for question in claim.questions)
    questions = sorted(wanted)
    asked = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("help_texts.py")), json.dumps(questions)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=2 * SECONDS,
    )  # fmt: skip
    return dict(zip(questions, json.loads(asked.stdout), strict=True))


def test_a_block_is_cut_into_its_commands() -> None:
    block = """
A=1 first --x \\
    "two words" && second 'a
b' # a comment
third > file
fourth | fifth; (sixth)
"""
    found = [words for line in logical_lines(block) for words in simple_commands(line)]
    assert found == [["first", "--x", "two words"], ["second", "a\nb"], ["third"], ["fourth"], ["fifth"], ["sixth"]]


@pytest.mark.parametrize(
    "line",
    [
        "nox -s tests no-such-session",
        "nox -t no-such-tag",
        "nox --no-such-option",
        "pip install ./packages/no-such-package",
        'pip install "./packages/ring[no-such-extra]"',
        'pip install "dilated-factory[no-such-extra]"',
        "pip install dilated-no-such-package",
        ".venv/bin/python examples/no_such_script.py",
        "python -m no_such_module",
        "torchrun --nproc-per-node 2 no_such_script.py",
        "pipx run --spec nox nox -s no-such-session",
        "pip no-such-subcommand",
        "no-such-program",
    ],
)
def test_a_command_that_names_what_is_not_there_is_found(line: str) -> None:
    [words] = simple_commands(line)
    with pytest.raises(AssertionError):
        list(claims(Command("a page", ROOT, tuple(words))))


@pytest.mark.parametrize("page", pages.pages(), ids=pages.name)
def test_every_command_names_what_exists(page: Path) -> None:
    for command in commands(page):
        list(claims(command))


@pytest.mark.parametrize("page", pages.pages(), ids=pages.name)
def test_every_option_is_in_the_help_of_its_program(page: Path, help_texts: dict[Question, str]) -> None:
    for command in commands(page):
        for claim in claims(command):
            texts = [help_texts[question] for question in claim.questions]
            silent = [text for text in texts if text.startswith("NO ANSWER")]
            assert not silent, f"{claim.where}: {claim.questions}: {silent}"
            known = {option for text in texts for option in re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text)}
            assert claim.option in known, f"{claim.where}: {claim.option} is not in the help of {claim.questions}"


def expected_after(fence: pages.Fence) -> list[str]:
    """The lines of the ```text block that follows under the same heading, if there is one."""
    following = [other for other in pages.split(fence.page)[0] if other.line > fence.line][:1]
    headings = [line for line, text in pages.split(fence.page)[1] if text.startswith("#") and line > fence.line]
    if not following or following[0].language != "text" or (headings and headings[0] < following[0].line):
        return []
    return [" ".join(line.split()) for line in following[0].text.splitlines() if line.strip(" .…")]


@pytest.mark.parametrize(
    "fence", [fence for fence in pages.fences("console") if "run" in fence.words], ids=lambda fence: fence.where
)
def test_a_block_marked_to_run_prints_what_the_page_says(fence: pages.Fence, tmp_path: Path) -> None:
    for module in fence.words[2:]:
        pytest.importorskip(module)
    for folder in ("packages", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": str(tmp_path),  # no profile and no compiled kernels of this machine's user
    }
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", fence.text],
        cwd=tmp_path, env=environment, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{fence.where}: not done in {SECONDS:.0f} s; it printed {process.communicate()[0]}")
    assert process.returncode == 0, f"{fence.where}: exit status {process.returncode}\n{printed}"
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for wanted in expected_after(fence):
        pattern = re.escape(wanted).replace(r"\.\.\.", ".*")
        assert any(re.fullmatch(pattern, line) for line in lines), f"{fence.where}: {wanted!r} is not in\n{printed}"
