"""The closed form of PMET and MEMIT: which change of a matrix writes values behind keys.

    D = argmin |K (W + D) - (K W + R)|^2 + lambda trace(D^T C D) = (K^T K + lambda C)^-1 K^T R

K: keys, the inputs of a down-projection at the last token of each subject, [n, h].
R: residuals, by how much what comes out is to change there, [n, d].
C: the second moment of all inputs on other text, E[k k^T], not centred, [h, h].
W, D: the matrix [h, d], applied as k @ W, and its change.

What differs from the authors' code: matrices are transposed, as ours are [in, out]; the system is
solved by Cholesky, not by an inverse, and where channels are never used (lambda C leaves directions
without any weight) the smallest of several minimisers is taken.
"""

import math
from typing import Literal

import numpy as np
import scipy.linalg
from jaxtyping import Float

from ffnlab.errors import ConfigError, NumericalError

__all__ = ["Spread", "share", "update"]

Spread = Literal["root", "linear"]


def share(left: int, spread: Spread = "root") -> float:
    """How much of the residual a layer takes, before which so many layers were to be edited.

    1 / sqrt(left) as PMET has it, 1 / left as MEMIT; the last layer takes all that is left.

    Args:
      left: layers that are not edited yet, this one included, >= 1.
      spread: "root" or "linear".

    >>> share(4), share(4, "linear"), share(1), share(1, "linear")
    (0.5, 0.25, 1.0, 1.0)
    """
    return 1 / math.sqrt(left) if spread == "root" else 1 / left


def update(
    keys: Float[np.ndarray, "n h"],
    residuals: Float[np.ndarray, "m d"],
    moment: Float[np.ndarray, "a b"],
    *,
    preserve: float,
) -> Float[np.ndarray, "h d"]:
    """The change of a matrix, see the module; computed in float64.

    Args:
      keys: K, a row for each fact.
      residuals: R [n, d], of this layer: `share` of what is missing.
      moment: C [h, h], symmetric, without negative directions.
      preserve: lambda >= 0, how much answers on other text weigh against the facts; C is a mean and
        K^T K a sum, so that lambda counts tokens.
    Returns:
      D, float64.
    Raises:
      ConfigError: shapes that do not fit, or preserve < 0.
      NumericalError: numbers that are not finite; preserve = 0 where K^T K has no inverse.
    Source: arXiv 2308.08742, equation of the update in `execute_pmet`; arXiv 2210.07229.

    >>> keys, residuals = np.array([[2.0, 0.0]]), np.array([[3.0]])
    >>> update(keys, residuals, np.eye(2), preserve=2.0).round(9).tolist()
    [[1.0], [0.0]]
    """
    keys, residuals, moment = (np.asarray(x, np.float64) for x in (keys, residuals, moment))
    n, h = keys.shape
    if residuals.shape[0] != n or moment.shape != (h, h):
        raise ConfigError(
            f"keys {keys.shape}, residuals {residuals.shape} and moment {moment.shape}; "
            f"[n, h], [n, d] and [h, h] are accepted"
        )
    if not preserve >= 0 or not math.isfinite(preserve):
        raise ConfigError(f"preserve={preserve} must be a finite number >= 0")
    named = {"keys": keys, "residuals": residuals, "moment": moment}
    bad = [name for name, values in named.items() if not np.isfinite(values).all()]
    if bad:
        raise NumericalError(f"{', '.join(bad)}: NaN or infinity; check the model's weights")
    system = keys.T @ keys + preserve * moment
    factor = cholesky(system)
    if factor is not None:
        return np.asarray(scipy.linalg.cho_solve((factor, True), keys.T @ residuals))
    if preserve == 0:
        raise NumericalError(
            f"preserve=0: of {n} keys over {h} channels K^T K has no inverse; preserve > 0 adds "
            "what the channels do on other text"
        )
    values, vectors = np.linalg.eigh(system)
    kept = values > tolerance(h) * values[-1]
    vectors = vectors[:, kept]
    return vectors @ ((vectors.T @ (keys.T @ residuals)) / values[kept, None])


def tolerance(h: int) -> float:
    """Below which part of its whole a direction of an h x h matrix is rounding."""
    return h * float(np.finfo(np.float64).eps)


def cholesky(system: Float[np.ndarray, "h h"]) -> Float[np.ndarray, "h h"] | None:
    """The lower factor of a symmetric matrix, or None where it has no inverse, to rounding."""
    try:
        factor = np.linalg.cholesky(system)
    except np.linalg.LinAlgError:
        return None
    least = tolerance(len(system)) * np.diagonal(system)
    return factor if np.all(np.diagonal(factor) ** 2 > least) else None
