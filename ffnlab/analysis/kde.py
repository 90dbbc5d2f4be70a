"""Bounds of the entropy of activations with a little Gaussian noise: kernels in place of cells.

A mixture of n Gaussians of variance v, one on each row, has an entropy between

    H <= d/2 - mean_i log mean_j N(t_i - t_j; 0, v)       (Kullback-Leibler distances)
    H >= d/2 + d/2 log(1/4) - mean_i log mean_j N(t_i - t_j; 0, 4v)       (Bhattacharyya)

and given the input d/2 (log 2 pi v + 1). In nats; never clipped. Distances are sums of squared
differences: |a|^2 - 2 ab + |b|^2 loses them where rows are long beside sqrt(v), and with them the
bound by log n. v follows what a layer does where
it is a share of the layer's largest activation (aKDE, arXiv 1902.09037).

What differs from that paper's code: one number is not both a standard deviation and a variance, no
noise is drawn, and no absolute values are taken.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from ffnlab.analysis.entropy import Host, Information, check_finite, check_rows
from ffnlab.errors import ConfigError, at_least, is_known

__all__ = ["Kernels", "mixture_entropy"]

ROWS = 512  # of distances at once
BOUNDS = ("lower", "upper")


def mixture_entropy(
    values: Float[Host, "n d"],
    variance: float | Float[Array, ""],
    *,
    bound: str = "upper",
    among: Float[Host, "n"] | None = None,
) -> Float[Array, ""]:
    """A bound in nats of the entropy of rows with noise.

    Args:
      values: activations.
      variance: v of the noise, > 0 and finite.
      bound: "upper" or "lower".
      among: 1 for each row that counts, else 0; all when None.
    Raises:
      ConfigError: another bound or variance, no rows or units.
      NumericalError: values that are not finite.
    """
    if bound not in BOUNDS:
        raise ConfigError(f"bound={bound!r} is not one of {BOUNDS}")
    check_variance(variance)
    check_rows("values", values)
    check_finite("values", values)
    values = jnp.asarray(values)
    n, d = values.shape
    spread = variance if bound == "upper" else 4 * jnp.asarray(variance)
    shift = 0.0 if bound == "upper" else d / 2 * math.log(1 / 4)
    weights = jnp.ones(n) if among is None else among
    rows = -(-n // ROWS) * ROWS if n > ROWS else n
    padded = jnp.pad(values, ((0, rows - n), (0, 0)))

    def of_rows(part: Float[Array, "m d"]) -> Float[Array, "m"]:
        square = jnp.sum((part[:, None] - values) ** 2, axis=-1)
        return jax.nn.logsumexp(-square / (2 * spread), axis=1, b=weights)

    parts = jax.lax.map(of_rows, padded.reshape(-1, min(n, ROWS), d)).reshape(-1)[:n]
    count = weights.sum()
    logs = jnp.where(weights > 0, parts, 0) - jnp.log(count) * weights
    mean = jnp.sum(logs * weights) / count - d / 2 * jnp.log(2 * jnp.pi * spread)
    return d / 2 + shift - mean


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Both informations of a layer by kernels.

    Attributes:
      classes: how many labels there are.
      variance: v of the noise, or of `adaptive` the share c of v = (c max |t|)^2.
      bound: "upper" or "lower".
      adaptive: whether v follows the layer.
    """

    classes: int
    variance: float = 0.01
    bound: str = "upper"
    adaptive: bool = False

    def __post_init__(self) -> None:
        at_least(1, classes=self.classes)
        check_variance(self.variance)
        if self.bound not in BOUNDS:
            raise ConfigError(f"bound={self.bound!r} is not one of {BOUNDS}")

    def __call__(
        self,
        values: Float[Host, "n d"],
        labels: Integer[Host, "labels"],
        inputs: Integer[Host, "inputs"] | None = None,
    ) -> Information:
        """I(X;T) and I(T;Y) in nats; the inputs make no difference, as T follows from X but noise.

        A layer that gives one value knows nothing.

        Raises:
          ConfigError: labels beyond the classes, or that are not a whole number for each row, no
            rows or units.
          NumericalError: values that are not finite.
        """
        check_rows("values", values, labels=labels, inputs=inputs)
        if is_known(labels):
            told = np.asarray(labels)  # on the host: under jit what jax computes is not known
            if not (0 <= told.min() and told.max() < self.classes):
                raise ConfigError(
                    f"labels are {told.min()} to {told.max()}; classes={self.classes} are numbered "
                    "from 0"
                )
        d = values.shape[1]
        largest = jnp.abs(values).max()
        v = jnp.float32(self.variance)
        if self.adaptive:
            v = (self.variance * jnp.where(largest > 0, largest, 1)) ** 2
        whole = mixture_entropy(values, v, bound=self.bound)
        known = jnp.float32(0)
        for label in range(self.classes):
            among = (labels == label).astype(values.dtype)
            share = among.mean()
            inside = mixture_entropy(values, v, bound=self.bound, among=among)
            known = known + jnp.where(share > 0, share * inside, 0)
        return Information(whole - d / 2 * (jnp.log(2 * jnp.pi * v) + 1), whole - known)


def check_variance(variance: float | Array) -> None:
    """Raises ConfigError for a variance that is known and not positive and finite."""
    if is_known(variance) and not 0 < variance < math.inf:
        raise ConfigError(f"variance={variance} must be positive and finite")
