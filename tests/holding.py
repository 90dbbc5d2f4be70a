"""A process that holds the lock of a folder, for tests that want to be refused by it."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

HOLD = """
import os, sys, time
from pathlib import Path
from ffnlab.parallel.lock import locked
say = lambda what: os.write(1, f"{{what}}\\n".encode())
with locked(Path(sys.argv[1])):
    {inside}
    say("in")
    time.sleep(600)
"""


@contextlib.contextmanager
def holder(folder, inside="pass", lines=1) -> Iterator[tuple[subprocess.Popen, list[str]]]:
    """A process that holds the lock of a folder, and its first lines; it is killed in the end."""
    command = [sys.executable, "-W", "ignore", "-c", HOLD.format(inside=inside), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = sorted(process.stdout.readline().strip() for _ in range(lines))
            assert said[-1] == "in", said
            yield process, said
        finally:
            process.kill()
