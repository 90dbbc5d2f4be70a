"""Trees in files: any pytree through orbax, a small one as a single npz, both with their structure.

Orbax stores no static fields (group sizes, formats) and casts dtypes silently, so the structure is
written beside the arrays (`ffnlab.sidecar`) and compared before an array is read. Nothing is ever
unpickled. The atomic writers and the strict JSON of `ffnlab.files` are re-exported here.
"""

import json
import math
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from ffnlab import placing, sidecar
from ffnlab.errors import DamagedError, FormatError
from ffnlab.files import (
    JSON_LIMIT,
    StrPath,
    atomic_dir,
    atomic_write,
    checksums,
    parse_json,
    read_json,
    verify,
    write_json,
)

__all__ = [
    "atomic_dir",
    "atomic_write",
    "begin_save",
    "load_stats",
    "read_json",
    "restore",
    "save",
    "save_stats",
    "write_json",
]

T = TypeVar("T")
SIDECAR = "tree.json"
# What the array store refuses.
UNSTORABLE = frozenset({"uint4", "uint2", "int2"})

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


def save(folder: StrPath, tree: object) -> None:
    """Saves any pytree: arrays through orbax, structure and static fields in a JSON sidecar.

    A later save to the same folder writes its arrays beside the earlier ones; renaming the new
    sidecar into place is what makes it the saved tree, so an interrupted save changes nothing. The
    sidecar has the SHA-256 of every file of the arrays.
    On several hosts every process calls it, and process 0 writes the sidecar.

    Args:
      folder: where to; made when missing.
      tree: NNX modules, dataclasses, NamedTuples, dicts, …; leaves are arrays of any dtype jax has
        but uint4, typed random keys, or Python scalars.
    Raises:
      FormatError: a leaf cannot be stored; the message has its path.
      OSError: the files could not be written.
    """
    begin_save(folder, tree)()


def begin_save(folder: StrPath, tree: object) -> Callable[[], None]:
    """Begins `save`, and returns what ends it; orbax writes the arrays meanwhile.

    Until the end is called nothing is saved. The tree's arrays may be donated or changed at once:
    they have been copied to the host, or on a CPU are held by a view, which donation spares.
    Arguments and errors as `save`, those of writing at either end.

    Returns:
      () -> None: waits until the arrays are written, and then writes their sums and the sidecar;
      may be called in another thread.
    """
    import orbax.checkpoint as ocp

    root = Path(folder).absolute()
    description = sidecar.describe(tree)
    arrays = storable(tree, description, str(root))
    name = f"arrays-{last_number(root) + 1}"
    root.mkdir(parents=True, exist_ok=True)
    checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
    if arrays:
        with save_errors(root):
            checkpointer.save(root / name, arrays, force=True)

    def end() -> None:
        with save_errors(root):
            checkpointer.wait_until_finished()
        checkpointer.close()
        if jax.process_index() == 0:
            files = checksums(root / name)
            write_json(root / SIDECAR, description | {"arrays": name, "files": files})
            for other in root.glob("arrays-*"):
                if other.name != name:
                    shutil.rmtree(other, ignore_errors=True)

    return end


@contextmanager
def save_errors(root: Path) -> Iterator[None]:
    """Turns what orbax raises into one line."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise OSError(f"{root}: could not save: {first_line(error)}") from None


def storable(tree: object, description: dict, source: str) -> dict[str, Any]:
    """The arrays that orbax gets, named by leaf number; keys as their data, empty ones left out."""
    arrays: dict[str, Any] = {}
    for i, (leaf, entry) in enumerate(
        zip(jax.tree.leaves(tree), description["leaves"], strict=True)
    ):
        if "python" in entry or 0 in entry["shape"]:
            continue
        if entry["dtype"] in UNSTORABLE:
            raise FormatError(
                f"{source}: {entry['path']} is {entry['dtype']}, which the array store refuses; "
                "store int4 or uint8"
            )
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise FormatError(f"{source}: {entry['path']} is abstract and holds no values to save")
        leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
        arrays[str(i)] = leaf if isinstance(leaf, jax.Array) else np.array(leaf)
    return arrays


def last_number(root: Path) -> int:
    """The number of the arrays folder that the sidecar names, 0 without one."""
    try:
        return arrays_number(read_json(root / SIDECAR), str(root))
    except (FileNotFoundError, FormatError):
        return 0


def arrays_number(description: Any, source: str) -> int:
    """Checks the name of the arrays folder, which must not lead elsewhere."""
    name = description.get("arrays") if isinstance(description, dict) else None
    found = re.fullmatch(r"arrays-([0-9]{1,9})", name) if isinstance(name, str) else None
    if found is None:
        raise FormatError(f"{source}: 'arrays' is {name!r}, not the name of an arrays folder")
    return int(found[1])


def restore(folder: StrPath, like: T) -> T:
    """Restores a tree that `save` wrote, into the structure and shardings of `like`.

    Args:
      folder: what `save` was given.
      like: a tree of the same structure, static fields, shapes and dtypes; its leaves are arrays
        or `jax.ShapeDtypeStruct` (from `jax.eval_shape`). An array goes to the sharding of its
        place in `like`, to NumPy where `like` has NumPy, else to the default device. Of several
        processes all call this, and each checks its part of the files.
    Returns:
      a new tree of the type of `like`.
    Raises:
      DamagedError: no checkpoint there, or its files are not those that were written.
      FormatError: one of another tree; the differences are listed by path, and no array has been
        read.
    """
    import orbax.checkpoint as ocp

    root = Path(folder).absolute()
    saved = read_sidecar(root)
    description = sidecar.describe(like)
    sidecar.check(saved, description, str(root))
    name = f"arrays-{arrays_number(saved, str(root))}"
    leaves, treedef = jax.tree.flatten(like)
    wanted = {
        str(i): abstract(leaf)
        for i, (leaf, entry) in enumerate(zip(leaves, saved["leaves"], strict=True))
        if "python" not in entry and 0 not in entry["shape"]
    }
    arrays: dict[str, Any] = {}
    verify_together(root / name, saved.get("files"))
    if wanted:
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                arrays = checkpointer.restore(root / name, wanted)
        except (ValueError, TypeError, RuntimeError, KeyError, OSError) as error:
            raise DamagedError(f"{root / name} cannot be read: {first_line(error)}") from None
    restored = [
        rebuild_leaf(leaf, entry, arrays.get(str(i)), str(root))
        for i, (leaf, entry) in enumerate(zip(leaves, saved["leaves"], strict=True))
    ]
    return jax.tree.unflatten(treedef, restored)


def verify_together(folder: Path, files: object) -> None:
    """`verify`, of which each process reads its part; where one fails, all raise DamagedError."""
    count, found = jax.process_count(), None
    try:
        verify(folder, files, (jax.process_index(), count))
    except DamagedError as error:
        found = error
    if count > 1:
        from jax.experimental import multihost_utils

        failed = multihost_utils.process_allgather(np.array(found is not None))
        if found is None and failed.any():
            found = DamagedError(f"{folder}: process {failed.argmax()} found a damaged file there")
    if found is not None:
        raise found


def read_sidecar(root: Path) -> Any:
    """The sidecar of a checkpoint folder."""
    try:
        return read_json(root / SIDECAR)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{root} is not a checkpoint: it has no {SIDECAR}") from None
    except FormatError as error:
        raise DamagedError(str(error)) from None


def abstract(leaf: Any) -> Any:
    """What orbax is asked for in place of a leaf: NumPy unless `like` fixes a sharding."""
    if fixed_sharding(leaf) is not None and not is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    shape, dtype = stored_as(leaf)
    # An array of the right shape that takes no memory: all its strides are zero.
    return np.broadcast_to(np.zeros((), dtype), shape)


def fixed_sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """The sharding a leaf of `like` asks for; None where the default device will do."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def rebuild_leaf(like: Any, entry: dict, value: Any, source: str) -> Any:
    """One restored leaf, of the kind that stands in `like`."""
    if "python" in entry:
        return python_scalar(type(like), entry.get("value"), f"{source}: {entry['path']}")
    shape, dtype = stored_as(like)
    value = np.zeros(shape, dtype) if value is None else value
    if isinstance(like, np.ndarray):
        return np.asarray(value)
    if isinstance(like, np.generic):
        return np.asarray(value)[()]
    value = jax.numpy.asarray(value)
    if is_key(like):
        value = jax.random.wrap_key_data(value, impl=key_impl(like.dtype))
    sharding = fixed_sharding(like)
    return value if sharding is None else placing.put(value, sharding)


def stored_as(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of the array that stands for a leaf in a file; a key's are its data's."""
    if is_key(leaf):
        key = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        leaf = jax.eval_shape(jax.random.key_data, key)
    return tuple(leaf.shape), np.dtype(leaf.dtype)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed random key, concrete or abstract."""
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_impl(dtype: Any) -> str:
    """The generator's name for a key dtype, which abstract keys do not tell."""
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(lambda name=name: jax.random.key(0, impl=name)).dtype == dtype:
            return name
    raise FormatError(f"random keys of dtype {dtype} are not of a generator that jax ships")


def python_scalar(kind: type, value: object, source: str) -> Any:
    """A Python scalar from its sidecar entry: floats and complex numbers are stored as repr."""
    try:
        if kind in (bool, int, str):
            if type(value) is not kind:
                raise ValueError(f"{value!r} is not of type {kind.__name__}")
            return value
        return kind(str(value))
    except ValueError as error:
        raise FormatError(f"{source}: {error}") from None


def first_line(error: BaseException) -> str:
    """The first line of a message that may run over pages."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def save_stats(path: StrPath, stats: object) -> None:
    """Saves a small pytree of arrays as one npz file, atomically.

    Args:
      path: the file to write.
      stats: NamedTuples, dicts or lists of arrays, keys and Python scalars that fit in memory.
    Raises:
      FormatError: a leaf cannot be stored; the message has its path.
    """
    description = sidecar.describe(stats)
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
            content = read_member(archive, SIDECAR_MEMBER, None, np.dtype(np.uint8))
            saved = parse_json(content.tobytes(), str(path))
            sidecar.check(saved, sidecar.describe(like), str(path))
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
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...] | None, dtype: np.dtype
) -> np.ndarray:
    """Reads one npy member whose header must say what is expected, before memory is taken.

    Args:
      archive: the open npz.
      name: the member, without ".npy".
      shape: the shape it must have; None: one dimension, of at most JSON_LIMIT bytes.
      dtype: the dtype it must have.
    """
    with archive.open(f"{name}.npy") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name}.npy has another npy version than 1.0")
        found, fortran, found_dtype = np.lib.format.read_array_header_1_0(file)
        fits = (
            found == shape if shape is not None else len(found) == 1 and 0 <= found[0] <= JSON_LIMIT
        )
        if not fits or found_dtype != dtype:
            raise ValueError(f"{name}.npy has {found_dtype}{list(found)}, not {dtype}{shape}")
        size = math.prod(found) * dtype.itemsize
        content = file.read(size + 1)
    if len(content) != size:
        raise ValueError(f"{name}.npy does not have the {size} bytes its header promises")
    array = np.frombuffer(content, dtype).reshape(found, order="F" if fortran else "C")
    return array.copy(order="C")
