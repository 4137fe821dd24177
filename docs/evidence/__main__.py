"""Write docs/performance.md from the recorded runs, and check that all pages say what the records give.

With no option the page is written, and the pages that quote a figure are compared. The exit status is 1 where one of
them says otherwise, or with --check where docs/performance.md is not what would be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Run as `python docs/evidence`, this file stands on its own; the rest is a package beside it.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from evidence.claims import CLAIMS  # noqa: E402
from evidence.page import PAGE, page  # noqa: E402
from evidence.quotes import differences, unclaimed  # noqa: E402
from evidence.records import ROOT  # noqa: E402


def main() -> None:
    """Write or check; the exit status is 1 where something differs."""
    parser = argparse.ArgumentParser(
        prog="python docs/evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--check", action="store_true", help="write nothing")
    asked.add_argument(
        "--unclaimed", action="store_true", help="list figures of the pages that no claim covers; not all are measured"
    )
    options = parser.parse_args()
    if options.unclaimed:
        sys.stdout.writelines(f"{line}\n" for line in unclaimed(CLAIMS))
        return
    found = differences(CLAIMS)
    if not options.check:
        (ROOT / PAGE).write_text(page(CLAIMS), encoding="utf-8")
    elif (ROOT / PAGE).read_text(encoding="utf-8") != page(CLAIMS):
        found.append(f"{PAGE}: not what the records give; write it with: python docs/evidence")
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
