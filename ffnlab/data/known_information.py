"""Pairs whose mutual information is set by construction, and images made of them.

Two Gaussian vectors share so many nats, evenly over their components; invertible maps leave the
information as it is: a rotation of each side, the normal distribution function to numbers in 0..1,
and pictures that tell their parameters (after arXiv 2305.08013).
"""

import math

import numpy as np
from jaxtyping import Float, Float32
from scipy import special, stats

from ffnlab.errors import ConfigError, at_least, check_seed

__all__ = ["as_uniform", "blob_images", "box_images", "gaussian_pairs"]

FALL = 10.0  # of a blob's intensity with the squared distance


def gaussian_pairs(
    count: int, information: float, *, width: int = 2, other: int | None = None, seed: int = 0
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n e"]]:
    """Draws of two standard normal vectors with I(X;Y) = information.

    Each of min(d, e) pairs of components has I_i = information / min(d, e), a correlation of
    sqrt(1 - exp(-2 I_i)); then each side is rotated at random.

    Args:
      count: n >= 1.
      information: nats, >= 0.
      width, other: d and e, >= 1; e is d when None.
      seed: of the draws.
    Raises:
      ConfigError: a size, information or seed out of range.
    """
    check_seed(seed)
    other = width if other is None else other
    at_least(1, count=count, width=width, other=other)
    if not 0 <= information < math.inf:
        raise ConfigError(f"information={information} must be finite and >= 0, in nats")
    random = np.random.default_rng(seed)
    shared = min(width, other)
    rho = math.sqrt(-math.expm1(-2 * information / shared))
    rest = math.exp(-information / shared)
    x, y = random.standard_normal((count, width)), random.standard_normal((count, other))
    y[:, :shared] = rho * x[:, :shared] + rest * y[:, :shared]
    sides = [
        side @ (stats.ortho_group.rvs(side.shape[1], random_state=random))
        if side.shape[1] > 1
        else side
        for side in (x, y)
    ]
    return sides[0], sides[1]


def as_uniform(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Standard normal numbers as numbers in 0..1, uniform each."""
    return special.ndtr(rows)


def blob_images(places: Float[np.ndarray, "n 2"], size: int = 16) -> Float32[np.ndarray, "n s s"]:
    """exp(-10 ((x - a)^2 + (y - b)^2)) on a grid over 0..1, ends included: a blob at (a, b).

    The log of an image is quadratic in (a, b), so that a linear map of it gives them back.

    Raises:
      ConfigError: places that are no pairs in 0..1, or size below 2.
    """
    check_parameters(places, 2, size)
    grid = np.linspace(0, 1, size)
    across, down = (np.exp(-FALL * (grid - places[:, [axis]]) ** 2) for axis in (0, 1))
    return (down[:, :, None] * across[:, None, :]).astype(np.float32)


def box_images(shapes: Float[np.ndarray, "n 4"], size: int = 16) -> Float32[np.ndarray, "n s s"]:
    """Bright rectangles, each pixel by the share of it that is covered.

    Of parameters (a, b, c, d) the sides are a .. a + b (1 - a) across and c .. c + d (1 - c) down,
    which tells all four.

    Raises:
      ConfigError: shapes that are no four numbers in 0..1, or size below 2.
    """
    check_parameters(shapes, 4, size)
    left = np.arange(size) / size

    def covered(begin: np.ndarray, extent: np.ndarray) -> np.ndarray:
        end = begin + extent * (1 - begin)
        low = np.maximum(left, begin[:, None])
        high = np.minimum(left + 1 / size, end[:, None])
        return np.maximum(high - low, 0) * size

    across, down = covered(*shapes[:, :2].T), covered(*shapes[:, 2:].T)
    return (down[:, :, None] * across[:, None, :]).astype(np.float32)


def check_parameters(rows: np.ndarray, width: int, size: int) -> None:
    """Raises ConfigError unless rows are so many numbers in 0..1 each, and size is 2 or more."""
    at_least(2, size=size)
    if rows.ndim != 2 or rows.shape[1] != width or not ((rows >= 0) & (rows <= 1)).all():
        raise ConfigError(f"parameters {list(rows.shape)} must be [n, {width}] in 0..1")
