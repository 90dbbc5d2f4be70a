"""Meta-training: a metanetwork learns to make networks that are as good and easier to prune.

    L = sum over batches of loss(W', batch) + reg R(W'),   W' = what it makes of W

R is `ffnlab.pruning.group_penalty`; gradients reach the metanetwork alone. One step is on one data
model with all its batches, in one program for every structure of data models.

Source: Meta Pruning via Graph Metanetworks (2025), whose code sums the cross-entropy over the about
100 batches of CIFAR and adds the regularizer once, with reg = 10 and alpha = 16: of one batch, or
of a mean, reg is a hundredth of that. What differs: batches are summed in a loop that keeps the
activations of one of them; the regularizer is a loss and not an addition to gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ffnlab.errors import ConfigError, is_known
from ffnlab.graph import Graph
from ffnlab.losses import Loss, labelled
from ffnlab.models.meta_network import MetaNetwork
from ffnlab.pruning.group_importance import group_penalty
from ffnlab.pruning.meta.correcting import check_fits, correct
from ffnlab.pruning.meta.layouts import layout_of
from ffnlab.weights.base import AxisNames

__all__ = ["Lesson", "Lessons", "lesson", "meta_loss"]

C = TypeVar("C")


class Lesson(NamedTuple):
    """A data model and what it was trained on: a batch of meta-training.

    Attributes:
      model: the network that is to be corrected.
      graph: of it.
      batches: a tree whose leaves are [k, …]: k batches of the loss.
    """

    model: Any
    graph: Graph
    batches: PyTree

    @property
    def rows(self) -> int:
        """Of all batches."""
        k, size = jax.tree.leaves(self.batches)[0].shape[:2]
        return k * size

    def leaf_axes(self) -> "Lesson":
        """Names of the dimensions of each array: of batches the rows are cut on a mesh."""
        whole = lambda leaf: AxisNames([None] * jnp.ndim(leaf))  # noqa: E731
        cut = lambda leaf: AxisNames((None, "batch", *[None] * (jnp.ndim(leaf) - 2)))  # noqa: E731
        model, batches = jax.tree.map(whole, self.model), jax.tree.map(cut, self.batches)
        return Lesson(model, self.graph.leaf_axes(), batches)


def lesson(model: Any, rows: PyTree, *, batches: int = 1) -> Lesson:
    """A data model with its rows in equal batches; those that are left over are not used.

    Args:
      model: see `ffnlab.pruning.meta.layout_of`.
      rows: what a batch of the loss is, of all rows: leaves [rows, …].
      batches: how many (k).
    Raises:
      ConfigError: fewer rows than batches, or none; as `layout_of`.
    """
    count = min((len(leaf) for leaf in jax.tree.leaves(rows)), default=0)
    if not 1 <= batches <= count:
        raise ConfigError(f"batches={batches} of {count} rows: one row or more each is accepted")
    size = count // batches

    def cut(leaf: Array | np.ndarray) -> Array:
        return jnp.asarray(leaf[: batches * size]).reshape(batches, size, *leaf.shape[1:])

    return Lesson(model, layout_of(model).graph(), jax.tree.map(cut, rows))


class Lessons:
    """Position -> lesson, in turns; for `ffnlab.parallel.train`."""

    def __init__(self, lessons: Sequence[Lesson]):
        """Lessons in the order in which they are given.

        Raises:
          ConfigError: there are none.
        """
        if not lessons:
            raise ConfigError("lessons=[]: a data model or more is accepted")
        self.lessons = tuple(lessons)

    def __call__(self, position: int) -> Lesson:
        """The lesson of a step."""
        return self.lessons[position % len(self.lessons)]


def meta_loss(loss: Loss = labelled, *, reg: float | Array = 10.0, alpha: float = 16.0) -> Loss:
    """The loss of a metanetwork, for `ffnlab.learning.backprop`.

    Args:
      loss: of a data model: any of `ffnlab.losses` that is not informed and returns no statistics;
        batch norms compute with what they have.
      reg: weight of the penalty beside the sum over batches, >= 0.
      alpha: see `ffnlab.pruning.group_penalty`.
    Returns:
      the loss: (metanetwork, `Lesson`) -> (sum over batches + reg * penalty, {"data": mean of the
      loss over batches, "penalty": R, and the metrics of the loss, means over batches}).
    Raises:
      ConfigError: reg below 0, alpha below 1; from the loss, as `layout_of`, or a metanetwork of
        another layout.

    >>> from ffnlab.layers import MLP
    >>> from ffnlab.models import MetaNetworkConfig
    >>> net = MetaNetworkConfig(nodes=1, edges=1, width=4).make(key=jax.random.key(0))
    >>> rows = jnp.ones((6, 4)), jnp.zeros(6, int)
    >>> one = lesson(MLP((4, 3, 2), key=jax.random.key(1)), rows, batches=2)
    >>> sorted(meta_loss(reg=0.1)(net, one)[1])
    ['accuracy', 'data', 'penalty']
    """
    if is_known(reg) and not reg >= 0:
        raise ConfigError(f"reg={reg} must be at least 0")
    if not alpha >= 1:
        raise ConfigError(f"alpha={alpha} must be at least 1")

    def of_lesson(network: MetaNetwork, batch: Lesson) -> tuple[Float[Array, ""], dict[str, Array]]:
        check_fits(network.config, layout_of(batch.model))
        new = correct(network, batch.model, batch.graph)

        def costs(rows: PyTree) -> tuple[Array, dict[str, Array]]:
            mean, metrics = loss(new, rows)[:2]
            return mean, dict(metrics)

        means, metrics = each(costs, batch.batches)
        penalty = group_penalty(new, alpha=alpha)
        told = {name: values.mean() for name, values in metrics.items()}
        return means.sum() + reg * penalty, {**told, "data": means.mean(), "penalty": penalty}

    return of_lesson


def each(costs: Callable[[PyTree], C], batches: PyTree) -> C:
    """What a function gives for every batch, [k]; of several the activations of one are kept.

    One alone is called as it is: in a loop, convolutions on CPUs are several times slower.
    """
    count = len(jax.tree.leaves(batches)[0])
    if count == 1:
        found = costs(jax.tree.map(lambda leaf: leaf[0], batches))
        return jax.tree.map(lambda leaf: leaf[None], found)
    again = jax.checkpoint(costs, policy=jax.checkpoint_policies.nothing_saveable)
    return jax.lax.scan(lambda _, rows: (None, again(rows)), None, batches)[1]
