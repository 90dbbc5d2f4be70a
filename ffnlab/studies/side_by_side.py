"""Members of a rule that learn side by side, and what is said of figures of several seeds."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab.parallel import LoopOptions, train
from ffnlab.rule import Rule

__all__ = ["learned_members", "spread"]


def learned_members(
    rule: Rule, model: PyTree, batches: Callable[[int], PyTree], steps: int, seed: int, count: int
) -> list[PyTree]:
    """The models of all members (`ffnlab.learning.members`) after so many steps.

    Args:
      rule: of `count` members.
      model: all of them, leaves [count, ...].
      batches: by position.
      steps: of training, ten in one compiled loop.
      seed: of the rule.
      count: of members.
    Raises:
      KeyboardInterrupt: a signal stopped it; what it learned so far is no result.
    """
    key, options = jax.random.key(seed), LoopOptions(log_every=0)
    outcome = train(rule, model, batches, steps, key=key, options=options, together=10)
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {steps}")
    found = rule.model(outcome.state)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(count)]


def spread(values: Sequence[float]) -> str:
    """One value, or a mean with its range.

    >>> spread([0.5]), spread([0.25, 0.75])
    ('0.500', '0.500 (0.250 to 0.750)')
    """
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"
