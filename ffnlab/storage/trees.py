"""Trees in files: any pytree, its arrays through orbax and its structure as JSON beside them.

Orbax stores no static fields (group sizes, formats) and casts dtypes silently, so the structure is
written beside the arrays (`ffnlab.storage.structure`) and compared before an array is read. Nothing
is ever unpickled.
"""

import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import numpy as np

from ffnlab.errors import DamagedError, FormatError, first_line
from ffnlab.storage import structure
from ffnlab.storage.files import (
    StrPath,
    as_json,
    checksums,
    read_json,
    sealed,
    unsealed,
    verify,
    write_json,
)
from ffnlab.storage.leaves import abstract, is_key, rebuild_leaf

__all__ = ["begin_save", "restore", "restore_about", "save"]

T = TypeVar("T")
SIDECAR = "tree.json"
ARRAYS = r"arrays-([0-9]{1,9})"
FORMAT = 2  # of the sidecar; 1 had no sum of its own
# What the array store refuses.
UNSTORABLE = frozenset({"uint4", "uint2", "int2"})


def save(folder: StrPath, tree: object) -> None:
    """Saves any pytree: arrays through orbax, structure and static fields in a JSON sidecar.

    A later save to the same folder writes its arrays beside the earlier ones; renaming the new
    sidecar into place is what makes it the saved tree, so an interrupted save changes nothing. The
    sidecar has the SHA-256 of every file of the arrays and of its own content. On several
    hosts every process calls it, and process 0 writes the sidecar.

    Args:
      folder: where to; made when missing.
      tree: NNX modules, dataclasses, NamedTuples, dicts, …; leaves are arrays of any dtype jax has
        but uint4, typed random keys, or Python scalars.
    Raises:
      FormatError: a leaf cannot be stored; the message has its path.
      OSError: the files could not be written.
    """
    begin_save(folder, tree)()


def begin_save(
    folder: StrPath, tree: object, about: Mapping[str, Any] | None = None
) -> Callable[[], None]:
    """Begins `save`, and returns what ends it; orbax writes the arrays meanwhile.

    Until the end is called nothing is saved. The tree's arrays may be donated or changed at once:
    they have been copied to the host, or on a CPU are held by a view, which donation spares.
    Arguments and errors as `save`, those of writing at either end.

    Args:
      folder, tree: as `save`.
      about: JSON values to keep in the sidecar, for `restore_about`.
    Returns:
      () -> None: waits until the arrays are written, and then writes their sums and the sidecar;
      may be called in another thread.
    """
    import orbax.checkpoint as ocp

    root = Path(folder).absolute()
    description = structure.describe(tree)
    arrays = storable(tree, description, str(root))
    name = f"arrays-{last_number(root) + 1}"
    content = {"format": FORMAT, "arrays": name, "about": as_json(about or {}), "tree": description}
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
            write_json(root / SIDECAR, sealed(content | {"files": files}))
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
        leaf = stored(leaf)
        arrays[str(i)] = leaf if isinstance(leaf, jax.Array) else np.array(leaf)
    return arrays


def stored(leaf: Any) -> Any:
    """The array that stands for a leaf in a file: itself, or the data of a key."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def last_number(root: Path) -> int:
    """The highest number of an arrays folder that is there or named by the sidecar, 0 without."""
    found = [re.fullmatch(ARRAYS, item.name) for item in root.glob("arrays-*")]
    numbers = [int(match[1]) for match in found if match]
    with suppress(FormatError):
        numbers.append(arrays_number(read_sidecar(root), str(root)))
    return max(numbers, default=0)


def arrays_number(description: Any, source: str) -> int:
    """Checks the name of the arrays folder, which must not lead elsewhere."""
    name = description.get("arrays") if isinstance(description, dict) else None
    found = re.fullmatch(ARRAYS, name) if isinstance(name, str) else None
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
      FormatError: one of another tree, of which the differences are listed by path, or of another
        version's format; no array has been read.
    """
    return restore_about(folder, like)[0]


def restore_about(
    folder: StrPath,
    like: T,
    accept: Callable[[dict[str, Any]], None] | None = None,
    absent: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[T, dict[str, Any]]:
    """`restore`, and what `begin_save` was told about the tree.

    Args:
      folder, like: as `restore`.
      accept: about -> None; asked before anything else is compared, it may raise.
      absent: leaves that an earlier version did not save, by path, and what they are where they
        are not in the file; they are copied.
    Returns:
      tree, about.
    """
    root = Path(folder).absolute()
    description = structure.describe(like)
    entries = description["leaves"]
    saved = together(root, lambda: whole(root, description, accept, absent))
    there = {entry["path"] for entry in saved["tree"]["leaves"]}
    leaves, treedef = jax.tree.flatten(like)
    filled = {
        i: rebuild_leaf(leaf, entry, np.array(stored(absent[entry["path"]])), str(root))
        for i, (leaf, entry) in enumerate(zip(leaves, entries, strict=True))
        if entry["path"] not in there
    }
    held = [leaf for i, leaf in enumerate(leaves) if i not in filled]
    pairs = list(zip(held, saved["tree"]["leaves"], strict=True))
    wanted = {
        str(i): abstract(leaf)
        for i, (leaf, entry) in enumerate(pairs)
        if "python" not in entry and 0 not in entry["shape"]
    }
    arrays = read_arrays(root / saved["arrays"], wanted) if wanted else {}
    restored = iter(
        rebuild_leaf(leaf, entry, arrays.get(str(i)), str(root))
        for i, (leaf, entry) in enumerate(pairs)
    )
    each = [filled[i] if i in filled else next(restored) for i in range(len(leaves))]
    return jax.tree.unflatten(treedef, each), saved["about"]


def whole(
    root: Path,
    description: dict,
    accept: Callable[[dict[str, Any]], None] | None,
    absent: Collection[str],
) -> dict[str, Any]:
    """The sidecar of a checkpoint folder that holds a tree as described, its files checked."""
    saved = read_sidecar(root)
    number = arrays_number(saved, str(root))
    if not isinstance(saved.get("about"), dict):
        raise FormatError(f"{root}: 'about' is {type(saved.get('about')).__name__}, not an object")
    if accept is not None:
        accept(saved["about"])
    structure.check(saved.get("tree"), description, str(root), absent)
    part = jax.process_index(), jax.process_count()
    verify(root / f"arrays-{number}", saved.get("files"), part)
    return saved


def together(root: Path, read: Callable[[], T]) -> T:
    """Reads in every process its part; where one finds damage, all raise DamagedError."""
    if jax.process_count() == 1:
        return read()
    from jax.experimental import multihost_utils

    result: list[T] = []
    problem: DamagedError | None = None
    try:
        result.append(read())
    except DamagedError as error:
        problem = error
    failed = multihost_utils.process_allgather(np.array(not result))
    if problem is not None:
        raise problem
    if failed.any():
        raise DamagedError(f"{root}: process {failed.argmax()} found a damaged file there")
    return result[0]


def read_arrays(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Arrays by leaf number, from orbax."""
    import orbax.checkpoint as ocp

    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            return checkpointer.restore(folder, wanted)
    except (ValueError, TypeError, RuntimeError, KeyError, OSError) as error:
        raise DamagedError(f"{folder} cannot be read: {first_line(error)}") from None


def read_sidecar(root: Path) -> dict[str, Any]:
    """The sidecar of a checkpoint folder, as it was written."""
    file = root / SIDECAR
    try:
        found = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{root} is not a checkpoint: it has no {SIDECAR}") from None
    except FormatError as error:
        raise DamagedError(str(error)) from None
    except OSError as error:
        raise DamagedError(f"{file} cannot be read: {error.strerror}") from None
    earlier = isinstance(found, dict) and found.get("format") == 1 and "sha256" not in found
    content = found if earlier else unsealed(found, str(file))
    if content.get("format") != FORMAT:
        raise FormatError(
            f"{file} is of format {content.get('format')!r}, and this version of ffnlab reads "
            f"{FORMAT}: go on with the version that wrote it, or begin anew"
        )
    return content
