"""`dilated bench`: its arguments and exit status.

Imports only the standard library until it runs, so that `dilated bench --help` needs no torch.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

__all__ = ["NAMES", "add_arguments", "run"]

NAMES = ("auto-enable", "pool-modes", "ring-sizes", "stages", "pattern-cache")

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""

FAILED = 1
USAGE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's options to a parser."""
    parser.add_argument("reports", nargs="*", metavar="REPORT", help=f"some of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:index] (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("bench-report"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="smaller heads and shorter sequences, under a minute")
    parser.add_argument(
        "--seconds", type=_seconds, help="for each report (default: 160, with --quick 9); rounds go by it"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="go on with the folder's rows, or fail where they are of another run"
    )
    again.add_argument("--fresh", action="store_true", help="measure all rows again")


def run(args: argparse.Namespace) -> int:
    """Runs the reports and writes what was measured.

    Returns:
        0; 1 where an output was wrong; 2 for a report, device or folder that cannot be used; 130 after Ctrl-C, with
        what was measured so far written.
    """
    from dilated_factory.bench import run as run_bench
    from dilated_factory.bench.session import UnusableError
    from dilated_factory.demo.screen import Screen

    resume = True if args.resume else False if args.fresh else None
    unknown = [name for name in args.reports if name not in NAMES]
    try:
        if unknown:
            raise UnusableError(f"there is no report {unknown[0]!r}; there are {', '.join(NAMES)}")
        results = run_bench(
            args.reports or None,
            device=args.device,
            output=args.output,
            quick=args.quick,
            seconds=args.seconds,
            resume=resume,
        )
    except UnusableError as error:
        Screen().note(f"dilated bench: {error}")
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    return FAILED if results.failed else 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return seconds
