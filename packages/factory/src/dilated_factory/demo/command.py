"""`dilated demo`: its arguments, and the order in which everything happens.

Imports only the standard library until it runs, so that `dilated --help` needs neither torch nor the bench extra.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

__all__ = ["add_arguments", "run"]

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""

FAILED = 1
USAGE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to a parser."""
    parser.add_argument(
        "--output", type=Path, default=Path("demo-report"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a much smaller model and comparison, under 40 seconds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:index] (default: %(default)s)")
    parser.add_argument(
        "--seed", type=_seed, default=0, help="of weights, data order and sample (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=_minutes, help="time for everything (default: 3.75, with --quick 0.5)")


def run(args: argparse.Namespace) -> int:
    """Runs the demo and writes its report.

    Returns:
        0; 1 where a check of an output failed or the model did not beat the unigram; 2 for a device or folder that
        cannot be used; 130 after Ctrl-C, with what was measured so far written.
    """
    from dilated_factory.demo.stages import UnusableError, run_stages

    try:
        return run_stages(args.output, quick=args.quick, device_name=args.device, seed=args.seed, minutes=args.minutes)
    except UnusableError as error:
        from dilated_factory.demo.screen import Screen

        Screen().note(f"dilated demo: {error}")
        return USAGE


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of minutes, got {text!r}")
    return minutes


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**63 - 1, got {text!r}")
    return int(text)
