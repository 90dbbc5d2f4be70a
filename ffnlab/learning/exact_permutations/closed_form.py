"""Exact Learning of Permutations for Nonzero Binary Inputs (arXiv 2502.16763, 2025): closed forms.

A wide network without biases, trained on the k basis vectors alone to send e_i to P e_i by gradient
descent on squares, ends on any input as a normal distribution. On a binary input with m ones,
divided by sqrt(m), its mean is one number for the outputs that are to be 1 and another for the
rest, whatever P is: positive for the former, negative for the latter (0 where m is 1 or k has no
rest). So the average of enough networks, cut between the two, is P on all 2^k - 1 inputs.

With the kernel's values a = K(1), b = K(0), s = K(1 / sqrt(m)) at cosines of unit vectors,

    c = b / (a + (k - 1) b),   S = m s + (k - m) b,   on = (s - c S) / (a - b),
    off = (b - c S) / (a - b)

`on` and `off` are also what the training outputs are weighed by, so that the variance of an output
over draws of the network, with the covariance q of outputs as drawn (q0 = q(0), qs = q(1/sqrt m)),

    v = q(1) + (q(1) - q0) A + q0 B^2 - 2 (m qs on + (k - m) q0 off),
    A = m on^2 + (k - m) off^2,  B = m on + (k - m) off

Everything is derived here and checked by linear algebra; the paper has these at the kernel of all
parameters (`ntk`). Its code has the standard parametrization, in which at its width the last layer
alone decides: `last_layer`. Its recorded figures are those of that kernel.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ffnlab.errors import ConfigError

__all__ = [
    "KERNELS",
    "Moments",
    "ensemble_size",
    "last_layer",
    "moments",
    "ntk",
    "safe_threshold",
]

Kernel = Callable[[float], float]  # cosine of two unit vectors -> value


def last_layer(u: float) -> float:
    """E relu(g . x) relu(g . x') for g ~ N(0, I): (u (pi - acos u) + sqrt(1 - u^2)) / (2 pi).

    It is the kernel of the last layer, and the covariance of outputs as drawn but for 1 / k.

    Args:
      u: cosine of two unit vectors.
    Raises:
      ConfigError: it lies outside of [-1, 1] by more than rounding.
    """
    u = cosine_of(u)
    return (u * (math.pi - math.acos(u)) + math.sqrt(1 - u * u)) / (2 * math.pi)


def ntk(u: float) -> float:
    """The kernel of both layers: u (pi - acos u) / (2 pi) + `last_layer`(u).

    Args and errors as `last_layer`.

    >>> ntk(1.0), round(ntk(0.0), 5)
    (1.0, 0.15915)
    """
    u = cosine_of(u)
    return u * (math.pi - math.acos(u)) / (2 * math.pi) + last_layer(u)


def cosine_of(u: float) -> float:
    """A cosine, of which rounding beyond -1 and 1 is cut; ConfigError for other numbers."""
    if not abs(u) <= 1 + 1e-6:
        raise ConfigError(f"u={u} is no cosine of two unit vectors; -1 to 1 is accepted")
    return min(max(u, -1.0), 1.0)


KERNELS: dict[str, Kernel] = {"ntk": ntk, "last layer": last_layer}


class Moments(NamedTuple):
    """What an output of a trained network is, over draws of the network.

    Attributes:
      on: mean where the output is to be 1.
      off: mean where it is to be 0.
      variance: of either.
    """

    on: float
    off: float
    variance: float


def moments(k: int, ones: int, kernel: Kernel = ntk, covariance: Kernel | None = None) -> Moments:
    """The moments of an output for an input with so many ones.

    Args:
      k: length of inputs and outputs, at least 1.
      ones: m, 1 to k.
      kernel: that training follows, of the cosine of two unit vectors; any positive definite one.
      covariance: of outputs as drawn; `last_layer` / k when None.
    Raises:
      ConfigError: a size out of range, or a kernel that is not positive definite on the inputs.

    >>> [round(x, 4) for x in moments(5, 2)]
    [0.5606, -0.0146, 0.0132]
    """
    check_sizes(k, ones)
    q = covariance if covariance is not None else lambda u: last_layer(u) / k
    cosine = 1 / math.sqrt(ones)
    a, b, s = (kernel(u) for u in (1.0, 0.0, cosine))
    if not (a > b and a + (k - 1) * b > 0):
        raise ConfigError(
            f"kernel has {a} at cosine 1 and {b} at 0; it is not positive definite on {k} vectors"
        )
    share = b / (a + (k - 1) * b) * (ones * s + (k - ones) * b)
    on, off = (s - share) / (a - b), (b - share) / (a - b)
    q1, q0, qs = q(1.0), q(0.0), q(cosine)
    squares, total = ones * on**2 + (k - ones) * off**2, ones * on + (k - ones) * off
    seen = ones * qs * on + (k - ones) * q0 * off
    rest = a - ones * s * on - (k - ones) * b * off  # of the kernel, given the basis
    if not rest >= -1e-9 * a:
        raise ConfigError(
            f"kernel has {s} at cosine {cosine:.4f} of an input with {ones} ones, beside {a} at 1 "
            f"and {b} at 0; it is not positive definite with the basis"
        )
    return Moments(on, off, q1 + (q1 - q0) * squares + q0 * total**2 - 2 * seen)


def safe_threshold(k: int, kernel: Kernel = ntk) -> float:
    """A cut that parts the means of every input: half the least `on`, that of m = k.

    Zero is none: the training inputs themselves have `off` = 0, where rounding decides.

    Raises:
      ConfigError: k below 1, or a kernel under which no cut parts the means.

    >>> round(safe_threshold(30), 3)
    0.023
    """
    check_sizes(k, 1)
    found = [moments(k, m, kernel) for m in range(1, k + 1)]
    cut = min(each.on for each in found) / 2
    rest = [each.off for each in found[: k - 1]]  # an input of ones has no other outputs
    if not max(rest, default=0.0) < cut:
        raise ConfigError(f"kernel: no cut parts means of at least {2 * cut} from {max(rest)}")
    return cut


def ensemble_size(
    k: int,
    ones: int,
    kernel: Kernel = ntk,
    *,
    delta: float = 0.1,
    threshold: float = 0.0,
    inputs: float = 1.0,
) -> int:
    """Networks whose average is right on so many inputs but for a chance of at most delta.

        N >= 2 v / gap^2 log(k inputs / delta),    gap the lesser of on - threshold, threshold - off

    by the tail of a normal distribution and the union of all outputs.

    Args:
      k, ones, kernel: see `moments`.
      delta: in (0, 1).
      threshold: an average above it is a 1.
      inputs: how many are to be right at once; 2.0**k - 1 for all.
    Returns:
      at least 1.
    Raises:
      ConfigError: an option out of range, or a threshold that does not part the means.

    >>> [ensemble_size(k, 2, last_layer) for k in (5, 10, 20, 30)]
    [65, 107, 202, 303]
    """
    if not 0 < delta < 1 or not 1 <= inputs < math.inf:
        raise ConfigError(
            f"delta={delta} must lie in (0, 1), inputs={inputs} be at least 1 and finite"
        )
    found = moments(k, ones, kernel)
    gap = found.on - threshold
    if ones < k:
        gap = min(gap, threshold - found.off)
    if not gap > 0:
        raise ConfigError(
            f"threshold={threshold} does not part the means {found.on} and {found.off} of inputs "
            f"with {ones} ones"
        )
    nats = math.log(k) + math.log(inputs) - math.log(delta)
    return max(math.ceil(2 * found.variance / gap**2 * nats), 1)


def check_sizes(k: int, ones: int) -> None:
    """Raises ConfigError unless 1 <= ones <= k."""
    if any(isinstance(n, bool) or not isinstance(n, int | np.integer) for n in (k, ones)):
        raise ConfigError(f"k={k!r} and ones={ones!r} must be whole numbers")
    if k < 1:
        raise ConfigError(f"k={k}: inputs have a length of at least 1")
    if not 1 <= ones <= k:
        said = "an input of zeros has no direction" if ones == 0 else f"1 to k={k} are accepted"
        raise ConfigError(f"ones={ones} of inputs of length k={k}: {said}")
