"""Ends a training run at each of its changes to the file system, and resumes it.

`python -m tests.parallel.writes CONFIG OUT`: a run that nothing disturbs, in OUT/whole; then for
every change n = 1, 2, … that the process makes by itself (a folder made, a file renamed, flushed or
removed) a run in OUT/n that ends without a word just before that one, and is resumed. Writes
[n, change, status when resumed] of all to OUT/writes.json.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from ffnlab import io
from tests.parallel.forks import fork, status_of

CHANGES = ("mkdir", "replace", "rename", "fsync", "unlink", "rmdir", "ftruncate", "pwrite")
ENDED = 86  # exit status of a run that was ended


def ending(number: int, note: Path) -> Callable[[], None]:
    """Lets a process end before its n-th change; what it was is noted in a file."""

    def prepare() -> None:
        left = [number]

        def wrapped(name: str, real: Callable) -> Callable:
            def change(*args: object, **kwargs: object) -> object:
                left[0] -= 1
                if not left[0]:
                    file = os.open(note, os.O_WRONLY | os.O_CREAT)
                    os.write(file, f"{name} {args[0]}".encode())
                    os._exit(ENDED)
                return real(*args, **kwargs)

            return change

        for name in CHANGES:
            setattr(os, name, wrapped(name, getattr(os, name)))

    return prepare


def main(config: Path, out: Path) -> int:
    """Does what the module says; 0 when the undisturbed run got to its end."""

    def begin(name: str, prepare: Callable[[], None] | None = None) -> int:
        arguments = ("--config", str(config), "--out", str(out / name), "--resume")
        return status_of(fork(out / f"{name}.log", *arguments, prepare=prepare))

    whole, found, number = begin("whole"), [], 1
    while begin(str(number), ending(number, out / f"{number}.txt")) == ENDED:
        what = (out / f"{number}.txt").read_text()
        found.append([number, what, begin(str(number))])
        number += 1
    io.write_json(out / "writes.json", found)
    return whole


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
