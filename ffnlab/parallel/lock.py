"""One run at a time in a folder: a lock that ends with the process that holds it.

The lock is the system's (`flock`): it is gone when its process is, killed or not. The file says who
holds it, for the message that the second one gets. On file systems without such locks, the file
itself is the lock: it is held while the process that it names lives; of another host's process that
cannot be told, and the user is asked to remove the file.
"""

import contextlib
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ffnlab.errors import ConfigError
from ffnlab.parallel.processes import from_first, is_first

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None

__all__ = ["locked"]

NAME = "run.lock"
PAUSE, PATIENCE = 0.05, 1.0  # seconds: between looks at a file, and until a writer has written
MOST = 4096  # bytes read of a lock file

# Descriptors of the locks of this process, by thread and folder; None in processes that do not
# write. A thread may enter again.
HELD: dict[tuple[int, str], int | None] = {}


@contextlib.contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Within it, no other run writes to a folder; the same thread may enter again.

    Of several processes of one run all call it, and the first one holds the lock.

    Args:
      folder: of a run, made when missing; None locks nothing.
    Raises:
      ConfigError: another run is in the folder, or it cannot be written. All processes raise it.
    """
    key = threading.get_ident(), "" if folder is None else os.path.realpath(folder)
    if folder is None or key in HELD:
        yield
        return
    descriptor, problem = None, ""
    if is_first():
        try:
            descriptor = take(folder)
        except ConfigError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{folder} cannot be used for a run: {error}"
    problem = from_first(problem)
    if problem:
        raise ConfigError(problem)
    HELD[key] = descriptor
    try:
        yield
    finally:
        if HELD.pop(key, None) is not None:  # a fork of the process holds nothing
            release(folder / NAME, descriptor)


def take(folder: Path) -> int:
    """Takes the lock of a folder; an open file that holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_NOFOLLOW", 0)  # what a link leads to is not ours to write
    while True:
        descriptor = os.open(path, flags, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"{path} is not a regular file; remove it")
            if seize(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def seize(descriptor: int, path: Path) -> bool:
    """Locks an open file and writes who holds it; False where it was removed in the meantime.

    Raises:
      ConfigError: another process holds it.
    """
    by_system = lock_file(descriptor, path)
    if not is_at(descriptor, path):
        return False
    if not by_system:
        owner = read_owner(descriptor)
        if owner and not is_gone(owner):
            raise ConfigError(f"{in_use(path, owner)}; if that process is gone, remove {path}")
    content = json.dumps(myself()).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)
    if not by_system:  # of several that found it free, the last one to write has it
        time.sleep(2 * PAUSE)
        owner = read_owner(descriptor)
        if owner != json.loads(content):
            raise ConfigError(in_use(path, owner))
    return True


def lock_file(descriptor: int, path: Path) -> bool:
    """Whether the system locks an open file; False where it has no locks.

    Raises:
      ConfigError: another process holds it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        until = time.monotonic() + PATIENCE
        while not (owner := read_owner(descriptor)) and time.monotonic() < until:
            time.sleep(PAUSE)
        raise ConfigError(in_use(path, owner)) from None
    except OSError:
        return False
    return True


def release(path: Path, descriptor: int) -> None:
    """Gives a lock back, and removes its file first, so that nobody locks a file that goes."""
    with contextlib.suppress(OSError):
        if is_at(descriptor, path):
            path.unlink()
    os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one of a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def in_use(path: Path, owner: dict[str, object]) -> str:
    """The message for the second run."""
    who = "another process"
    if owner:
        who = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    return f"{path.parent} is in use by {who}: wait for it, end it, or train into another folder"


def myself() -> dict[str, object]:
    """What a lock file says of its process."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "since": since, "started": started(pid)}


def read_owner(descriptor: int) -> dict[str, object]:
    """What a lock file says; nothing where it is empty or half-written."""
    try:
        found = json.loads(os.pread(descriptor, MOST, 0))
        pid = int(found["pid"])
        if not 0 < pid < 2**31:
            return {}
        return {
            "pid": pid,
            "host": str(found["host"]),
            "since": str(found["since"]),
            "started": found["started"],
        }
    except (ValueError, KeyError, TypeError):
        return {}


def is_gone(owner: dict[str, object]) -> bool:
    """Whether the process that a lock file names is dead, as far as can be told from here."""
    if owner["host"] != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return started(owner["pid"]) != owner["started"]  # the number went to another process


def started(pid: int) -> str | None:
    """When a process began, in the system's own count; None where that is not told."""
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat_line.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]


def forget() -> None:
    """In a fork: the parent holds its locks, and its child's copies must not keep them."""
    for descriptor in HELD.values():
        if descriptor is not None:
            os.close(descriptor)
    HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)
