"""Measured vowels: duration, pitch and formants of twelve American English vowels."""

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from ffnlab.data.clusters import Labelled
from ffnlab.data.folders import folder
from ffnlab.errors import ConfigError, FFNLabError, FormatError, check_seed

__all__ = ["Vowels", "vowels"]

COLUMNS = ("dur", "f0", "f1", "f2", "f3")
NAMED = ("type", "speaker", "vowel")
SIZE_LIMIT = 1 << 24  # bytes


class Vowels(NamedTuple):
    """Measurements of n vowels.

    Attributes:
      x: duration in ms, pitch and three formants in Hz, [n, 5]; NaN where one was not measured.
      y: which vowel, [n], an index into `names`.
      group: who spoke, [n], an index into `groups`: boys, girls, men, women.
      speaker: [n], a number for each speaker.
      names: of the vowels, in X-SAMPA.
      groups: letters of the groups.
    """

    x: Float32[np.ndarray, "n 5"]
    y: Int32[np.ndarray, "n"]
    group: Int32[np.ndarray, "n"]
    speaker: Int32[np.ndarray, "n"]
    names: tuple[str, ...]
    groups: tuple[str, ...]

    def of_group(self, letter: str) -> Labelled:
        """The vowels of one group that were measured whole.

        Raises:
          ConfigError: no such group.
        """
        if letter not in self.groups:
            raise ConfigError(f"group {letter!r} is not one of {self.groups}")
        keep = (self.group == self.groups.index(letter)) & np.isfinite(self.x).all(1)
        return Labelled(self.x[keep], self.y[keep])

    def by_speaker(self, held_out: float = 0.2, seed: int = 0) -> tuple[Labelled, Labelled]:
        """(train, test) of vowels that were measured whole; no speaker is in both.

        Args:
          held_out: share of the speakers of each group that are in test, in (0, 1).
          seed: of the choice.
        Raises:
          ConfigError: a share or a seed out of its range.
        """
        check_seed(seed)
        if not 0 < held_out < 1:
            raise ConfigError(f"held_out={held_out} must lie between 0 and 1")
        random, chosen = np.random.default_rng(seed), []
        for group in range(len(self.groups)):
            who = np.unique(self.speaker[self.group == group])
            chosen.append(random.permutation(who)[: max(1, round(held_out * len(who)))])
        in_test, whole = np.isin(self.speaker, np.concatenate(chosen)), np.isfinite(self.x).all(1)
        parts = (whole & ~in_test, whole & in_test)
        train, test = (Labelled(self.x[keep], self.y[keep]) for keep in parts)
        return train, test


def vowels(path: str | Path | None = None) -> Vowels:
    """The vowels of Hillenbrand et al. (1995), from a table.

    Args:
      path: CSV with the columns type, speaker, vowel, dur, f0, f1, f2, f3; vowels/h95.csv in
        FFNLAB_DATA when None. 0 and an empty cell stand for what was not measured.
    Raises:
      FFNLabError: there is no file.
      FormatError: another table; the line is named.
    """
    file = folder("vowels") / "h95.csv" if path is None else Path(path)
    if not file.is_file():
        raise FFNLabError(f"{file}: there is no such file")
    if file.stat().st_size > SIZE_LIMIT:
        raise FormatError(f"{file}: more than {SIZE_LIMIT} bytes")
    try:
        rows = list(csv.reader(io.StringIO(file.read_bytes().decode("utf-8"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"{file}: no table of text: {error}") from None
    if not rows or sorted(rows[0]) != sorted((*NAMED, *COLUMNS)):
        raise FormatError(f"{file}: columns {rows[0] if rows else []}; {(*NAMED, *COLUMNS)}")
    places = {name: rows[0].index(name) for name in (*NAMED, *COLUMNS)}
    if len(rows) < 2:
        raise FormatError(f"{file}: no rows")
    x = np.array([_numbers(row, places, f"{file}, line {i}") for i, row in enumerate(rows[1:], 2)])
    said = {name: [row[places[name]] for row in rows[1:]] for name in NAMED}
    names, groups = (tuple(sorted(set(said[name]))) for name in ("vowel", "type"))
    whose = list(zip(said["type"], said["speaker"], strict=True))
    speakers = {who: i for i, who in enumerate(sorted(set(whose)))}
    return Vowels(
        x.astype(np.float32),
        np.array([names.index(v) for v in said["vowel"]], np.int32),
        np.array([groups.index(g) for g in said["type"]], np.int32),
        np.array([speakers[who] for who in whose], np.int32),
        names,
        groups,
    )


def _numbers(row: list[str], places: dict[str, int], where: str) -> list[float]:
    if len(row) != len(places):
        raise FormatError(f"{where}: {len(row)} cells, {len(places)} columns")
    try:
        values = [float(row[places[name]] or 0) for name in COLUMNS]
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from None
    if not all(0 <= value < 1e6 for value in values):
        raise FormatError(f"{where}: {values}; measurements are at least 0 and below a million")
    return [value or float("nan") for value in values]
