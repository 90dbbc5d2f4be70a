"""Tokens hidden from a model that is to find them again (BERT, arXiv 1810.04805, section 3.1).

Of the tokens of a text a share is chosen. A chosen token becomes the mask in 80 % of cases, any
token in 10 %, and stays in 10 %, so that a model cannot tell which ones it will be asked for.
Special tokens are never chosen. Training and scoring choose alike; for scoring the draw is fixed.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from ffnlab.data.text.documents import Encoder, around
from ffnlab.data.text.packing import checked_position, rows_of_part
from ffnlab.data.text.windows import TextBatches
from ffnlab.errors import ConfigError

__all__ = ["MaskedBatches", "MaskedWindows", "Masking", "masked_windows", "masking_of"]

SHARE, TO_MASK, TO_ANY = 0.15, 0.8, 0.1
NAMES = ("[MASK]", "<mask>")  # what masks are called where a tokenizer does not say
NONE = -1  # the target of a token that is not asked for


@runtime_checkable
class Named(Protocol):
    """The part of a tokenizer's backend that knows tokens by name."""

    def id(self, token: str) -> int | None:
        """The id of a token, or None."""
        ...


@runtime_checkable
class MaskTokenizer(Encoder, Protocol):
    """The part of `ffnlab.formats.Tokenizer` that is used here.

    Attributes:
      size: all ids are below it.
      special: ids of special tokens.
      backend: knows tokens by name.
    """

    size: int
    special: frozenset[int]
    backend: Named

    def role(self, name: str) -> int | None:
        """The id of the token in a role such as "mask", or None."""
        ...


@dataclasses.dataclass(frozen=True)
class Masking:
    """How tokens are hidden.

    Attributes:
      mask: id that stands for a hidden token.
      size: ids of a text are below it.
      special: ids that are never hidden.
      first, last: what a row begins and ends with.
      share: of the tokens that are chosen; 0 hides nothing.
    """

    mask: int
    size: int
    special: tuple[int, ...] = ()
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    share: float = SHARE

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share={self.share} must lie in 0..1")

    def room(self, length: int) -> int:
        """Tokens of a text that a row of so many has; ConfigError where there is none."""
        room = length - len(self.first) - len(self.last)
        if room < 1:
            raise ConfigError(
                f"length={length} leaves no token between the {len(self.first) + len(self.last)} "
                "that the tokenizer puts around a text"
            )
        return room

    def framed(self, rows: Int[np.ndarray, "n u"]) -> Int[np.ndarray, "n t"]:
        """Rows between what stands around a text."""
        ends = [
            np.tile(np.asarray(ids, np.int32), (len(rows), 1)) for ids in (self.first, self.last)
        ]
        return np.concatenate([ends[0], rows, ends[1]], axis=1)

    def draw(
        self,
        tokens: Int[np.ndarray, "n t"],
        random: np.random.Generator,
        may: Bool[np.ndarray, "n t"] | bool = True,
    ) -> tuple[Int[np.ndarray, "n t"], Int[np.ndarray, "n t"]]:
        """(rows with tokens hidden, targets); chosen are only tokens that `may` be."""
        ordinary = may & ~np.isin(tokens, self.special)
        chosen = ordinary & (random.random(tokens.shape) < self.share)
        fate, other = random.random(tokens.shape), random.integers(self.size, size=tokens.shape)
        changed = np.where(
            fate < TO_MASK, self.mask, np.where(fate < TO_MASK + TO_ANY, other, tokens)
        )
        hidden = np.where(chosen, changed, tokens).astype(np.int32)
        return hidden, np.where(chosen, tokens, NONE).astype(np.int32)


def masking_of(tokenizer: MaskTokenizer, vocab: int) -> Masking:
    """How the tokens of a tokenizer are hidden.

    The mask is the tokenizer's own; where it has none, as where tokens are bytes, it is the first
    id that no text has, which the model must have room for.

    Raises:
      ConfigError: the model has no such id.

    >>> from ffnlab.formats import Tokenizer
    >>> masking_of(Tokenizer.bytes(), vocab=257).mask
    256
    """
    named = (tokenizer.backend.id(name) for name in NAMES)
    mask = tokenizer.role("mask")
    mask = next((i for i in named if i is not None), tokenizer.size) if mask is None else mask
    if mask >= vocab:
        raise ConfigError(
            f"vocab={vocab}: the model has no token for the mask, which is {mask}; use vocab = "
            f"{mask + 1} or a tokenizer with a mask"
        )
    first, last = around(tokenizer)
    special = tuple(sorted({mask, *tokenizer.special}))
    return Masking(mask, min(tokenizer.size, vocab), special, tuple(first), tuple(last))


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedBatches:
    """Batches of `ffnlab.losses.masked`: `batches(position)` is (tokens, targets), both [b, t].

    Attributes:
      rows: training windows; each gives the tokens of a row between `first` and `last`.
      masking: how they are hidden.
    """

    rows: TextBatches
    masking: Masking

    def __post_init__(self) -> None:
        self.masking.room(self.rows.length)

    def __call__(self, position: int) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b t"]]:
        """Batch number `position` (>= 0), always the same one."""
        room = self.masking.room(self.rows.length)
        framed = self.masking.framed(self.rows(position)[:, :room])
        seed = np.random.SeedSequence([self.rows.seed, checked_position(position)])
        return self.masking.draw(framed, np.random.Generator(np.random.Philox(seed)))

    def part(self, index: int, count: int) -> Callable[[int], tuple]:
        """The same batches, of each only the rows of part `index` of `count` equal ones."""
        first, size = rows_of_part(self.rows.batch, index, count)
        return lambda position: tuple(rows[first : first + size] for rows in self(position))


class MaskedWindows(NamedTuple):
    """A text with tokens hidden, in windows that follow each other.

    Attributes:
      tokens: [w, t] int32, as a model is given them.
      valid: [w, t], false on padding.
      targets: [w, t] int32, the token that was chosen, -1 elsewhere.
    """

    tokens: Int[np.ndarray, "w t"]
    valid: Bool[np.ndarray, "w t"]
    targets: Int[np.ndarray, "w t"]

    def batches(self, rows: int) -> Iterator["MaskedWindows"]:
        """Groups of `rows` windows; the last is filled up with windows that ask for nothing."""
        for start in range(0, len(self.tokens), rows):
            part = [array[start : start + rows] for array in self]
            missing = rows - len(part[0])
            fills = (0, True, NONE)
            yield MaskedWindows(
                *(
                    np.pad(array, ((0, missing), (0, 0)), constant_values=fill)
                    for array, fill in zip(part, fills, strict=True)
                )
            )


def masked_windows(
    tokens: Int[np.ndarray, "n"],
    length: int,
    masking: Masking,
    counted: Bool[np.ndarray, "n"] | None = None,
    source: str = "the text",
) -> MaskedWindows:
    """Cuts a text into windows and hides a fixed draw of its tokens.

    Args:
      tokens: of the text, [n], n >= 1.
      length: of a window, with what stands around a text.
      masking: how tokens are hidden.
      counted: which tokens may be chosen; all ordinary ones when None.
      source: what the text is called in errors.
    Raises:
      ConfigError: a length without room, or no token is chosen.
    """
    room = masking.room(length)
    windows = -(-len(tokens) // room)
    places = np.arange(windows * room).reshape(windows, room)
    inside, places = places < len(tokens), np.minimum(places, len(tokens) - 1)
    may = inside if counted is None else inside & counted[places]
    rows = masking.framed(np.where(inside, tokens[places], 0).astype(np.int32))
    head, tail = len(masking.first), len(masking.last)
    around_it = ((0, 0), (head, tail))
    valid = np.pad(inside, around_it, constant_values=True)
    seed = np.random.Generator(np.random.Philox(np.random.SeedSequence([0, length])))
    hidden, targets = masking.draw(rows, seed, np.pad(may, around_it))
    if masking.share and not (targets >= 0).any():
        raise ConfigError(f"{source} has {len(tokens)} tokens, none of which is hidden; give more")
    return MaskedWindows(hidden, valid, targets)
