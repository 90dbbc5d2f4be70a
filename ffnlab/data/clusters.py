"""Classification data that needs no download: Gaussian clusters, and scikit-learn's digits."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from ffnlab.errors import require

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
    """
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
      test: how many of them are held out.
    Returns:
      (train, test), x of width 64.
    Raises:
      MissingExtraError: scikit-learn is not installed.
    """
    data = require("sklearn.datasets", extra="run").load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    x, y = (data.data[order] / 16).astype(np.float32), data.target[order].astype(np.int32)
    return Labelled(x[test:], y[test:]), Labelled(x[:test], y[:test])
