"""Losses of models that drop: with a key, and of classes that several views of a row agree on.

RpHGNN's leader-board runs: of `views` of a batch, of whose rows some have a known class,

    loss = sum over views of  CE(known rows) + weight CE(all rows, their pseudo class)

where the pseudo class of a row is the largest of its mean probabilities over the views.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ffnlab.errors import ConfigError, at_least
from ffnlab.losses import InformedLoss, Loss, Moment, masked

__all__ = ["consistency", "keyed"]


def keyed(loss: Loss) -> InformedLoss:
    """A loss of a model that drops, or draws otherwise, by a key that its call is given.

    Args:
      loss: of a model's call.
    Returns:
      the informed loss, whose model is called with `key=moment.key`.
    """

    def drawing(model: Callable, batch: PyTree, moment: Moment) -> tuple:
        return loss(functools.partial(model, key=moment.key), batch)

    return drawing


def consistency(*, views: int = 3, weight: float = 0.6) -> InformedLoss:
    """The loss of a model that takes a key and drops by it (`models.GroupNetwork`).

    Its batch is (rows, classes), classes [b] negative where they are not known.

    Args:
      views: of a batch.
      weight: of the pseudo classes.
    Returns:
      the loss: (model, batch, moment) -> (mean, {"accuracy": of known rows in a view, "agreement":
      share of rows of a view that have their pseudo class}).
    Raises:
      ConfigError: no view, or a weight below 0.
    """
    at_least(1, views=views)
    if not weight >= 0:
        raise ConfigError(f"weight={weight} must be 0 or more")

    def loss(
        model: PyTree, batch: tuple[PyTree, Int[Array, "b"]], moment: Moment
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        rows, classes = batch
        keys = jax.random.split(moment.key, views)
        logits = jax.vmap(lambda key: model(rows, key=key).astype(jnp.float32))(keys)
        pseudo = jax.nn.softmax(logits).mean(0).argmax(-1)
        apart = optax.softmax_cross_entropy_with_integer_labels
        agreed = jax.vmap(lambda one: apart(one, pseudo).mean())(logits).sum()
        known, metrics = jax.vmap(lambda one: masked(lambda _: one, batch))(logits)
        told = {
            "accuracy": metrics["accuracy"].mean(),
            "agreement": (logits.argmax(-1) == pseudo).mean(dtype=jnp.float32),
        }
        return known.sum() + weight * agreed, told

    return loss
