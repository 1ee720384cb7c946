"""The command `circuitfind`, and `python -m circuitfind`: a signal that comes before the command line is ready ends the
process with the exit code that it has later, too, and without a traceback of imports."""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Imports the command line, and runs it."""
    names = (name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    ours = [one for one, how in before.items() if how in (signal.SIG_DFL, signal.default_int_handler)]  # not of `nohup`
    for number in ours:
        signal.signal(number, lambda number, _: os._exit(128 + number))
    from circuitfind.cli.app import main as run

    for number in ours:
        signal.signal(number, before[number])
    return run()


if __name__ == "__main__":
    sys.exit(main())
