"""Learning as a transform: what a few passes of a rule make of a model."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, Key, PyTree

from ffnlab.errors import at_least
from ffnlab.rule import Rule
from ffnlab.transform import Transform

__all__ = ["Fitted", "fitted_by"]


class Fitted(NamedTuple):
    """Where a rule is.

    Attributes:
      state: of the rule.
      passes: [] int32, whole passes over the batches.
    """

    state: PyTree
    passes: Int[Array, ""]


def fitted_by(rule: Rule, *, key: Key[Array, ""], passes: int = 1) -> Transform[nnx.Module, Fitted]:
    """The transform that trains a model, a step for each batch: small parts of a method that are
    learned, such as the autoencoder that compresses what a probe is to look at.

    Long training is `ffnlab.parallel.train`'s, which logs, shards and resumes within a pass.

    Args:
      rule: how; any.
      key: of its draws.
      passes: over the batches, >= 1.
    Raises:
      ConfigError: passes below 1.
    """
    at_least(1, passes=passes)

    def init(model: nnx.Module) -> Fitted:
        return Fitted(rule.init(model, key), jnp.int32(0))

    def observe(stats: Fitted, model: nnx.Module, batch: PyTree) -> Fitted:
        del model
        rule.check(stats.state, batch)
        return stats._replace(state=rule.step(stats.state, batch)[0])

    def advance(model: nnx.Module, stats: Fitted) -> tuple[Fitted, bool]:
        del model
        return stats._replace(passes=stats.passes + 1), int(stats.passes) + 1 >= passes

    def rewrite(model: nnx.Module, stats: Fitted) -> nnx.Module:
        del model
        return rule.model(stats.state)

    return Transform(f"fitted_by({rule.name})", init, observe, rewrite, advance)
