"""Files that came from elsewhere: JSON, file names and sizes are checked before they are used."""

import os
import stat
from pathlib import Path

from ffnlab.errors import FormatError
from ffnlab.storage.files import parse_json

JSON_LIMIT = 32 * 1024 * 1024


def quoted(name: object) -> str:
    """A foreign name for an error message: escaped and at most 120 characters long."""
    text = ascii(name)
    return text if len(text) <= 120 else text[:117] + "..."


def is_count(value: object) -> bool:
    """Whether what was read is a size: an integer of 0 to 2**63 - 1.

    >>> is_count(3), is_count(True), is_count(-1)
    (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def read_json(file: Path, *, limit: int = JSON_LIMIT) -> object:
    """Strict JSON (`ffnlab.storage.files`) of a regular file, its size checked before reading.

    Args:
      file: where it is.
      limit: bytes that are read at most.
    Raises:
      FormatError: the file is missing, is not a regular file, is too large, or is not JSON.
    """
    size = file_size(file)
    if size > limit:
        raise FormatError(f"{file}: {size} bytes of JSON; at most {limit} are read")
    return parse_json(file.read_bytes(), str(file))


def file_size(file: Path) -> int:
    """Bytes in a regular file.

    Raises:
      FormatError: there is no such file, or it is a directory, a pipe or a device.
    """
    try:
        found = os.stat(file)
    except (OSError, ValueError) as error:
        raise FormatError(f"{file}: cannot be read ({error})") from None
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{file}: not a regular file")
    return found.st_size


def inside(directory: Path, name: str) -> Path:
    """The file `name` in `directory`, which it may not leave, neither by name nor by a link.

    The one exception is the layout of the Hugging Face cache, where a file in `snapshots/REVISION`
    or in a folder there is a link to one in `blobs` beside `snapshots`.

    Raises:
      FormatError: the name is not a plain file name, or a link leads elsewhere.
    """
    if not name or name in (".", "..") or any(c in name for c in "/\\:\0"):
        raise FormatError(f"{directory}: {quoted(name)} is not a plain file name")
    file = directory / name
    try:
        home, target = directory.resolve(), file.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise FormatError(f"{directory}: {quoted(name)}: {error}") from None
    allowed = [home]
    for above in (home.parent, home.parent.parent):
        if above.name == "snapshots":
            allowed.append(above.parent / "blobs")
    if target.parent not in allowed:
        raise FormatError(f"{file}: a link that leaves the directory")
    return file
