"""Which matrices a quantizer replaces, and how: shared by all methods of this package."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from ffnlab import models, tree
from ffnlab.errors import NumericalError
from ffnlab.layers import Linear
from ffnlab.models.calibration import Layered
from ffnlab.tree import Predicate, Selector
from ffnlab.weights import SparseInput, Weight

inside_blocks = tree.at("layers**") & tree.of_type(Linear)


def linears(select: Predicate) -> Selector:
    """The `Linear` layers among what a selection names."""
    name = getattr(select, "name", "select")
    return Selector(name, lambda path, node: isinstance(node, Linear) and select(path, node))


def replace_weights(
    model: Layered, select: Predicate, quantize: Callable[[Weight], Weight]
) -> Layered:
    """The model with `quantize(weight)` in place of each selected weight.

    A weight that drops small inputs keeps doing so around the quantized one.

    Args:
      model: any with layers, stacked or not; the result is in the same form.
      select: of the `Linear`s of the unstacked model.
      quantize: weight -> weight of the same shape.
    Raises:
      SelectionError: nothing is selected.
      NumericalError: a selected weight holds NaN or infinity.
    """
    was_stacked = isinstance(model.layers, models.Stacked)
    model = models.unstack(model)
    check_finite(tree.select(model, linears(select)))

    def store(linear: Linear) -> Linear:
        weight = linear.weight
        if isinstance(weight, SparseInput):
            return linear.replace(SparseInput(quantize(weight.w), weight.threshold))
        return linear.replace(quantize(weight))

    model = tree.map_at(model, linears(select), store)
    return models.stack(model) if was_stacked else model


def check_finite(chosen: dict[str, Linear]) -> None:
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
