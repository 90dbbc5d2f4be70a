"""Stacks of alike layers, scanned: compile time and program size do not grow with depth.

`stack` puts the layers of a model on a leading axis and `unstack` takes them apart again, both
without changing a bit. Where layers alternate (Gemma's windows), the shortest repeating period is
stacked.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
from flax import nnx

from ffnlab.errors import ConfigError
from ffnlab.layers.stacking import stack_modules, unstack_modules

__all__ = [
    "Shared",
    "Stacked",
    "check_layered",
    "in_list",
    "in_order",
    "kind_of",
    "layers_of",
    "period_of",
    "stack",
    "unstack",
]


class Stacked(nnx.Module):
    """`repeats` times a period of layers, each leaf with a leading axis of that length.

    Attributes:
      period: nnx.List of modules; the logical axes of every variable begin with "layers".
      repeats: how often the period repeats (static).
    """

    def __init__(self, period: list[nnx.Module], repeats: int):
        self.period = nnx.List(period)
        self.repeats = repeats


class Shared(nnx.Module):
    """Layers of which several are one: layer i is the block of stage source[i], all its arrays.

    Gradients of a stage are the sums over its layers. What rewrites single layers does not take
    this form: `ffnlab.structure.expand` gives every layer a block of its own.

    Attributes:
      stages: nnx.List of blocks.
      source: the stage of every layer (static).
    """

    def __init__(self, stages: Sequence[nnx.Module], source: Sequence[int]):
        """Layers of ready stages.

        Raises:
          ConfigError: no layers, or a stage that is not there.
        """
        if not source or not set(source) <= set(range(len(stages))):
            raise ConfigError(
                f"source={tuple(source)}: one or more of the {len(stages)} stages are accepted"
            )
        self.stages = nnx.List(stages)
        self.source = tuple(source)


M = TypeVar("M")  # any model whose `layers` are an `nnx.List` of modules, or the same `Stacked`


def check_layered(model: object) -> None:
    """Raises ConfigError unless a model has `layers`, in a list or stacked."""
    if isinstance(getattr(model, "layers", None), Shared):
        raise ConfigError(
            f"layers of the {type(model).__name__} share blocks; structure.expand gives each one"
        )
    if not isinstance(getattr(model, "layers", None), nnx.List | Stacked):
        raise ConfigError(
            f"model is a {type(model).__name__}; a Decoder or another model with layers is accepted"
        )


def period_of(layers: Sequence[nnx.Module] | Stacked | Shared) -> list[nnx.Module]:
    """The layers in order; of a stack, those of one period."""
    if isinstance(layers, Shared):
        return [layers.stages[stage] for stage in layers.source]
    return list(layers.period if isinstance(layers, Stacked) else layers)


def layers_of(model: object) -> int:
    """How many layers a model has, in a list or stacked.

    Raises:
      ConfigError: it has no layers.
    """
    check_layered(model)
    layers = model.layers  # type: ignore[attr-defined]
    repeats = layers.repeats if isinstance(layers, Stacked) else 1
    return repeats * len(period_of(layers))


def stack(model: M) -> M:
    """The same model with its layers stacked, to be scanned.

    Raises:
      ConfigError: it has no layers.
      ValueError: the model is stacked already.
    """
    check_layered(model)
    if isinstance(model.layers, Stacked):
        raise ValueError("model is stacked already; models.unstack(model) gives the list form")
    layers = list(model.layers)
    n = len(layers)
    if not n:
        raise ConfigError("model.layers is empty: there is nothing to stack")
    kinds = [kind_of(layer) for layer in layers]
    width = next(p for p in range(1, n + 1) if n % p == 0 and kinds[p:] == kinds[: n - p])
    period = [stack_modules(layers[i::width]) for i in range(width)]
    return _with_layers(model, Stacked(period, n // width))


def unstack(model: M) -> M:
    """The same model with its layers in a list; one that is not stacked is copied.

    Raises:
      ConfigError: it has no layers.
    """
    check_layered(model)
    layers = model.layers
    if not isinstance(layers, Stacked):
        return jax.tree.map(lambda leaf: leaf, model)
    return _with_layers(model, nnx.List(in_order(layers)))


def in_order(layers: Sequence[nnx.Module] | Stacked) -> list[nnx.Module]:
    """Every layer by itself."""
    if not isinstance(layers, Stacked):
        return list(layers)
    columns = [unstack_modules(module, layers.repeats) for module in layers.period]
    return [module for row in zip(*columns, strict=True) for module in row]


def in_list(model: M, change: Callable[[M], M]) -> M:
    """Changes a model in its list form; the result is in the form of the argument.

    Args:
      model: stacked or not, or without layers at all.
      change: of the model with its layers in a list.
    """
    if not isinstance(getattr(model, "layers", None), Stacked):
        return change(model)
    return stack(change(unstack(model)))


def kind_of(layer: nnx.Module) -> tuple:
    """Structure, shapes and dtypes: what layers that are to be stacked have in common."""
    leaves, treedef = jax.tree.flatten(layer)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _with_layers(model: M, layers: nnx.Module) -> M:
    new = jax.tree.map(lambda leaf: leaf, model)
    new.layers = cast(Any, layers)
    return new
