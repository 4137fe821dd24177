"""The command line: ``dilated COMMAND``. A command's module is imported only when that command is run.

Imports the standard library only, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One subcommand: its module, with ``add_arguments(parser)`` and ``run(args) -> int``, and what it needs."""

    summary: str
    module: str
    needs: tuple[str, ...] = ()
    extra: str = ""


COMMANDS = {
    "info": Command(
        "show versions, this machine and attention types; with --kernels, devices and kernels too",
        "dilated_factory.cli.info",
    ),
    "demo": Command(
        "train a small LongNet on this machine, and compare dilated with dense attention",
        "dilated_factory.demo.command",
        needs=("rich", "matplotlib"),
        extra="bench",
    ),
    "bench": Command(
        "measure the specification's tables on this machine, each output checked",
        "dilated_factory.bench.command",
        needs=("rich", "matplotlib"),
        extra="bench",
    ),
    "tune": Command(
        "measure pools, kernels and block sizes on this machine, and write a profile that the factory follows",
        "dilated_factory.tuning.command",
    ),
}


class _Version(argparse.Action):
    """Looks the version up when it is asked for: reading metadata costs more than all other parsing."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        print(f"dilated-factory {version('dilated-factory')}")
        parser.exit()


def version(distribution: str) -> str | None:
    """Return the version of a distribution, None where it is not installed.

    "source tree" stands for one that is on the path without metadata.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        found = importlib.util.find_spec(distribution.replace("-", "_"))
        return "source tree" if found else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: what follows ``dilated``; None for the process's own.

    Returns:
        The exit status: 0 for success, 1 where something that it needs is not installed, else the command's own.

    Raises:
        SystemExit: as argparse does, after help (0) and for wrong arguments (2).

    >>> main(["info", "--json"]) == 0  # doctest: +ELLIPSIS
    {...}
    True
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="dilated", description="Dilated attention: what this machine can run, and what it gains."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    # No option before the command takes a value, so the first word that is no option is the command.
    called = next((word for word in arguments if not word.startswith("-")), None)
    for name, command in COMMANDS.items():
        description = f"{command.summary[0].upper()}{command.summary[1:]}."
        subparser = subparsers.add_parser(name, help=command.summary, description=description)
        if name != called:
            continue
        missing = [module for module in command.needs if importlib.util.find_spec(module) is None]
        if missing:
            print(
                f"dilated {name} needs {' and '.join(missing)}, not installed here. Install with:\n"
                f'    pip install "dilated-factory[{command.extra}]"',
                file=sys.stderr,
            )
            return 1
        with warnings.catch_warnings():
            # torch says this where numpy is absent, and no command needs numpy from torch.
            warnings.filterwarnings("ignore", "Failed to initialize NumPy")
            module = importlib.import_module(command.module)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has left, as ``| head`` does. Python would fail once more at exit, flushing what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
