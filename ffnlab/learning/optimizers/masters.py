"""Optimizers in float32, whatever the parameters are.

A second moment in bfloat16 stops decaying: at b2 = .999 a step takes away a thousandth, less than
half of its last bit. And a small step of a bfloat16 parameter is rounded away. So the optimizer
sees float32 gradients and float32 copies of the parameters (masters), and the parameters are these,
rounded.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ffnlab import tree

__all__ = ["MastersState", "in_float32"]


class MastersState(NamedTuple):
    """State of an optimizer of parameters some of which are narrower than float32.

    Attributes:
      masters: a float32 copy of each narrower parameter, None in the place of the others.
      inner: the optimizer's own state, of float32 parameters.
    """

    masters: PyTree
    inner: PyTree


def in_float32(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer with moments, norms and masters in float32.

    Args:
      optimizer: any optax transformation.
    Returns:
      one whose state is that of `optimizer` where all parameters are at least float32, else a
      `MastersState`. `optax.apply_updates` then makes of the parameters the rounded masters (of a
      sum in float32: a step many times as large as the parameter may tip a rounding); `update`
      needs the parameters. The state shares no array with the parameters.
    Raises:
      ValueError: from `update`, without parameters where there are masters.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> PyTree:
        masters = jax.tree.map(lambda leaf: widened(leaf) if is_narrow(leaf) else None, params)
        wide = tree.combine(masters, params)
        inner = own(optimizer.init(wide), wide)
        return MastersState(masters, inner) if jax.tree.leaves(masters) else inner

    def update(
        gradient: PyTree, state: PyTree, params: PyTree = None, **extra: object
    ) -> tuple[PyTree, PyTree]:
        if not isinstance(state, MastersState):
            return optimizer.update(gradient, state, params, **extra)
        if params is None:
            raise ValueError("params=None: an optimizer with masters needs the parameters")
        before = tree.combine(state.masters, params)
        gradient = jax.tree.map(widened, gradient)
        updates, inner = optimizer.update(gradient, state.inner, before, **extra)
        after = optax.apply_updates(before, updates)
        each = lambda of_narrow, *trees: jax.tree.map(  # noqa: E731
            of_narrow, state.masters, *trees, is_leaf=lambda leaf: leaf is None
        )
        masters = each(lambda master, new: None if master is None else new, after)
        # From the parameters, not from the masters: their sum with it is the new master.
        change = each(
            lambda master, step, new, old: step if master is None else new - widened(old),
            updates,
            after,
            params,
        )
        return change, MastersState(masters, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def own(state: PyTree, params: PyTree) -> PyTree:
    """A state none of whose arrays is another's or a parameter's: a step that donates takes all.

    Some optimizers begin with the parameters themselves, as what they measure distances from.
    """
    seen = {id(leaf) for leaf in jax.tree.leaves(params)}

    def fresh(leaf: Array) -> Array:
        if id(leaf) in seen:
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(fresh, state)


def widened(leaf: Array) -> Array:
    """An array in float32, or in its own dtype where that is no narrower float."""
    return leaf if not is_narrow(leaf) else leaf.astype(jnp.float32)


def is_narrow(leaf: Array) -> bool:
    """Whether an array is floating and narrower than float32."""
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
