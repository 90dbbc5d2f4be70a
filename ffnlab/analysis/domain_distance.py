"""How far apart two sets of rows are: by how well a logistic regression tells them apart.

The proxy A-distance (Ben-David et al.; as in DANN, arXiv 1505.07818, section 5.1.1) is 2 (1 - 2 e),
e the error of a linear classifier of the domain on rows that it has not seen: 0 where domains look
alike, 2 where they are told apart without an error. The authors take a linear support vector
machine, the first half of each domain to learn from and the best of ten C by the error on the
second half, which makes e a little too small; a logistic regression and drawn halves are the only
difference here. A domain head that failed while features were trained against it proves nothing:
this one is fresh.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float
from scipy import optimize, sparse, special

from ffnlab.errors import ConfigError, check_seed

__all__ = ["DomainDistance", "domain_distance"]

PENALTIES = np.logspace(-5, 4, 10)  # C, as the authors have it
SPARSE = 0.1  # rows with a smaller share of numbers other than 0 are multiplied as sparse ones

Rows = Float[Array | np.ndarray, "..."]


class DomainDistance(NamedTuple):
    """What a fresh linear classifier of the domain reaches.

    Attributes:
      error: of the best one on unseen rows, each domain counting half; 0 to .5.
      distance: proxy A-distance, 2 (1 - 2 error); 0 to 2.
      penalty: its C.
    """

    error: float
    distance: float
    penalty: float


def domain_distance(source: Rows, target: Rows, *, seed: int = 0) -> DomainDistance:
    """The proxy A-distance of two sets of rows, inputs or features.

    Args:
      source, target: [n, d] and [m, d], two rows or more of each.
      seed: of the draw of halves, of which one is learned from and the other scored.
    Raises:
      ConfigError: other shapes, fewer rows, no columns, numbers that are not finite, or a seed
        outside 0..2**32 - 1.
    """
    check_seed(seed)
    parts = {"source": np.asarray(source, np.float64), "target": np.asarray(target, np.float64)}
    for name, part in parts.items():
        if part.ndim != 2 or len(part) < 2 or not part.shape[1] or not np.isfinite(part).all():
            raise ConfigError(f"{name} {part.shape}: two finite rows or more are needed, [n, d]")
    shapes = [part.shape for part in parts.values()]
    if shapes[0][1] != shapes[1][1]:
        raise ConfigError(f"source {shapes[0]} and target {shapes[1]} have unequal widths")
    random = np.random.default_rng(seed)
    halves = [np.array_split(part[random.permutation(len(part))], 2) for part in parts.values()]
    (x, signs), (unseen, wanted) = (joined(*both) for both in zip(*halves, strict=True))
    errors, start = [], np.zeros(x.shape[1] + 1)
    for penalty in PENALTIES:  # each begins where the one before it ended
        start = fitted(x, signs, penalty, start)
        wrong = np.sign(unseen @ start[1:] + start[0]) != wanted
        error = np.mean([wrong[wanted == sign].mean() for sign in (-1, 1)])
        errors.append(min(error, 1 - error))
    best = int(np.argmin(errors))
    return DomainDistance(errors[best], 2 * (1 - 2 * errors[best]), float(PENALTIES[best]))


def joined(source: np.ndarray, target: np.ndarray) -> tuple:
    """(rows of both, sparse where most numbers are 0; -1 for the source and 1 for the target)."""
    x = np.concatenate([source, target])
    signs = np.concatenate([-np.ones(len(source)), np.ones(len(target))])
    return (sparse.csr_array(x) if np.mean(x != 0) < SPARSE else x), signs


def fitted(x, signs: np.ndarray, penalty: float, start: np.ndarray) -> np.ndarray:
    """The offset and weights that minimize C sum log(1 + exp(-s (x w + b))) + |w|^2 / 2.

    Args:
      x: [n, d], dense or sparse.
      signs: [n], -1 or 1.
      penalty: C.
      start: [d + 1], where the search begins.
    """

    def cost(w: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (x @ w[1:] + w[0])
        pull = -penalty * signs * special.expit(-margins)
        gradient = np.concatenate([[pull.sum()], x.T @ pull + w[1:]])
        return penalty * np.logaddexp(0, -margins).sum() + w[1:] @ w[1:] / 2, gradient

    return optimize.minimize(cost, start, jac=True, method="L-BFGS-B").x
