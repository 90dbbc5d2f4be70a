"""A small tree in a file: one npz with its structure beside the arrays; nothing is unpickled."""

import json
import math
import zipfile
import zlib
from typing import Any, TypeVar

import jax
import numpy as np

from ffnlab.errors import FormatError, first_line
from ffnlab.storage import structure
from ffnlab.storage.files import JSON_LIMIT, StrPath, atomic_write, parse_json
from ffnlab.storage.leaves import is_key, rebuild_leaf, stored_as

__all__ = ["load_stats", "save_stats"]

T = TypeVar("T")
SIDECAR_MEMBER = "tree"
# What zipfile and NumPy's header reader raise on damaged input.
READ_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    RuntimeError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)


def save_stats(path: StrPath, stats: object) -> None:
    """Saves a small pytree of arrays as one npz file, atomically.

    Args:
      path: the file to write.
      stats: NamedTuples, dicts or lists of arrays, keys and Python scalars that fit in memory.
    Raises:
      FormatError: a leaf cannot be stored; the message has its path.
    """
    description = structure.describe(stats)
    members: dict[str, Any] = {
        SIDECAR_MEMBER: np.frombuffer(json.dumps(description).encode(), np.uint8)
    }
    entries = description["leaves"]
    for i, (leaf, entry) in enumerate(zip(jax.tree.leaves(stats), entries, strict=True)):
        if "python" in entry:
            continue
        array = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        members[str(i)] = array.view(raw_dtype(array.dtype))
    with atomic_write(path) as file:
        np.savez(file, **members)


def raw_dtype(dtype: np.dtype) -> np.dtype:
    """A dtype that an npy header can name; bfloat16, fp8 and int4 go as unsigned bytes."""
    known = dtype.kind in "biufc" and dtype.isbuiltin == 1
    return dtype if known else np.dtype(f"u{dtype.itemsize}")


def load_stats(path: StrPath, like: T) -> T:
    """Loads what `save_stats` wrote, into the structure of `like`.

    Args:
      path: the file.
      like: a tree of the same structure, static fields, shapes and dtypes, arrays or abstract.
    Returns:
      a new tree of the type of `like`; leaves as `restore` places them.
    Raises:
      FormatError: not such a file, a damaged one, or one of another tree.
      FileNotFoundError: there is no such file.
    """
    leaves, treedef = jax.tree.flatten(like)
    try:
        with zipfile.ZipFile(path) as archive:
            content = read_member(archive, SIDECAR_MEMBER, (None,), np.dtype(np.uint8))
            saved = parse_json(content.tobytes(), str(path))
            structure.check(saved, structure.describe(like), str(path))
            loaded = []
            for i, (leaf, entry) in enumerate(zip(leaves, saved["leaves"], strict=True)):
                value = None if "python" in entry else stats_array(archive, str(i), leaf)
                loaded.append(rebuild_leaf(leaf, entry, value, str(path)))
    except READ_ERRORS as error:
        if isinstance(error, FormatError | FileNotFoundError):
            raise
        raise FormatError(f"{path} cannot be read: {first_line(error)}") from None
    return jax.tree.unflatten(treedef, loaded)


def stats_array(archive: zipfile.ZipFile, name: str, like: Any) -> np.ndarray:
    """One array of an npz file, at the dtype of its place in `like`."""
    shape, dtype = stored_as(like)
    return read_member(archive, name, shape, raw_dtype(dtype)).view(dtype)


def read_member(
    archive: zipfile.ZipFile, name: str, shape: tuple[int | None, ...], dtype: np.dtype
) -> np.ndarray:
    """Reads one npy member whose header must say what is expected, before memory is taken.

    Args:
      archive: the open npz.
      name: the member, without ".npy".
      shape: the shape it must have; None for any size, then at most JSON_LIMIT bytes in all.
      dtype: the dtype it must have.
    """
    with archive.open(f"{name}.npy") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name}.npy has another npy version than 1.0")
        found, fortran, found_dtype = np.lib.format.read_array_header_1_0(file)
        size = math.prod(found) * dtype.itemsize
        fits = len(found) == len(shape) and all(
            0 <= a if b is None else a == b for a, b in zip(found, shape, strict=True)
        )
        if not fits or found_dtype != dtype or (None in shape and size > JSON_LIMIT):
            raise ValueError(f"{name}.npy has {found_dtype}{list(found)}, not {dtype}{shape}")
        content = file.read(size + 1)
    if len(content) != size:
        raise ValueError(f"{name}.npy does not have the {size} bytes its header promises")
    array = np.frombuffer(content, dtype).reshape(found, order="F" if fortran else "C")
    return array.copy(order="C")
