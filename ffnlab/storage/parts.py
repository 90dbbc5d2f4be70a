"""Trees in parts: what one process holds of a tree, in a folder of its own.

Nothing here waits for another process: each writes the pieces of arrays that its devices hold, and
what is restored may come from any parts that together have what a process needs.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import jax
import numpy as np

from ffnlab.errors import DamagedError
from ffnlab.storage import structure
from ffnlab.storage.files import (
    StrPath,
    as_json,
    atomic_write,
    readable_sum,
    sealed,
    write_json,
)
from ffnlab.storage.leaves import fixed_sharding, is_key, key_impl, rebuild_leaf, stored_as
from ffnlab.storage.trees import FORMAT, SIDECAR, read_sidecar, storable

__all__ = ["Part", "begin_part", "covers", "read_part", "restore_parts"]

T = TypeVar("T")
PIECES = "pieces.bin"


class Piece(NamedTuple):
    """A rectangle of an array.

    Attributes:
      start: of each axis.
      shape: of the rectangle.
      offset: of its bytes in the file.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int


class Part(NamedTuple):
    """A part that was written to its end.

    Attributes:
      folder: of it.
      about: what `begin_part` was told.
      tree: description of the whole tree (`ffnlab.storage.structure`).
      pieces: of each leaf's array; none of Python scalars.
      sha256: of the pieces' file.
    """

    folder: Path
    about: dict[str, Any]
    tree: dict[str, Any]
    pieces: Sequence[Sequence[Piece]]
    sha256: str


def begin_part(folder: StrPath, tree: object, about: Mapping[str, Any]) -> Callable[[], None]:
    """Copies what this process holds of a tree to the host, and returns what writes it.

    Args:
      folder: of this part alone; made when missing.
      tree: see `ffnlab.storage.trees.save`.
      about: JSON values to keep.
    Returns:
      () -> None: writes the part; may be called in another thread. Renaming the sidecar into place
      is what makes it a part, so that one cut off is none.
    Raises:
      FormatError: a leaf cannot be stored; the message has its path.
      OSError: by what is returned: the files could not be written.
    """
    root, description = Path(folder), structure.describe(tree)
    arrays = storable(tree, description, str(root))
    held = {int(i): list(pieces_held(array)) for i, array in arrays.items()}

    def write() -> None:
        root.mkdir(parents=True, exist_ok=True)
        with atomic_write(root / PIECES) as file:
            placed, digest = written(file, held)
        each = [placed.get(i, []) for i in range(len(description["leaves"]))]
        content = {"format": FORMAT, "about": as_json(about), "tree": description, "pieces": each}
        write_json(root / SIDECAR, sealed(content | {"bytes": digest}))

    return write


def pieces_held(array: jax.Array | np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """(start, values) of the pieces of an array that this process holds, each once."""
    if not isinstance(array, jax.Array):
        yield (0,) * array.ndim, np.asarray(array)
        return
    seen = set()
    for shard in array.addressable_shards:
        start = starts(shard.index)
        if start not in seen:
            seen.add(start)
            yield start, np.asarray(shard.data)


def starts(index: Sequence[slice]) -> tuple[int, ...]:
    """Where a rectangle begins."""
    return tuple(each.start or 0 for each in index)


def written(
    file: IO[bytes], held: Mapping[int, Sequence[tuple[tuple[int, ...], np.ndarray]]]
) -> tuple[dict[int, list[Piece]], str]:
    """Writes pieces one after the other; (where each is by leaf, SHA-256 of all)."""
    found: dict[int, list[Piece]] = {}
    digest, offset = hashlib.sha256(), 0
    for i, pieces in held.items():
        for start, values in pieces:
            content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            found.setdefault(i, []).append(Piece(start, values.shape, offset))
            file.write(content.data)
            digest.update(content.data)
            offset += content.size
    return found, digest.hexdigest()


def read_part(folder: StrPath) -> Part:
    """What is in a part; its pieces are not read.

    Raises:
      DamagedError: none was written to its end there, or its sidecar is not the one written.
      FormatError: it is of another version.
    """
    root = Path(folder)
    saved = read_sidecar(root)
    try:
        each = [[Piece(*map(as_tuple, piece)) for piece in leaf] for leaf in saved["pieces"]]
        return Part(root, dict(saved["about"]), dict(saved["tree"]), each, str(saved["bytes"]))
    except (KeyError, TypeError, ValueError):
        raise DamagedError(f"{root / SIDECAR} does not describe a part of a tree") from None


def as_tuple(value: Any) -> Any:
    """A list of JSON as a tuple of integers, a number as an integer."""
    return tuple(int(x) for x in value) if isinstance(value, list) else int(value)


def covers(parts: Sequence[Part], like: object) -> bool:
    """Whether parts hold all that this process needs of a tree.

    Args:
      parts: of one saving; pieces of different ones are the same or do not overlap.
      like: see `ffnlab.storage.trees.restore`.
    """
    leaves = jax.tree.leaves(like)
    return all(
        sum(volume(overlap(piece, need)) for piece in pieces_of(parts, i)) == volume(need)
        for i, leaf in enumerate(leaves)
        for need in needs(leaf)
    )


def pieces_of(parts: Sequence[Part], leaf: int) -> dict[Piece, Part]:
    """The different pieces of a leaf, each with a part that holds it."""
    found = {piece[:2]: (piece, part) for part in parts for piece in part.pieces[leaf]}
    return dict(found.values())


def needs(leaf: Any) -> list[Piece]:
    """The rectangles of a leaf that this process needs; none of a Python scalar."""
    if isinstance(leaf, bool | int | float | complex | str):
        return []
    shape, _ = stored_as(leaf)
    whole = Piece((0,) * len(shape), shape, 0)
    sharding = fixed_sharding(leaf)
    if sharding is None:
        return [whole]
    found = {rectangle(i, shape) for i in sharding.addressable_devices_indices_map(shape).values()}
    return sorted(found)


def rectangle(index: Sequence[slice] | None, shape: Sequence[int]) -> Piece:
    """The rectangle of an index of slices; axes without one are whole."""
    given = [each.indices(size)[:2] for each, size in zip(index or (), shape, strict=False)]
    ranges = [*given, *((0, size) for size in shape[len(given) :])]
    return Piece(tuple(a for a, _ in ranges), tuple(b - a for a, b in ranges), 0)


def overlap(one: Piece, other: Piece) -> Piece:
    """What two rectangles have in common; of no length along an axis where that is nothing."""
    start = tuple(map(max, one.start, other.start))
    ends = (min(a + n, b + m) for a, n, b, m in zip(*one[:2], *other[:2], strict=True))
    return Piece(start, tuple(max(e - s, 0) for s, e in zip(start, ends, strict=True)), 0)


def volume(piece: Piece) -> int:
    """Entries of a rectangle."""
    return math.prod(piece.shape)


def restore_parts(parts: Sequence[Part], like: T) -> T:
    """A tree from parts that cover it.

    Args:
      parts, like: as `covers`, which said yes.
    Returns:
      a new tree, placed as `like` says.
    Raises:
      DamagedError: a file is not the one that was written.
      FormatError: the tree is not that of `like`.
    """
    description = structure.describe(like)
    for part in parts:
        structure.check(part.tree, description, str(part.folder))
        if readable_sum(part.folder / PIECES) != part.sha256:
            raise DamagedError(f"{part.folder / PIECES} is not the file that was written")
    leaves, treedef = jax.tree.flatten(like)
    entries = parts[0].tree["leaves"]
    each = [
        restored_leaf(leaf, entry, pieces_of(parts, i), str(parts[0].folder))
        for i, (leaf, entry) in enumerate(zip(leaves, entries, strict=True))
    ]
    return jax.tree.unflatten(treedef, each)


def restored_leaf(like: Any, entry: dict, pieces: Mapping[Piece, Part], source: str) -> Any:
    """One leaf from its pieces, of the kind that stands in `like`."""
    sharding = fixed_sharding(like)
    if "python" in entry:
        return rebuild_leaf(like, entry, None, source)
    shape, dtype = stored_as(like)
    if sharding is None:
        whole = assembled(Piece((0,) * len(shape), shape, 0), pieces, dtype)
        return rebuild_leaf(like, entry, whole, source)
    value = jax.make_array_from_callback(
        shape, sharding, lambda index: assembled(rectangle(index, shape), pieces, dtype)
    )
    return jax.random.wrap_key_data(value, impl=key_impl(like.dtype)) if is_key(like) else value


def assembled(need: Piece, pieces: Mapping[Piece, Part], dtype: np.dtype) -> np.ndarray:
    """The values of a rectangle."""
    out = np.empty(need.shape, dtype)
    for piece, part in pieces.items():
        common = overlap(piece, need)
        if volume(common):
            count = volume(piece) * dtype.itemsize
            raw = np.fromfile(part.folder / PIECES, np.uint8, count, offset=piece.offset)
            values = raw.view(dtype).reshape(piece.shape)
            out[inside(common, need)] = values[inside(common, piece)]
    return out


def inside(common: Piece, whole: Piece) -> tuple[slice, ...]:
    """A rectangle as slices of one that contains it."""
    return tuple(
        slice(a - b, a - b + n)
        for a, b, n in zip(common.start, whole.start, common.shape, strict=True)
    )
