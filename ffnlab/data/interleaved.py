"""Rows in which tokens of two kinds alternate, as models with a copy for each kind learn them.

Ids tell the kind: those of the second begin where those of the first end.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from ffnlab.data.clusters import Labelled
from ffnlab.data.text.packing import Packed
from ffnlab.errors import ConfigError, at_least, check_seed

__all__ = ["CaptionedDigits", "RuleSegments", "answered", "caption_length", "captioned"]

SEGMENT = (8, 16)  # tokens of a segment, at least and at most
UNTOLD, ANSWER = ("digit", "thing"), "it is "  # of digits, and of other images
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = " abcdefghijklmnopqrstuvwxyz"
START = len(LETTERS)  # the token before every row
LEVELS = 16
Rules = tuple[tuple[int, int, int], ...]


@dataclasses.dataclass(frozen=True)
class RuleSegments:
    """Segments of two families by turns, each by one of its family's rules: `batches(position)`.

        x_t = (a x_{t-1} + b x_{t-2} + c) mod n        within a segment, from two random tokens on

    Attributes:
      batch: rows.
      length: tokens of a row.
      tokens: of a family (n); those of the second are n .. 2 n - 1.
      seed: of the rows; the rules are always the same.
      rules: of each family, (a, b, c) of each of its rules; a segment draws one.
    """

    batch: int
    length: int
    tokens: int = 16
    seed: int = 0
    rules: tuple[Rules, Rules] = (
        ((3, 5, 1), (9, 1, 4), (5, 13, 7), (1, 7, 2)),
        ((7, 11, 6), (13, 3, 0), (11, 9, 3), (15, 5, 8)),
    )

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch, length=self.length, tokens=self.tokens)
        check_seed(self.seed)

    @property
    def starts(self) -> tuple[int]:
        """The first id of the second family."""
        return (self.tokens,)

    def __call__(self, position: int) -> Int[np.ndarray, "b t"]:
        """The rows at a position, [batch, length] int32; always the same."""
        draw = np.random.default_rng((self.seed, position))
        return np.stack([self.row(draw) for _ in range(self.batch)])

    def row(self, draw: np.random.Generator) -> Int[np.ndarray, "t"]:
        """One row, which begins within a segment of either family."""
        found: list[int] = []
        family, cut = int(draw.integers(2)), int(draw.integers(SEGMENT[0]))
        while len(found) < self.length + cut:
            a, b, c = self.rules[family][int(draw.integers(len(self.rules[family])))]
            segment = draw.integers(self.tokens, size=2).tolist()
            for _ in range(int(draw.integers(SEGMENT[0], SEGMENT[1] + 1)) - 2):
                segment.append((a * segment[-1] + b * segment[-2] + c) % self.tokens)
            found += [token + family * self.tokens for token in segment]
            family = 1 - family
        return np.array(found[cut : cut + self.length], np.int32)


def captioned(images: Labelled, told: np.ndarray, names: Sequence[str] = NAMES) -> Packed:
    """Images between two captions, as rows of tokens.

        <start> a seven <64 pixels> it is seven      or      <start> a digit <64 pixels> it is …

    Letters come first among the ids, then the start, then 16 levels of grey (`CaptionedDigits`).
    Classes with other names than digits are untold as "thing".

    Args:
      images: x [n, pixels] in [0, 1], row by row, y the class.
      told: [n] bool, whether the caption before the image says of which class it is.
      names: of the classes, in small letters and spaces.
    Returns:
      rows with padding at the end, whose segment is 0; all of `caption_length`.
    Raises:
      ConfigError: images that are no rows, another number of `told`, a name with other signs, or a
        class without a name.

    >>> rows = captioned(Labelled(np.zeros((1, 64), np.float32), np.array([7])), np.array([True]))
    >>> rows.tokens.shape, rows.tokens[0, :12].tolist()
    ((1, 84), [27, 1, 0, 19, 5, 22, 5, 14, 0, 28, 28, 28])
    """
    n = len(images.y)
    if images.x.ndim != 2 or len(images.x) != n or np.shape(told) != (n,):
        raise ConfigError(
            f"images {images.x.shape} and told {np.shape(told)}; ({n}, pixels) and ({n},) are "
            "accepted"
        )
    length = caption_length(names, images.x.shape[1])
    if n and not 0 <= images.y.min() <= images.y.max() < len(names):
        raise ConfigError(f"classes {images.y.min()} to {images.y.max()} of {len(names)} names")
    untold = UNTOLD[tuple(names) != NAMES]
    tokens, segments = np.zeros((2, n, length), np.int32)
    levels = np.minimum((images.x * LEVELS).round().astype(int), LEVELS - 1) + START + 1
    for i, (pixels, label, is_told) in enumerate(zip(levels, images.y, told, strict=True)):
        before = f"a {names[label] if is_told else untold} "
        row = [START, *map(LETTERS.index, before), *pixels]
        row += map(LETTERS.index, f"{ANSWER}{names[label]}")
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return Packed(tokens, segments, positions)


def caption_length(names: Sequence[str], pixels: int) -> int:
    """Tokens of a row of `captioned`: those of the longest.

    Raises:
      ConfigError: a name with other signs than small letters and spaces, or without any.

    >>> caption_length(("cat", "horse"), 4)
    24
    """
    for name in names:
        if not name or not set(name) <= set(LETTERS):
            raise ConfigError(f"name {name!r} of a class; small letters and spaces are accepted")
    longest = max(map(len, names))
    return 1 + len(f"a {'':{max(longest, *map(len, UNTOLD))}} ") + pixels + len(ANSWER) + longest


def answered(rows: Packed) -> Bool[np.ndarray, "n t"]:
    """Where in rows of `captioned` the name stands that the answer gives."""
    last = rows.segments.sum(1) - 1
    at = np.arange(rows.tokens.shape[1])
    after_image = np.where(rows.tokens > START, at, 0).max(1)
    return (at > after_image[:, None] + len(ANSWER)) & (at <= last[:, None])


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionedDigits:
    """Batches of captioned images, each drawn anew, half of them told: `batches(position)`.

    Attributes:
      digits: to draw from, or other images, see `captioned`.
      batch: rows.
      seed: of the draws.
      names: of the classes.
    """

    digits: Labelled
    batch: int
    seed: int = 0
    names: Sequence[str] = NAMES

    vocab = START + 1 + LEVELS
    starts = (START + 1,)  # the first id of an image

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch)
        check_seed(self.seed)

    def __call__(self, position: int) -> Packed:
        """The rows at a position; always the same."""
        draw = np.random.default_rng((self.seed, position))
        rows = draw.integers(len(self.digits.y), size=self.batch)
        chosen = Labelled(self.digits.x[rows], self.digits.y[rows])
        return captioned(chosen, draw.random(self.batch) < 0.5, self.names)
