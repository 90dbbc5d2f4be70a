"""Runs of `ffnlab train` as forks of a process that has imported everything and started nothing.

A process takes seconds to import what a run needs; a fork made before jax has started is a process
like any other, without them.
"""

import importlib
import os
import time
import traceback
from pathlib import Path

from ffnlab.cli.main import main
from tests.parallel.launch import PATIENCE

# What a run imports late.
for module in ("orbax.checkpoint", "tyro", "ffnlab.cli.train", "jax.experimental.multihost_utils"):
    importlib.import_module(module)


def fork(log: Path, *arguments: str) -> int:
    """Starts `ffnlab train` with its output appended to a file; the process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        status = main(["train", "--no-progress", *arguments])
    except BaseException:  # noqa: BLE001 the process ends here
        traceback.print_exc()
    finally:
        os._exit(status)


def is_over(child: int) -> bool:
    """Whether a process has ended; it is not asked again after that."""
    return os.waitpid(child, os.WNOHANG)[0] == child


def status_of(child: int) -> int:
    """Waits for a process; its exit status, or minus the signal that ended it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
