"""``dilated bench``: its arguments and exit status.

Imports only the standard library until it runs, so that ``dilated bench --help`` needs no torch.
"""

from __future__ import annotations

import argparse

from dilated_factory.bench.settings import FULL, QUICK
from dilated_factory.cli.arguments import (
    FAILED,
    INTERRUPTED,
    USAGE,
    UnusableError,
    add_device,
    add_folder,
    positive_number,
)

NAMES = ("auto-enable", "pool-modes", "ring-sizes", "stages", "pattern-cache")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dilated bench``."""
    parser.add_argument("reports", nargs="*", metavar="REPORT", help=f"some of {', '.join(NAMES)} (default: all)")
    add_device(parser, "cpu")
    add_folder(parser, "bench-report")
    parser.add_argument("--quick", action="store_true", help="smaller heads and shorter sequences, under a minute")
    parser.add_argument(
        "--seconds",
        type=positive_number("seconds"),
        metavar="N",
        help="seconds for each report, which set how many rounds are timed "
        f"(default: {FULL.seconds:g}; with --quick {QUICK.seconds:g})",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="go on with the folder's rows, and fail where they are of another run (default: then start anew)",
    )
    again.add_argument("--fresh", action="store_true", help="measure all rows again")


def run(options: argparse.Namespace) -> int:
    """Run the reports and write what was measured.

    Returns:
        0; 1 where an output was wrong; 2 for a report, device or folder that cannot be used; 130 after Ctrl-C, with
        what was measured so far written.
    """
    from dilated_factory.bench import run as run_bench
    from dilated_factory.demo.screen import Screen

    resume = True if options.resume else False if options.fresh else None
    unknown = [name for name in options.reports if name not in NAMES]
    try:
        if unknown:
            raise UnusableError(f"reports: expected some of {', '.join(NAMES)}, got {unknown[0]!r}")
        results = run_bench(
            options.reports or None,
            device=options.device,
            output=options.output,
            quick=options.quick,
            seconds=options.seconds,
            resume=resume,
        )
    except UnusableError as error:
        Screen().note(f"dilated bench: {error}")
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    return FAILED if results.failed else 0
