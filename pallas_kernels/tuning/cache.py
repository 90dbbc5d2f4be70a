"""Configurations that were measured best: where they are kept and how one is found.

Two files hold them: the user's, which wins, and the one that comes with the package (empty as long
as nothing has been measured). An entry belongs to an operation, the sources of its kernel (what was
measured of others says nothing), a device's name, a minor version of jax, the facts of the call
that change the kernel, and a number of tokens, rounded up to a power of two (its bucket). A call
takes the entry of its bucket, else the nearest of two buckets on either side, the larger first;
farther ones are another regime. What is malformed or does not fit is left out with one warning.

Files are read once per process and written by the command `tune` only. A program that is compiled
keeps the configuration it was traced with.
"""

import functools
import hashlib
import json
import math
import os
import warnings
from pathlib import Path
from typing import NamedTuple

from pallas_kernels import backend

SCHEMA = 2
VARIABLE = "PALLAS_KERNELS_TUNING"
SHIPPED = Path(__file__).with_name("shipped.json")
REACH = 2  # buckets between a call and the entry it takes: a factor of four
LARGEST = 16 << 20  # bytes of a file
BUCKETS = tuple(2**i for i in range(31))
LONGEST = 1e12  # microseconds
LISTED, SHOWN = 3, 300  # bad entries that a warning names, letters of each


class Key(NamedTuple):
    """What an entry is for.

    Attributes:
      op: the operation, "w4a8.matmul".
      device: the device's name, as its driver gives it.
      jax: minor version, "0.12".
      sources: digest of the kernel's source files.
      m: tokens, a power of two.
      facts: (name, number or word) pairs sorted by name: all else that changes the kernel.
    """

    op: str
    device: str
    jax: str
    sources: str
    m: int
    facts: tuple[tuple[str, int | str], ...]


class Entry(NamedTuple):
    """A configuration and how it was found.

    Attributes:
      key: what it is for.
      config: numbers by name.
      us: microseconds measured.
      heuristic_us: of the configuration that is taken without a measurement.
      date: of the measurement, "2026-11-24".
      where: the file and the entry's number, for messages.
    """

    key: Key
    config: dict[str, int]
    us: float
    heuristic_us: float
    date: str
    where: str = ""


def bucket(m):
    """The power of two from m on.

    >>> [bucket(m) for m in (0, 1, 3, 64, 65)]
    [1, 1, 4, 64, 128]
    """
    return 1 << max(0, m - 1).bit_length()


def key(op, m, facts):
    """The `Key` of a call on the device that is traced for, under this jax."""
    minor = ".".join(map(str, backend.JAX_VERSION[:2]))
    where = backend.device_kind(), minor, sources(op.partition(".")[0])
    return Key(op, *where, bucket(m), tuple(sorted(facts.items())))


@functools.cache
def sources(kernel):
    """Digest of the files that a kernel is made of.

    Args:
      kernel: name of its folder, "w4a8".
    """
    root = Path(__file__).parent.parent
    files = [root / "_compat.py", *sorted((root / kernel).glob("*.py"))]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find(op, m, facts, build):
    """The configuration measured for a call or for one of about its size.

    Args:
      op: the operation.
      m: tokens.
      facts: numbers and words by name; see `Key`.
      build: called with an entry's numbers by name; gives the configuration, or raises ValueError
        where they do not fit the facts.
    Returns:
      what `build` gave, or None when no entry is near.
    """
    wanted = key(op, m, facts)
    entries = load().get(wanted._replace(m=0), [])
    for entry in sorted(entries, key=lambda entry: distance(entry, wanted.m)):
        if distance(entry, wanted.m)[0] > REACH:
            return None
        try:
            return build(entry.config)
        except ValueError as error:
            entries.remove(entry)  # facts alone decide: it would fit no other call either
            complain([f"{entry.where}: {error}"])
    return None


def distance(entry, m):
    """Buckets between an entry and m; of two as near the larger comes first."""
    return abs(math.log2(entry.key.m / m)), -entry.key.m


@functools.cache
def load():
    """Entries of both files, the user's first, in lists by `Key` without m; see `reload`."""
    table: dict[Key, list[Entry]] = {}
    for path in (user_file(), SHIPPED):
        try:
            entries, problems = read(path)
        except ValueError as error:
            entries, problems = [], [str(error)]
        complain(problems)
        for entry in entries:
            table.setdefault(entry.key._replace(m=0), []).append(entry)
    return table


def reload():
    """Reads the files again at the next call."""
    load.cache_clear()


def user_file():
    """The user's file: PALLAS_KERNELS_TUNING, else one in the user's cache folder."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "pallas_kernels" / "tuning.json"


def read(path):
    """The entries of a file, and what is wrong with those left out.

    Args:
      path: the file; one that is not there holds nothing.
    Returns:
      entries, a list of `Entry`; problems, a list of lines.
    Raises:
      ValueError: the file is not a table of this schema.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"more than {LARGEST} bytes")
        held = json.loads(path.read_bytes())
    except FileNotFoundError:
        return [], []
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(held, dict) or set(held) != {"version", "entries"}:
        raise ValueError(f"{path}: must hold 'version' and 'entries' and nothing else")
    if held["version"] != SCHEMA or not isinstance(held["entries"], list):
        raise ValueError(f"{path}: version={held['version']!r}, accepted: {SCHEMA} with a list")
    entries, problems = [], []
    for number, value in enumerate(held["entries"]):
        where = f"{path}, entry {number}"
        try:
            entries.append(parse(value, where))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return entries, problems


FIELDS = ("op", "device", "jax", "sources", "m", "facts", "config", "us", "heuristic_us", "date")


def parse(value, where):
    """An `Entry` from what JSON gave; ValueError says what is wrong with it."""
    if not isinstance(value, dict) or set(value) != set(FIELDS):
        raise ValueError(f"must hold {', '.join(FIELDS)} and nothing else")
    for name in ("op", "device", "jax", "sources", "date"):
        if not isinstance(value[name], str):
            raise ValueError(f"{name}={value[name]!r} is not a string")
    if not whole(value["m"]) or value["m"] not in BUCKETS:
        raise ValueError(f"m={value['m']!r} is not a power of two up to {BUCKETS[-1]}")
    for name in ("us", "heuristic_us"):
        number = isinstance(value[name], int | float) and not isinstance(value[name], bool)
        if not number or not 0 < value[name] < LONGEST:
            raise ValueError(f"{name}={value[name]!r} is not a time")
    facts, config = value["facts"], value["config"]
    if not isinstance(facts, dict) or not all(
        whole(x) or isinstance(x, str) for x in facts.values()
    ):
        raise ValueError("facts must be whole numbers and strings by name")
    if not isinstance(config, dict) or not config or not all(map(whole, config.values())):
        raise ValueError("config must be whole numbers by name")
    pairs = tuple(sorted(facts.items()))
    kernel = value["op"], value["device"], value["jax"], value["sources"]
    named = Key(*kernel, value["m"], pairs)
    return Entry(named, config, value["us"], value["heuristic_us"], value["date"], where)


def whole(value):
    """Whether a value is a whole number, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def complain(problems):
    """One warning for what was left out."""
    if problems:
        more = f" (and {len(problems) - LISTED} more)" if len(problems) > LISTED else ""
        named = "; ".join(text[:SHOWN] for text in problems[:LISTED])
        warnings.warn(
            f"left out of the tuned configurations: {named}{more}; "
            "correct or remove it, or run `python -m pallas_kernels.tune` again",
            stacklevel=2,
        )


def record(entry, path):
    """Adds an entry to a file, in place of one of the same key; the file is replaced as a whole.

    Args:
      entry: an `Entry`.
      path: the file, made with its folder where it is not there. Malformed entries go.
    Raises:
      ValueError: the file is not a table of this schema.
      OSError: it cannot be written.
    """
    kept = {old.key: old for old in read(path)[0]} | {entry.key: entry}
    entries = [
        {**old.key._asdict(), "facts": dict(old.key.facts), "config": old.config}
        | {"us": old.us, "heuristic_us": old.heuristic_us, "date": old.date}
        for _, old in sorted(kept.items(), key=lambda pair: str(pair[0]))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_text(json.dumps({"version": SCHEMA, "entries": entries}, indent=1) + "\n")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
