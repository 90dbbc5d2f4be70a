"""Starting the processes of a run, and starting it again with those that are left when one dies.

A process that dies takes the others with it: they cannot compute without its part. What is lost is
the time since the newest checkpoint; the rest of the run is done by fewer processes, on the mesh
that still fits (a size of -1 takes up the change), with the same batches in the same order.

One process each on this machine, or, within an allocation of Slurm, one per host.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ffnlab.errors import ConfigError, at_least
from ffnlab.parallel.signals import SIGNALS, handled

__all__ = ["DOES_NOT_FIT", "REFUSED", "Place", "launch", "places"]

REFUSED, DOES_NOT_FIT = 2, 3  # exit statuses: an error of use, and that of a mesh
FELT = {1, -signal.SIGABRT}  # how one ends that lost another
GRACE = 5.0  # seconds that the others have to say what they felt
POLL = 0.02  # seconds


class Place(NamedTuple):
    """Where a process runs.

    Attributes:
      host: as the others reach it.
      prefix: of the command that starts it there.
      variables: of its environment.
    """

    host: str
    prefix: tuple[str, ...] = ()
    variables: Mapping[str, str] = {}


class Ended(NamedTuple):
    """How the processes of one start ended.

    Attributes:
      status: exit status for all: 0, one that they ended with themselves, or 1 after a death.
      dead: which of them died, and not because another one did.
      said: how those ended.
    """

    status: int
    dead: Sequence[int] = ()
    said: str = ""


def places(count: int | None) -> list[Place]:
    """Where the processes of a run go.

    Args:
      count: of them; under Slurm all hosts of the allocation when None, elsewhere needed.
    Raises:
      ConfigError: no count, or more processes than hosts.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if nodes and shutil.which("scontrol") and "SLURM_STEP_ID" not in os.environ:
        command = ["scontrol", "show", "hostnames", nodes]
        hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        if count is not None and not 1 <= count <= len(hosts):
            raise ConfigError(
                f"processes={count} must lie in 1..{len(hosts)}, the hosts of the job"
            )
        srun = ("srun", "--overlap", "--nodes=1", "--ntasks=1", "--nodelist")
        return [Place(host, (*srun, host)) for host in hosts[:count]]
    if count is None:
        raise ConfigError("processes is not given; only a job of Slurm tells how many there are")
    at_least(1, processes=count)
    return [Place("127.0.0.1", (), share) for share in shares(count)]


def shares(count: int) -> list[dict[str, str]]:
    """What tells each of several processes on one machine which GPUs are its own.

    Raises:
      ConfigError: there are GPUs, and the processes do not divide them.
    """
    gpus = visible_gpus()
    if count == 1 or not gpus:
        return [{} for _ in range(count)]
    if len(gpus) % count:
        raise ConfigError(f"processes={count} does not divide the {len(gpus)} GPUs {gpus}")
    each = len(gpus) // count
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i : i + each])} for i in range(0, len(gpus), each)
    ]


def visible_gpus() -> list[str]:
    """The GPUs that a process started from here would see."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu") or not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()


def launch(command: Sequence[str], where: Sequence[Place], least: int = 1) -> int:
    """Runs a command in several processes until it has finished, been stopped, or failed.

    Args:
      command: that takes --coordinator, --num-processes, --process-id and --resume.
      where: a place for each process.
      least: processes with which the run still goes on after others died.
    Returns:
      the exit status: 0 where the run finished or a signal stopped it with a checkpoint; that of
      the command where it refused; 1 where fewer than `least` processes are left, or no number of
      them fits the mesh.
    Raises:
      ConfigError: `least` is not between 1 and the number of places, or the command cannot be
        started.
    """
    if not 1 <= least <= len(where):
        raise ConfigError(f"min={least} must lie in 1..{len(where)}, the number of processes")
    left, again = list(where), False
    while True:
        ended = fitting(command, left, least, again)
        if not ended.dead:
            return ended.status
        left = [place for i, place in enumerate(left) if i not in ended.dead]
        if len(left) < least:
            say(f"{ended.said}; {len(left)} left, less than {least}: it ends; --resume goes on")
            return 1
        say(f"{ended.said}; {len(left)} left, which go on from the newest checkpoint")
        again = True


def fitting(command: Sequence[str], left: Sequence[Place], least: int, again: bool) -> Ended:
    """Starts as many processes as are left; after a death, fewer where the mesh does not fit."""
    for count in range(len(left), least - 1, -1):
        ended = once(command, left[:count], again)
        if not (again and ended.status == DOES_NOT_FIT and not ended.dead):
            return ended
        say(f"{count} processes do not fit")
    say(f"no number of processes from {len(left)} down to {least} fits")
    return Ended(1)


def once(command: Sequence[str], where: Sequence[Place], again: bool) -> Ended:
    """Starts all processes, passes their output on, and waits until they have ended."""
    address = f"{where[0].host}:{free_port()}"
    common = ["--coordinator", address, "--num-processes", str(len(where))]
    common += ["--resume"] if again and "--resume" not in command else []
    processes: list[subprocess.Popen] = []
    relays: list[threading.Thread] = []
    try:
        with passing_signals(processes):
            for i, place in enumerate(where):
                arguments = [*place.prefix, *command, *common, "--process-id", str(i)]
                processes.append(start(arguments, place.variables))
                relays.append(threading.Thread(target=relay, args=(processes[-1], i), daemon=True))
                relays[-1].start()
            return awaited(processes, where)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for thread in relays:
            thread.join(GRACE)


def start(arguments: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen:
    """Starts a process, away from the terminal's signals."""
    try:
        return subprocess.Popen(
            arguments,
            env=os.environ | dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigError(f"{arguments[0]!r} cannot be started: {error.strerror}") from None


def relay(process: subprocess.Popen, index: int) -> None:
    """Prints what a process prints, each line with its rank."""
    assert process.stdout is not None  # a pipe
    with process.stdout as lines:
        for line in lines:
            print(f"[{index}] {line.decode(errors='replace').rstrip()}", flush=True)


@contextmanager
def passing_signals(processes: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Within it, a signal to stop is passed on; see `handled` for a second one."""

    def stop() -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    with handled(stop, SIGNALS):
        yield


def awaited(processes: Sequence[subprocess.Popen], where: Sequence[Place]) -> Ended:
    """Waits until all have ended; a while after one failed, the others are killed."""
    statuses = polled(processes, lambda found: any(found.values()) or len(found) == len(processes))
    if not any(statuses.values()):
        return Ended(0)
    first = [i for i, status in statuses.items() if status]
    until = time.monotonic() + GRACE
    late = polled(processes, lambda found: len(found) == len(processes) or time.monotonic() > until)
    refused = {status for status in late.values() if status in (REFUSED, DOES_NOT_FIT)}
    if refused and statuses[first[0]] in refused:
        return Ended(statuses[first[0]])
    # Whatever else than a failed collective ended one, that one died.
    dead = [i for i, s in late.items() if s not in FELT | {0, REFUSED, DOES_NOT_FIT}] or first
    each = [f"process {i} ({where[i].host}) died: {how(late[i])}" for i in dead]
    return Ended(1, dead, "; ".join(each))


def polled(
    processes: Sequence[subprocess.Popen], enough: Callable[[Mapping[int, int]], bool]
) -> dict[int, int]:
    """The exit statuses of those that have ended, once they are enough."""
    while True:
        polls = {i: process.poll() for i, process in enumerate(processes)}
        found = {i: status for i, status in polls.items() if status is not None}
        if enough(found):
            return found
        time.sleep(POLL)


def how(status: int) -> str:
    """How a process ended, in words.

    >>> how(-9), how(1)
    ('SIGKILL', 'exit status 1')
    """
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]


def say(what: str) -> None:
    """Prints a line of the launcher's own."""
    print(f"ffnlab launch: {what}", file=sys.stderr, flush=True)
