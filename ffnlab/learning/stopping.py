"""Early stopping inside a rule's state: the best parameters so far, and how long ago they were.

    best <- the model whenever score(model, batch) is higher than ever before

The loop's own patience (`ffnlab.parallel.LoopOptions`) ends a run; it keeps no earlier model. What
is here is part of the state, so it is saved and resumed with it, and members of one program
(`ffnlab.learning.members`) each stop by themselves.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ffnlab.errors import at_least
from ffnlab.rule import Rule

__all__ = ["StoppingState", "Watch", "early_stopping", "kept", "noted", "unwatched"]

T = TypeVar("T")


class Watch(NamedTuple):
    """What is remembered of scores.

    Attributes:
      score: [] float32, the highest so far; -inf before the first.
      waited: [] int32, scores in a row that were no higher.
    """

    score: Float[Array, ""]
    waited: Int[Array, ""]


def unwatched() -> Watch:
    """Before any score."""
    return Watch(jnp.float32(-jnp.inf), jnp.int32(0))


def noted(
    watch: Watch, score: Float[Array, ""], is_asked: Bool[Array, ""]
) -> tuple[Watch, Bool[Array, ""]]:
    """What is remembered after a step, and whether its parameters are the best so far.

    Args:
      watch: before it.
      score: of the step, the more the better; it counts where `is_asked`. NaN is no best.
      is_asked: whether there is a score.
    Returns:
      (watch, whether to keep the step's parameters: until the first score the newest are kept).
    """
    is_higher = is_asked & (score > watch.score)
    waited = jnp.where(is_asked, jnp.where(is_higher, 0, watch.waited + 1), watch.waited)
    is_best = is_higher | jnp.isneginf(watch.score)
    return Watch(jnp.where(is_higher, score, watch.score), waited), is_best


def kept(is_best: Bool[Array, ""], new: T, old: T) -> T:
    """New parameters where they are the best, else old ones."""
    return jax.tree.map(functools.partial(jnp.where, is_best), new, old)


class StoppingState(NamedTuple):
    """What a rule that stops early changes.

    Attributes:
      inner: the state of the rule, with a field `model`.
      best: the model with the best score so far.
      watch: of the scores.
      taken: [] int32, steps taken.
    """

    inner: PyTree
    best: PyTree
    watch: Watch
    taken: Int[Array, ""]


def early_stopping(
    rule: Rule,
    score: Callable[[PyTree, PyTree], Float[Array, ""]],
    *,
    every: int = 2,
    patience: int = 100,
) -> Rule:
    """The rule that keeps the best model by a score, and rests when none came for long.

    Args:
      rule: whose state has its model in a field `model`.
      score: (model, batch) -> how good it is, the more the better; of what `rule` does not learn
        from.
      every: steps between scores.
      patience: scores in a row that are no higher after which nothing changes any more.
    Returns:
      a Rule; its state is `StoppingState`, its model and its predictions are those of the best. Its
      metrics are the rule's, 0 once it rests, and "score", the best so far, 0 before the first.
      `step` donates its state.
    Raises:
      ConfigError: a number below 1.
    """
    at_least(1, every=every, patience=patience)

    def init(model: PyTree, key: Array) -> StoppingState:
        best = jax.tree.map(jnp.copy, model)
        return StoppingState(rule.init(model, key), best, unwatched(), jnp.int32(0))

    def step(state: StoppingState, batch: PyTree) -> tuple[StoppingState, dict[str, Array]]:
        rests = state.watch.waited >= patience
        metrics = jax.eval_shape(rule.step, state.inner, batch)[1]
        idle = lambda inner, batch: (  # noqa: E731
            inner,
            {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in metrics.items()},
        )
        go = lambda inner, batch: (lambda s, m: (s, dict(m)))(*rule.step(inner, batch))  # noqa: E731
        inner, found = jax.lax.cond(rests, idle, go, state.inner, batch)
        taken = state.taken + ~rests
        is_asked = ~rests & (taken % every == 0)
        of_step = lambda inner, batch: jnp.float32(score(rule.model(inner), batch))  # noqa: E731
        none = lambda inner, batch: jnp.float32(-jnp.inf)  # noqa: E731
        value = jax.lax.cond(is_asked, of_step, none, inner, batch)
        watch, is_best = noted(state.watch, value, is_asked)
        best = kept(is_best & ~rests, rule.model(inner), state.best)
        found["score"] = jnp.where(jnp.isneginf(watch.score), 0, watch.score)
        return StoppingState(inner, best, watch, taken), found

    def predict(state: StoppingState, inputs: PyTree) -> PyTree:
        return rule.predict(state.inner._replace(model=state.best), inputs)

    return Rule(
        f"{rule.name}, stopped early",
        init,
        jax.jit(step, donate_argnums=0),
        jax.jit(predict),
        model=lambda state: state.best,
        check=lambda state, batch: rule.check(state.inner, batch),
    )
