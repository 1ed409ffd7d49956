"""`python -m sysctr`: the command line."""

import sys

from sysctr.cli import main

if __name__ == "__main__":
    sys.exit(main())
