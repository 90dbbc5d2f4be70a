"""What starting costs: measured in fresh interpreters."""

import subprocess
import sys

__all__ = ["over_jax"]

PROGRAM = """
import time, jax
start = time.perf_counter()
import ffnlab
print(time.perf_counter() - start)
"""


def over_jax(runs: int = 3) -> float:
    """Seconds that `import ffnlab` adds to `import jax`: the least of several runs.

    Args:
      runs: fresh interpreters started, >= 1.
    Returns:
      seconds.
    Raises:
      RuntimeError: the interpreter failed; the message is what it said.
    """
    return min(one_run() for _ in range(runs))


def one_run() -> float:
    """Seconds of one import."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"import ffnlab failed:\n{done.stderr}")
    return float(done.stdout)
