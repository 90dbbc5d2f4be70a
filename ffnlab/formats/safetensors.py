"""A safetensors reader that trusts nothing, and a writer that leaves nothing half-written.

Format: `u64 little-endian n | n bytes of JSON header | data`. The header maps a tensor name to
`{"dtype", "shape", "data_offsets": [start, stop]}` and `__metadata__` to a map of strings. The
tensors tile the data without gap or overlap.

Everything a header says is checked against the size of the file before a byte of data is read, so
a lying header costs no more memory than its own length. Tensors are read, not mapped: a mapped
page counts as resident (streaming a checkpoint through a map doubles the peak), and a file that
shrinks under a map ends the process.

What differs from the `safetensors` package: the header may have at most `JSON_LIMIT` bytes
(theirs: 100 MB; parsed JSON takes some twenty times its text), duplicate keys and `NaN` are
refused, fp8 tensors can be read (theirs writes but cannot read them through numpy), and rows can
be read alone.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from ffnlab.errors import FormatError
from ffnlab.formats.untrusted import JSON_LIMIT, file_size, inside, is_count, quoted, read_json
from ffnlab.storage.files import atomic_write, parse_json, write_json

RANK_LIMIT = 16
BYTES_LIMIT = 2**47  # of one tensor: the user address space of a 64-bit machine
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MODEL_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `(stop - start) == prod(shape) * dtype.itemsize`.

    Attributes:
      name: the key in the header.
      dtype: numpy dtype (bfloat16 and fp8 from ml_dtypes).
      shape: as stored, `[out, in]` for a Hugging Face matrix.
      file: the file that holds it.
      start: first byte, counted from the beginning of the file.
      stop: one past the last byte.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and checks the header of one safetensors file.

    Returns:
      The tensors by name, in the order of the header, and the metadata.
    Raises:
      FormatError: whatever is wrong, naming the file and, where there is one, the tensor.
    """
    size = file_size(file)
    with open(file, "rb") as handle:
        head = handle.read(8)
        if len(head) < 8:
            raise FormatError(f"{file}: {size} bytes; a safetensors file has at least 8")
        length = int.from_bytes(head, "little")
        if length > min(size - 8, JSON_LIMIT):
            raise FormatError(
                f"{file}: the header claims {length} bytes, the file has {size - 8} after the "
                f"length, and at most {JSON_LIMIT} are read"
            )
        text = handle.read(length)
    if len(text) != length or not text.startswith(b"{"):
        raise FormatError(f"{file}: the header does not begin with {{; not a safetensors file")
    header = parse_json(text, str(file))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{file}: __metadata__ must map strings to strings")
    infos = {name: _info(name, entry, file, 8 + length) for name, entry in header.items()}
    _check_tiling(infos, file, 8 + length, size)
    return infos, metadata


def is_shape(value: object) -> bool:
    """Whether what was read is the shape of a tensor."""
    return isinstance(value, list) and len(value) <= RANK_LIMIT and all(map(is_count, value))


def _info(name: str, entry: object, file: Path, base: int) -> TensorInfo:
    where = f"{file}: tensor {quoted(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{where}: dtype {quoted(dtype)}; known: {', '.join(DTYPES)}")
    if not is_shape(shape):
        raise FormatError(
            f"{where}: shape {quoted(shape)}; a list of at most {RANK_LIMIT} counts is accepted"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise FormatError(f"{where}: data_offsets {quoted(offsets)} are not two counts")
    start, stop = offsets
    itemsize = DTYPES[dtype].itemsize
    if math.prod(max(side, 1) for side in shape) * itemsize > BYTES_LIMIT:
        raise FormatError(f"{where}: shape {quoted(shape)} does not fit any memory")
    if stop - start != math.prod(shape) * itemsize:
        raise FormatError(
            f"{where}: {stop - start} bytes between its offsets, but shape {quoted(shape)} of "
            f"{dtype} takes {math.prod(shape) * itemsize}"
        )
    return TensorInfo(name, DTYPES[dtype], tuple(shape), file, base + start, base + stop)


def _check_tiling(infos: Mapping[str, TensorInfo], file: Path, base: int, size: int) -> None:
    position = base
    for info in sorted(infos.values(), key=lambda info: (info.start, info.stop)):
        if info.stop > size:
            raise FormatError(
                f"{file}: tensor {quoted(info.name)} ends at byte {info.stop}, the file at {size}; "
                "the file is truncated or its header lies"
            )
        if info.start != position:
            kind = "overlaps the one before it" if info.start < position else "leaves a gap"
            raise FormatError(
                f"{file}: tensor {quoted(info.name)} {kind}: it starts at byte {info.start}, "
                f"{position} is expected"
            )
        position = info.stop
    if position != size:
        raise FormatError(f"{file}: {size - position} bytes after the last tensor")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one file or of a directory of shards; opened, checked, nothing read yet.

    Attributes:
      origin: the directory or file, for messages.
      tensors: `TensorInfo` by name.
    """

    origin: Path
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """Reads one tensor, or some of its rows, into a fresh array.

        Args:
          name: a key of `tensors`.
          rows: first and one past the last index along axis 0; None reads all.
        Returns:
          A writable array of the stored dtype; shape as stored, or `[rows, ...]`.
        Raises:
          FormatError: no such tensor, or the file became shorter since it was checked.
          ValueError: `rows` outside the tensor.
        """
        if name not in self.tensors:
            raise FormatError(f"{self.origin}: there is no tensor {quoted(name)}")
        info = self.tensors[name]
        start, shape = info.start, info.shape
        if rows is not None:
            if not shape or not 0 <= rows[0] <= rows[1] <= shape[0]:
                raise ValueError(f"rows={rows} outside tensor {name} of shape {shape}")
            start += rows[0] * math.prod(shape[1:]) * info.dtype.itemsize
            shape = (rows[1] - rows[0], *shape[1:])
        raw = np.empty(math.prod(shape) * info.dtype.itemsize, np.uint8)
        with open(info.file, "rb", buffering=0) as handle:
            handle.seek(start)
            _fill(handle, raw, info)
        if info.dtype == np.bool_:
            return (raw != 0).reshape(shape)
        return raw.view(info.dtype).reshape(shape)


def _fill(handle, raw: np.ndarray, info: TensorInfo) -> None:
    view, done = memoryview(raw), 0
    while done < len(view):
        count = handle.readinto(view[done:])
        if not count:
            raise FormatError(f"{info.file}: tensor {quoted(info.name)} ends early; truncated?")
        done += count


def open_file(file: str | Path) -> Checkpoint:
    """Opens one safetensors file.

    Raises:
      FormatError: see `read_header`.
    """
    file = Path(file)
    return Checkpoint(file, read_header(file)[0])


def open_directory(directory: str | Path, spare: Callable[[str], bool] | None = None) -> Checkpoint:
    """Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Args:
      directory: of the checkpoint.
      spare: whether the index may list a tensor of this name that its shard lacks; none when None.
    Raises:
      FormatError: neither is there, an entry leaves the directory, a shard is missing or bad, or
        index and shards disagree about what is where.
    """
    directory = Path(directory)
    if (directory / SINGLE_FILE).exists():
        return Checkpoint(directory, read_header(inside(directory, SINGLE_FILE))[0])
    if not (directory / INDEX_FILE).exists():
        raise FormatError(
            f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there"
            + (" (pickled weights are never read)" if list(directory.glob("*.bin")) else "")
        )
    index_file = inside(directory, INDEX_FILE)
    index = read_json(index_file)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        raise FormatError(f"{index_file}: weight_map must map tensor names to file names")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(where.values())):
        found, _ = read_header(inside(directory, shard))
        listed = {name for name, file in where.items() if file == shard}
        for name in sorted(listed.symmetric_difference(found)):
            if name in listed and spare is not None and spare(name):
                continue
            side = "lists it, the shard lacks it" if name in listed else "does not list it"
            raise FormatError(f"{directory / shard}: tensor {quoted(name)}: the index {side}")
        tensors |= found
    return Checkpoint(directory, tensors)


@dataclass(frozen=True)
class Entry:
    """A tensor to write: known at once what it is, made only when its turn comes.

    Attributes:
      dtype: numpy dtype, one of `DTYPES`.
      shape: as it will be stored.
      make: returns the array of that dtype and shape.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def entry(array: np.ndarray) -> Entry:
    """An `Entry` for an array that is already there, of any shape and known dtype."""
    return Entry(array.dtype, array.shape, lambda: array)


def write_file(file: str | Path, entries: Mapping[str, Entry]) -> None:
    """Writes one safetensors file under a temporary name and renames it.

    Args:
      file: what to write; an existing file is replaced.
      entries: tensors by name. Made, written and dropped one at a time.
    Raises:
      FormatError: a dtype the format does not have, or `make` returned something else than it said.
    """
    file = Path(file)
    order = sorted(entries, key=lambda name: -entries[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        item = entries[name]
        if item.dtype not in _NAMES:
            raise FormatError(f"{file}: tensor {quoted(name)}: {item.dtype} cannot be stored")
        header[name] = {
            "dtype": _NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [position, position + item.nbytes],
        }
        position += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(file) as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            handle.write(_bytes(name, entries[name], file))


def _bytes(name: str, item: Entry, file: Path) -> memoryview:
    array = np.ascontiguousarray(item.make())
    if array.dtype != item.dtype or array.size != math.prod(item.shape):
        raise FormatError(
            f"{file}: tensor {quoted(name)} was announced as {item.dtype}{list(item.shape)} and "
            f"came as {array.dtype}{list(array.shape)}"
        )
    return memoryview(array.reshape(-1).view(np.uint8))


def shards(entries: Mapping[str, Entry], max_shard_bytes: int) -> list[list[str]]:
    """Groups names, in order, so that a group is at most `max_shard_bytes` (or one tensor)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, item in entries.items():
        if groups[-1] and filled + item.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += item.nbytes
    return groups


def write_directory(
    directory: str | Path, entries: Mapping[str, Entry], *, max_shard_bytes: int = 5 * 10**9
) -> list[str]:
    """Writes `model.safetensors`, or shards and their index when it would be too large.

    Files of an earlier checkpoint in the same directory that would be read instead are removed.

    Args:
      directory: must exist.
      entries: tensors by name.
      max_shard_bytes: data bytes of one file, >= 1; a larger tensor has a file of its own.
    Returns:
      The names of the files written.
    Raises:
      FormatError: see `write_file`.
    """
    directory = Path(directory)
    groups = shards(entries, max_shard_bytes)
    if len(groups) == 1:
        written = [SINGLE_FILE]
        write_file(directory / SINGLE_FILE, entries)
    else:
        names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
        for file, group in zip(names, groups, strict=True):
            write_file(directory / file, {name: entries[name] for name in group})
        written = [*names, INDEX_FILE]
        _write_index(directory, names, groups, sum(item.nbytes for item in entries.values()))
    for file in directory.iterdir():
        if MODEL_FILES.fullmatch(file.name) and file.name not in written:
            file.unlink()
    return written


def _write_index(directory: Path, names: list[str], groups: list[list[str]], total: int) -> None:
    where = {name: file for file, group in zip(names, groups, strict=True) for name in group}
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})
