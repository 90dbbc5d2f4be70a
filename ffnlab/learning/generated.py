"""The loss of a hypernetwork: that of what it generates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from ffnlab.errors import ConfigError, is_known
from ffnlab.losses import Loss
from ffnlab.models import Condition, Hypernet
from ffnlab.models.hypernet.inputs import check_task

__all__ = ["generated"]


def generated(loss: Loss, *, penalty: float | Array = 0.0) -> Loss:
    """A loss of targets as one of the hypernetwork that gives their weights.

        mean over i of  loss(target_i, rows_i) + penalty * mean(Theta_i^2)

    Weight decay of a hypernetwork's own parameters is no weight decay of what it generates;
    `penalty` is.

    Args:
      loss: of a target, which the hypernetwork makes for each inputs: any of `ffnlab.losses` that
        is not informed and returns no statistics.
      penalty: weight of the mean square of a target's weights, >= 0.
    Returns:
      the loss: (hypernetwork, (inputs, rows)) -> (mean, metrics of `loss`, averaged). Inputs are a
      `Condition` of arrays [n, …], or numbers of tasks [n]; rows a tree of arrays [n, …], a batch
      for each.
    Raises:
      ConfigError: penalty below 0; from the loss ValueError, as `Hypernet.vector`.

    >>> from ffnlab.losses import labelled
    >>> from ffnlab.models import HypernetConfig, MLPConfig
    >>> net = HypernetConfig(MLPConfig((3, 2))).make(key=jax.random.key(0))
    >>> rows = jnp.ones((1, 5, 3)), jnp.zeros((1, 5), int)
    >>> generated(labelled)(net, (jnp.array([0]), rows))[0].shape
    ()
    """
    if is_known(penalty) and not 0 <= penalty < math.inf:
        raise ConfigError(f"penalty={penalty} must be finite and at least 0")

    def of_targets(
        net: Hypernet, batch: tuple[Condition | Int[Array | np.ndarray, "n"], PyTree]
    ) -> tuple[Array, dict[str, Array]]:
        inputs, rows = batch
        tasks = inputs.task if isinstance(inputs, Condition) else inputs
        if tasks is not None:
            check_task(net.spec, tasks)

        def one(inputs: Condition | Array, rows: PyTree) -> tuple[Array, dict[str, Array]]:
            vector = net.vector(inputs)
            mean, metrics = loss(net.build(vector), rows)[:2]
            if is_known(penalty) and penalty == 0:
                return mean, dict(metrics)
            square = jnp.mean(vector.astype(jnp.float32) ** 2)
            return mean + penalty * square, {**metrics, "weights": square}

        costs, metrics = jax.vmap(one)(inputs, rows)
        return costs.mean(), {name: value.mean() for name, value in metrics.items()}

    return of_targets
