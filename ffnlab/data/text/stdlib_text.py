"""The running interpreter's standard library as text: a corpus every machine already has.

What is read is fixed by rule, so two machines with the same Python read the same bytes: the
`.py` files below the standard library folder, sorted by relative path, without the parts that
are installed packages, tests, or generated tables (`EXCLUDED`), and without files that are not
UTF-8. Line ends are normalised to "\n". A NUL byte stands before every file and after the last.

Whole modules are held out by name (`HELD_OUT`, about 200 KB on Python 3.11); no byte of them is
in the training text. None of this text is stored in ffnlab: `StdlibText.identity` records the
Python version and the SHA-256 of both parts, which is how two runs are told apart.
"""

import dataclasses
import functools
import hashlib
import os
import platform
import sysconfig
from pathlib import Path

from ffnlab.errors import FFNLabError

SEPARATOR = b"\0"

# Folders anywhere on the path: installed packages, tests, and tables that teach no language.
EXCLUDED = frozenset(
    "site-packages dist-packages test tests idle_test __pycache__ encodings pydoc_data".split()
)
# Single files: a table of entities, and what differs from one installation to the next.
EXCLUDED_FILES = ("html/entities.py", "sitecustomize.py", "usercustomize.py")
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")

HELD_OUT = (
    "asyncio/queues.py",
    "copy.py",
    "csv.py",
    "fnmatch.py",
    "fractions.py",
    "heapq.py",
    "http/cookies.py",
    "json/__init__.py",
    "json/decoder.py",
    "json/encoder.py",
    "json/scanner.py",
    "json/tool.py",
    "queue.py",
    "shlex.py",
    "textwrap.py",
)

EVERY = 60  # of the training modules: one in so many is left to validate on
MIN_FILES = 50  # a real standard library has over 500 modules; fewer is a stripped install


@dataclasses.dataclass(frozen=True)
class StdlibText:
    """Training and held-out text.

    Attributes:
      train: bytes, files separated by NUL.
      held_out: bytes, the files of `HELD_OUT` that this version has, separated by NUL.
      identity: python version, and for both parts SHA-256, size and number of files.
    """

    train: bytes
    held_out: bytes
    identity: dict[str, str | int]


def text_identity(train: bytes, held_out: bytes) -> dict[str, str | int]:
    """What tells two texts apart: Python version, SHA-256 and size of both parts."""
    record: dict[str, str | int] = {"python": platform.python_version()}
    for name, text in (("train", train), ("held_out", held_out)):
        record[f"{name}_sha256"] = hashlib.sha256(text).hexdigest()
        record[f"{name}_bytes"] = len(text)
    return record


def is_source(path: str) -> bool:
    """Whether a file belongs to the corpus.

    Args:
      path: relative path with forward slashes.
    Returns:
      True for Python source that is neither installed, a test, nor a generated table.

    >>> is_source("json/decoder.py"), is_source("test/test_json.py"), is_source("html/entities.py")
    (True, False, False)
    """
    parts = path.split("/")
    if not path.endswith(".py") or path in EXCLUDED_FILES or EXCLUDED.intersection(parts):
        return False
    return not path.startswith(EXCLUDED_PREFIXES)


@functools.cache
def stdlib_text(root: Path | None = None) -> StdlibText:
    """Reads the standard library's text.

    Args:
      root: folder to read; default the running interpreter's standard library.
    Returns:
      `StdlibText`; the same folder gives the same bytes.
    Raises:
      FFNLabError: the folder has no Python sources, or no held-out module.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else Path(root)
    sources = _read(root)
    held = {path: data for path, data in sources.items() if path in HELD_OUT}
    train = {path: data for path, data in sources.items() if path not in HELD_OUT}
    if len(train) < MIN_FILES or not held:
        raise FFNLabError(
            f"{root} has {len(train)} Python source files and {len(held)} of the held-out modules; "
            f"at least {MIN_FILES} and 1 are needed. Installations that ship byte code only (zip "
            "or embedded Python) have no sources: use a full Python, or pass --text FILE."
        )
    return StdlibText(join(train), join(held), _identity(train, held))


def validation_split(text: StdlibText) -> StdlibText:
    """The training text in two parts, to choose settings on: no byte of the held-out modules.

    Args:
      text: of the standard library.
    Returns:
      `StdlibText` whose `held_out` is every 60th module of the training text, in path order from
      the first, and whose `train` is the others.
    """
    modules = text.train[1:-1].split(SEPARATOR)
    train = {f"{i:06}": data for i, data in enumerate(modules) if i % EVERY}
    held = {f"{i:06}": data for i, data in enumerate(modules) if not i % EVERY}
    return StdlibText(join(train), join(held), _identity(train, held))


def join(files: dict[str, bytes]) -> bytes:
    """Files in path order, a NUL before each and one at the end.

    >>> join({"b.py": b"2", "a.py": b"1"})
    b'\\x001\\x002\\x00'
    """
    return SEPARATOR + b"".join(files[path] + SEPARATOR for path in sorted(files))


def _read(root: Path) -> dict[str, bytes]:
    sources = {}
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in EXCLUDED]
        for file in (Path(folder) / name for name in names):
            path = file.relative_to(root).as_posix()
            if not is_source(path):
                continue
            data = file.read_bytes().replace(b"\r\n", b"\n")
            if data and SEPARATOR not in data and _is_utf8(data):
                sources[path] = data
    return sources


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _identity(train: dict[str, bytes], held: dict[str, bytes]) -> dict[str, str | int]:
    counts = {"train_files": len(train), "held_out_files": len(held)}
    return text_identity(join(train), join(held)) | counts
