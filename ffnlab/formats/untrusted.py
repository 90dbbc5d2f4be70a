"""Files that came from elsewhere: JSON, TOML, names and sizes are checked before they are used."""

import os
import re
import stat
import tomllib
from pathlib import Path

from ffnlab.errors import FormatError
from ffnlab.storage.files import parse_json

JSON_LIMIT = 32 * 1024 * 1024
KEY_LIMIT = 8  # parts of a dotted key of TOML
# Texts and comments of TOML: of many lines, of one. An end that is missing is none of ours.
TEXTS = re.compile(
    rb'"""(?:[^\\]|\\.)*?(?:"{3,5}|\Z)' + rb"|'''.*?(?:'{3,5}|\Z)"
    rb'|"(?:[^"\\\n]|\\.)*"?' + rb"|'[^'\n]*'?|#[^\n]*",
    re.DOTALL,
)
DEEP_KEY = re.compile(rb"(?<![A-Za-z0-9_-])(?:[A-Za-z0-9_-]+[ \t]*\.[ \t]*){%d}" % KEY_LIMIT)


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


def parse_toml(content: bytes, source: str) -> dict[str, object]:
    """Tables of TOML from elsewhere.

    Python's parser takes minutes for a line of 100 kB: of a key of n parts joined by dots it looks
    at n^2 / 2. Such keys are refused before it sees them.

    Args:
      content: of the file, in UTF-8.
      source: its name, for messages.
    Raises:
      FormatError: it is not valid TOML, or has a key of more than 8 parts.

    >>> parse_toml(b'[a]\\n"b.c" = 1', "x")
    {'a': {'b.c': 1}}
    """
    if DEEP_KEY.search(TEXTS.sub(b"x", content)):
        raise FormatError(f"{source}: a key of more than {KEY_LIMIT} parts is not accepted")
    try:
        return tomllib.loads(content.decode())
    except ValueError as error:  # of UTF-8, of TOML, of numbers of thousands of digits
        raise FormatError(f"{source} is not valid TOML: {error}") from None
    except RecursionError:
        raise FormatError(f"{source} is not valid TOML: nested too deeply") from None


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
