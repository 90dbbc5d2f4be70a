"""A run goes on with another model: what an optimizer remembers follows the arrays it is of."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ffnlab.errors import ConfigError
from ffnlab.rule import Rule
from ffnlab.transform import Transform, calibrate

__all__ = ["from_state", "rewritten"]

S = TypeVar("S", bound=tuple)


def rewritten(state: S, transform: Transform) -> S:
    """The state of a run whose model a transform rewrites, by keeping, moving or dropping arrays.

    What the optimizer holds for each array (moments, masters) stays with it, and what it held for
    one that was dropped is dropped. Steps, and numbers that belong to no array, stay.

    Args:
      state: with fields `model` and `optimizer`, of `ffnlab.learning.backprop` for instance; left
        intact, its arrays are shared. Of `members` under `jax.vmap`.
      transform: one that observes nothing, `ffnlab.structure.unguided` for instance.
    Raises:
      ConfigError: the transform makes arrays of its own, for which an optimizer remembers nothing.
    """
    model = state.model  # type: ignore[attr-defined]
    stats = calibrate(transform, model, progress=False)
    leaves, structure = jax.tree.flatten(model)
    tags = numbered(leaves)
    new, out = jax.tree.flatten(transform.rewrite(jax.tree.unflatten(structure, tags), stats))
    source = [found(tag, tags, transform.name) for tag in new]

    def moved(node: PyTree) -> PyTree:
        """What a tree like the model becomes; what stands for no array of it goes along."""
        parts = structure.flatten_up_to(node)
        return jax.tree.unflatten(out, [parts[i] for i in source])

    is_like = lambda node: isinstance(node, type(model))  # noqa: E731
    optimizer = jax.tree.map(
        lambda node: moved(node) if is_like(node) else node,
        state.optimizer,  # type: ignore[attr-defined]
        is_leaf=is_like,
    )
    return state._replace(model=moved(model), optimizer=optimizer)  # type: ignore[attr-defined]


def numbered(leaves: list[Array]) -> list[np.ndarray]:
    """Arrays of the same shapes, in which no number stands twice."""
    ends = np.cumsum([0, *(leaf.size for leaf in leaves)])
    return [
        np.arange(start, start + leaf.size, dtype=np.int32).reshape(leaf.shape)
        for start, leaf in zip(ends[:-1].tolist(), leaves, strict=True)
    ]


def found(tag: Array | np.ndarray, tags: list[np.ndarray], name: str) -> int:
    """Which of the numbered arrays one is.

    Raises:
      ConfigError: none of them.
    """
    for i, own in enumerate(tags):
        if own.shape == tag.shape and np.array_equal(own, np.asarray(tag)):
            return i
    raise ConfigError(
        f"transform {name!r} makes arrays of its own; an optimizer goes along with those that are "
        "kept, moved or dropped: begin anew with rule.init(model, key)"
    )


def from_state(rule: Rule, state: PyTree) -> Rule:
    """The rule whose runs begin at a state instead of at a model: the next part of a run.

        first = train(guided_rule, model, batches, steps=T, key=key, folder="guided")
        state = rewritten(first.state, unguided())
        rest = from_state(plain_rule, state)
        train(rest, state.model, lambda i: batches(T + i), steps=S - T, key=key, folder="rest")

    Args:
      rule: of the run that goes on.
      state: one of its states; left intact.
    """
    return dataclasses.replace(rule, init=lambda model, key: jax.tree.map(jnp.copy, state))
