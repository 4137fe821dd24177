"""``dilated demo``: its arguments and exit status.

Imports only the standard library until it runs, so that ``dilated demo --help`` needs no torch.
"""

from __future__ import annotations

import argparse

from dilated_factory.cli.arguments import USAGE, UnusableError, add_device, add_folder, positive_number
from dilated_factory.demo.settings import FULL, QUICK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dilated demo``."""
    add_device(parser, "cpu")
    add_folder(parser, "demo-report")
    parser.add_argument("--quick", action="store_true", help="a smaller model and comparison, under 40 seconds")
    parser.add_argument(
        "--minutes",
        type=positive_number("minutes"),
        metavar="N",
        help=f"minutes for everything (default: {FULL.minutes:g}; with --quick {QUICK.minutes:g})",
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of weights, data order and sample (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Run the demo and write its report.

    Returns:
        0; 1 where a check of an output failed or the model did not beat the unigram; 2 for a device or folder that
        cannot be used; 130 after Ctrl-C, with what was measured so far written.
    """
    from dilated_factory.demo.stages import run_stages

    try:
        return run_stages(
            options.output,
            quick=options.quick,
            device_name=options.device,
            seed=options.seed,
            minutes=options.minutes,
        )
    except UnusableError as error:
        from dilated_factory.demo.screen import Screen

        Screen().note(f"dilated demo: {error}")
        return USAGE


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**63 - 1, got {text!r}")
    return int(text)
