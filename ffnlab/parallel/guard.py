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
      bad: the metrics that are not finite, of the first step of those last read that has any.
      bad_step: which step that is.
    """

    def __init__(self, skipped: float | None):
        self.skipped, self.bad, self.bad_step, self._position = skipped, {}, -1, -1
        self._last: dict[str, float] = {}

    def read(self, metrics: Mapping[str, Array], position: int, steps: int = 1) -> dict[str, float]:
        """Waits for a step, or for a group of steps; the finite metrics of the last one.

        They are read once; asked again, it says what it has found.

        Args:
          metrics: of the step; of a group, [n], of which the first `steps` were taken.
          position: where the last of them ended.
          steps: how many.
        """
        if position == self._position:
            return self._last
        self._position, self.bad, self._last = position, {}, {}
        read = {name: np.atleast_1d(value) for name, value in jax.device_get(dict(metrics)).items()}
        for i in range(steps if read else 0):
            found = {name: float(value[i]) for name, value in read.items()}
            if self.skipped is not None:
                self.skipped += found["skipped"]
                found["skipped"] = self.skipped
            bad = {name: value for name, value in found.items() if not np.isfinite(value)}
            if bad and not self.bad:
                self.bad, self.bad_step = bad, position - steps + i + 1
            self._last = {name: value for name, value in found.items() if name not in bad}
        return self._last


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
