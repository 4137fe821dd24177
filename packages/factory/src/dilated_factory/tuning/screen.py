"""How far the measurement is: a bar on a terminal with rich, lines elsewhere. On standard error, for results are data.

Imports rich when a bar is shown.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """What ``tune(progress=)`` takes, for the duration of the block."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        with _bar() as show:
            yield show
        return
    latest = time.monotonic()

    def line(done: int, total: int, words: str) -> None:
        nonlocal latest
        if done in (1, total) or time.monotonic() - latest >= SECONDS_BETWEEN_LINES:
            latest = time.monotonic()
            sys.stderr.write(f"dilated tune {done / total:4.0%}  {words}\n")
            sys.stderr.flush()

    yield line


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=24), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starts")
        yield lambda done, total, words: bar.update(task, total=total, completed=done, description=words)
