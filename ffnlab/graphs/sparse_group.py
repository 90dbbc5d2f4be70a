"""NetInfoF's combination (ICLR 2024, openreview KY8ZNcljVU): a linear model that drops what it does
not need, single numbers and whole groups of its inputs.

    F(w, b) = mean cross-entropy(rows @ w + b, y) + l1 sum |w| + l2 sum over groups g of |w_g|_2

A group is what one embedding gives. One output is the logit of class 1; several are those of
classes. The model is an MLP of a single map, so that any kind of file holds it.

A step is one of L-BFGS (`optax.lbfgs`, with its line search) on F, where the derivative of |w| and
of |w_g| at 0 is taken as 0, then one of proximal gradient,

    w <- prox(w - grad cross-entropy / L),   L its largest curvature, by power iteration,

which makes exact zeros. Either is left out where it would raise F, which therefore never rises.

What differs from the authors' code (main.py): they take L-BFGS of rate 0.1 alone, with the same
derivative at 0 and other random pairs in every evaluation, so that no weight is ever 0; here a step
sees one batch. Biases, one for each group there, add up to one here.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError, at_least, is_known
from ffnlab.layers import MLP
from ffnlab.learning.labels import check_labels
from ffnlab.rule import Metrics, Rule

__all__ = ["SparseGroupState", "penalty", "shrunk", "sparse_group"]

POWERS = 20  # of the iteration for the largest curvature
SAFE = 1.05  # which it finds from below


class SparseGroupState(NamedTuple):
    """What the rule changes.

    Attributes:
      model: an MLP of one map.
      optimizer: of L-BFGS, over what is trained.
    """

    model: MLP
    optimizer: PyTree


def penalty(
    w: Float[Array, "rows out"], groups: int, l1: float | Array, l2: float | Array
) -> Float[Array, ""]:
    """l1 sum |w| + l2 sum over groups of |w_g|_2; its derivative at 0 is 0.

    Args:
      w: weights, whose rows are those of the groups one after the other.
      groups: how many, all of one size.
      l1, l2: >= 0.
    """
    parts = w.reshape(groups, -1)
    square = jnp.sum(parts**2, axis=1)
    is_there = square > 0
    lengths = jnp.where(is_there, jnp.sqrt(jnp.where(is_there, square, 1)), 0)
    # sign(w) * w, since JAX takes the derivative of |w| at 0 as 1
    return l1 * jnp.sum(jnp.sign(w) * w) + l2 * jnp.sum(lengths)


def shrunk(
    w: Float[Array, "rows out"], groups: int, l1: float | Array, l2: float | Array
) -> Float[Array, "rows out"]:
    """The proximal map of `penalty`: argmin_v |v - w|^2 / 2 + penalty(v).

    Each weight comes nearer to 0 by l1, then each group by l2, and stays at 0 (Friedman, Hastie and
    Tibshirani, arXiv 1001.0736).

    >>> shrunk(jnp.array([[3.0], [-0.5], [0.3], [0.2]]), 2, 1.0, 0.5).ravel().tolist()
    [1.5, -0.0, 0.0, 0.0]
    """
    soft = jnp.sign(w) * jnp.maximum(jnp.abs(w) - l1, 0)
    parts = soft.reshape(groups, -1)
    length = jnp.linalg.norm(parts, axis=1, keepdims=True)
    share = jnp.maximum(1 - l2 / jnp.where(length > 0, length, 1), 0)
    return (parts * share).reshape(w.shape)


def cross_entropy(logits: Float[Array, "p out"], y: Int[Array, "p"]) -> Float[Array, ""]:
    """Mean over rows, in nats."""
    if logits.shape[1] == 1:
        wanted = jnp.asarray(y).astype(logits.dtype)
        return optax.sigmoid_binary_cross_entropy(logits[:, 0], wanted).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(y)).mean()


def curvature(rows: Float[Array, "p r"], outputs: int) -> Float[Array, ""]:
    """An upper bound of the cross-entropy's second derivative by the weights and the bias."""
    more = jnp.concatenate([rows, jnp.ones((len(rows), 1))], axis=1)

    def again(v: Array, _: None) -> tuple[Array, Array]:
        moved = more.T @ (more @ v) / len(rows)
        length = jnp.linalg.norm(moved)
        return moved / jnp.where(length > 0, length, 1), length

    _, lengths = jax.lax.scan(again, jnp.ones(more.shape[1]) / more.shape[1] ** 0.5, length=POWERS)
    return SAFE * lengths[-1] * (0.25 if outputs == 1 else 0.5)


def sparse_group(
    groups: int, *, l1: float | Array = 1e-4, l2: float | Array = 1e-4, memory: int = 10
) -> Rule:
    """The rule that fits a linear model with a penalty on weights and on groups of them.

    Its model is an MLP of one map with a bias, [groups * d, outputs]; its batches are (rows,
    classes), as large as memory holds: a step is one of all of them, and what else is in a batch is
    not looked at. `members` varies l1 and l2.

    Args:
      groups: of inputs, all of one size; the five embeddings of NetInfoF.
      l1, l2: of single weights and of groups, >= 0; the authors try 1e-4 and 1e-5, 1e-3 to 1e-6.
      memory: steps that L-BFGS remembers.
    Returns:
      a Rule; its state is `SparseGroupState`, its metrics are "loss" (F), "nats" (the
      cross-entropy) and "zeros", the share of weights that are 0. `step` donates its state.
    Raises:
      ConfigError: numbers out of range; from `init`, another model. From `check`, ValueError for
        rows of another width and classes that are not there.
    """
    at_least(1, groups=groups, memory=memory)
    for name, value in (("l1", l1), ("l2", l2)):
        if is_known(value) and not value >= 0:
            raise ConfigError(f"{name}={value} must be at least 0")
    lbfgs = optax.lbfgs(memory_size=memory)

    def init(model: MLP, key: Array) -> SparseGroupState:
        del key
        check_model(model, groups)
        state = SparseGroupState(model, lbfgs.init(cast("Any", tree.trained(model)[0])))
        return jax.tree.map(jnp.copy, state)  # the step donates all, and two may be one

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: SparseGroupState, batch: tuple) -> tuple[SparseGroupState, Metrics]:
        rows, y = batch[:2]
        parts: Any = tree.trained(state.model)
        begin, fixed = parts
        smooth = lambda trained: cross_entropy(tree.combine(trained, fixed)(rows), y)  # noqa: E731

        def objective(trained: PyTree) -> Float[Array, ""]:
            return smooth(trained) + penalty(weights(trained), groups, l1, l2)

        value, gradient = jax.value_and_grad(objective)(begin)
        more, optimizer = lbfgs.update(
            gradient, state.optimizer, begin, value=value, grad=gradient, value_fn=objective
        )
        moved, value = lower(objective, optax.apply_updates(begin, more), begin, value)
        rate = 1 / curvature(rows, weights(begin).shape[1])
        pulled = jax.tree.map(lambda w, g: w - rate * g, moved, jax.grad(smooth)(moved))
        pulled = with_weights(pulled, shrunk(weights(pulled), groups, rate * l1, rate * l2))
        moved, value = lower(objective, pulled, moved, value)
        metrics = {
            "loss": value,
            "nats": smooth(moved),
            "zeros": jnp.mean((weights(moved) == 0).astype(jnp.float32)),
        }
        return SparseGroupState(tree.combine(moved, fixed), optimizer), metrics

    def check(state: SparseGroupState, batch: tuple) -> None:
        wide, outputs = state.model.maps[0].weight.shape
        rows, y = batch[:2]
        if rows.ndim != 2 or rows.shape[1] != wide or len(y) != len(rows) or not len(rows):
            raise ConfigError(
                f"rows {tuple(rows.shape)} with {len(y)} classes; [p, {wide}] with p are accepted"
            )
        check_labels(y, max(2, outputs))

    predict = jax.jit(lambda state, rows: state.model(rows))
    return Rule("sparse_group", init, step, predict, check=check)


def lower(
    objective: Callable[[PyTree], Array], found: PyTree, begin: PyTree, value: Array
) -> tuple[PyTree, Array]:
    """What was found where it is no worse, with its value; else where it began."""
    new = objective(found)
    is_lower = new <= value  # false where it is NaN
    kept = jax.tree.map(lambda a, b: jnp.where(is_lower, a, b), found, begin)
    return kept, jnp.where(is_lower, new, value)


def weights(trained: MLP) -> Float[Array, "rows out"]:
    """The matrix of a model of one map."""
    return trained.maps[0].weight.dense()


def with_weights(trained: MLP, w: Float[Array, "rows out"]) -> MLP:
    """The model with another matrix."""
    return tree.replace(trained, {"maps[0].w.value.w": w})


def check_model(model: object, groups: int) -> None:
    """Raises ConfigError unless a model is an MLP of one map whose rows are groups."""
    is_one = isinstance(model, MLP) and len(model.maps) == 1 and model.maps[0].bias is not None
    if not is_one:
        raise ConfigError(f"model is a {type(model).__name__}; an MLP of one map with a bias is")
    wide = cast("MLP", model).maps[0].weight.shape[0]
    if wide % groups:
        raise ConfigError(f"groups={groups} must divide the {wide} inputs of the model")
