"""Entropy and information of continuous rows from distances to nearest neighbours.

    H = -mean_i sum_j w_j log p_j(i) + 1/2 log det C
    p_j(i) = exp(psi(j)) / (V_d r_j(i)^d (n - 1))

r_j(i) is the distance of row i to its j-th nearest of the other rows once all are whitened by their
covariance C, V_d the volume of the unit ball. Up to four dimensions w = (1, 0, ..): Kozachenko and
Leonenko (1987). Beyond, the bias falls slower than n^(-1/2), and w is the smallest vector of sum 1
that cancels its leading terms (Berrett, Samworth and Yuan, arXiv 1606.00304); as the estimator of
arXiv 2305.08013 has it. In nats, on the host, in float64; never clipped: an estimate may be
negative.

What is continuous is told by dtype: floating numbers are, whole numbers are names of classes.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float
from scipy import spatial, special

from ffnlab.analysis.entropy import joint_states, mutual_information
from ffnlab.errors import ConfigError, at_least

__all__ = ["Estimate", "nearest_entropy", "nearest_information", "nearest_weights"]

Rows = Array | np.ndarray

PLAIN = 4  # dimensions up to which the nearest neighbour alone is best
STABLE = 8  # dimensions beyond which weights of five neighbours grow to hundreds
CUT = 1e-6  # singular values below this share of the largest are none


class Estimate(NamedTuple):
    """An estimate in nats.

    Attributes:
      value: may be negative.
      error: its standard deviation; of an information the sum over the entropies it is made of,
        which is an upper bound. It knows nothing of bias.
    """

    value: float
    error: float


def nearest_weights(neighbours: int, width: int) -> Float[np.ndarray, "k"]:
    """The weights w of so many neighbours in so many dimensions, their sum 1.

    Args:
      neighbours: k >= 1.
      width: d >= 1.
    Raises:
      ConfigError: fewer neighbours than the 1 + floor(d / 4) conditions of d > 4 dimensions.

    >>> nearest_weights(3, 2).tolist()
    [1.0, 0.0, 0.0]
    """
    at_least(1, neighbours=neighbours, width=width)
    weights = np.zeros(neighbours)
    if width <= PLAIN:
        weights[0] = 1
        return weights
    terms = width // PLAIN
    held = sorted({i * neighbours // width - 1 for i in range(1, width + 1)} - {-1})
    if len(held) < terms + 1:
        raise ConfigError(
            f"neighbours={neighbours} in {width} dimensions: at least {terms + 1} are needed"
        )
    j = np.array(held) + 1
    powers = 2 * np.arange(1, terms + 1)[:, None] / width
    rows = np.exp(special.gammaln(j + powers) - special.gammaln(j))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    conditions = np.concatenate([np.ones((1, len(held))), rows])
    wanted = np.concatenate([[1.0], np.zeros(terms)])
    weights[held] = np.linalg.lstsq(conditions, wanted, rcond=CUT)[0]
    return weights


def nearest_entropy(rows: Rows, *, neighbours: int = 5, jitter: float = 0.0) -> Estimate:
    """The differential entropy of what rows are drawn from.

    Args:
      rows: [n, d] or [n], floating, of n > neighbours draws.
      neighbours: how many; more than the first are used beyond four dimensions.
      jitter: standard deviation of normal noise added to rows, in those of each column; always the
        same draw. Rows that are equal have no finite entropy without it.
    Raises:
      ConfigError: too few rows or neighbours, numbers that are not finite, a covariance that is
        singular, equal rows.
    """
    return entropy_of(jittered(continuous("rows", rows), jitter, 0), neighbours, "rows")


def nearest_information(x: Rows, y: Rows, *, neighbours: int = 5, jitter: float = 0.0) -> Estimate:
    """I(X;Y) of pairs of rows, each side continuous or discrete by its dtype.

    Of two continuous sides H(X) + H(Y) - H(X,Y), each by `nearest_entropy`; of one
    H(X) - sum_y p(y) H(X | y); of none the plug-in estimate, whose error is given as 0.

    Args:
      x, y: [n, d] or [n], floating or whole numbers.
      neighbours, jitter: as `nearest_entropy`.
    Raises:
      ConfigError: as `nearest_entropy` (of two sides that determine each other the joint
        covariance is singular: their information is infinite); sides of unequal length; a class
        of too few rows.
    """
    if len(x) != len(y):
        raise ConfigError(f"x has {len(x)} rows, y {len(y)}")
    sides = {"x": np.asarray(x), "y": np.asarray(y)}
    is_class = {name: not np.issubdtype(side.dtype, np.floating) for name, side in sides.items()}
    ready = {
        name: classes(name, side)
        if is_class[name]
        else jittered(continuous(name, side), jitter, seed)
        for seed, (name, side) in enumerate(sides.items())
    }
    if all(is_class.values()):
        return Estimate(mutual_information(ready["x"], ready["y"]), 0.0)
    if any(is_class.values()):
        (named,) = (ready[name] for name in sides if is_class[name])
        (name,) = (name for name in sides if not is_class[name])
        return among_classes(ready[name], named, neighbours, name)
    both = np.concatenate([ready["x"], ready["y"]], axis=1)
    parts = [
        entropy_of(ready["x"], neighbours, "x"),
        entropy_of(ready["y"], neighbours, "y"),
        entropy_of(both, neighbours, "x and y together"),
    ]
    value = parts[0].value + parts[1].value - parts[2].value
    return Estimate(value, sum(part.error for part in parts))


def among_classes(rows: np.ndarray, named: np.ndarray, neighbours: int, name: str) -> Estimate:
    """H(X) - sum_y p(y) H(X | y)."""
    whole = entropy_of(rows, neighbours, name)
    value, error = whole
    for label, count in zip(*np.unique(named, return_counts=True), strict=True):
        inside = entropy_of(rows[named == label], neighbours, f"{name} of class {label}")
        value -= count / len(rows) * inside.value
        error += count / len(rows) * inside.error
    return Estimate(float(value), float(error))


def entropy_of(rows: np.ndarray, neighbours: int, name: str) -> Estimate:
    """`nearest_entropy` of float64 rows, under a name for errors."""
    n, d = rows.shape
    if n <= neighbours:
        raise ConfigError(f"{name} has {n} rows; more than neighbours={neighbours} are needed")
    weights = nearest_weights(neighbours, d)
    if d > STABLE:
        warnings.warn(
            f"{name}: {d} dimensions and {neighbours} neighbours give weights of up to "
            f"{np.abs(weights).max():.3g}; the estimate is unstable, compress to fewer",
            stacklevel=4,
        )
    whitened, half = whiten(rows, name)
    used = int(np.flatnonzero(weights)[-1]) + 1
    distances = spatial.KDTree(whitened).query(whitened, used + 1, workers=-1)[0][:, 1:]
    is_zero = distances[:, 0] == 0
    if is_zero.any():
        raise ConfigError(
            f"{name} has {is_zero.sum()} of {n} rows that are equal to another: their entropy is "
            "not finite; give jitter > 0, or whole numbers if they are classes"
        )
    ball = d / 2 * math.log(math.pi) - special.gammaln(d / 2 + 1)
    logs = special.digamma(np.arange(1, used + 1)) - ball - d * np.log(distances)
    each = (logs - math.log(n - 1)) @ weights[:used]
    return Estimate(float(half - each.mean()), float(each.std() / math.sqrt(n)))


def whiten(rows: np.ndarray, name: str) -> tuple[np.ndarray, float]:
    """(rows of unit covariance, 1/2 log det of the covariance they had)."""
    centred = rows - rows.mean(0)
    scale = centred.std(0)
    if not scale.all():
        rank = int(np.count_nonzero(scale))
        raise ConfigError(
            f"{name}: columns are constant; the covariance has rank at most {rank} of {len(scale)}"
        )
    scaled = centred / scale  # columns may differ by orders of magnitude
    values, vectors = np.linalg.eigh(scaled.T @ scaled / len(rows))
    least = np.finfo(np.float64).eps * len(rows) * values[-1]
    if values[0] <= least:
        rank = int(np.sum(values > least))
        raise ConfigError(
            f"{name}: the covariance has rank {rank} of {len(scale)}; drop what follows from the "
            "rest, or give jitter > 0"
        )
    half = float(np.log(scale).sum() + np.log(values).sum() / 2)
    return scaled @ (vectors / np.sqrt(values)) @ vectors.T, half


def continuous(name: str, rows: Rows) -> np.ndarray:
    """Rows [n, d] in float64; of [n] numbers one column."""
    rows = np.asarray(rows)
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not rows.shape[1] or not np.issubdtype(rows.dtype, np.floating):
        raise ConfigError(
            f"{name} is {rows.dtype}{list(rows.shape)}; floating rows [n, d] are needed"
        )
    if not np.isfinite(rows).all():
        raise ConfigError(f"{name} has NaN or infinity")
    return rows.astype(np.float64)


def classes(name: str, labels: Rows) -> np.ndarray:
    """A number for each row of names of classes."""
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer) and labels.dtype != bool:
        raise ConfigError(f"{name} is {labels.dtype}; floating or whole numbers are accepted")
    if labels.ndim == 1:
        return labels.astype(np.int64)
    return joint_states(labels.reshape(len(labels), -1))


def jittered(rows: np.ndarray, jitter: float, seed: int) -> np.ndarray:
    """Rows with the noise of `nearest_entropy`."""
    if not 0 <= jitter < math.inf:
        raise ConfigError(f"jitter={jitter} must be >= 0 and finite")
    if jitter == 0:
        return rows
    scale = rows.std(0)
    noise = np.random.default_rng(seed).standard_normal(rows.shape)
    return rows + jitter * np.where(scale > 0, scale, 1) * noise
