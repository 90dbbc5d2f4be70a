"""Text as token windows: training batches by position, held-out windows with a stride.

Text is bytes; a byte is a token (0 .. 255), and NUL separates files. Other tokenizers give their
ids as one array and use the same windows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Integer

from ffnlab.data.text.documents import SEPARATOR, joined, read_documents
from ffnlab.data.text.packing import checked_position, rows_of_part
from ffnlab.errors import FFNLabError


def read_text(paths: Iterable[str | Path]) -> bytes:
    """Reads UTF-8 text files (`read_documents`), a NUL before each document and one at the end.

    Args:
      paths: files, kept in the given order.
    Returns:
      the bytes of all of them.
    Raises:
      FFNLabError: a file is missing, a folder, empty, or not UTF-8; all such files are listed.
    """
    return joined(read_documents(paths)) + SEPARATOR


def as_tokens(text: bytes | Integer[np.ndarray, "n"]) -> Integer[np.ndarray, "n"]:
    """Bytes as token ids, [n] uint8; an array of ids stays as it is."""
    return np.frombuffer(text, np.uint8) if isinstance(text, bytes) else np.asarray(text)


@dataclasses.dataclass(frozen=True, eq=False)
class TextBatches:
    """Shuffled training windows of one token stream: `batches(position)` is a batch.

    One epoch cuts the stream into windows of `length` predictions, from an offset and in an order
    drawn from (seed, epoch), so the cuts differ between epochs. Position p is batch p of the
    endless sequence of epochs; nothing else is remembered.

    Attributes:
      tokens: the stream, bytes or [n] integer array.
      batch: rows of a batch (b).
      length: predictions in a row; a row has length + 1 tokens, and neighbours share one.
      seed: of offsets and orders.
      source: what the text is called in errors.
    """

    tokens: bytes | Integer[np.ndarray, "n"]
    batch: int
    length: int
    seed: int = 0
    source: str = "the text"

    def __post_init__(self) -> None:
        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise FFNLabError(f"{name}={getattr(self, name)} must be at least 1")
        if self.per_epoch < 1:
            raise FFNLabError(
                f"{self.source} has {len(self.tokens)} tokens; batch={self.batch} rows of "
                f"length={self.length} need at least {(self.batch + 1) * self.length + 1}"
            )

    @property
    def per_epoch(self) -> int:
        """Batches in one epoch, whatever its offset."""
        return ((len(self.tokens) - 1) // self.length - 1) // self.batch

    def __call__(self, position: int) -> Int[np.ndarray, "b t"]:
        """Batch number `position` (>= 0): [batch, length + 1] int32."""
        return self._rows(position, 0, self.batch)

    def part(self, index: int, count: int) -> Callable[[int], Int[np.ndarray, "r t"]]:
        """The same batches, of each only the rows of part `index` of `count` equal ones.

        Raises:
          FFNLabError: `count` does not divide the batch.
        """
        first, size = rows_of_part(self.batch, index, count)
        return lambda position: self._rows(position, first, size)

    def _rows(self, position: int, first: int, size: int) -> Int[np.ndarray, "r t"]:
        epoch, index = divmod(checked_position(position), self.per_epoch)
        offset, order = _epoch(self.seed, epoch, self.length, self.per_epoch * self.batch)
        rows = order[index * self.batch + first :][:size]
        starts = offset + rows * self.length
        return as_tokens(self.tokens)[starts[:, None] + np.arange(self.length + 1)].astype(np.int32)


@functools.lru_cache(maxsize=8)
def _epoch(seed: int, epoch: int, length: int, windows: int) -> tuple[int, Int[np.ndarray, "w"]]:
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    return int(random.integers(length)), random.permutation(windows)


class HeldOut(NamedTuple):
    """Windows that score every token of a text once, with the context that the stride leaves it.

    Attributes:
      tokens: [w, length + 1] int32, padded with 0.
      counted: [w, length] bool: whether prediction j (of token j + 1) is scored in this window.
    """

    tokens: Int[np.ndarray, "w t"]
    counted: Bool[np.ndarray, "w u"]

    def batches(self, rows: int) -> Iterator["HeldOut"]:
        """Groups of `rows` windows; the last is filled with windows that count nothing."""
        for start in range(0, len(self.tokens), rows):
            part = HeldOut(self.tokens[start : start + rows], self.counted[start : start + rows])
            missing = ((0, rows - len(part.tokens)), (0, 0))
            yield HeldOut(np.pad(part.tokens, missing), np.pad(part.counted, missing))


def held_out_windows(
    text: bytes | Integer[np.ndarray, "n"],
    length: int,
    stride: int,
    source: str = "the text",
    scored: Bool[np.ndarray, "n"] | None = None,
) -> HeldOut:
    """Cuts a text into windows that start every `stride` tokens.

    Args:
      text: bytes or [n] integer array, n >= 2.
      length: predictions in a window.
      stride: tokens between starts, 1 <= stride <= length. All predictions of the first window
        count, in later ones the last `stride`: those have at least length - stride tokens before
        them.
      source: what the text is called in errors.
      scored: which tokens count; all when None. The first never does.
    Returns:
      `HeldOut`; n - 1 predictions are counted in all, or those of the tokens that count.
    Raises:
      FFNLabError: the text has fewer than two tokens, or the stride is out of range.

    >>> held_out_windows(b"abcdef", length=4, stride=2).counted.astype(int)
    array([[1, 1, 1, 1],
           [0, 0, 1, 0]])
    """
    tokens = as_tokens(text)
    if len(tokens) < 2:
        raise FFNLabError(f"{source} has {len(tokens)} tokens; at least 2 are needed")
    if not 1 <= stride <= length:
        raise FFNLabError(f"stride={stride} must lie between 1 and length={length}")
    predictions = len(tokens) - 1
    windows = 1 + max(0, -(-(predictions - length) // stride))
    places = stride * np.arange(windows)[:, None] + np.arange(length + 1)
    inside = places < len(tokens)
    rows = np.where(inside, tokens[np.minimum(places, predictions)], 0).astype(np.int32)
    fresh = (np.arange(length) >= length - stride) | (np.arange(windows)[:, None] == 0)
    counted = inside[:, 1:] & fresh
    if scored is not None:
        counted &= scored[np.minimum(places[:, 1:], predictions)]
    return HeldOut(rows, counted)
