"""Commands in forks without standard streams; see `test_streams.py`.

`python -m tests.cli.closed OUT CLOSED ARGUMENTS…`: runs `ffnlab` with each of the ARGUMENTS (a
string each) in a fork of its own in which the descriptors CLOSED (such as "012") were never open,
and writes the exit statuses to OUT. A fork takes no time to import what a command needs.
"""

import importlib
import json
import os
import sys
from pathlib import Path

from ffnlab.cli.main import main

NAMES = ("stdin", "stdout", "stderr")


def run(closed: str, arguments: list[str]) -> int:
    """The exit status of `ffnlab ARGUMENTS`, as Python starts without the descriptors closed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        for digit in closed:
            os.close(int(digit))
            setattr(sys, NAMES[int(digit)], None)
        status = main(arguments)
    except SystemExit as done:
        status = done.code
    finally:
        os._exit(status)


if __name__ == "__main__":
    importlib.import_module("tyro")
    out, closed, *lines = sys.argv[1:]
    statuses = {line: run(closed, line.split()) for line in lines}
    Path(out).write_text(json.dumps(statuses))
