"""Series of numbers over time: files of them, parts in order, windows to forecast from.

A part of a series is a range of places. What is learned from comes first, what is scored last, and
nothing after a place is ever part of what is read, scaled or marked for a forecast from it: scales
are those of the part that is learned from, and a window belongs to a part when all that it
forecasts lies there. What it reads may lie before the part, as in the published splits.

Files are CSV with a header, a first column of times and one column for each series: ETT (`date`,
HUFL, …, OT) and NAB (`timestamp`, `value`) are such files.
"""

import csv
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from ffnlab.data.folders import folder
from ffnlab.errors import ConfigError, FFNLabError, FormatError, at_least, check_seed

__all__ = [
    "Series",
    "Windows",
    "etth1",
    "lagged_series",
    "parts_of",
    "read_series",
    "time_marks",
    "window_starts",
    "windows",
]

SIZE_LIMIT = 1 << 28  # bytes of a file
COLUMNS = 10_000
ETT_PARTS = (12 * 30 * 24, 4 * 30 * 24, 4 * 30 * 24)  # hours: twelve months, four and four


class Series(NamedTuple):
    """Numbers that were measured side by side.

    Attributes:
      values: [t, n].
      times: of each place, to the second.
      names: of the series.
    """

    values: Float32[np.ndarray, "t n"]
    times: np.ndarray
    names: tuple[str, ...]


class Windows(NamedTuple):
    """What is read, what is forecast, and the times that are known beside it.

    Attributes:
      x: [r, length, n].
      y: [r, horizon, n].
      marks: [r, length, m] of what is read, or None.
    """

    x: Float32[np.ndarray, "r t n"]
    y: Float32[np.ndarray, "r s n"]
    marks: Float32[np.ndarray, "r t m"] | None


def read_series(file: str | Path) -> Series:
    """The series of a file.

    Raises:
      FFNLabError: there is no such file.
      FormatError: it is another one, or larger than 256 MB: no header, a row of another length, a
        time that is none or not after the one before it, a number that is none; the line is named.
    """
    file = Path(file)
    try:
        size = file.stat().st_size
    except OSError as error:
        raise FFNLabError(f"{file} cannot be read: {error.strerror}") from None
    if size > SIZE_LIMIT:
        raise FormatError(f"{file} has {size} bytes; at most {SIZE_LIMIT} are accepted")
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            return parsed(csv.reader(lines, strict=True), file)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise FormatError(f"{file} is no CSV file: {error}") from None


def parsed(rows: "csv._reader", file: Path) -> Series:
    """The series of the rows of a file."""
    header = next(rows, [])
    if not 2 <= len(header) <= COLUMNS + 1 or len(set(header)) != len(header):
        raise FormatError(
            f"{file}: {len(header)} columns in the header; a column of times and 1 to {COLUMNS} of "
            "numbers, each with a name of its own, are accepted"
        )
    times, values = [], []
    for cells in rows:
        if not cells:
            continue
        line = rows.line_num
        if len(cells) != len(header):
            raise FormatError(f"{file}: line {line} has {len(cells)} columns, not {len(header)}")
        times.append(time_of(cells[0], f"{file}: line {line}"))
        if len(times) > 1 and times[-1] <= times[-2]:
            raise FormatError(f"{file}: line {line}: {cells[0]!r} is not after the line before it")
        values.append(numbers_of(cells[1:], f"{file}: line {line}"))
    if not values:
        raise FormatError(f"{file} has a header and no lines")
    return Series(np.stack(values), np.array(times, "datetime64[s]"), tuple(header[1:]))


def time_of(cell: str, where: str) -> datetime.datetime:
    """A time as files write it; of a zone, in that of Greenwich."""
    try:
        time = datetime.datetime.fromisoformat(cell.strip())
    except ValueError:
        raise FormatError(f"{where}: {cell!r} is no time like 2016-07-01 00:00:00") from None
    return time if time.tzinfo is None else time.astimezone(datetime.UTC).replace(tzinfo=None)


def numbers_of(cells: Sequence[str], where: str) -> Float32[np.ndarray, "n"]:
    """Finite numbers."""
    try:
        found = np.array([float(cell) for cell in cells])
    except ValueError:
        found = np.array([np.nan])
    if not (np.abs(found) <= np.finfo(np.float32).max).all():  # NaN is not
        raise FormatError(f"{where}: {list(cells)[:8]} are not all finite numbers")
    return found.astype(np.float32)


def etth1(path: str | Path | None = None) -> Series:
    """The hourly transformer temperatures of Zhou et al. (Informer, 2021), seven series.

    Args:
      path: of ETTh1.csv; etth1/ETTh1.csv in FFNLAB_DATA when None.
    """
    return read_series(folder("etth1") / "ETTh1.csv" if path is None else path)


def lagged_series(seed: int, *, length: int = 6000, series: int = 8) -> Series:
    """Hourly series that are one latent one, each some hours later than the one before it.

        z_t = sin(2 pi t / 24 + a) + .5 sin(2 pi t / 168) + AR(1) of .9, noise .3
        x_j(t) = c_j z(t - 3 j) + .1 noise

    The first ones tell the future of the last ones, which no series tells of itself.

    Args:
      seed: of the draws.
      length: places.
      series: how many.
    """
    check_seed(seed)
    at_least(1, length=length, series=series)
    random, most = np.random.default_rng(seed), 3 * (series - 1)
    n = length + most
    hours, noise, wander = np.arange(n), random.normal(size=n) * 0.3, np.zeros(n)
    for i in range(1, n):
        wander[i] = 0.9 * wander[i - 1] + noise[i]
    phase = random.uniform(0, 2 * np.pi)
    z = np.sin(2 * np.pi * hours / 24 + phase) + 0.5 * np.sin(2 * np.pi * hours / 168) + wander
    scale = random.uniform(0.5, 1.5, series) * random.choice([-1, 1], series)
    late = np.stack([z[most - 3 * j : n - 3 * j] for j in range(series)], -1)
    values = scale * late + 0.1 * random.normal(size=late.shape)
    times = np.datetime64("2020-01-01T00:00:00") + np.arange(length) * np.timedelta64(1, "h")
    names = tuple(f"{3 * j} hours late" for j in range(series))
    return Series(values.astype(np.float32), times.astype("datetime64[s]"), names)


def parts_of(length: int, parts: Sequence[float] | Sequence[int]) -> list[slice]:
    """Parts of a series in order, from its beginning.

    Args:
      length: places of the series.
      parts: shares that add up to at most 1, or numbers of places (`ETT_PARTS`).
    Raises:
      ConfigError: a part of no place, or more than there are.

    >>> parts_of(100, (0.7, 0.1, 0.2))
    [slice(0, 70, None), slice(70, 80, None), slice(80, 100, None)]
    """
    are_counts = all(isinstance(part, int) for part in parts)
    ends = np.cumsum(parts) if are_counts else np.floor(np.cumsum(parts) * length + 1e-6)
    edges = [0, *(int(end) for end in ends)]
    sizes = np.diff(edges)
    if not len(sizes) or sizes.min() < 1 or edges[-1] > length:
        raise ConfigError(f"parts={list(parts)} of {length} places are {list(map(int, sizes))}")
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def time_marks(times: np.ndarray) -> Float32[np.ndarray, "t 4"]:
    """Hour, day of the week, of the month and of the year, each in -.5..+.5, as Informer has them.

    >>> time_marks(np.array(["2016-07-01T00:00:00"], "datetime64[s]")).round(3)
    array([[-0.5  ,  0.167, -0.5  , -0.001]], dtype=float32)
    """
    day, month = (times.astype(f"datetime64[{unit}]") for unit in "DM")
    hour = (times - day) // np.timedelta64(1, "h")
    weekday = (day.astype(int) + 3) % 7  # of 1970-01-01, a Thursday; Monday is 0
    in_month = (day - month).astype(int)
    in_year = (day - times.astype("datetime64[Y]").astype(day.dtype)).astype(int)
    parts = (hour / 23, weekday / 6, in_month / 30, in_year / 365)
    return np.stack([part - 0.5 for part in parts], -1).astype(np.float32)


def window_starts(part: slice, length: int, horizon: int) -> Int[np.ndarray, "w"]:
    """Places where windows begin whose forecast lies within a part.

    Raises:
      ConfigError: there is none.

    >>> window_starts(slice(10, 15), length=4, horizon=2).tolist()
    [6, 7, 8, 9]
    """
    at_least(1, length=length, horizon=horizon)
    first, last = max(part.start - length, 0), part.stop - length - horizon
    if last < first:
        raise ConfigError(
            f"length={length} and horizon={horizon}: places {part.start} to {part.stop} are too few"
        )
    return np.arange(first, last + 1)


def windows(
    values: Float32[np.ndarray, "t n"],
    marks: Float[np.ndarray, "t m"] | None,
    starts: Int[np.ndarray, "r"],
    length: int,
    horizon: int,
) -> Windows:
    """The windows that begin at some places."""
    read = starts[:, None] + np.arange(length)
    told = starts[:, None] + length + np.arange(horizon)
    return Windows(values[read], values[told], None if marks is None else marks[read])
