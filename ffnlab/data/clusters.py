"""Classification data that needs no download: Gaussian clusters, and scikit-learn's digits."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from ffnlab.errors import ConfigError, at_least, check_seed, require

__all__ = ["Labelled", "digits", "gaussian_clusters"]


class Labelled(NamedTuple):
    """Inputs with classes; a batch of it is a pair (x, y).

    Attributes:
      x: inputs, [n, d] float32.
      y: classes, [n] int32.
    """

    x: Float32[np.ndarray, "n d"]
    y: Int32[np.ndarray, "n"]


def gaussian_clusters(
    seed: int = 0,
    *,
    train: int = 8000,
    test: int = 2000,
    classes: int = 10,
    per_class: int = 3,
    width: int = 64,
    noise: float = 1.1,
) -> tuple[Labelled, Labelled]:
    """Clusters around centres drawn from N(0, I), several to a class: not linearly separable.

        x = centre + noise * N(0, I)

    Args:
      seed: of centres and points.
      train, test: how many points.
      classes: how many classes; centre i belongs to class i modulo `classes`.
      per_class: centres of a class.
      width: dimensions (d).
      noise: standard deviation around a centre.
    Returns:
      (train, test) points of the same centres.
    Raises:
      ConfigError: a number out of its range.
    """
    check_seed(seed)
    at_least(0, train=train, test=test)
    at_least(1, classes=classes, per_class=per_class, width=width)
    if not 0 <= noise < math.inf:
        raise ConfigError(f"noise={noise} must not be negative, and be finite")
    random = np.random.default_rng(seed)
    centres = random.normal(size=(classes * per_class, width))
    which = random.integers(len(centres), size=train + test)
    x = centres[which] + noise * random.normal(size=(train + test, width))
    x, y = x.astype(np.float32), (which % classes).astype(np.int32)
    return Labelled(x[:train], y[:train]), Labelled(x[train:], y[train:])


def digits(seed: int = 0, *, test: int = 360) -> tuple[Labelled, Labelled]:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels scaled to [0, 1], split at random.

    Args:
      seed: of the split.
      test: how many of them are held out, not all.
    Returns:
      (train, test), x of width 64.
    Raises:
      ConfigError: a number out of its range.
      MissingExtraError: scikit-learn is not installed.
    """
    check_seed(seed)
    at_least(0, test=test)
    data = require("sklearn.datasets", extra="run").load_digits()
    if test >= len(data.target):
        raise ConfigError(f"test={test} leaves none of {len(data.target)} digits to learn from")
    order = np.random.default_rng(seed).permutation(len(data.target))
    x, y = (data.data[order] / 16).astype(np.float32), data.target[order].astype(np.int32)
    return Labelled(x[test:], y[test:]), Labelled(x[:test], y[:test])
