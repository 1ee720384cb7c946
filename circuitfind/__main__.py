"""`python -m circuitfind` is the command `circuitfind`."""

from __future__ import annotations

import sys

from circuitfind.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
