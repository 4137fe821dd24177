"""``python -m dilated_factory``: the command line where the ``dilated`` script is not on the path."""

import sys

from dilated_factory.cli import main

if __name__ == "__main__":
    sys.exit(main())
