"""``dilated tune``: its arguments, and what it says and writes. Imports only the standard library until it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from dilated_factory.cli.arguments import FAILED, INTERRUPTED, USAGE, add_device, positive_number
from dilated_factory.tuning import KERNEL_DTYPES, LENGTHS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dilated tune``."""
    add_device(parser, None)
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write (default: the user's own profile)")
    parser.add_argument(
        "--budget",
        type=positive_number("seconds"),
        default=120.0,
        metavar="N",
        help="seconds for everything (default: %(default)g)",
    )
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    lengths, dtypes = ",".join(map(str, LENGTHS)), ",".join(KERNEL_DTYPES)
    parser.add_argument(
        "--lengths", type=_sizes, default=LENGTHS, metavar="N,N", help=f"tokens of the sequences (default: {lengths})"
    )
    parser.add_argument(
        "--dtypes",
        type=_names,
        default=KERNEL_DTYPES,
        metavar="NAME,NAME",
        help=f"for which kernels are chosen (default: {dtypes})",
    )
    parser.add_argument(
        "--heads", type=int, default=8, metavar="N", help="heads of the attention (default: %(default)s)"
    )
    parser.add_argument(
        "--head-dim", type=int, default=64, metavar="N", help="channels of a head (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print, and write the profile.

    Returns:
        0; 1 where the file cannot be written; 2 for an argument that cannot be; 130 after Ctrl-C, and then nothing is
        written: half a profile would say "not measured" of what an older one had measured.
    """
    from dilated_factory.policy import Policy
    from dilated_factory.profile import default_path
    from dilated_factory.tuning import text, tune
    from dilated_factory.tuning.screen import progress

    place = default_path() if options.output is None else options.output
    objection = None if options.dry_run else _objection(place)
    if objection is not None:
        return _fail(objection, FAILED)
    try:
        with progress() as show:
            profile = tune(
                options.device,
                budget_seconds=options.budget,
                dtypes=options.dtypes,
                head_dim=options.head_dim,
                heads=options.heads,
                lengths=options.lengths,
                progress=show,
            )
    except (TypeError, ValueError) as error:
        return _fail(str(error), USAGE)
    except KeyboardInterrupt:
        return _fail("interrupted, nothing was written", INTERRUPTED)
    if not options.dry_run:
        try:
            profile.save(place)
        except OSError as error:
            return _fail(f"the profile cannot be written: {error}", FAILED)
    if options.json:
        _say(json.dumps({**profile.content(), "path": None if options.dry_run else str(place)}, indent=1))
        return 0
    _say(text.render(profile, Policy()))
    _say(f"\n{_where(place, options)}")
    return 0


def _where(place: Path, options: argparse.Namespace) -> str:
    """Where the file went, and whether the factory will read it there."""
    from dilated_factory.profile import VARIABLE, default_path

    if options.dry_run:
        return "Nothing was written (--dry-run)."
    words = f"Written to {place}"
    if os.environ.get(VARIABLE) == "off":
        return f"{words}\nThe factory does not use it while {VARIABLE}=off is set."
    if place != default_path():
        return f"{words}\nThe factory uses it where {VARIABLE}={place} is set, or with profile=load({str(place)!r})."
    return f"{words}\nThe factory uses it from now on; {VARIABLE}=off leaves it alone."


def _objection(place: Path) -> str | None:
    """Why nothing can be written there; found before two minutes of measuring, not after. Makes the folder."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"the profile cannot be written: {error}"
    if place.is_dir():
        return f"the profile cannot be written: {place} is a folder"
    if not os.access(place.parent, os.W_OK):
        return f"the profile cannot be written: no permission to write in {place.parent}"
    return None


def _fail(words: str, status: int) -> int:
    sys.stderr.write(f"dilated tune: {words}\n")
    return status


def _say(words: str) -> None:
    sys.stdout.write(f"{words}\n")


def _sizes(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between, got {text!r}") from None


def _names(text: str) -> list[str]:
    return text.split(",")
