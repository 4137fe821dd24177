"""Whether the pages that quote a figure say what its record gives, and which figures nobody claims.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from string import Formatter

from evidence.claim import Claim
from evidence.page import PAGE
from evidence.records import ROOT

# Figures as people write measured ones: a number with a unit, a ratio or a power of ten.
FIGURE = re.compile(
    r"(?<![\w.])\d[\d,.]*(?: to \d[\d,.]*)? ?"
    r"(?:%|×|(?:times|ms|us|µs|ns|s|seconds|minutes|kB|MB|GB|TB|KiB|MiB|GiB|TiB|tokens a second)\b)"
    r"|(?<![\w.])\d(?:\.\d+)?e-\d+"
)
PLACES = ("README.md", "packages/*/README.md", "docs/**/*.md")
NOT_PLACES = ("docs/benchmarks/", "docs/_build/", PAGE)


def plain(text: str) -> str:
    """Text without its line breaks."""
    return " ".join(text.split())


def differences(claims: Iterable[Claim], pages: Mapping[str, str] | None = None) -> list[str]:
    """One line for each quote that its page does not hold; `pages` (path -> text) stand in for files in tests."""
    found = []
    for claim in claims:
        fields = claim.fields()
        for quote in claim.quotes:
            text = plain(pages[quote.page] if pages and quote.page in pages else _read(quote.page))
            expected = plain(quote.words.format(**fields))
            # Not within a longer number: "0.9 ms" is no part of "10.9 ms", nor "a ratio of 2" of "a ratio of 2.5".
            if not re.search(rf"(?<!\d)(?<!\d[.,]){re.escape(expected)}(?!\d)(?![.,]\d)", text):
                found.append(f"{quote.page}: {_said(quote.words, text, expected)} ({claim.record}.json)")
    return found


def unclaimed(claims: Iterable[Claim]) -> list[str]:
    """Figures of the pages that stand outside of every quote, with the words around them."""
    quoted: dict[str, list[str]] = {}
    for claim in claims:
        for quote in claim.quotes:
            quoted.setdefault(quote.page, []).append(plain(quote.words.format(**claim.fields())))
    found = []
    for pattern in PLACES:
        for path in sorted(ROOT.glob(pattern)):
            page = path.relative_to(ROOT).as_posix()
            if page.startswith(NOT_PLACES):
                continue
            text = plain(re.sub(r"^```.*?^```", "", _read(page), flags=re.DOTALL | re.MULTILINE))
            for words in quoted.get(page, []):
                text = text.replace(words, "…")
            found += [
                f"{page}: {text[max(0, figure.start() - 60) : figure.end() + 40]}" for figure in FIGURE.finditer(text)
            ]
    return found


def _read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _said(words: str, text: str, expected: str) -> str:
    """What the page says in place of `expected`, where the words around the figures are there."""
    parts: list[str] = []
    for literal, field, _, _ in Formatter().parse(" ".join(words.split())):
        parts.append(re.escape(literal))
        if field is not None:
            parts.append(r"\S+(?: \S+){0,3}?")
    other = re.search("".join(parts), text) if len(parts) > 2 else None
    if other:
        return f"says “{other[0]}”, and the record gives “{expected}”"
    return f"does not say “{expected}”"
