"""Batches on their way into a step: read, checked, grouped, and placed.

A group is several batches in one array per leaf, for steps that follow each other in one compiled
loop. How many of them are taken is a number that the program is given, so one program serves
groups of all sizes, and a step has the same bits in each of them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from ffnlab.data import Parted
from ffnlab.layers.logical import Layout
from ffnlab.parallel.sharding import (
    MeshStep,
    batch_part,
    make_step,
    place_batch,
    place_part,
    placed_step,
)
from ffnlab.rule import Metrics, Rule

__all__ = ["Feed", "Group", "step_of"]


class Group(NamedTuple):
    """Batches of one shape for steps that follow each other.

    Attributes:
      batches: a batch's tree, each leaf [n, …].
      taken: [] int32: the first so many of the n are there, the others fill up.
    """

    batches: PyTree
    taken: Int[Array | np.ndarray, ""]


Step = Callable[[PyTree, PyTree], tuple[PyTree, Metrics]]


def step_of(rule: Rule, where: tuple[Mesh, Layout] | None, together: int) -> Step:
    """A rule's step on what `Feed` gives.

    Args:
      rule, where, together: as for `Feed`.
    Returns:
      the rule's own step where nothing is placed or grouped; any other donates its state.
    """
    if together == 1:
        return rule.step if where is None else make_step(rule, *where)
    if where is None:
        return jax.jit(grouped(rule.step, together), donate_argnums=0)
    return MeshStep(grouped(placed_step(rule, *where), together), *where)


def grouped(step: Step, together: int) -> Callable[[PyTree, Group], tuple[PyTree, Metrics]]:
    """Steps on the batches of a group, one after the other.

    Args:
      step: (state, batch) -> (state, metrics); it is traced.
      together: batches that a group has room for (n).
    Returns:
      (state, group) -> (state, metrics); each metric is [n], of the steps taken.
    """

    def steps(state: PyTree, group: Group) -> tuple[PyTree, Metrics]:
        batch_at = lambda i: jax.tree.map(lambda leaf: leaf[i], group.batches)  # noqa: E731

        def one(i: Array, carry: tuple[PyTree, Metrics]) -> tuple[PyTree, Metrics]:
            state, rows = carry
            state, metrics = step(state, batch_at(i))
            return state, jax.tree.map(lambda row, value: row.at[i].set(value), rows, metrics)

        like = jax.eval_shape(lambda: step(state, batch_at(0))[1])
        rows = jax.tree.map(lambda leaf: jnp.zeros((together, *leaf.shape), leaf.dtype), like)
        return jax.lax.fori_loop(0, group.taken, one, (state, rows))

    return steps


class Feed:
    """The batches of a run, in order.

    Attributes:
      rule: checks each of them on the host.
      together: batches of a group; 1 for batches by themselves.
    """

    def __init__(
        self,
        batches: Callable[[int], PyTree],
        rule: Rule,
        where: tuple[Mesh, Layout] | None,
        together: int = 1,
    ):
        """A feed; of several processes each reads its rows, where the batches are `Parted`.

        Args:
          batches: position -> batch, on the host.
          rule: whose check is asked.
          where: mesh and layout; None for the default device.
          together: see above.
        """
        self.rule, self.together = rule, together
        self._read, self._place = placed(batches, where, stacked=together > 1)
        self._ahead: tuple[int, PyTree] | None = None  # a batch read that began another group
        self._seen: list[Array] = []  # arrays of the last one checked, if they cannot change

    def __call__(self, state: PyTree, position: int, end: int) -> tuple[PyTree, int]:
        """What the step from a position is given, and how many steps it takes.

        Args:
          state: before it; only its shapes are looked at.
          position: of the first batch.
          end: position that a group does not reach beyond.
        Raises:
          ValueError: the rule does not take a batch.
        """
        first = self._checked(state, position)
        if self.together == 1:
            return self._place(first), 1
        rows = [first]
        while len(rows) < min(self.together, end - position):
            following = self._checked(state, position + len(rows))
            if shapes(following) != shapes(first):
                self._ahead = position + len(rows), following
                break
            rows.append(following)
        full = rows + [first] * (self.together - len(rows))
        batches = jax.tree.map(lambda *leaves: np.stack(leaves), *full)
        return Group(self._place(batches), np.int32(len(rows))), len(rows)

    def _checked(self, state: PyTree, position: int) -> PyTree:
        if self._ahead is not None and self._ahead[0] == position:
            return self._ahead[1]
        batch = self._read(position)
        leaves = jax.tree.leaves(batch)
        if not leaves or list(map(id, leaves)) != list(map(id, self._seen)):
            self.rule.check(state, batch)  # not again of a graph, which is the same every time
            is_fixed = all(isinstance(leaf, jax.Array) for leaf in leaves)
            self._seen = leaves if is_fixed else []
        return batch


def shapes(batch: PyTree) -> list[tuple]:
    """Shapes and dtypes of a batch."""
    return [(np.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(batch)]


def placed(
    batches: Callable[[int], PyTree], where: tuple[Mesh, Layout] | None, *, stacked: bool
) -> tuple[Callable[[int], PyTree], Callable[[PyTree], PyTree]]:
    """(what this process reads of a batch by position, how that is placed)."""
    if where is None:
        return batches, lambda batch: batch
    index, count = batch_part(*where)
    if count > 1 and isinstance(batches, Parted):
        read, place = batches.part(index, count), place_part
    else:
        read, place = batches, place_batch
    return read, functools.partial(place, mesh=where[0], layout=where[1], stacked=stacked)
