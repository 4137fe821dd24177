"""Pages hold what they promise: blocks that are run, languages that are named, links and paths that lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pages
import pytest

# pytest-markdown-docs runs a block whose first word is python. What else may follow it there.
ASKED_OF_PYTHON = re.compile(r"continuation|fixture:\w+|runner:\w+")
WAYS_TO_SHOW_PYTHON = {"python", "py", "python3", "pycon", "{code-block}", "{code}", "{sourcecode}", "{doctest}"}
QUOTED_FOLDERS = ("docs/", "packages/", "examples/", ".ci/")

each_page = pytest.mark.parametrize("page", pages.pages(), ids=pages.name)
each_package_readme = pytest.mark.parametrize(
    "page", [page for page in pages.pages() if page.match("packages/*/README.md")], ids=pages.name
)


@pytest.fixture(scope="module")
def given_to_pytest() -> set[Path]:
    """The pages that the sessions "docs" and "doctests" hand to pytest, said by these sessions themselves."""
    specification = importlib.util.spec_from_file_location("noxfile", pages.ROOT / "noxfile.py")
    assert specification is not None
    assert specification.loader is not None
    noxfile: Any = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(noxfile)
    given: set[Path] = set()

    def note(session: Any, report: str, *arguments: str, **options: Any) -> None:
        given.update(Path(argument) for argument in arguments if argument.endswith(".md"))

    # Neither builds nor installs: what is asked is the list, not the run.
    noxfile.pin_wheels = lambda session, *packages: noxfile.CONSTRAINTS
    noxfile.install = lambda session, *requirements, **options: None
    noxfile.pytest = note
    session = SimpleNamespace(run=lambda *command, **options: None)
    noxfile.docs(session)
    for package in noxfile.PACKAGES:
        noxfile.doctests(session, package)
    return given


@each_page
def test_every_fence_names_its_language(page: Path) -> None:
    nameless = [fence.where for fence in pages.split(page)[0] if not fence.language]
    assert not nameless, "a fence without a language; output and sketches are ```text"


@each_page
def test_shell_blocks_are_console_blocks_without_a_prompt(page: Path) -> None:
    for fence in pages.split(page)[0]:
        assert fence.language not in {"sh", "bash", "shell", "zsh"}, f"{fence.where}: write ```console"
        if fence.language == "console":
            prompts = [line for line in fence.text.splitlines() if line.startswith(("$ ", "% ", "> "))]
            assert not prompts, f"{fence.where}: a prompt cannot be copied"


@each_page
def test_every_python_block_is_run(page: Path, given_to_pytest: set[Path]) -> None:
    blocks = [fence for fence in pages.split(page)[0] if fence.language in WAYS_TO_SHOW_PYTHON]
    for block in blocks:
        assert block.language == "python", f"{block.where}: only blocks that begin with ```python are run"
        unknown = [word for word in block.words[1:] if not ASKED_OF_PYTHON.fullmatch(word)]
        assert not unknown, f"{block.where}: {unknown} keeps it from being run"
        ast.parse(block.text, filename=block.where)
    assert not blocks or page in given_to_pytest, f"no nox session runs the {len(blocks)} python blocks of this page"


@each_package_readme
def test_a_package_shows_an_example_of_about_ten_lines_near_its_top(page: Path) -> None:
    first = next((fence for fence in pages.split(page)[0] if fence.language == "python"), None)
    assert first is not None
    assert first.line <= 25
    assert 5 <= len(first.text.splitlines()) <= 20


@each_package_readme
def test_a_package_links_nothing_by_a_relative_path(page: Path) -> None:
    relative = [target for _, target in pages.links(page) if "://" not in target and not target.startswith("#")]
    assert not relative, "the page is read on PyPI and inside the site too, where such a path leads elsewhere"


@each_page
def test_every_link_and_image_leads_somewhere(page: Path) -> None:
    broken = []
    for line, target in pages.links(page):
        path, _, anchor = unquote(target).partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        goal = (page.parent / path).resolve() if path else page
        if not goal.exists():
            broken.append(f"line {line}: {target} does not exist")
        elif anchor and goal.suffix == ".md" and anchor not in pages.anchors(goal):
            broken.append(f"line {line}: {target}: no such heading; there are {sorted(pages.anchors(goal))}")
    assert not broken


@each_page
def test_every_path_quoted_in_prose_exists(page: Path) -> None:
    missing = [f"line {line}: {path}" for line, path in quoted_paths(page) if not exists(path, page)]
    assert not missing, "quoted, and not there (what a reader is to make is written with <name>)"


def quoted_paths(page: Path) -> list[tuple[int, str]]:
    """The paths into this repository that a page quotes, with their lines."""
    quoted = [
        (line, word.lstrip("(\"'").rstrip(".,;:)\"'").removeprefix("./").partition("[")[0])
        for line, span in pages.code_spans(page)
        for word in span.split()
    ]
    return [(line, path) for line, path in quoted if path.startswith(QUOTED_FOLDERS) and not re.search("[<>{}…]", path)]


def exists(path: str, page: Path) -> bool:
    """Whether a quoted path, or a pattern of paths, is found from the root or from the package the page is about."""
    package = pages.ROOT / "packages" / (page.parent.name if page.name == "README.md" else page.stem)
    pattern = path.rstrip("/").partition("#")[0]
    # What a session writes is there only once it has run.
    return pattern.startswith("docs/_build") or any(any(folder.glob(pattern)) for folder in (pages.ROOT, package))


def test_a_page_is_read_as_markdown(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# What `a_b` costs\n\n## Again\n\nSee [one](x.md#a) and `[no](link)`, `two\nlines`.\n\n"
        "````text\n```python\nquoted\n```\n````\n- in a list\n\n  ```console run\n  nox -l\n  ```\n\n## Again\n",
        encoding="utf-8",
    )
    fences, _ = pages.split(page)
    assert [(fence.language, fence.line, fence.text) for fence in fences] == [
        ("text", 8, "```python\nquoted\n```\n"),
        ("console", 15, "nox -l\n"),
    ]
    assert pages.anchors(page) == {"what-a_b-costs", "again", "again-1"}
    assert list(pages.links(page)) == [(5, "x.md#a")]
    assert [span for _, span in pages.code_spans(page)] == ["a_b", "[no](link)", "two lines"]
    around = tmp_path / "around.md"
    around.write_text("(a-target)=\n\n# Around\n\n```{include} page.md\n:start-line: 2\n```\n", encoding="utf-8")
    assert pages.anchors(around) == {"a-target", "around", *pages.anchors(page)}


@pytest.mark.parametrize(
    "quoted", ["docs/nothing.md", "./packages/nothing", "(.ci/nothing.py),", "examples/nothing.py"]
)
def test_a_quoted_path_that_is_not_there_is_found(quoted: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Run `python {quoted}` and see.\n", encoding="utf-8")
    [(line, path)] = quoted_paths(page)
    assert (line, "nothing" in path) == (1, True)
    assert not exists(path, page)
