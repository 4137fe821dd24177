"""``dilated info``: what is here, what is lacking, and with --kernels what can run and why the rest cannot.

``machine`` gathers what is known without torch, ``devices`` what only torch knows, ``text`` writes both.
Imports the standard library only, so that the answer comes at once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import warnings
from dataclasses import asdict

from dilated_factory.cli.info import machine, text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dilated info``."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--kernels", action="store_true", help="also import torch, and show devices and kernels as it sees them"
    )


def run(options: argparse.Namespace) -> int:
    """Print the information.

    Returns:
        0; 1 where --kernels is asked for and torch or dilated-core is not installed.
    """
    info = machine.gather()
    seen = None
    if options.kernels:
        missing = [name for name in ("torch", "dilated-core") if info.versions[name] is None]
        if missing:
            print(
                f"dilated info --kernels needs {' and '.join(missing)}, not installed here. Install with:\n"
                f"    pip install {' '.join(missing)}",
                file=sys.stderr,
            )
            return 1
        with warnings.catch_warnings():
            # torch says this where numpy is absent, and nothing here needs numpy from torch.
            warnings.filterwarnings("ignore", "Failed to initialize NumPy")
            from dilated_factory.cli.info import devices

        seen = devices.gather()
    if options.json:
        # "devices" is null where torch was not asked, and a list, if an empty one, where it was.
        found = None if seen is None else [asdict(device) for device in seen]
        print(json.dumps({**asdict(info), "devices": found}, indent=2))
        return 0
    # A terminal gets wrapped lines; a file or a pipe whole ones, which can be searched.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(text.render(info, seen, width))
    return 0
