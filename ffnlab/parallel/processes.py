"""Several processes as one run: joining them, agreeing, and ending when one of them dies.

`jax.distributed` connects the processes, watches their heartbeats and passes on a preemption
notice; gloo, NCCL or the TPU's links carry the collectives. A process that dies is first felt as a
collective that fails; who it was, the coordinator says when the heartbeat runs out, and ends the
others. So a process whose collective failed waits for that word.
"""

import hashlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np

from ffnlab.errors import ConfigError, FFNLabError
from ffnlab.parallel.rollcall import roll_call

__all__ = ["agree", "from_first", "is_first", "joined", "meet"]

DIED, INTERRUPTED = 1, 130  # exit statuses: it lost another one, or Ctrl-C ended it at once
SAID = 1000  # bytes that process 0 says at once
SLACK = 10  # seconds that the coordinator's word may take after the heartbeat ran out


def is_first() -> bool:
    """Whether this process writes what is written once: it is number 0, or alone."""
    return jax.process_index() == 0


@contextmanager
def joined(
    coordinator: str | None,
    count: int | None,
    index: int | None,
    heartbeat: int,
    join: int = 300,
) -> Iterator[None]:
    """Within it, this process is one of several; on the way out it waits for the others.

    An error of ours is raised in every process alike and passes. Any other one may be this
    process's own, or what it felt of another's death: its traceback is printed, and the process
    ends without a word to the others, who find out by its heartbeat. So it does when Ctrl-C
    interrupts it (in the training loop the first one stops all processes, see `stop_request`).

    Args:
      coordinator: "HOST:PORT" of process 0; "auto" where `jax.distributed` detects the cluster
        (Slurm, Open MPI, Kubernetes, TPU pods); None for a process that is alone.
      count: of processes; with HOST:PORT only.
      index: of this one, 0 <= index < count; with HOST:PORT only.
      heartbeat: seconds without a sign of life after which a process counts as dead, >= 1.
      join: seconds to wait for all to come, >= 1.
    Raises:
      ConfigError: arguments that do not fit together, or no cluster is detected; with HOST:PORT, in
        all that came, not all did, or the port is taken (`ffnlab.parallel.rollcall`).
    """
    check_arguments(coordinator, count, index, heartbeat, join)
    if coordinator is None:
        yield
        return
    connect(coordinator, count, index, heartbeat, join)
    try:
        yield
    except FFNLabError:
        jax.distributed.shutdown()
        raise
    except KeyboardInterrupt:
        say(f"interrupted; the others end within {heartbeat} s")
        os._exit(INTERRUPTED)
    except Exception as error:  # noqa: BLE001 the process ends here
        leave(error, heartbeat)
    else:
        jax.distributed.shutdown()


def check_arguments(
    coordinator: str | None, count: int | None, index: int | None, heartbeat: int, join: int
) -> None:
    """Raises ConfigError unless the arguments of `joined` fit together."""
    for name, seconds in {"heartbeat": heartbeat, "join": join}.items():
        if seconds < 1:
            raise ConfigError(f"{name}={seconds} must be at least 1 second")
    given = f"coordinator={coordinator!r}, num_processes={count}, process_id={index}"
    by_hand = coordinator not in (None, "auto")
    if (count is None or index is None) if by_hand else (count is not None or index is not None):
        raise ConfigError(
            f"{given}: num_processes and process_id go with a coordinator HOST:PORT, all three; "
            "'auto' finds them out, and a process that is alone has none"
        )
    if by_hand and not (0 <= index < count):
        raise ConfigError(f"{given}: process_id must lie between 0 and num_processes - 1")
    host, _, port = (coordinator or "").rpartition(":")
    if by_hand and not (host and re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        raise ConfigError(f"coordinator={coordinator!r} is not HOST:PORT")


def connect(
    coordinator: str, count: int | None, index: int | None, heartbeat: int, join: int
) -> None:
    """Connects to the other processes; arguments as `joined`."""
    times = {"heartbeat_timeout_seconds": heartbeat, "shutdown_timeout_seconds": heartbeat}
    times["initialization_timeout"] = join
    if coordinator != "auto":
        roll_call(coordinator, count, index, join)
        jax.distributed.initialize(coordinator, count, index, **times)
        return
    try:
        jax.distributed.initialize(**times)
    except ValueError as error:
        raise ConfigError(
            f"coordinator='auto': jax.distributed detects no cluster ({error}); "
            "name HOST:PORT of process 0, num_processes and process_id"
        ) from None


def leave(error: Exception, heartbeat: int) -> None:
    """Ends the process after an error; after that of a collective, once the dead one is named."""
    traceback.print_exception(error)
    what = "another process may have died; the coordinator names it within"
    if isinstance(error, jax.errors.JaxRuntimeError | OSError):
        say(f"{what} {heartbeat} s, and process 0, which hosts the coordinator, as the leader")
        time.sleep(heartbeat + SLACK)
    sys.stdout.flush()
    os._exit(DIED)


def say(what: str) -> None:
    """Prints a line about this process to standard error."""
    line = f"process {jax.process_index()} of {jax.process_count()}: {what}"
    print(line, file=sys.stderr, flush=True)


def meet(name: str) -> None:
    """Waits until every process has come here.

    Args:
      name: of the place, the same in all.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(what: object, name: str) -> None:
    """Raises ConfigError, in every process, unless all hold the same value.

    Args:
      what: JSON values.
      name: what it is called in the error.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    content = json.dumps(what, sort_keys=True).encode()
    digest = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
    every = multihost_utils.process_allgather(digest)
    other = [i for i, row in enumerate(every) if not np.array_equal(row, every[0])]
    if other:
        raise ConfigError(f"{name} of process {other[0]} is not that of process 0")


def from_first(text: str) -> str:
    """What process 0 says, in every process.

    Args:
      text: of which the first `SAID` bytes arrive; only that of process 0 counts.
    """
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    content = np.frombuffer(text.encode()[:SAID].ljust(SAID, b"\0"), np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(content), np.uint8)
    return told.tobytes().rstrip(b"\0").decode(errors="ignore")
