"""Programs for more devices than there are: compiled and run by another process on CPU devices.

The number of devices is fixed when jax starts, so that a process of its own has them. The module
that it runs ends with

    if __name__ == "__main__":
        answer(measure)

and `ask` sends it a request and gives what `measure` made of it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ffnlab.errors import FFNLabError, at_least

__all__ = ["answer", "ask"]

DEVICES = "--xla_force_host_platform_device_count"
# A failure that is not ours is shown whole, without jax's remark on the frames that it hides.
PRETENDED = {"JAX_PLATFORMS": "cpu", "JAX_TRACEBACK_FILTERING": "off"}


def ask(module: str, request: Mapping[str, object], devices: int) -> Any:
    """What a module answers on a machine of so many devices.

    Args:
      module: dotted name.
      request: JSON values.
      devices: how many CPU devices it sees.
    Returns:
      JSON values.
    Raises:
      FFNLabError: it refused, in its words; or it failed, with its traceback.
    """
    at_least(1, devices=devices)
    flags = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}={devices}"
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(request),
        env=os.environ | PRETENDED | {"XLA_FLAGS": flags.strip()},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise FFNLabError(done.stderr.strip() or f"{module} ended with status {done.returncode}")
    found = json.loads(done.stdout)
    if "refused" in found:
        raise FFNLabError(found["refused"])
    return found["answer"]


def answer(measure: Callable[[dict[str, Any]], object]) -> None:
    """Reads a request, and writes what is made of it or why it is refused.

    Args:
      measure: of a request; what it raises of ours is a refusal.
    """
    try:
        found = {"answer": measure(json.load(sys.stdin))}
    except FFNLabError as error:
        found = {"refused": str(error)}
    json.dump(found, sys.stdout)
