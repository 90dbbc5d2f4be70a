"""Batch normalization whose statistics are data that a call returns (arXiv 1502.03167).

A layer never changes: in training form it gives its output with the batch's `Moments`, `measured`
collects those of a whole model by path, a loss returns them, and `written` makes the model whose
running statistics have moved. The moments of the parts of a batch are `merged` to those of the
whole, exactly, before they are written.
"""

import contextvars
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers.norms import Scaled
from ffnlab.layers.stacking import Statistic

__all__ = ["BatchNorm", "FixedAffine", "Moments", "measured", "written"]

M = TypeVar("M", bound=nnx.Module)


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


class BatchNorm(Scaled):
    """(x - mean) / sqrt(variance + eps) * scale + bias, of every channel.

    A call uses the running statistics. `in_training` uses those of the batch, over all axes but the
    last, and returns them: in a jitted step over a sharded batch they are those of the global
    batch. Of a batch that is taken in parts (microbatches) each part is normalized by itself, and
    the moments of the whole batch move the running statistics once.

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

    def updated(self, moments: Moments) -> "BatchNorm":
        """A norm whose running statistics have moved towards those of a batch."""
        spread = moments.variance
        if self.unbiased:
            n = moments.count[..., None]
            spread = spread * n / jnp.maximum(n - 1, 1.0)
        old = self.mean.get_value(), self.variance.get_value()
        share = self.momentum
        mean, variance = (
            (1 - share) * was + share * now
            for was, now in zip(old, (moments.mean, spread), strict=True)
        )
        return self.with_statistics(mean, variance)

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
) -> tuple[object, dict[str, Moments]]:
    """Runs `model(*args, **kwargs)` with every batch norm in training form.

        def loss(model, batch):
            logits, moments = measured(model, batch[0])
            nats, metrics = labelled(lambda _: logits, batch)
            return nats, metrics, moments

    A norm that runs more than once measures all its inputs as one. Norms of a scanned stack live
    inside the scan: `models.unstack` first.

    Returns:
      (output, moments by the norm's path).
    Raises:
      SelectionError: the model has no batch norm, or one of them did not run.
    """

    def in_training(path: str, norm: BatchNorm) -> BatchNorm:
        new = tree.copy(norm)
        new.__class__ = _InTraining
        new.path = path
        return new

    noting = tree.map_at_path(model, tree.of_type(BatchNorm), in_training)
    paths = [path for path, _ in tree.select(noting, tree.of_type(_InTraining)).items()]
    token = _moments.set({})
    try:
        output = noting(*args, **kwargs)
        found = _moments.get()
    finally:
        _moments.reset(token)
    missing = [path for path in paths if path not in found]
    if missing:
        raise tree.SelectionError(f"batch norms did not run: {missing[:5]}")
    return output, {path: joined(found[path]) for path in paths}


def joined(parts: list[Moments]) -> Moments:
    """The moments of all parts together."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *parts).merged()


def written(model: M, moments: Mapping[str, Moments]) -> M:
    """The model whose batch norms, by path, have moved towards some moments.

    Raises:
      SelectionError: a path does not exist.
      ValueError: there is no batch norm at a path.
    """
    nodes = dict(tree.walk(model))
    for path in moments:
        if path in nodes and not isinstance(nodes[path], BatchNorm):
            raise ValueError(f"{path} is a {type(nodes[path]).__name__}, no BatchNorm")
    moved = lambda path, m: nodes[path].updated(m) if path in nodes else None  # noqa: E731
    return tree.replace(model, {path: moved(path, m) for path, m in moments.items()})
