"""`python -m ffnlab` is the command `ffnlab`."""

import sys

from ffnlab.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
