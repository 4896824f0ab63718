"""`python -m simam`, the same as the command `simam`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
