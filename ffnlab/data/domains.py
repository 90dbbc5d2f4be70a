"""Pairs of domains: the same classes, inputs of another distribution, for domain adaptation."""

import gzip
import itertools
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from ffnlab.data.clusters import Labelled
from ffnlab.data.folders import folder
from ffnlab.errors import ConfigError, FFNLabError, FormatError, at_least, check_seed, require

__all__ = ["moons", "on_photographs", "read_svmlight", "reviews"]

DOMAINS = ("books", "dvd", "electronics")
WORDS = 5000  # uni- and bigrams of the reviews
LINE_LIMIT = 1 << 20  # bytes of a line
ROWS_LIMIT = 1 << 20
# A class of two is -1 or +1 in files; others are their number.
SIGNS = {-1: 0, 1: 1}


def moons(
    seed: int = 0, *, count: int = 150, angle: float = 35.0, noise: float = 0.05
) -> tuple[Labelled, Labelled]:
    """Two half circles of evenly spaced points that lie in each other, and the same ones turned.

    Args:
      seed: of the noise.
      count: points of each domain, half of them of each class.
      angle: of the turn, degrees, around the middle of the source.
      noise: standard deviation, in units of the half circles' radius.
    Returns:
      (source, target), x [count, 2], moved to the middle of the source and twice as large; they
      differ by the noise and the turn.
    Raises:
      ConfigError: fewer than two points, negative noise, an angle that is not finite, or a seed
        outside 0..2**32 - 1.
    Source: as in the experiments of DANN (arXiv 1505.07818, section 5.1.1).
    """
    at_least(2, count=count)
    check_seed(seed)
    if not 0 <= noise < math.inf:
        raise ConfigError(f"noise={noise} must be at least 0")
    if not math.isfinite(angle):
        raise ConfigError(f"angle={angle} must be finite")
    random = np.random.default_rng(seed)
    y = np.arange(count) % 2
    t = math.pi * (np.arange(count) // 2) / np.maximum(np.bincount(y)[y] - 1, 1)
    upper = np.stack([np.cos(t), np.sin(t)], -1)
    lower = np.stack([1 - np.cos(t), 0.5 - np.sin(t)], -1)
    x = np.where(y[:, None] == 1, lower, upper) + noise * random.normal(size=(2, count, 2))
    x = 2 * (x - x[0].mean(0))
    turn = math.radians(angle)
    matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    both = x[0], x[1] @ matrix.T
    source, target = (Labelled(part.astype(np.float32), y.astype(np.int32)) for part in both)
    return source, target


def on_photographs(
    images: Float32[np.ndarray, "n h w *c"], seed: int = 0
) -> Float32[np.ndarray, "n h w 3"]:
    """Images on patches of photographs: |patch - image| in each colour (arXiv 1505.07818).

    The photographs are the two that scikit-learn comes with, of 427 x 640 pixels.

    Args:
      images: values in [0, 1], grey or, with a last axis of 1 or 3, in channels.
      seed: of the patches.
    Returns:
      values in [0, 1].
    Raises:
      ConfigError: another shape, values outside [0, 1], images larger than the photographs, or a
        seed outside 0..2**32 - 1.
      MissingExtraError: scikit-learn or its reader of images is not installed.
    """
    if images.ndim == 3:
        images = images[..., None]
    is_one = images.ndim == 4 and images.shape[-1] in (1, 3)
    check_seed(seed)
    if not is_one or not images.size or not (images.min() >= 0 and images.max() <= 1):
        raise ConfigError(
            f"images {images.shape}; [n, h, w] or [n, h, w, 1 or 3] with values in [0, 1] are "
            "accepted"
        )
    load = require("sklearn.datasets", extra="run").load_sample_images
    photographs = np.stack(load().images).astype(np.float32) / 255
    (_, tall, wide, _), (n, h, w, _) = photographs.shape, images.shape
    if h > tall or w > wide:
        raise ConfigError(f"images of {h} x {w}; the photographs have {tall} x {wide} pixels")
    random = np.random.default_rng(seed)
    which = random.integers(len(photographs), size=n)
    rows, columns = random.integers(tall - h + 1, size=n), random.integers(wide - w + 1, size=n)
    patches = np.stack(
        [photographs[k, i : i + h, j : j + w] for k, i, j in zip(which, rows, columns, strict=True)]
    )
    return np.abs(patches - images)


def reviews(domain: str, path: str | Path | None = None) -> tuple[Labelled, Labelled]:
    """Reviews of products: counts of words and of pairs of words, and the verdict (0 bad, 1 good).

    Args:
      domain: "books", "dvd" or "electronics".
      path: folder with DOMAIN_train.svmlight.gz and DOMAIN_test.svmlight.gz; amazon_reviews in
        FFNLAB_DATA when None.
    Returns:
      (train, test), x [n, 5000] float32 counts.
    Raises:
      ConfigError: another domain.
      FFNLabError: there is no file.
      FormatError: it is damaged.
    Source: features of the reviews of Blitzer et al. as DANN's authors use them.
    """
    if domain not in DOMAINS:
        raise ConfigError(f"domain={domain!r} is not one of {DOMAINS}")
    where = folder("amazon_reviews") if path is None else Path(path)
    files = [where / f"{domain}_{part}.svmlight.gz" for part in ("train", "test")]
    train, test = (read_svmlight(file, width=WORDS) for file in files)
    return train, test


def read_svmlight(file: str | Path, *, width: int) -> Labelled:
    """Sparse rows of an svmlight file, made dense: `CLASS INDEX:VALUE INDEX:VALUE ...` a line.

    Args:
      file: text, compressed by gzip where its name ends in .gz; indices count from 0.
      width: columns.
    Returns:
      x [n, width]; classes -1 and +1 become 0 and 1.
    Raises:
      FFNLabError: there is no file.
      FormatError: it is damaged; the line is named.
    """
    file = Path(file)
    if not file.is_file():
        raise FFNLabError(f"{file}: there is no such file")
    rows, classes = [], []
    try:
        for number, line in enumerate(lines(file), 1):
            if number > ROWS_LIMIT:
                raise FormatError(f"{file}: more than {ROWS_LIMIT} rows")
            kind, row = parsed(line, width, f"{file}, line {number}")
            classes.append(kind)
            rows.append(row)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise FormatError(f"{file}: damaged: {error}") from None
    if not rows:
        raise FormatError(f"{file}: no rows")
    y = np.array(classes)
    if set(classes) <= set(SIGNS):
        y = np.array([SIGNS[kind] for kind in classes])
    if y.min() < 0:
        raise FormatError(f"{file}: classes {sorted(set(classes))}; -1 and 1, or from 0 on")
    return Labelled(np.stack(rows), y.astype(np.int32))


def lines(file: Path) -> Iterator[str]:
    """The lines of a text file that are not empty, none too long."""
    opened = gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb")
    with opened as handle:
        for _ in itertools.count():
            line = handle.readline(LINE_LIMIT + 1)
            if not line:
                return
            if len(line) > LINE_LIMIT:
                raise FormatError(f"{file}: a line of more than {LINE_LIMIT} bytes")
            text = line.decode("ascii").partition("#")[0].strip()
            if text:
                yield text


def parsed(line: str, width: int, where: str) -> tuple[int, Float32[np.ndarray, "d"]]:
    """One line: class and dense row."""
    kind, *pairs = line.split()
    row, last = np.zeros(width, np.float32), -1
    try:
        for pair in pairs:
            index, _, value = pair.partition(":")
            place, number = int(index), float(value)
            if not last < place < width or not math.isfinite(number):
                raise FormatError(f"{where}: {pair!r}; indices rise from 0 to {width - 1}")
            row[place], last = number, place
        return int(float(kind)), row
    except (ValueError, OverflowError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{where}: no class and INDEX:VALUE pairs: {error}") from None
