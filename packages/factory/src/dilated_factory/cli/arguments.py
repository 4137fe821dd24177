"""What the subcommands have in common: exit statuses, options that mean the same in all of them, checks of numbers.

Imports the standard library only, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

FAILED = 1
"""Exit status where something was wrong with what was found."""

USAGE = 2
"""Exit status for an argument that cannot be used, as argparse has it."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""


class UnusableError(Exception):
    """A device or a folder that cannot be used, or nothing to go on with; found before any work."""


def add_device(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Add --device; None stands for the best that is present."""
    shown = "the best there is" if default is None else default
    parser.add_argument("--device", default=default, help=f"cpu or cuda[:index] (default: {shown})")


def add_folder(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --output, a folder that is made where it is missing."""
    parser.add_argument(
        "--output", type=Path, default=Path(default), metavar="FOLDER", help="where to write (default: %(default)s)"
    )


def positive_number(unit: str) -> Callable[[str], float]:
    """A reader of positive, finite numbers of that unit, for ``add_argument(type=)``.

    >>> positive_number("seconds")("1.5")
    1.5
    """

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f"expected a positive number of {unit}, got {text!r}")
        return number

    return read
