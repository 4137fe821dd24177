"""The commands on a page, and what each of them claims to be there: sessions, folders, extras, scripts, options.

A claim that can be seen to be wrong at once is an AssertionError; what a --help has to settle is handed back.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import nox.project
import pages
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

ROOT = pages.ROOT

# Programs of others: no page teaches them, so that no more is checked than their names.
KNOWN = {"curl", "git", "hatch", "uv"}
# Scripts that a reader has, or writes: not this repository's.
READERS_OWN = {"train.py"}
# Sessions that hand what follows -- to pytest, and the folder whose conftest.py may add options.
PYTEST_SESSIONS = {
    "docs": (), "doctests": (), "fuzz": (), "house": ("tests/house",), "interop": ("tests/interop",), "tests": (),
}  # fmt: skip
NOX_OPTIONS = {"-s", "-t", "-P", "-l", "--list", "-r", "-R"}

Question = tuple[str, ...]  # as help_texts.py takes it: ("script", path) or ("module", name, ...)


class Command(NamedTuple):
    """One program with its arguments, where it stands, and the folder that the page has gone to by then."""

    where: str
    folder: Path
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        """Without the folder it is called from."""
        return Path(self.words[0]).name

    def called(self, *words: str) -> Command:
        """The command that this one runs."""
        return self._replace(words=words)


class Claim(NamedTuple):
    """That an option is in the --help of one of these."""

    where: str
    option: str
    questions: tuple[Question, ...]


# -------------------------------------------------------------------------------------------- reading a shell block


def logical_lines(text: str) -> Iterator[str]:
    """Lines, joined where a backslash or an open quote carries one on."""
    held = ""
    for line in text.splitlines():
        held += line
        if held.endswith("\\"):
            held = held[:-1] + " "
            continue
        try:
            shlex.split(held, comments=True)
        except ValueError:
            held += "\n"
            continue
        yield held
        held = ""
    if held.strip():
        raise ValueError(f"this command does not end: {held!r}")


def simple_commands(line: str) -> Iterator[list[str]]:
    """A logical line cut at &&, || and so on: words alone, without what is assigned before and redirected after."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>()")
    lexer.whitespace_split = True
    words: list[str] = []
    redirected = False
    for word in [*lexer, ";"]:
        if set(word) <= set("&|;()"):
            if words:
                yield words
            words = []
        elif set(word) <= set("<>"):
            redirected = True
        elif redirected:
            redirected = False
        elif words or not re.match(r"\w+=", word):
            words.append(word)


def commands(page: Path) -> list[Command]:
    """Every command of a page's ```console blocks, `cd` followed from block to block, then those quoted in prose.

    A quoted one with a <name> for the reader to fill in says nothing that could be checked.
    """
    found, folder = [], ROOT
    for fence in pages.split(page)[0]:
        if fence.language != "console":
            continue
        for line in logical_lines(fence.text):
            for words in simple_commands(line):
                if words[0] == "cd":
                    # From where the page has gone to, or over again from the root, as in a new section.
                    goals = [place / words[1] for place in (folder, ROOT) if (place / words[1]).is_dir()]
                    assert goals, f"{fence.where}: cd {words[1]}: there is no such folder in {folder} or in the root"
                    folder = goals[0]
                else:
                    found.append(Command(fence.where, folder, tuple(words)))
    programs = ("nox -", "dilated ", "python ", "python3 ", "pip install ", "torchrun ", "uvx ", "pipx ")
    for line_number, span in pages.code_spans(page):
        if span.startswith(programs) and not re.search(r"<[\w-]+>", span):
            where = f"{pages.name(page)}:{line_number}"
            found += [Command(where, ROOT, tuple(words)) for words in simple_commands(span) if words]
    return found


# -------------------------------------------------------------------------------------------- what there is


@cache
def sessions() -> tuple[set[str], set[str]]:
    """The names of nox's sessions, with and without what they are parametrized by, and the tags."""
    listed = subprocess.run(
        # Without a choice, only the sessions that run by default are listed.
        [sys.executable, "-m", "nox", "--list", "--json", "--keywords", "not nothing"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    entries = json.loads(listed.stdout)
    names = {name for entry in entries for name in (entry["name"], entry["session"])}
    return names, {tag for entry in entries for tag in entry["tags"]}


@cache
def projects() -> dict[str, tuple[Path, set[str]]]:
    """Of each distribution of this repository: its folder and its extras."""
    found = {}
    for path in sorted(ROOT.glob("packages/*/pyproject.toml")):
        project = nox.project.load_toml(path)["project"]
        found[canonicalize_name(project["name"])] = path.parent, set(project.get("optional-dependencies", {}))
    return found


# -------------------------------------------------------------------------------------------- what a command claims


def claims(command: Command) -> Iterator[Claim]:
    """Check what can be seen without running anything; yield the options that a --help has to name."""
    arguments = list(command.words[1:])
    match command.program:
        case "nox":
            yield from nox_claims(command, arguments)
        case "pip" | "pip3":
            pip_claims(command, arguments)
        case "python" | "python3":
            yield from python_claims(command, arguments)
        case "torchrun":
            yield from torchrun_claims(command, arguments)
        case "dilated":
            yield from module_claims(command, "dilated_factory", arguments)
        case "uvx" | "pipx":
            programs = [position for position, word in enumerate(arguments) if word == "nox"]
            assert programs, f"{command.where}: {command.program} is known to run nox, no more"
            yield from claims(command.called(*arguments[programs[0] :]))
        case program:
            assert program in KNOWN, f"{command.where}: this test does not know {program}; add it to KNOWN"


def pythons() -> list[str]:
    """The versions of Python that the packages declare."""
    prefix = "Programming Language :: Python :: 3."
    classifiers = {
        line
        for path in ROOT.glob("packages/*/pyproject.toml")
        for line in nox.project.load_toml(path)["project"]["classifiers"]
    }
    return sorted(line.rpartition(" ")[2] for line in classifiers if line.startswith(prefix))


def nox_claims(command: Command, arguments: list[str]) -> Iterator[Claim]:
    """`nox -P PYTHON -s NAME... -t TAG... -- what the session takes`."""
    rest: list[str] = []
    if "--" in arguments:
        arguments, rest = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    names, tags = sessions()
    chosen: list[str] = []
    option = ""
    for word in arguments:
        if word.startswith("-"):
            option = word
            assert option in NOX_OPTIONS, f"{command.where}: nox {option} is not known here"
        elif option == "-s":
            assert word in names, f"{command.where}: no session is called {word!r}; there are {sorted(names)}"
            chosen.append(word.partition("(")[0])
        elif option == "-t":
            assert word in tags, f"{command.where}: no session has the tag {word!r}; there are {sorted(tags)}"
        elif option == "-P":
            assert word in pythons(), f"{command.where}: no package declares Python {word}; there are {pythons()}"
        else:
            raise AssertionError(f"{command.where}: nox takes no {word!r} here")
    for session in chosen:
        questions = session_questions(session, command.words, rest)
        if questions is not None:
            yield from (Claim(command.where, word, questions) for word in options(rest))


def session_questions(session: str, words: tuple[str, ...], rest: list[str]) -> tuple[Question, ...] | None:
    """Who reads what follows `--`; None where that is for the session alone to say."""
    if session in PYTEST_SESSIONS:
        return (("module", "pytest", *PYTEST_SESSIONS[session]),)
    if session == "demo":
        return (("module", "dilated_factory", "demo"),)
    if session == "figures":
        return (("script", "docs/figures"),)
    if session == "bench":
        folders = re.findall(r"bench\(([\w-]+)\)", " ".join(words)) or ["*"]
        return tuple(
            ("script", pages.name(path))
            for folder in folders
            for path in sorted(ROOT.glob(f"packages/{folder}/benchmarks/bench_*.py"))
        )
    if session == "gpu":
        named = [path for word in rest for path in sorted(ROOT.glob(f"packages/*/benchmarks/{word}.py"))]
        return ("script", ".ci/gpu.py"), *(("script", pages.name(path)) for path in named), ("module", "pytest")
    return None


def pip_claims(command: Command, arguments: list[str]) -> None:
    """`pip install`: folders that are packages, extras that they have, names of ours that exist."""
    assert arguments[:1] == ["install"], f"{command.where}: of pip, this test knows install, no more"
    for word in arguments[1:]:
        if word.startswith("-"):
            continue
        path, bracket, extra = word.partition("[")
        if path.startswith((".", "/")) or (command.folder / path / "pyproject.toml").exists():
            folder = (command.folder / path).resolve()
            matches = [found for where, found in projects().values() if where == folder]
            assert matches, f"{command.where}: {path} is no package of this repository"
            asked, there = set(extra.strip("]").split(",")) if bracket else set(), matches[0]
        else:
            try:
                requirement = Requirement(word)
            except InvalidRequirement as error:
                raise AssertionError(f"{command.where}: pip cannot read {word!r}") from error
            name = canonicalize_name(requirement.name)
            if not name.startswith("dilated-"):
                continue
            assert name in projects(), f"{command.where}: no package here is called {name}"
            asked, there = requirement.extras, projects()[name][1]
        assert asked <= there, f"{command.where}: {word}: there are the extras {sorted(there)}"


def python_claims(command: Command, arguments: list[str]) -> Iterator[Claim]:
    """`python -c`, `python -m` and `python script.py`."""
    match arguments:
        case ["-c", code, *_]:
            ast.parse(code, filename=command.where)
        case ["-m", "pip" | "nox" as module, *rest]:
            yield from claims(command.called(module, *rest))
        case ["-m", "venv", *_]:
            pass
        case ["-m", module, *rest]:
            assert importlib.util.find_spec(module), f"{command.where}: there is no module {module}"
            yield from module_claims(command, module, rest)
        case [script, *rest]:
            if script in READERS_OWN:
                return
            found = [folder / script for folder in (command.folder, ROOT) if (folder / script).exists()]
            assert found, f"{command.where}: there is no {script} in {command.folder}"
            question = ("script", pages.name(found[0].resolve()))
            yield from (Claim(command.where, word, (question,)) for word in options(rest))


def module_claims(command: Command, module: str, arguments: list[str]) -> Iterator[Claim]:
    """`python -m module`; of `dilated`, the subcommand's own help is asked, which fails if there is no such one."""
    subcommand = [word for word in arguments[:1] if module == "dilated_factory" and not word.startswith("-")]
    question = ("module", module, *subcommand)
    for word in options(arguments) or (["--help"] if subcommand else []):
        yield Claim(command.where, word, (question,))


def torchrun_claims(command: Command, arguments: list[str]) -> Iterator[Claim]:
    """torchrun's options, those before the script; then the script's."""
    scripts = [position for position, word in enumerate(arguments) if word.endswith(".py")]
    assert scripts, f"{command.where}: torchrun is given no script"
    torchrun: Question = ("module", "torch.distributed.run")
    for word in options(arguments[: scripts[0]]):
        yield Claim(command.where, word, (torchrun,))
    yield from python_claims(command, arguments[scripts[0] :])


def options(words: list[str]) -> list[str]:
    """Those words that are options, without their values."""
    return [word.partition("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]
