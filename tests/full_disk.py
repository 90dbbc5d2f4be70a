"""A disk on which the n-th call that writes fails, and everything that would take room after it.

The calls are Python's: opening to write, `write`, `flush`, `fsync`, `mkdir`, `link`, `rename`. What
libraries write in C++ is met by `small_files`.
"""

import builtins
import errno
import io
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# After the disk is full these work again: they take no room, or the system keeps some.
MOVES = ("replace", "rename", "link")


class Disk:
    """Counts the calls that write, and fails from one of them on.

    Attributes:
      fails_at: number of the first call that fails, from 1; 0 for none.
      calls: made so far, in order.
    """

    def __init__(self, fails_at: int):
        self.fails_at, self.calls = fails_at, []

    @property
    def is_full(self) -> bool:
        """Whether a call has failed."""
        return 0 < self.fails_at <= len(self.calls)

    def ask(self, call: str, *names: Any) -> None:
        """Counts a call, or fails it."""
        self.calls.append(call)
        if len(self.calls) == self.fails_at or (self.is_full and call not in MOVES):
            # As Python does: an error of a descriptor has no name.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *map(str, names[:1]))


class File:
    """An open file whose writes ask the disk; one that fails leaves half of what it was given."""

    def __init__(self, file: Any, disk: Disk):
        self._file, self._disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "File":
        self._file.__enter__()
        return self

    def __exit__(self, *details: Any) -> Any:
        return self._file.__exit__(*details)

    def write(self, content: Any) -> int:
        """Writes, or fails in the middle."""
        try:
            self._disk.ask("write")
        except OSError:
            self._file.write(content[: len(content) // 2])
            raise
        return self._file.write(content)

    def flush(self) -> None:
        """Flushes, or fails."""
        self._disk.ask("flush")
        self._file.flush()


@contextmanager
def filling(fails_at: int) -> Iterator[Disk]:
    """Makes the disk full at its n-th call within the block."""
    disk, plain = Disk(fails_at), io.open

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return plain(file, mode, *args, **options)
        disk.ask("open", file)
        return File(plain(file, mode, *args, **options), disk)

    def asking(name: str, act: Callable) -> Callable:
        def asked(*args: Any, **options: Any) -> Any:
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            if not is_folder:  # that only makes a rename durable, and may be refused
                disk.ask(name, *(a for a in args if not isinstance(a, int)))
            return act(*args, **options)

        return asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        for name in ("fsync", "mkdir", *MOVES):
            patch.setattr(os, name, asking(name, getattr(os, name)))
        yield disk


def every_call(act: Callable[[], object]) -> Iterator[tuple[Disk, OSError]]:
    """Runs `act` on disks that are full at its first call, its second, …, until it ends whole.

    Yields:
      the disk, after it was full, and what `act` raised; the caller looks at what was left.
    """
    for fails_at in range(1, 1000):
        with filling(fails_at) as disk:
            try:
                act()
            except OSError as error:
                found = error
            else:
                found = None
        if not disk.is_full:
            assert found is None and fails_at > 1, found
            return
        if found is not None:
            yield disk, found
    raise AssertionError("it does not end")


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Lets no file grow beyond so many bytes, whoever writes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
