"""Batch normalization whose statistics are data that a call returns (arXiv 1502.03167).

A layer never changes: in training form it gives its output with the batch's `Moments`, and
`statistics` says what they make of the running ones. `measured` runs a whole model so, and gives
the new statistics by path, as a loss returns them.
"""

import contextvars
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError, SelectionError
from ffnlab.layers.norms import Scaled
from ffnlab.layers.stacking import Statistic
from ffnlab.weights.base import register, static

__all__ = ["BatchNorm", "FixedAffine", "Moments", "NextVariance", "measured"]


class Moments(NamedTuple):
    """What a batch norm measures of a batch.

    Attributes:
      count: [] float32, values of every channel.
      mean: [d] float32.
      variance: [d] float32, sums of squares divided by the count.
    """

    count: Float[Array, "*parts"]
    mean: Float[Array, "*parts d"]
    variance: Float[Array, "*parts d"]

    @classmethod
    def of(cls, x: Float[Array, "*b d"]) -> "Moments":
        """The moments of every channel over all other axes, in float32."""
        x32, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
        mean = x32.mean(axes)
        return cls(jnp.float32(x.size // x.shape[-1]), mean, ((x32 - mean) ** 2).mean(axes))

    def merged(self) -> "Moments":
        """The moments of the whole from those of its parts, which lie along the first axis.

        mean = sum_i n_i mean_i / n,   variance = sum_i n_i (variance_i + (mean_i - mean)^2) / n
        """
        n = self.count.sum(0)
        share = (self.count / jnp.maximum(n, 1.0))[:, None]
        mean = (share * self.mean).sum(0)
        return Moments(n, mean, (share * (self.variance + (self.mean - mean) ** 2)).sum(0))


@register
@dataclasses.dataclass(frozen=True)
class NextVariance:
    """A running variance that has moved towards that of a batch, made of means over its rows
    (`ffnlab.losses.Unsettled`).

    Those of the parts of a batch average to those of the batch, and `settle` then gives what the
    whole batch would: the variance of a batch is that within its parts and that of their means,
    which is measured from the running mean, so that float32 keeps its digits.

    Attributes:
      within: variance of a part.
      mean, square: of a part, its mean less the running one, and the square of that.
      was: the running variance.
      count: [] values of every channel in a part.
      momentum, unbiased: the norm's (static).
    """

    within: Float[Array, "*stack d"]
    mean: Float[Array, "*stack d"]
    square: Float[Array, "*stack d"]
    was: Float[Array, "*stack d"]
    count: Float[Array, "*stack"]
    momentum: float = static()
    unbiased: bool = static()

    def settle(self, parts: int) -> Float[Array, "*stack d"]:
        """The new running variance, after so many equal parts have been averaged."""
        variance = self.within + jnp.maximum(self.square - self.mean**2, 0.0)
        if self.unbiased:
            n = parts * self.count[..., None]
            variance = variance * n / jnp.maximum(n - 1, 1.0)
        return (1 - self.momentum) * self.was + self.momentum * variance


class BatchNorm(Scaled):
    """(x - mean) / sqrt(variance + eps) * scale + bias, of every channel.

    A call uses the running statistics. `in_training` uses those of the batch, over all axes but the
    last, and returns them: in a jitted step over a sharded batch they are those of the global
    batch. Of a batch that is taken in parts (microbatches) each part is normalized by its own
    moments, and those of the whole batch move the running statistics, once.

    Attributes:
      scale, bias: Param holding [d], or None.
      mean, variance: Statistic holding [d] float32, the running ones.
      eps: added to the variance (static).
      momentum: share of a new batch in the running statistics, as torch names it (flax calls
        1 - momentum so) (static).
      unbiased: whether the running variance is of sums divided by count - 1, as torch has it; what
        normalizes a batch in training never is (static).
    """

    def __init__(
        self,
        d: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        unbiased: bool = False,
        scale: bool = True,
        bias: bool = True,
        axis: str = "embed",
        dtype: DTypeLike = jnp.float32,
    ):
        """Sets the scale and the running variance to one, the bias and the running mean to zero.

        Raises:
          ConfigError: a momentum outside 0..1.
        """
        if not 0 <= momentum <= 1:
            raise ConfigError(f"momentum={momentum} must lie in 0..1")
        super().__init__(d, eps=eps, scale=scale, bias=bias, axis=axis, dtype=dtype)
        self.mean = Statistic(jnp.zeros((d,), jnp.float32), axes=(axis,))
        self.variance = Statistic(jnp.ones((d,), jnp.float32), axes=(axis,))
        self.momentum, self.unbiased = momentum, unbiased

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.normalized(x, self.mean.get_value(), self.variance.get_value())

    def in_training(self, x: Float[Array, "*b d"]) -> tuple[Float[Array, "*b d"], Moments]:
        """(x normalized by its own moments, those moments)."""
        moments = Moments.of(x)
        fixed = jax.tree.map(jax.lax.stop_gradient, moments)
        return self.normalized(x, moments.mean, moments.variance), fixed

    def normalized(
        self, x: Float[Array, "*b d"], mean: Float[Array, "d"], variance: Float[Array, "d"]
    ) -> Float[Array, "*b d"]:
        """x normalized by the given statistics, in x's dtype."""
        y = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + self.eps)
        return self.scaled(y).astype(x.dtype)

    def statistics(self, moments: Moments) -> dict[str, PyTree]:
        """What the moments of a batch, or of a part of one, make of the running statistics.

        Returns:
          by attribute: "mean" [d], which averages over parts as it is, and "variance", a
          `NextVariance`. Those of a stacked norm have its leading axes.
        """
        old = self.mean.get_value()
        off = moments.mean - old
        was, share = self.variance.get_value(), self.momentum
        variance = NextVariance(
            moments.variance, off, off**2, was, moments.count, share, self.unbiased
        )
        return {"mean": old + share * off, "variance": variance}

    def with_statistics(self, mean: Float[Array, "d"], variance: Float[Array, "d"]) -> "BatchNorm":
        """A norm with other running statistics."""
        new = tree.copy(self)
        new.mean = Statistic(mean, axes=self.mean.axes)
        new.variance = Statistic(variance, axes=self.variance.axes)
        return new

    def affine(self) -> tuple[Float[Array, "d"], Float[Array, "d"]]:
        """(a, c), float32: a call is a * x + c."""
        a = jax.lax.rsqrt(self.variance.get_value() + self.eps)
        if self.scale is not None:
            a = a * self.scale.get_value().astype(jnp.float32)
        c = -self.mean.get_value() * a
        return a, c if self.bias is None else c + self.bias.get_value().astype(jnp.float32)


class FixedAffine(nnx.Module):
    """y = a * x + c of every channel: a batch norm whose statistics and parameters are settled.

    Attributes:
      a, c: Statistic holding [d] float32; neither is trained.
    """

    def __init__(self, a: Float[Array, "d"], c: Float[Array, "d"], *, axis: str = "embed"):
        self.a, self.c = (Statistic(v.astype(jnp.float32), axes=(axis,)) for v in (a, c))

    def affine(self) -> tuple[Float[Array, "d"], Float[Array, "d"]]:
        """(a, c)."""
        return self.a.get_value(), self.c.get_value()

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        a, c = self.affine()
        return (x.astype(jnp.float32) * a + c).astype(x.dtype)


_moments: contextvars.ContextVar[dict[str, list[Moments]]] = contextvars.ContextVar("moments")


class _InTraining(BatchNorm):
    """A batch norm that a call of `measured` meets: in training form, its moments noted."""

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y, moments = self.in_training(x)
        _moments.get().setdefault(self.path, []).append(moments)
        return y


def measured(
    model: nnx.Module, *args: object, **kwargs: object
) -> tuple[object, dict[str, PyTree]]:
    """Runs `model(*args, **kwargs)` with every batch norm in training form.

        def loss(model, batch):
            logits, statistics = measured(model, batch[0])
            nats, metrics = labelled(lambda _: logits, batch)
            return nats, metrics, statistics

    A norm that runs more than once measures all its inputs as one.

    Returns:
      (output, new statistics by path, see `BatchNorm.statistics`).
    Raises:
      SelectionError: the model has no batch norm, or one of them did not run.
      ConfigError: one is in a scanned stack, inside of which its moments would stay.
    """

    def in_training(path: str, norm: BatchNorm) -> BatchNorm:
        new = tree.copy(norm)
        new.__class__ = _InTraining
        new.path = path
        return new

    norms = tree.select(model, tree.of_type(BatchNorm))
    scanned = [path for path, norm in norms.items() if norm.mean.get_value().ndim > 1]
    if scanned:
        raise ConfigError(
            f"batch norms of a scanned stack cannot be measured: {scanned[:3]}; models.unstack the "
            "model, or train it with scan = false"
        )
    noting = tree.replace(model, {path: in_training(path, norm) for path, norm in norms.items()})
    token = _moments.set({})
    try:
        output = noting(*args, **kwargs)
        found = _moments.get()
    finally:
        _moments.reset(token)
    missing = [path for path in norms if path not in found]
    if missing:
        raise SelectionError(f"batch norms did not run: {missing[:5]}")
    return output, {
        f"{path}.{name}": value
        for path, norm in norms.items()
        for name, value in norm.statistics(joined(found[path])).items()
    }


def joined(parts: list[Moments]) -> Moments:
    """The moments of all parts together."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *parts).merged()
