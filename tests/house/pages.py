"""The pages that are read: READMEs and docs/, cut into fences, prose, headings and links. Standard library only.

What is written by a benchmark (docs/benchmarks) or by Sphinx (docs/_build) is not a page in this sense.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
WRITTEN_BY_PROGRAMS = ("benchmarks", "_build")
OPENING = re.compile(r"^(?P<indent>\s*)(?P<marks>`{3,}|~{3,})(?P<info>[^`]*)$")


class Fence(NamedTuple):
    """A fenced block: its page, the line it opens on (from 1), what stands behind the marks, and what it holds."""

    page: Path
    line: int
    info: str
    text: str

    @property
    def words(self) -> list[str]:
        """Of what stands behind the marks: the language, then what the block asks for."""
        return self.info.split()

    @property
    def language(self) -> str:
        """The first of these words, or nothing."""
        return self.words[0] if self.words else ""

    @property
    def where(self) -> str:
        """Page and line, as editors take it."""
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    """A page's path inside the repository."""
    return page.relative_to(ROOT).as_posix()


@cache
def pages() -> tuple[Path, ...]:
    """Every page: the root's README, each package's, and docs/ without what programs write."""
    docs = ROOT / "docs"
    written = (page for page in docs.rglob("*.md") if page.relative_to(docs).parts[0] not in WRITTEN_BY_PROGRAMS)
    return (ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md")), *sorted(written))


@cache
def split(page: Path) -> tuple[tuple[Fence, ...], tuple[tuple[int, str], ...]]:
    """A page's fences, and the numbered lines outside of them."""
    fences, prose = [], []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        opening = OPENING.match(line)
        if opening is None:
            prose.append((number, line))
            continue
        indent, marks = len(opening["indent"]), opening["marks"]
        held = []
        for _, inner in lines:
            if inner.strip().startswith(marks) and not inner.strip().strip(marks[0]):
                break
            held.append(inner[indent:] if not inner[:indent].strip() else inner)
        else:
            raise ValueError(f"{name(page)}:{number}: this fence is never closed")
        fences.append(Fence(page, number, opening["info"].strip(), "\n".join(held) + "\n"))
    return tuple(fences), tuple(prose)


def fences(*languages: str) -> list[Fence]:
    """Every fence of every page, or those in one of these languages."""
    found = (fence for page in pages() for fence in split(page)[0])
    return [fence for fence in found if not languages or fence.language in languages]


def code_spans(page: Path) -> Iterator[tuple[int, str]]:
    """What is quoted as code in a page's prose, with the line its paragraph begins on."""
    for number, paragraph in _paragraphs(page):
        for span in re.finditer(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", paragraph, re.DOTALL):
            yield number, " ".join(span[2].split())


def links(page: Path) -> Iterator[tuple[int, str]]:
    """The targets of a page's links and images, with the line their paragraph begins on."""
    for number, paragraph in _paragraphs(page):
        prose = re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "code", paragraph, flags=re.DOTALL)
        for link in re.finditer(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|(?:src|href)=\"([^\"]+)\"", prose):
            yield number, link[1] or link[2]


@cache
def anchors(page: Path) -> frozenset[str]:
    """What `#...` may name in a page, and in those it includes: headings as GitHub and MyST write them, and targets."""
    fences, prose = split(page)
    included = [(page.parent / fence.words[1]).resolve() for fence in fences if fence.language == "{include}"]
    lines = [line for _, line in (*prose, *(line for other in included for line in split(other)[1]))]
    found: dict[str, int] = {}
    for line in lines:
        if heading := re.match(r"#{1,6}\s+(.*?)\s*#*$", line):
            slug = re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-")
            found[slug] = found.get(slug, -1) + 1
    repeated = {f"{slug}-{number}" for slug, last in found.items() for number in range(1, last + 1)}
    explicit = {target[1] for line in lines if (target := re.match(r"\(([\w-]+)\)=$", line))}
    return frozenset(found) | repeated | explicit


def _paragraphs(page: Path) -> Iterator[tuple[int, str]]:
    """Prose cut at blank lines and at fences, where a code span cannot reach across; a table's rows one by one."""
    held: list[str] = []
    first = last = 0
    for number, line in (*split(page)[1], (0, "")):
        apart = not line.strip() or number != last + 1 or line.lstrip().startswith(("|", "#"))
        if apart and held:
            yield first, "\n".join(held)
            held = []
        if line.strip():
            first = first if held else number
            held.append(line)
        last = number
