"""Modules of one structure as one, with a leading axis: what `lax.scan` and `vmap` take."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["Statistic", "stack_modules", "with_axes"]

M = TypeVar("M", bound=nnx.Module)


class Statistic(nnx.Variable):
    """What a layer holds that was measured: saved and sharded, never trained and never decayed."""


def stack_modules(modules: Sequence[M]) -> M:
    """One module whose leaves are those of all on a new first axis, logically "layers"."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *modules)
    return with_axes(stacked, lambda axes: ("layers", *axes))


def with_axes(module: M, change: Callable[[tuple[str, ...]], tuple[str, ...]]) -> M:
    """A copy of a module whose parameters and statistics carry other logical axes."""

    def is_named(node: object) -> bool:
        return isinstance(node, nnx.Param | Statistic)

    def convert(node: object) -> object:
        if not isinstance(node, nnx.Param | Statistic):
            return node
        kind: type[nnx.Variable] = type(node)
        return kind(node.get_value(), axes=change(node.axes))

    return jax.tree.map(convert, module, is_leaf=is_named)
