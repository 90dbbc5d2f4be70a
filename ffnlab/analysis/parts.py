"""The parts of any model by path: its variables, those of one layer together, and how to draw them.

A layer is the module that holds a variable itself. Stacked blocks are taken apart, so that paths
are those of the list form.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from ffnlab import tree
from ffnlab.models import Stacked, unstack
from ffnlab.weights import is_weight

__all__ = ["bars", "layer_of", "selected", "taken_apart", "variables"]

M = TypeVar("M")
MOST_INCHES = 60


def taken_apart(model: M) -> M:
    """The model with its blocks in a list; another one as it is."""
    return unstack(model) if isinstance(getattr(model, "layers", None), Stacked) else model


def variables(model: object) -> dict[str, Any]:
    """What each variable holds, an array or a weight, by path in tree order.

    Arrays outside of variables stand by themselves; only what has floating parts is there.
    """
    found: dict[str, Any] = {}
    inside: tuple[str, ...] = ()
    for path, node in tree.walk(model):
        is_variable = isinstance(node, nnx.Variable)
        if path.startswith(inside):
            continue
        if is_variable or is_weight(node) or is_array(node):
            inside = (f"{path}.", f"{path}[")
            value = node.get_value() if is_variable else node
            if any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(value)):
                found[path] = value
    return found


def is_array(node: object) -> bool:
    """Whether a node is a leaf with a dtype, abstract or not."""
    return jax.tree_util.all_leaves([node]) and hasattr(node, "dtype")


def selected(model: object, select: str) -> dict[str, Any]:
    """The `variables` that a pattern of paths selects, or that lie in what it selects.

    Args:
      select: as `ffnlab.tree.at` takes it.
    Raises:
      SelectionError: it matches nothing that holds a variable.
    """
    found, chosen = variables(model), tree.select(model, tree.at(select))
    inside = tuple(f"{path}{after}" for path in chosen for after in (".", "["))
    kept = {p: v for p, v in found.items() if p in chosen or p.startswith(inside)}
    return kept or tree.select(found, tree.at(select))


def layer_of(path: str) -> str:
    """The layer that a variable is of.

    >>> layer_of("layers[0].ffn.up.w"), layer_of("scale")
    ('layers[0].ffn.up', 'scale')
    """
    return path.rpartition(".")[0] or path


def bars(figure: Any, values: Mapping[str, float], label: str) -> None:
    """Draws a horizontal bar for each name, the first on top."""
    figure.set_size_inches(8, min(MOST_INCHES, 1.5 + 0.2 * len(values)))
    axes = figure.subplots()
    axes.barh(range(len(values)), list(values.values()))
    axes.set_yticks(range(len(values)), list(values), fontsize=7)
    axes.set_xlabel(label)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
