"""Which matrices a quantizer replaces, and how: shared by all methods of this package."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool

from ffnlab import tree
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.layers import Block, GroupedLinear, Linear
from ffnlab.layers.linear import Map
from ffnlab.models.rewriting import routers
from ffnlab.models.stack import in_list
from ffnlab.tree import Predicate, Selector
from ffnlab.weights import SparseInput, Weight

M = TypeVar("M")

inside_blocks = tree.at("layers**") & tree.of_type(Linear, GroupedLinear) & ~routers


def linears(select: Predicate) -> Selector:
    """The linear maps, grouped ones and `Conv` layers among what a selection names."""
    name = getattr(select, "name", "select")
    return Selector(name, lambda path, node: isinstance(node, Map) and select(path, node))


def check_model(model: object) -> None:
    """Raises ConfigError unless something is a module."""
    if not isinstance(model, nnx.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}; a Decoder or another model is accepted"
        )


def chosen(select: Predicate | None, model: Any) -> Selector:
    """What is quantized: as selected, else maps inside blocks, not routers; all without blocks."""
    has_blocks = any(isinstance(node, Block) for _, node in tree.walk(model))
    return linears(select or (inside_blocks if has_blocks else tree.of_type(Map)))


def replace_weights(model: M, select: Predicate | None, quantize: Callable[[Weight], Weight]) -> M:
    """The model with `quantize(weight)` in place of each selected weight.

    A weight that drops small inputs keeps doing so around the quantized one. Of a grouped map every
    matrix is quantized for itself.

    Args:
      model: any, its layers in a list or stacked; the result is in the same form.
      select: of the maps of the unstacked model; see `chosen`.
      quantize: weight -> weight of the same shape.
    Raises:
      SelectionError: nothing is selected.
      NumericalError: a selected weight holds NaN or infinity.
    """

    def store(linear: Map) -> Map:
        weight = linear.weight
        if isinstance(linear, GroupedLinear):
            return linear.replace(jax.vmap(quantize)(weight))
        if isinstance(weight, SparseInput):
            return linear.replace(SparseInput(quantize(weight.w), weight.threshold))
        return linear.replace(quantize(weight))

    def stored(model: M) -> M:
        where = chosen(select, model)
        check_finite(tree.select(model, where))
        return tree.map_at(model, where, store)

    return in_list(model, stored)


def check_finite(chosen: dict[str, Map]) -> None:
    """Raises NumericalError if a selected weight holds NaN or infinity; no check while tracing."""
    if is_traced(chosen):
        return
    finite = jax.device_get({path: all_finite(linear.weight) for path, linear in chosen.items()})
    bad = [path for path, ok in finite.items() if not ok]
    if bad:
        raise NumericalError(
            f"NaN or infinity in the weights of {len(bad)} of {len(chosen)} selected layers: "
            f"{', '.join(bad[:5])}; repair the checkpoint, or leave them out with select="
        )


def is_traced(tree: object) -> bool:
    """Whether a tree holds values that are not known yet (under jit or eval_shape)."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


@jax.jit
def all_finite(weight: Weight) -> Bool[Array, ""]:
    """Whether every element of a weight is a number."""
    return jnp.isfinite(weight.dense()).all()
