"""Stacks of alike layers, scanned: compile time and program size do not grow with depth.

`stack` puts the layers of a model on a leading axis and `unstack` takes them apart again, both
without changing a bit. Where layers alternate (Gemma's windows), the shortest repeating period is
stacked.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx

from ffnlab.errors import ConfigError
from ffnlab.layers.pipelining import Schedule
from ffnlab.layers.stacking import stack_modules, unstack_modules, with_axes

__all__ = [
    "Pipelined",
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


class Pipelined(nnx.Module):
    """Layers in stages that work at the same time: what `ffnlab.models.pipeline` makes.

    Each leaf has three leading axes, of S stages, of R repeats and of the n periods of layers that
    one stage has in one repeat: period ((r S + s) n + i) of the model is at [s, r, i].

    Attributes:
      period: nnx.List of modules; the logical axes of every variable begin with "stages",
        "repeats", "layers".
      schedule: when which stage works on what (static).
      periods: n, how many a stage has in a repeat (static).
    """

    def __init__(self, period: list[nnx.Module], schedule: Schedule, periods: int):
        self.period = nnx.List(period)
        self.schedule = schedule
        self.periods = periods

    @property
    def repeats(self) -> int:
        """How often the period repeats."""
        return self.schedule.stages * self.schedule.repeats * self.periods


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


N = TypeVar("N", bound=nnx.Module)
M = TypeVar("M")  # any model whose `layers` are an `nnx.List` of modules, or the same `Stacked`


def check_layered(model: object) -> None:
    """Raises ConfigError unless a model has `layers`, in a list or stacked."""
    if isinstance(getattr(model, "layers", None), Pipelined):
        raise ConfigError(
            f"layers of the {type(model).__name__} are in the stages of a pipeline; "
            "models.unpipeline(model) gives the list form"
        )
    if isinstance(getattr(model, "layers", None), Shared):
        raise ConfigError(
            f"layers of the {type(model).__name__} share blocks; structure.expand gives each one"
        )
    if not isinstance(getattr(model, "layers", None), nnx.List | Stacked):
        raise ConfigError(
            f"model is a {type(model).__name__}; a Decoder or another model with layers is accepted"
        )


def period_of(layers: Sequence[nnx.Module] | Stacked | Pipelined | Shared) -> list[nnx.Module]:
    """The layers in order; of a stack or a pipeline, those of one period."""
    if isinstance(layers, Shared):
        return [layers.stages[stage] for stage in layers.source]
    return list(layers.period if isinstance(layers, Stacked | Pipelined) else layers)


def layers_of(model: object) -> int:
    """How many layers a model has, in a list, stacked or in a pipeline.

    Raises:
      ConfigError: it has no layers.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, Pipelined):
        check_layered(model)
    repeats = layers.repeats if isinstance(layers, Stacked | Pipelined) else 1
    return repeats * len(period_of(layers))


def stack(model: M) -> M:
    """The same model with its layers stacked, to be scanned.

    A model whose layers are of several widths (`GraphNetwork`) stacks the runs of alike ones.

    Raises:
      ConfigError: it has no layers.
      ValueError: the model is stacked already.
    """
    if hasattr(model, "stacked"):
        return model.stacked()
    check_layered(model)
    if isinstance(model.layers, Stacked):
        raise ValueError("model is stacked already; models.unstack(model) gives the list form")
    period = stacked_period(list(model.layers))
    return with_layers(model, Stacked(period, len(model.layers) // len(period)))


def stacked_period(layers: Sequence[nnx.Module]) -> list[nnx.Module]:
    """The shortest period of layers that repeats, each with a leading axis of its repeats.

    Raises:
      ConfigError: there are none.
    """
    n = len(layers)
    if not n:
        raise ConfigError("model.layers is empty: there is nothing to stack")
    kinds = [kind_of(layer) for layer in layers]
    width = next(p for p in range(1, n + 1) if n % p == 0 and kinds[p:] == kinds[: n - p])
    return [stack_modules(layers[i::width]) for i in range(width)]


def unstack(model: M) -> M:
    """The same model with its layers in a list, from a stack or a pipeline; else a copy.

    Raises:
      ConfigError: it has no layers.
    """
    if hasattr(model, "unstacked"):
        return model.unstacked()
    layers = getattr(model, "layers", None)
    if isinstance(layers, Stacked | Pipelined):
        return with_layers(model, nnx.List(in_order(layers)))
    check_layered(model)
    return jax.tree.map(lambda leaf: leaf, model)


def in_order(layers: Sequence[nnx.Module] | Stacked | Pipelined) -> list[nnx.Module]:
    """Every layer by itself."""
    if not isinstance(layers, Stacked | Pipelined):
        return list(layers)
    period = layers.period if isinstance(layers, Stacked) else map(as_stack, layers.period)
    columns = [unstack_modules(module, layers.repeats) for module in period]
    return [module for row in zip(*columns, strict=True) for module in row]


def as_stages(module: N, schedule: Schedule, periods: int) -> N:
    """A stacked module in stages, see `Pipelined`."""
    shape = (schedule.repeats, schedule.stages, periods)
    cut = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(*shape, *x.shape[1:]), 0, 1), module)
    return with_axes(cut, lambda axes: ("stages", "repeats", *axes))


def as_stack(module: N) -> N:
    """The inverse of `as_stages`."""
    whole = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[3:]), module)
    return with_axes(whole, lambda axes: axes[2:])


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


def with_layers(model: M, layers: nnx.Module) -> M:
    """The same model with its layers in another form."""
    new = jax.tree.map(lambda leaf: leaf, model)
    new.layers = cast(Any, layers)
    return new
