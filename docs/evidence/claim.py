"""What a claim is, and the words that it gives. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from evidence.records import load


@dataclass(frozen=True)
class Quote:
    """Where else a claim's figures stand.

    Attributes:
        page: a file, from the repository's root.
        words: as they stand there, with fields for the figures; line breaks do not count.
    """

    page: str
    words: str


@dataclass(frozen=True)
class Claim:
    """One statement with its figures.

    Attributes:
        package: whose it is: the folder under packages/.
        statement: with fields such as {ms:.1f}, which name what `values` gives and how it is written.
        record: where the figures come from, as "decode" or "demo/report".
        values: field -> figure, or text, from what the record holds.
        quotes: who else says so.
    """

    package: str
    statement: str
    record: str
    values: Callable[[Any], Mapping[str, Any]]
    quotes: tuple[Quote, ...] = ()

    def fields(self) -> Mapping[str, Any]:
        """The figures."""
        return self.values(load(self.record))

    def text(self) -> str:
        """The statement with its figures."""
        return self.statement.format(**self.fields())
