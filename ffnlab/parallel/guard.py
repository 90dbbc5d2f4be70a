"""Steps that end in NaN or infinity: where they came from, and a rule that leaves them out."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from ffnlab.rule import Rule

__all__ = ["Figures", "first_bad", "skip_bad_steps"]


def skip_bad_steps(rule: Rule) -> Rule:
    """The same rule, but a step whose metrics or state are not finite changes nothing.

    An infinity that stood in the state before the step is no fault of it: the threshold of a
    channel that is always dropped, the best value that a schedule has seen so far.

    Args:
      rule: any.
    Returns:
      a Rule of the same states; its metrics are those of the rule and "skipped", 1 for a step that
      was left out and else 0. The next batch is another one, so learning goes on. `step` donates
      its state.
    """

    def step(state: PyTree, batch: PyTree) -> tuple[PyTree, Mapping[str, Array]]:
        after, metrics = rule.step(state, batch)
        fine = jnp.stack([*finite(after, state).values(), *finite(metrics).values(), True]).all()
        kept = jax.tree.map(lambda new, old: jnp.where(fine, new, old), after, state)
        return kept, {**metrics, "skipped": jnp.where(fine, 0.0, 1.0)}

    return dataclasses.replace(rule, step=jax.jit(step, donate_argnums=0))


class Figures:
    """Reads the metrics of steps on the host.

    Attributes:
      skipped: steps left out so far; None where none are.
      bad: the metrics of the last step read that are not finite.
    """

    def __init__(self, skipped: float | None):
        self.skipped, self.bad, self.position = skipped, {}, -1

    def read(self, metrics: Mapping[str, Array], position: int) -> dict[str, float]:
        """Waits for a step; its finite metrics. A step may be read again, and is counted once."""
        found = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        if self.skipped is not None and found:
            self.skipped += found["skipped"] if position > self.position else 0.0
            found["skipped"] = self.skipped
        self.position = position
        self.bad = {name: value for name, value in found.items() if not np.isfinite(value)}
        return {name: value for name, value in found.items() if name not in self.bad}


def first_bad(state: PyTree) -> str | None:
    """The path of the first array of a tree that has a NaN or an infinity; None without one.

    >>> first_bad({"a": jnp.ones(2), "b": [jnp.array([1.0, jnp.nan])]})
    "['b'][0]"
    """
    found = jax.jit(finite)(state)
    return next((path for path, fine in found.items() if not fine), None)


def finite(tree: PyTree, before: PyTree | None = None) -> dict[str, Bool[Array, ""]]:
    """Whether every value is finite or what it was before, by the path of each floating array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    earlier = [None] * len(leaves) if before is None else jax.tree.leaves(before)
    return {
        jax.tree_util.keystr(path).lstrip("."): (
            jnp.isfinite(leaf) if old is None else jnp.isfinite(leaf) | (leaf == old)
        ).all()
        for (path, leaf), old in zip(leaves, earlier, strict=True)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    }
