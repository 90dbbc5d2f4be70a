"""How far what a hypernetwork gives for earlier tasks has moved.

    R = 1/n sum_j sum_i Omega_ji (w_i(e_j*; theta*) - w_i(e_j*; theta))^2

over n earlier tasks j. theta* and e_j* are the parameters and the embeddings before the present
task; neither has a gradient, nor do the targets w(e_j*; theta*). Omega is 1, or how much each
weight matters.

Source: von Oswald et al., Continual learning with hypernetworks, arXiv 1906.00695, eq. 2; weights
of importance as in its code, and in dependency preserving hypernetworks (arXiv 2209.07712).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from ffnlab import tree
from ffnlab.errors import ConfigError, is_known
from ffnlab.models import Hypernet
from ffnlab.models.hypernet.inputs import check_task
from ffnlab.weights import Dense

__all__ = ["drift", "mean_drift", "outputs", "table_of", "with_table"]


def table_of(net: Hypernet) -> Float[Array, "tasks e"]:
    """The embeddings of all tasks."""
    return net.tasks.weight.dense()


def with_table(net: Hypernet, table: Float[Array, "tasks e"]) -> Hypernet:
    """The hypernetwork with these embeddings of tasks."""
    new = tree.copy(net)
    new.tasks.w.set_value(Dense(table))
    return new


def outputs(net: Hypernet) -> Float[Array, "tasks P"]:
    """The weights that are given for every task."""
    return jax.vmap(net.vector)(jnp.arange(net.spec.tasks))


def mean_drift(
    found: Float[Array, "tasks P"],
    targets: Float[Array, "tasks P"],
    old: Bool[Array, "tasks"],
    importance: Float[Array, "tasks P"] | None = None,
) -> Float[Array, ""]:
    """R of what is given and of what was; 0 where no task is old."""
    square = (found - stop_gradient(targets)) ** 2
    if importance is not None:
        square = stop_gradient(importance) * square
    each = jnp.where(old, square.sum(1), 0.0)
    return each.sum() / jnp.maximum(old.sum(), 1)


def drift(
    net: Hypernet,
    before: Hypernet,
    tasks: Int[Array, "n"] | tuple[int, ...],
    *,
    importance: Float[Array, "n P"] | None = None,
) -> Float[Array, ""]:
    """R by itself, for tasks that were learned.

    Args:
      net: the hypernetwork; the gradient is with respect to all of it but embeddings of tasks.
      before: what it was when the present task began (theta*, e*).
      tasks: those that were learned before, one or more.
      importance: Omega of each, >= 0; 1 when None.
    Returns:
      the mean over tasks of the sum over weights, [].
    Raises:
      ValueError: no task was learned, one is not there or is there twice, or importance is of
        another shape or negative.
    """
    if np.ndim(tasks) != 1 or not len(tasks):
        raise ConfigError(
            f"tasks has shape {np.shape(tasks)}: there must be a task that was learned before, in "
            "a row"
        )
    if is_known(tasks):
        check_task(net.spec, np.asarray(tasks))
        if len(np.unique(np.asarray(tasks))) != len(tasks):
            raise ConfigError(f"tasks={tasks}: each is accepted once")
    tasks = jnp.asarray(tasks)
    if importance is not None:
        check_importance(importance, (len(tasks), net.layout.size))
    kept = with_table(net, stop_gradient(table_of(before)))
    found, targets = (jax.vmap(model.vector)(tasks) for model in (kept, before))
    return mean_drift(found, targets, jnp.ones(len(tasks), bool), importance)


def check_importance(importance: Array, shape: tuple[int, int]) -> None:
    """Raises ConfigError for other weights than one of each task's weights, none below 0."""
    if importance.shape != shape:
        raise ConfigError(f"importance has shape {importance.shape}, {shape} is accepted")
    if is_known(importance) and not bool((np.asarray(importance) >= 0).all()):
        raise ConfigError("importance must be at least 0 everywhere")
