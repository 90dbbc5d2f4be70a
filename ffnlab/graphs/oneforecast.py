"""Learning to forecast: the loss of fields, the balance of their gradients, and roll-out.

OneForecast (2025), `models.OneForecast`. A model gives the next state, and longer forecasts by
being given its own. Fields are far from each other in how hard they are, so before the loss the
gradients of all fields are brought to one length:

    loss = sum over steps of the mean over fields c of |found_c - true_c| / |true_c|
    g_c <- C w_c / (sum of w) g_c,   w_c = 1 / max(|g_c|, 1e-5)         (`balanced`)

with lengths over the places of a grid. It is learned for one step, and then at a small rate for
two, three, … steps: `forecast_loss` takes as many as its batch has.

What differs from the authors' code: a field that is zero everywhere is divided by 1; at a field
that is met exactly the gradient is 0, not NaN; noise on the inputs of training is an option here.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.losses import InformedLoss, Moment
from ffnlab.models.globe import Globe
from ffnlab.models.oneforecast import OneForecast

__all__ = ["ForecastBatch", "balanced", "forecast_loss", "relative_distance", "rollout"]

EPS = 1e-5  # of a gradient's length, the authors'


class ForecastBatch(NamedTuple):
    """Moments, and what came of each.

    Attributes:
      x: fields of a moment, [b, h, w, c], numbers that are told beside them included.
      y: fields one step later, two, …, [b, s, h, w, o].
      globe: that of the grid, whole in every batch.
      told: what is told beside the model's own fields from the second step on,
        [b, s, h, w, c - o]; None where the fields are all there is.
    """

    x: Any
    y: Any
    globe: Globe
    told: Any = None


def relative_distance(
    found: Float[Array, "h w c"], true: Float[Array, "h w c"]
) -> Float[Array, "c"]:
    """|found_c - true_c| / |true_c| of every field, lengths over the grid; |found_c| where the true
    field is zero everywhere.

    >>> relative_distance(jnp.full((1, 2, 1), 3.0), jnp.full((1, 2, 1), 2.0)).tolist()
    [0.5]
    """
    found, true = (jnp.asarray(fields, jnp.float32) for fields in (found, true))
    apart, size = (length(field) for field in (found - true, true))
    return apart / jnp.where(size > 0, size, 1)


def length(fields: Float[Array, "h w c"]) -> Float[Array, "c"]:
    """Of every field; its gradient at zero is zero."""
    squares = jnp.sum(jnp.square(fields), axis=(-3, -2))
    some = squares > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def balanced(fields: Float[Array, "*b h w c"], eps: float = EPS) -> Float[Array, "*b h w c"]:
    """The fields as they are; their gradients on the way back are brought to one length.

    That length is C / (sum over fields of 1 / |g_c|), of every example by itself, and a gradient
    shorter than eps is raised as one of eps.

    >>> gradient = jax.grad(lambda x: jnp.sum(balanced(x) * jnp.array([1.0, 3.0])))
    >>> gradient(jnp.ones((1, 1, 2))).tolist()
    [[[1.5, 1.5]]]
    """
    return fields


def balanced_back(eps: float, _: None, gradient: Array) -> tuple[Array]:
    wide = gradient.astype(jnp.float32)
    size = jnp.sqrt(jnp.sum(wide**2, axis=(-3, -2), keepdims=True))
    weight = 1 / jnp.maximum(size, eps)
    share = weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), eps)
    return ((gradient.shape[-1] * share * wide).astype(gradient.dtype),)


balanced.defvjp(lambda fields, eps: (fields, None), balanced_back)


def rollout(
    model: OneForecast,
    x: Float[Array, "h w c"],
    globe: Globe,
    steps: int,
    told: Float[Array, "s h w k"] | None = None,
    *,
    is_balanced: bool = False,
) -> Float[Array, "s h w o"]:
    """Forecasts one step ahead, two, …, each from the one before.

    Args:
      model: from c fields to o of them.
      x: the first moment.
      globe: of its grid.
      steps: how many (s), at least 1.
      told: what stands beside the model's fields after each step, k = c - o numbers of every place;
        the last is not read. None where k = 0.
      is_balanced: whether gradients are `balanced` at every step, in training.
    Raises:
      ConfigError: no step, or the model's output and what is told do not make an input again.
    """
    of_told = 0 if told is None else told.shape[-1]
    if steps < 1:
        raise ConfigError(f"steps={steps} must be at least 1")
    if steps > 1 and model.config.outputs + of_told != model.config.inputs:
        raise ConfigError(
            f"steps={steps}: the model gives {model.config.outputs} fields and told has {of_told}; "
            f"an input has {model.config.inputs}"
        )

    def one(x: Array, told: Array | None) -> tuple[Array, Array]:
        found = model(x, globe)
        found = balanced(found, EPS) if is_balanced else found
        again = found if told is None else jnp.concatenate([found, told], axis=-1)
        return (again if steps > 1 else x), found

    return jax.lax.scan(one, x, told, length=steps)[1]


def forecast_loss(*, balance: bool = True, noise: float = 0.0) -> InformedLoss:
    """The loss of forecasts, of as many steps as a batch has.

    Args:
      balance: whether gradients of fields are brought to one length.
      noise: standard deviation of what is added to the first moment, >= 0; drawn anew every step.
    Returns:
      a loss (model, `ForecastBatch`, moment) -> (sum over steps of the mean relative distance over
      fields [], {"first": that of the first step [], "rms": root of the mean squared error of all
      numbers []}); it is `informed`.
    Raises:
      ConfigError: negative noise; from the loss, as `rollout`.
    """
    if not noise >= 0:
        raise ConfigError(f"noise={noise} must be 0 or more")

    def loss(model: OneForecast, batch: ForecastBatch, moment: Moment) -> tuple:
        x, y = jnp.asarray(batch.x), jnp.asarray(batch.y)
        if noise:
            x = x + noise * jax.random.normal(moment.key, x.shape, x.dtype)

        def of_one(x: Array, told: Array | None) -> Array:
            steps = y.shape[1]
            return rollout(model, x, batch.globe, steps, told, is_balanced=balance)

        found = jax.vmap(of_one)(x, batch.told)
        each = jax.vmap(jax.vmap(relative_distance))(found, y).mean(axis=(0, 2))
        rms = jnp.sqrt(jnp.mean(jnp.square(found.astype(jnp.float32) - y)))
        return each.sum(), {"first": each[0], "rms": rms}

    return loss
