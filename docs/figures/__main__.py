"""Draw every picture of the documentation again; all packages must be installed.

    nox -s figures                                all of them, in their places
    nox -s figures -- branches benchmarks/demo    some, by name
    nox -s figures -- --check                     draw into a temporary folder and compare; fails where docs differ

The pictures of how-it-works are computed from the packages' own objects, each by the module of its name here. Those of
recorded runs are drawn from the JSON beside them. What --check asks: every picture in docs is drawn by one of these,
every drawing has a picture in docs, and sizes agree. Where both were drawn by the same version of matplotlib, an SVG
must also be the same to the byte.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from drawings import differences, drawings
from recorded import ROOT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 where --check finds a difference."""
    known = drawings()
    parser = argparse.ArgumentParser(
        prog="python docs/figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to draw, all by default: {', '.join(known)}")
    parser.add_argument("--check", action="store_true", help="compare with what is in docs; change nothing")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no picture is called {', '.join(unknown)}; there are {', '.join(known)}")
    names = options.names or list(known)
    if options.check:
        found = differences(names)
        print("\n".join(found) or f"{len(names)} drawings agree with the pictures in docs")
        return 1 if found else 0
    for name in names:
        for path in known[name](ROOT):
            print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
