"""Features of a frozen network in files, so that it runs once for the same model and data."""

import hashlib
import json
import math
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree, Shaped

from ffnlab.errors import ConfigError, FormatError, at_least, first_line
from ffnlab.storage import structure
from ffnlab.storage.files import StrPath, atomic_write, parse_json
from ffnlab.storage.leaves import is_key
from ffnlab.storage.npz import READ_ERRORS, raw_dtype, read_member

__all__ = ["FeatureCache"]

M = TypeVar("M")
ABOUT, FEATURES = "about", "features"  # members of a file
MOST_AXES = 32


class FeatureCache:
    """Features by the SHA-256 of what they are made of: one npz for each in a folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache = FeatureCache(folder)
    ...     x = np.arange(6, dtype=np.float32).reshape(3, 2)
    ...     cache("sums", lambda w, rows: rows @ w, np.ones(2, np.float32), x)
    array([1., 5., 9.], dtype=float32)
    """

    def __init__(self, folder: StrPath, *, rows: int = 256):
        """Of a folder, which is made where a first file is written.

        Args:
          folder: of the files; any of them may be removed.
          rows: of the data that the network runs on at once, >= 1.
        Raises:
          ConfigError: no rows.
        """
        at_least(1, rows=rows)
        self.folder, self.rows = Path(folder), rows

    def __call__(
        self, name: str, compute: Callable[[M, Any], jax.Array], model: M, data: PyTree
    ) -> Shaped[np.ndarray, "n ..."]:
        """compute(model, data), from its file where there is one.

        Args:
          name: of what `compute` does. It is a part of the key and the function is not: give
            another name for another function.
          compute: of (model, rows of the data) the features of these rows, [rows, ...]; compiled.
          model: any pytree of arrays, keys and Python scalars.
          data: any pytree of arrays with an equal leading axis of n >= 1 rows.
        Returns:
          features, [n, ...], of the dtype that `compute` gives.
        Raises:
          ConfigError: data without rows, or features that are not one for each row.
          FormatError: a leaf is nothing that has bytes; it is named.
        Warns:
          UserWarning: the file is damaged; features are computed and it is written anew.
        """
        sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
        if len(sizes) != 1 or sizes & {(), (0,)}:
            raise ConfigError(f"data need one leading axis of n >= 1 rows; found {sorted(sizes)}")
        path = self.path(name, model, data)
        try:
            return read(path)
        except FileNotFoundError:
            pass
        except FormatError as error:
            warnings.warn(f"{error}; its features are computed anew", stacklevel=2)
        (n,) = sizes.pop()
        run, parts = jax.jit(compute), []
        for start in range(0, n, self.rows):
            part = jax.tree.map(lambda leaf, at=start: leaf[at : at + self.rows], data)
            parts.append(np.asarray(run(model, part)))
            wanted = min(self.rows, n - start)
            if parts[-1].shape[:1] != (wanted,):
                raise ConfigError(f"compute gave {parts[-1].shape} for {wanted} rows of data")
        features = np.concatenate(parts)
        write(path, features)
        return features

    def path(self, name: str, model: PyTree, data: PyTree) -> Path:
        """The file of features: its name is the SHA-256 of name, model and data.

        Of trees count structure, static fields, and of every leaf path, dtype, shape and bytes.
        """
        total = hashlib.sha256(json.dumps(name).encode())
        for tree in (model, data):
            total.update(json.dumps(structure.describe(tree), sort_keys=True).encode() + b"\n")
            for leaf in jax.tree.leaves(tree):
                if not isinstance(leaf, bool | int | float | complex | str):
                    array = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
                    total.update(np.ascontiguousarray(array).data.cast("B"))
        return self.folder / f"{total.hexdigest()}.npz"


def write(path: Path, features: np.ndarray) -> None:
    """Writes features with a description of them, atomically."""
    raw = np.ascontiguousarray(features).view(raw_dtype(features.dtype))
    about = {
        "dtype": features.dtype.name,
        "shape": list(features.shape),
        "sha256": hashlib.sha256(raw.tobytes()).hexdigest(),
    }
    members = {ABOUT: np.frombuffer(json.dumps(about).encode(), np.uint8), FEATURES: raw}
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, **members)


def read(path: Path) -> np.ndarray:
    """Features as they were written.

    Raises:
      FormatError: the file is damaged.
      FileNotFoundError: there is none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            content = read_member(archive, ABOUT, (None,), np.dtype(np.uint8))
            shape, dtype, wanted = described(parse_json(content.tobytes(), str(path)))
            size = math.prod(shape) * dtype.itemsize
            if size > path.stat().st_size:  # before memory is taken: files are not compressed
                raise ValueError(f"it says {size} bytes of features")
            raw = read_member(archive, FEATURES, shape, raw_dtype(dtype))
    except READ_ERRORS as error:
        if isinstance(error, FormatError | FileNotFoundError):
            raise
        raise FormatError(f"{path} cannot be read: {first_line(error)}") from None
    if hashlib.sha256(raw.tobytes()).hexdigest() != wanted:
        raise FormatError(f"{path} does not hold the features that were written")
    return raw.view(dtype)


def described(about: Any) -> tuple[tuple[int, ...], np.dtype, str]:
    """Shape, dtype and sum of features, from what a file says of them."""
    shape, name, total = (about[field] for field in ("shape", "dtype", "sha256"))
    known = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not known or not 1 <= len(shape) <= MOST_AXES or not isinstance(name, str):
        raise ValueError(f"features of shape {shape} and dtype {name}")
    dtype = jax.numpy.dtype(name)
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError(f"features of dtype {name}")
    return tuple(shape), dtype, total
