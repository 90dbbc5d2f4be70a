"""Files that are whole or absent: atomic writes of files and folders, and strict JSON."""

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from ffnlab.errors import DamagedError, FormatError

__all__ = [
    "StrPath",
    "as_json",
    "atomic_dir",
    "atomic_write",
    "checksums",
    "naming",
    "open_regular",
    "parse_json",
    "read_json",
    "remove",
    "sealed",
    "sha256",
    "unsealed",
    "verify",
    "write_json",
]

StrPath = str | os.PathLike[str]

JSON_LIMIT = 64 << 20  # bytes of JSON read at most; a sidecar of 10,000 leaves has about 1 MB


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Makes a system error within it name the file that was to be written.

    Python's own say only "No space left on device" where `write`, `flush` or `fsync` failed.

    Args:
      path: what an error without a name gets.
      temporary: a file or folder that `path` stands for where an error names it or what is in it.
    """
    try:
        yield
    except OSError as error:
        names = [n for n in (error.filename2, error.filename) if isinstance(n, str | os.PathLike)]
        stand_in = path if temporary is None else temporary
        inside = [Path(n).relative_to(stand_in) for n in names if Path(n).is_relative_to(stand_in)]
        if inside:
            error.filename, error.filename2 = str(path / inside[0]), None
        elif error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_write(path: StrPath, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a file that appears under its name only when the block has ended without an error.

    It is written beside its target under a temporary name, flushed to disk, and renamed; an
    exception leaves what was there before. Missing parent folders are made.

    Args:
      path: the file to write.
      mode: "wb", or "w" for UTF-8 text.
    Yields:
      the open file.
    Raises:
      ValueError: another mode.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode={mode!r} is not one of 'w', 'wb'")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(target, temporary):
            with open(temporary, mode, encoding="utf-8" if mode == "w" else None) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


@contextlib.contextmanager
def atomic_dir(path: StrPath) -> Iterator[Path]:
    """Gives an empty folder that takes the place of `path` when the block ends without an error.

    An existing folder is replaced as a whole: it is moved aside, the new one takes its name, then
    the old one is removed. An exception leaves the old one as it was.

    Args:
      path: the folder to write.
    Yields:
      a temporary folder beside it.
    Raises:
      NotADirectoryError: `path` is a file.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; a folder is to be written there")
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    temporary = target.with_name(f".{target.name}.{mark}.tmp")
    aside = target.with_name(f".{target.name}.{mark}.old")
    try:
        with naming(target, temporary):
            temporary.mkdir()
            yield temporary
            if target.exists():
                os.replace(target, aside)
            os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside.exists() and not target.exists():
            os.replace(aside, target)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename durable, where the system can open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: StrPath, value: object) -> None:
    """Writes JSON atomically, indented, in UTF-8.

    Args:
      path: the file to write.
      value: dicts with string keys, lists, tuples, strings, numbers (also NumPy's), None, and
        arrays, which become lists.
    Raises:
      ValueError: a number is NaN or infinite, which JSON cannot say.
      TypeError: something that JSON has no form for.
    """
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False, default=plain)
    with atomic_write(path, "w") as file:
        file.write(text + "\n")


def remove(path: StrPath) -> None:
    """Removes a file, a link, or a folder with all that is in it; nothing where none is."""
    target = Path(path)
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def open_regular(path: StrPath) -> BufferedReader:
    """Opens a regular file for reading; a FIFO or a device in its place is not waited for.

    Raises:
      FormatError: a folder, FIFO, socket or device is there.
      OSError: it cannot be opened.
    """

    def check(status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{path} is not a regular file")

    check(os.stat(path))
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, _: os.open(name, flags))
    try:
        check(os.fstat(file.fileno()))  # of what was opened: it may have been exchanged
    except FormatError:
        file.close()
        raise
    return file


def sha256(file: StrPath) -> str:
    """SHA-256 of a regular file, in hexadecimal."""
    with open_regular(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def plain(value: object) -> object:
    """NumPy and jax scalars and arrays as Python numbers and lists."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"JSON has no form for {type(value).__name__}")


def read_json(path: StrPath, *, limit: int = JSON_LIMIT) -> Any:
    """Reads JSON strictly: no NaN or infinity, no key given twice, no file over `limit` bytes.

    Args:
      path: the file to read.
      limit: accepted size, bytes.
    Returns:
      dicts, lists, strings, numbers, booleans and None.
    Raises:
      FormatError: the file is none of that, or no regular file; the message names it.
      FileNotFoundError: there is no such file.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise FormatError(f"{path}: more than {limit} bytes of JSON")
    return parse_json(content, str(path))


def parse_json(content: bytes, source: str) -> Any:
    """The strict parser behind `read_json`."""
    try:
        return json.loads(
            content.decode(), parse_constant=refuse, parse_float=finite, object_pairs_hook=unique
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source} is not valid JSON: {error}") from None


def refuse(constant: str) -> None:
    """Rejects NaN and the infinities, which Python's parser lets in."""
    raise ValueError(f"{constant} is not JSON")


def finite(number: str) -> float:
    """A float, unless it is too large to be one: Python reads 1e999 as infinity."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:40]} is not a finite number")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict, unless a key was given twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """An object for `write_json` with the SHA-256 of its own content.

    Args:
      value: JSON values by name; none is called "sha256".
    Returns:
      the same and "sha256".

    >>> unsealed(sealed({"a": [1, 2]}), "a file")
    {'a': [1, 2]}
    """
    content = as_json(value)
    return content | {"sha256": digest(content)}


def unsealed(value: object, source: str) -> dict[str, Any]:
    """The inverse of `sealed`, of what was read from a file.

    Raises:
      DamagedError: it is not what was sealed; the message names `source`.
    """
    content = dict(value) if isinstance(value, dict) else {}
    if content.pop("sha256", None) != digest(content):
        raise DamagedError(f"{source} is not the file that was written: its sum is another")
    return content


def digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, the same for any order of the keys and any layout of the file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def as_json(value: Any) -> Any:
    """A value as it comes back from `write_json` and `read_json`; errors as the first."""
    return json.loads(json.dumps(value, allow_nan=False, default=plain))


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder, by its path from there."""
    return {name: sha256(file) for name, file in files_under(folder).items()}


def files_under(folder: Path) -> dict[str, Path]:
    """Every file under a folder by its path from there, in order."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file for file in files}


def verify(folder: Path, wanted: object, part: tuple[int, int] = (0, 1)) -> None:
    """Raises DamagedError unless the files of a folder have the checksums they had.

    Args:
      folder: of the files.
      wanted: what `checksums` gave.
      part: (index, count): all files must be there, and of `count` equal parts of them this one is
        read.
    """
    if not isinstance(wanted, dict):
        raise DamagedError(f"{folder}: its description has no checksums")
    found = files_under(folder)
    index, count = part
    names = sorted(wanted.keys() | found.keys())
    wrong = [name for name in names if (name in wanted) != (name in found)] or [
        name for name in names[index::count] if wanted[name] != readable_sum(found[name])
    ]
    if wrong:
        kind = "is missing" if wrong[0] not in found else "is not the file that was written"
        raise DamagedError(f"{folder / wrong[0]} {kind} ({len(wrong)} of {len(names)} files)")


def readable_sum(file: Path) -> str:
    """`sha256` of a file that may be damaged."""
    try:
        return sha256(file)
    except (OSError, FormatError) as error:
        raise DamagedError(f"{file} cannot be read: {error}") from None
