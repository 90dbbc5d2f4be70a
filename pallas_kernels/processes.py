"""Work in processes of its own: one that dies or hangs costs itself and nothing else."""

import os
import signal
import subprocess


def run(command, limit, *, environment, output=None):
    """Runs a command in a group of processes that is ended when it takes too long.

    Args:
      command: a program and its arguments.
      limit: seconds.
      environment: variables set beside this process's own.
      output: an open file for all that it prints; this process's own streams when None.
    Returns:
      the exit status, negative for a signal; None where it took too long.
    """
    error = None if output is None else subprocess.STDOUT
    process = subprocess.Popen(
        command,
        env=os.environ | dict(environment),
        stdout=output,
        stderr=error,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:  # too long, or interrupted
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
