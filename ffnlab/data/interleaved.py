"""Rows in which tokens of two kinds alternate, as models with a copy for each kind learn them.

Ids tell the kind: those of the second begin where those of the first end.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from ffnlab.data.clusters import Labelled
from ffnlab.data.text.packing import Packed
from ffnlab.errors import ConfigError, at_least, check_seed

__all__ = ["CaptionedDigits", "RuleSegments", "captioned"]

SEGMENT = (8, 16)  # tokens of a segment, at least and at most
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = " abcdefghijklmnopqrstuvwxyz"
START = len(LETTERS)  # the token before every row
LEVELS, PIXELS = 16, 64
Rules = tuple[tuple[int, int, int], ...]
CAPTIONED = 1 + 8 + PIXELS + 11  # tokens of the longest row


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


def captioned(digits: Labelled, told: np.ndarray) -> Packed:
    """Digits between two captions, as rows of tokens.

        <start> a seven <64 pixels> it is seven      or      <start> a digit <64 pixels> it is …

    Letters come first among the ids, then the start, then 16 levels of grey (`CaptionedDigits`).

    Args:
      digits: x [n, 64] in [0, 1], y the digit.
      told: [n] bool, whether the caption before the image says which digit it is.
    Returns:
      rows with padding at the end, whose segment is 0.
    Raises:
      ConfigError: images of another size, or another number of `told`.

    >>> rows = captioned(Labelled(np.zeros((1, 64), np.float32), np.array([7])), np.array([True]))
    >>> rows.tokens.shape, rows.tokens[0, :12].tolist()
    ((1, 84), [27, 1, 0, 19, 5, 22, 5, 14, 0, 28, 28, 28])
    """
    n = len(digits.y)
    if digits.x.shape != (n, PIXELS) or np.shape(told) != (n,):
        raise ConfigError(
            f"digits of {digits.x.shape[1:]} pixels and {np.shape(told)} told; {PIXELS} pixels and "
            f"({n},) are accepted"
        )
    tokens, segments = np.zeros((2, n, CAPTIONED), np.int32)
    levels = np.minimum((digits.x * LEVELS).round().astype(int), LEVELS - 1) + START + 1
    for i, (pixels, digit, is_told) in enumerate(zip(levels, digits.y, told, strict=True)):
        before = f"a {NAMES[digit] if is_told else 'digit'} "
        row = [START, *map(LETTERS.index, before), *pixels]
        row += map(LETTERS.index, f"it is {NAMES[digit]}")
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    positions = np.broadcast_to(np.arange(CAPTIONED, dtype=np.int32), tokens.shape)
    return Packed(tokens, segments, positions)


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionedDigits:
    """Batches of captioned digits, each drawn anew, half of them told: `batches(position)`.

    Attributes:
      digits: to draw from.
      batch: rows.
      seed: of the draws.
    """

    digits: Labelled
    batch: int
    seed: int = 0

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
        return captioned(chosen, draw.random(self.batch) < 0.5)
