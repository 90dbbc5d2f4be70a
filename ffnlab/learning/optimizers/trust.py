"""Updates as long as the weights they change: LAMB and LARS (arXiv 1904.00962, Algorithms 1 and 2).

    ratio = phi(||x||) / ||u||,   x <- x - rate * ratio * u        for every tensor x of the model

u is Adam's update in LAMB and the momentum in LARS, weight decay included: decay turns the step and
leaves its length alone. phi(z) = min(max(z, low), high), or z itself. The two made batches of 32k
train in few steps; later work found that tuned Nesterov and Adam do as well (arXiv 2102.06356).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from ffnlab.errors import ConfigError
from ffnlab.learning.optimizers.masters import in_float32

__all__ = ["lamb", "lars", "matrices", "scale_by_trust_ratio", "sqrt_batch_schedule", "stacked"]

Mask = PyTree | Callable[[PyTree], PyTree]
Rate = float | Array | optax.Schedule


def stacked(params: PyTree) -> PyTree:
    """How many leading axes of each leaf count layers: a tree of ints, from 0 to 3.

    A parameter of a scanned model holds one tensor per layer, and its logical axes begin with
    "layers" (`ffnlab.models.stack`), after those of stages and repeats in a pipeline.
    """

    def of_node(node: PyTree) -> PyTree:
        axes = node.get_metadata().get("axes") if isinstance(node, nnx.Variable) else None
        count = axes.index("layers") + 1 if axes and "layers" in axes else 0
        return jax.tree.map(lambda leaf: count, node)

    return jax.tree.map(of_node, params, is_leaf=lambda node: isinstance(node, nnx.Variable))


def matrices(params: PyTree) -> PyTree:
    """Which leaves are matrices, stacked or not: a tree of bools.

    False for biases and for the scales of norms, which usually get neither decay nor a trust ratio.
    """
    return jax.tree.map(lambda leaf, count: leaf.ndim - count >= 2, params, stacked(params))


def scale_by_trust_ratio(
    bounds: tuple[float, float] | None = None,
    adapted: Mask | None = None,
    layer_axes: Mask = stacked,
) -> optax.GradientTransformation:
    """Scales the update of each tensor to the norm of its weights.

    `optax.scale_by_trust_ratio` with masks, clipped norms, float32 sums whatever the dtype, and one
    ratio per layer where layers are stacked.

    Args:
      bounds: (low, high) of phi; phi(z) = z when None.
      adapted: tree of bools, or a function from parameters to one; the other leaves keep their
        update. All when None.
      layer_axes: tree of ints, or a function from parameters to one: how many leading axes of a
        leaf count tensors of their own.
    Returns:
      an optax transformation; the ratio is 1 where either norm is 0. `update` needs the parameters.
    Raises:
      ConfigError: low > high, or one of them negative or not a number.
      ValueError: from `update`, without parameters or with integer leaves.
    """
    if bounds is not None and not 0 <= bounds[0] <= bounds[1]:
        raise ConfigError(f"bounds={bounds} must be (low, high) with 0 <= low <= high")

    def norm(x: Array, axes: int) -> Array:
        square = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        return jnp.sqrt(jnp.sum(square, axis=tuple(range(axes, x.ndim)), keepdims=True))

    def scaled(update: Array, param: Array, axes: int, chosen: bool) -> Array:
        if not chosen:
            return update
        length, step = norm(param, axes), norm(update, axes)
        wanted = length if bounds is None else jnp.clip(length, *bounds)
        is_zero = (length == 0) | (step == 0)
        ratio = jnp.where(is_zero, 1.0, wanted / jnp.where(is_zero, 1.0, step))
        return (ratio * update).astype(update.dtype)

    def update_fn(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        check(updates, params)
        chosen = jax.tree.map(lambda _: True, params) if adapted is None else adapted
        axes, chosen = (x(params) if callable(x) else x for x in (layer_axes, chosen))
        return jax.tree.map(scaled, updates, params, axes, chosen), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def check(updates: PyTree, params: PyTree | None) -> None:
    """Raises ValueError without parameters, or where an update is not of floating dtype."""
    if params is None:
        raise ValueError("params=None: the trust ratio needs the parameters in `update`")
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            where = jax.tree_util.keystr(path)
            raise ValueError(f"update{where} has dtype {leaf.dtype}; floating ones are accepted")


def lamb(
    rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    bounds: tuple[float, float] | None = None,
    decayed: Mask = matrices,
    adapted: Mask | None = None,
    layer_axes: Mask = stacked,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """LAMB (arXiv 1904.00962, Algorithm 2): Adam's update, scaled to the weights.

    Args:
      rate: learning rate: an adapted tensor moves by rate * ||x|| a step.
      b1, b2: of the averages of gradients and of their squares, in [0, 1).
      eps: added to the root of the average of squares.
      weight_decay: added to the update before the ratio.
      bounds: see `scale_by_trust_ratio`.
      decayed: which leaves decay; matrices by default.
      adapted: which leaves get a ratio; those that decay, when None.
      layer_axes: see `scale_by_trust_ratio`.
      mu_dtype: of the average of gradients; float32, or wider as the parameters, when None.
    Raises:
      ConfigError: b1 or b2 outside [0, 1), or bad bounds.
    """
    in_unit_interval(b1=b1, b2=b2)
    chain = optax.chain(
        optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype),
        optax.add_decayed_weights(weight_decay, decayed),
        scale_by_trust_ratio(bounds, decayed if adapted is None else adapted, layer_axes),
        optax.scale_by_learning_rate(rate),
    )
    return in_float32(chain)


def lars(
    rate: Rate,
    b1: float = 0.9,
    weight_decay: float = 0.0,
    *,
    bounds: tuple[float, float] | None = None,
    decayed: Mask = matrices,
    adapted: Mask | None = None,
    layer_axes: Mask = stacked,
) -> optax.GradientTransformation:
    """LARS as in arXiv 1904.00962, Algorithm 1: the averaged gradient, scaled to the weights.

    `optax.lars` takes the momentum after the ratio instead. Arguments as for `lamb`.

    Raises:
      ConfigError: b1 outside [0, 1), or bad bounds.
    """
    in_unit_interval(b1=b1)
    chain = optax.chain(
        optax.add_decayed_weights(weight_decay, decayed),
        optax.ema(b1, debias=False),
        scale_by_trust_ratio(bounds, decayed if adapted is None else adapted, layer_axes),
        optax.scale_by_learning_rate(rate),
    )
    return in_float32(chain)


def in_unit_interval(**values: float) -> None:
    """Raises ConfigError naming the first value outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{name}={value} must lie in [0, 1)")


def sqrt_batch_schedule(
    batch: int,
    steps: int,
    *,
    base_rate: float = 5 / 8e3,
    base_batch: int = 512,
    base_warmup: float = 1 / 320,
) -> Callable[[Float[Array, ""]], Float[Array, ""]]:
    """The rate for another batch size: peak by its square root, warm-up in proportion to it.

    Linear warm-up to base_rate * sqrt(batch / base_batch) over the fraction
    base_warmup * batch / base_batch of the steps (at most all), then linear to zero. The defaults
    are those of BERT in the paper: 5e-3 and a fifth at 32k.

    Args:
      batch: examples in a step.
      steps: of the run.
      base_rate, base_batch, base_warmup: a known good setting.
    Returns:
      step -> rate.
    Raises:
      ConfigError: a size or rate that is not positive.
    """
    for name, value in {
        "batch": batch,
        "steps": steps,
        "base_rate": base_rate,
        "base_batch": base_batch,
        "base_warmup": base_warmup,
    }.items():
        if not value > 0:
            raise ConfigError(f"{name}={value} must be positive")
    peak = base_rate * math.sqrt(batch / base_batch)
    warmup = max(1, round(steps * min(1.0, base_warmup * batch / base_batch)))
    rise = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules(
        [rise, optax.linear_schedule(peak, 0.0, max(1, steps - warmup))], [warmup]
    )
