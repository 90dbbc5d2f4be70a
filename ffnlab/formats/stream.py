"""One parameter from its file to its devices: read in pieces, turned, cast, placed.

The only memory that grows with the model is the parameter's own, in its target dtype: pieces of
about `PIECE` bytes are read and written straight into an aligned buffer that the CPU backend then
takes over without a copy; a sharded parameter is read shard by shard.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import ml_dtypes
import numpy as np

from ffnlab.errors import FormatError
from ffnlab.formats.safetensors import Checkpoint, TensorInfo
from ffnlab.formats.untrusted import quoted

PIECE = 4 * 1024 * 1024
TILE = 16  # columns written at a time when turning: 64 bytes of float32, one cache line
ALIGNMENT = 64  # what the CPU backend asks of a buffer to take it over
NOT_FINITE = "NaN or infinity"
Index = tuple[slice, ...]
Axes = tuple[str | None, ...]
Placement = (
    jax.sharding.Sharding | Callable[[str, Axes, tuple[int, ...]], jax.sharding.Sharding] | None
)


@dataclass(frozen=True)
class Stored:
    """A parameter, or a part of a fused tensor, as it lies in a checkpoint.

    Attributes:
      info: the tensor.
      first: its first row (axis 0 of the stored tensor).
      shape: logical shape, [in, out] for a matrix.
      transposed: stored as [out, in]; `first` counts in `out`.
      taps: of a convolution's kernel, stored as [out, in, *kernel] and transposed, all together; 0
        for no kernel.
      leading: axes of length 1 that are stored before these.
    """

    info: TensorInfo
    first: int
    shape: tuple[int, ...]
    transposed: bool
    taps: int = 0
    leading: int = 0


@dataclass(frozen=True)
class Stack:
    """Alike parameters on a new first axis, each a tensor of its own in the checkpoint.

    Attributes:
      parts: one or more, of one shape.
    """

    parts: tuple[Stored, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all together."""
        return (len(self.parts), *self.parts[0].shape)


def placement(
    sharding: Placement, path: str, axes: Axes, shape: tuple[int, ...]
) -> jax.sharding.Sharding | None:
    """Where one array goes: as all do, or as a function of it says."""
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return sharding
    return sharding(path, axes, shape)


def place(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
    read: Callable[[Index], np.ndarray],
) -> jax.Array:
    """An array on the default device, or sharded; only what this process holds is read.

    Args:
      shape: of the whole array.
      dtype: of the array.
      sharding: where it goes; None for the default device.
      read: gives the values at an index, as an array of that dtype.
    """
    if sharding is None:
        return jax.device_put(read(tuple(slice(None) for _ in shape)))
    return jax.make_array_from_callback(shape, sharding, read, dtype=dtype)


def reader(
    checkpoint: Checkpoint, stored: Stored | Stack, dtype: np.dtype, *, check_finite: bool
) -> Callable[[Index], np.ndarray]:
    """The function that reads any rectangle of a parameter.

    Args:
      checkpoint: where it is.
      stored: what it is.
      dtype: of the result.
      check_finite: whether NaN and infinity are errors, in the file or made by the cast.
    Returns:
      index -> array; it raises FormatError, naming file and tensor, for a value that is not finite.
    """

    def read(index: Index) -> np.ndarray:
        spans = [part.indices(side)[:2] for part, side in zip(index, stored.shape, strict=True)]
        out = aligned([stop - start for start, stop in spans], dtype)
        if isinstance(stored, Stack):
            for row, part in zip(out, stored.parts[slice(*spans[0])], strict=True):
                _fill(row, spans[1:], checkpoint, part, check_finite)
        else:
            _fill(out, spans, checkpoint, stored, check_finite)
        return out

    return read


def _fill(
    out: np.ndarray,
    spans: Sequence[tuple[int, int]],
    checkpoint: Checkpoint,
    stored: Stored,
    check_finite: bool,
) -> None:
    """Reads a rectangle of a tensor in pieces, straight into an array of its shape."""
    rows = spans[-1] if stored.transposed else spans[0]
    columns = spans[0] if stored.transposed else spans[-1]
    per_row = math.prod(stored.info.shape[1 + stored.leading :]) * stored.info.dtype.itemsize
    step = max(PIECE // max(per_row, 1) // TILE, 1) * TILE
    for start in range(*rows, step):
        stop = min(start + step, rows[1])
        piece = _rows(checkpoint, stored, stored.first + start, stored.first + stop)
        with np.errstate(over="ignore", invalid="ignore"):  # told below
            cast = piece.astype(out.dtype, copy=False)
        if check_finite and not is_finite(cast):
            what = f"numbers that {out.dtype} cannot hold" if is_finite(piece) else NOT_FINITE
            raise FormatError(f"{stored.info.file}: tensor {quoted(stored.info.name)} holds {what}")
        if stored.taps:  # [out, in, *kernel] as [out, taps * in], the order of our rows
            cast = np.moveaxis(cast, 1, -1).reshape(len(cast), -1)
        _store(out, cast, start - rows[0], columns, stored)


def _rows(checkpoint: Checkpoint, stored: Stored, start: int, stop: int) -> np.ndarray:
    """Rows of a tensor; one with leading axes is read whole."""
    name = stored.info.name
    if not stored.leading:
        return checkpoint.read(name, (start, stop))
    return checkpoint.read(name).reshape(stored.info.shape[stored.leading :])[start:stop]


def equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two matrices hold the same values (NaN equals NaN), read in pieces.

    Args:
      checkpoint: where they are.
      one, other: their names there.
    """
    a, b = checkpoint.tensors[one], checkpoint.tensors[other]
    if a.shape != b.shape or not a.shape:
        return False
    step = max(PIECE // max(math.prod(a.shape[1:]) * a.dtype.itemsize, 1), 1)
    for start in range(0, a.shape[0], step):
        rows = (start, min(start + step, a.shape[0]))
        x, y = (checkpoint.read(name, rows).astype(np.float64) for name in (one, other))
        if not np.array_equal(x, y, equal_nan=True):
            return False
    return True


def _store(
    out: np.ndarray, piece: np.ndarray, at: int, columns: tuple[int, int], stored: Stored
) -> None:
    if len(stored.shape) == 1:
        out[at : at + len(piece)] = piece
    elif not stored.transposed:
        out[at : at + len(piece)] = piece[:, slice(*columns)]
    else:
        for i in range(0, len(piece), TILE):
            tile = piece[i : i + TILE, slice(*columns)]
            out[:, at + i : at + i + len(tile)] = tile.T


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array whose buffer the CPU backend can take over."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def is_finite(array: np.ndarray) -> bool:
    """Whether no entry of a float array is NaN or infinite."""
    if array.dtype == ml_dtypes.bfloat16:
        exponent = np.uint16(0x7F80)
        return not bool(((array.view(np.uint16) & exponent) == exponent).any())
    return bool(np.isfinite(array).all())
