"""What a layer is to make of its rows, from its own output alone.

    h: [r, N, w] output of a layer for each copy of the graph; k: the nodes learned from

Each has five parts, all that the rule asks of it: `loss` is minimized, `onward` is what the next
layer reads, `scores` are what a layer says of what is asked, summed over layers, `total` makes the
answer of the sum, and `figure` says how good answers are, the more the better.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from ffnlab.graph.segments import wide
from ffnlab.learning.forward_gnn.inputs import GraphInputs, Host
from ffnlab.learning.forward_gnn.options import ForwardGNNOptions

__all__ = ["ForwardForward", "Links", "Objective", "SingleForward", "objective_of", "rank_auc"]


@runtime_checkable
class Objective(Protocol):
    """What the rule asks of an objective."""

    appends: bool  # whether labels are appended to features

    def loss(
        self, h: Float[Array, "r N w"], inputs: GraphInputs, targets: Int[Host, "k"]
    ) -> Float[Array, ""]:
        """What is minimized."""
        ...

    def onward(self, h: Float[Array, "r N w"]) -> Float[Array, "q N w"]:
        """Rows that the next layer reads of what is learned from: each copy's, or one's for all."""
        ...

    def scores(self, h: Float[Array, "r N w"], inputs: GraphInputs) -> Float[Array, "..."]:
        """What a layer says of what is asked."""
        ...

    def total(self, summed: Float[Array, "..."], count: int | Array) -> Float[Array, "..."]:
        """The answer of the scores of `count` layers."""
        ...

    def figure(self, answers: Float[Array, "..."], targets: Int[Host, "k"]) -> Float[Array, ""]:
        """How good answers are."""
        ...


@dataclasses.dataclass(frozen=True)
class SingleForward:
    """Nodes are to resemble the virtual node of their class: one copy, no negative ones.

        logits = H_k H_virtual^T / T;   loss = mean cross-entropy;   scores = softmax(logits)

    Attributes:
      classes: how many (C).
      temperature: T > 0.
    """

    classes: int
    temperature: float | Array = 1.0
    appends = False

    def logits(self, h: Float[Array, "1 N w"]) -> Float[Array, "n C"]:
        """Similarities of nodes and classes."""
        nodes, classes = h[0, : -self.classes], h[0, -self.classes :]
        return wide(nodes @ classes.T) / self.temperature

    def loss(
        self, h: Float[Array, "1 N w"], inputs: GraphInputs, targets: Int[Host, "n"]
    ) -> Float[Array, ""]:
        """Mean cross-entropy of the nodes learned from."""
        wanted = jnp.maximum(targets, 0)
        nats = optax.softmax_cross_entropy_with_integer_labels(self.logits(h), wanted)
        return mean_where(nats, targets >= 0)

    def onward(self, h: Float[Array, "1 N w"]) -> Float[Array, "1 N w"]:
        """All rows."""
        return h

    def scores(self, h: Float[Array, "1 N w"], inputs: GraphInputs) -> Float[Array, "n C"]:
        """The share of each class."""
        return jax.nn.softmax(self.logits(h))

    def total(self, summed: Float[Array, "n C"], count: int | Array) -> Float[Array, "n C"]:
        """The sum."""
        return summed

    def figure(self, answers: Float[Array, "n C"], targets: Int[Host, "n"]) -> Float[Array, ""]:
        """Accuracy."""
        return accuracy(answers, targets)


@dataclasses.dataclass(frozen=True)
class ForwardForward:
    """Rows are to be long where the label that is written is true, and short where it is not.

        goodness = |h|^2 - theta;   loss = mean softplus(-goodness) of the true copy
                                           + mean over the others of mean softplus(goodness)

    The first copy has true labels. Asked for classes there is a copy for each, in which all nodes
    that are asked have that class: scores = mean_j h_j^2 - theta, a mean where the loss has a sum.

    Attributes:
      virtual: how many virtual nodes there are; 0 where labels are appended.
      threshold: theta.
    """

    virtual: int
    threshold: float | Array = 2.0

    @property
    def appends(self) -> bool:
        """Whether labels are appended to features."""
        return self.virtual == 0

    def rows(self, h: Float[Array, "r N w"]) -> Float[Array, "r n w"]:
        """Those of nodes that are not virtual."""
        return wide(h[:, : h.shape[1] - self.virtual])

    def loss(
        self, h: Float[Array, "r N w"], inputs: GraphInputs, targets: Int[Host, "n"]
    ) -> Float[Array, ""]:
        """Of the nodes learned from, in all copies."""
        goodness = jnp.sum(self.rows(h) ** 2, axis=-1) - self.threshold
        is_learned = targets >= 0
        true = mean_where(jax.nn.softplus(-goodness[0]), is_learned)
        wrong = jax.vmap(mean_where, (0, None))(jax.nn.softplus(goodness[1:]), is_learned)
        return true + wrong.mean()

    def onward(self, h: Float[Array, "r N w"]) -> Float[Array, "q N w"]:
        """Every copy's own rows; those of the true copy for all where edges say the label."""
        return h if self.appends else h[:1]

    def scores(self, h: Float[Array, "C N w"], inputs: GraphInputs) -> Float[Array, "n C"]:
        """Mean squares less the threshold."""
        return jnp.mean(self.rows(h) ** 2, axis=-1).T - self.threshold

    def total(self, summed: Float[Array, "n C"], count: int | Array) -> Float[Array, "n C"]:
        """The sum."""
        return summed

    def figure(self, answers: Float[Array, "n C"], targets: Int[Host, "n"]) -> Float[Array, ""]:
        """Accuracy."""
        return accuracy(answers, targets)


@dataclasses.dataclass(frozen=True)
class Links:
    """Nodes with an edge between them are to resemble each other.

    s = h_u . h_v;   loss = mean binary cross-entropy of s;   scores = sigmoid(s)
    """

    appends = False

    def similarities(self, h: Float[Array, "1 N w"], inputs: GraphInputs) -> Float[Array, "m"]:
        """Of the pairs that are asked for."""
        ends = h[0][inputs.pairs]
        return wide(jnp.sum(ends[:, 0] * ends[:, 1], axis=-1))

    def loss(
        self, h: Float[Array, "1 N w"], inputs: GraphInputs, targets: Int[Host, "m"]
    ) -> Float[Array, ""]:
        """Mean over pairs."""
        logits = self.similarities(h, inputs)
        return optax.sigmoid_binary_cross_entropy(logits, targets.astype(logits.dtype)).mean()

    def onward(self, h: Float[Array, "1 N w"]) -> Float[Array, "1 N w"]:
        """All rows."""
        return h

    def scores(self, h: Float[Array, "1 N w"], inputs: GraphInputs) -> Float[Array, "m"]:
        """How likely an edge is."""
        return jax.nn.sigmoid(self.similarities(h, inputs))

    def total(self, summed: Float[Array, "m"], count: int | Array) -> Float[Array, "m"]:
        """The mean."""
        return summed / count

    def figure(self, answers: Float[Array, "m"], targets: Int[Host, "m"]) -> Float[Array, ""]:
        """Area under the receiver's curve."""
        return rank_auc(answers, targets > 0)


def objective_of(options: ForwardGNNOptions, classes: int) -> Objective:
    """The objective that options name, of so many classes."""
    if options.objective == "links":
        return Links()
    if options.objective == "single_forward":
        return SingleForward(classes, options.temperature)
    virtual = classes if options.objective == "virtual_nodes" else 0
    return ForwardForward(virtual, options.threshold)


def mean_where(values: Float[Array, "n"], counted: Bool[Host, "n"]) -> Float[Array, ""]:
    """The mean of the values that count."""
    return jnp.sum(jnp.where(counted, values, 0)) / jnp.maximum(jnp.sum(counted), 1)


def accuracy(answers: Float[Array, "n C"], targets: Int[Host, "n"]) -> Float[Array, ""]:
    """The share of nodes with a target whose class has the largest score."""
    right = (answers.argmax(-1) == targets).astype(jnp.float32)
    return mean_where(right, targets >= 0)


def rank_auc(scores: Float[Array, "m"], positive: Bool[Host, "m"]) -> Float[Array, ""]:
    """`ffnlab.scores.roc_auc` inside of a compiled function; both kinds are there.

    >>> float(rank_auc(jnp.array([0.1, 0.4, 0.35, 0.8]), jnp.array([False, False, True, True])))
    0.75
    """
    order = jnp.sort(scores)
    first, last = (jnp.searchsorted(order, scores, side=side) for side in ("left", "right"))
    ranks = (first + last + 1) / 2  # the mean rank of equal scores
    m, k = jnp.sum(positive), jnp.sum(~positive)
    return (jnp.sum(jnp.where(positive, ranks, 0)) - m * (m + 1) / 2) / (m * k)
