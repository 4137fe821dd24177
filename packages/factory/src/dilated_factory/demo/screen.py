"""What the demo shows while it runs: live bars on a terminal, plain lines every few seconds elsewhere.

Imports rich when a screen is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_LINE_SECONDS = 10.0
"""Between two lines of a bar where output is not a terminal."""

PLAIN_WIDTH = 110
"""Columns where output is not a terminal, so that tables in logs do not depend on who reads them."""


class Bar(Protocol):
    """Called with how much is done and a few words on how it goes."""

    def __call__(self, done: float, words: str) -> None:
        """Show it."""


class Screen:
    """Print stages, notes, bars and tables to ``console``, rich's standard output where None."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = Console(highlight=False) if console is None else console
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, PLAIN_WIDTH)

    def title(self, text: str, subtitle: str) -> None:
        """The first lines."""
        self.console.print(f"[bold]{text}[/bold]")
        self.console.print(f"[dim]{subtitle}[/dim]")

    def stage(self, text: str) -> None:
        """A heading."""
        self.console.print(f"\n[bold cyan]{text}[/bold cyan]")

    def note(self, text: str) -> None:
        """A line of plain text; nothing in it is read as markup."""
        self.console.print(text, markup=False)

    def quote(self, text: str) -> None:
        """Text in a frame, as it is."""
        from rich.panel import Panel
        from rich.text import Text

        self.console.print(Panel(Text(text), border_style="dim"))

    def table(
        self, header: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = (0,), emphasised: str = ""
    ) -> None:
        """Columns numbered in ``words`` are left-aligned, others right; rows begun by ``emphasised`` stand out."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index in words else "right")
        for row in rows:
            style = "bold green" if emphasised and row[0] == emphasised else None
            table.add_row(*(escape(cell) for cell in row), style=style)
        self.console.print(table)

    @contextmanager
    def bar(self, name: str, total: float) -> Iterator[Bar]:
        """A progress bar for the duration of the block; the block calls what it is given."""
        if self.console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[words]}"),
            )
            with Progress(*columns, console=self.console) as progress:
                task = progress.add_task(name, total=total, words="")
                yield lambda done, words: progress.update(task, completed=min(done, total), words=words)
        else:
            last = time.monotonic() - PLAIN_LINE_SECONDS
            latest = ""

            def report(done: float, words: str) -> None:
                nonlocal last, latest
                latest = f"{name} {min(done / total, 1.0):4.0%}  {words}"
                if time.monotonic() - last >= PLAIN_LINE_SECONDS:
                    last = time.monotonic()
                    self.note(latest)
                    latest = ""

            yield report
            if latest:
                self.note(latest)
