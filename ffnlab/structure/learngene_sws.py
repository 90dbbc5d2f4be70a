"""Exploring Learngene via Stage-wise Weight Sharing for Initializing Variable-sized Models (SWS)
(2024, arXiv 2404.16897).

A network whose layers share their weights within stages is taught by a large one. Its few blocks
have learnt to be applied repeatedly, so that they may be repeated more or fewer times, each at its
own stage, to begin networks of any depth that only need brief tuning.

    auxiliary    layer i runs block b(i), the stage that holds i
    descendant   layer k begins as a copy of block src[k], src not decreasing

Symbols. S: stages; L, n: layers of the auxiliary network and of a descendant.

What differs from the authors' code: a descendant keeps heads and eps of its auxiliary network
(theirs change both, Aux-S has 12 heads and Des-S 6), so that with src = b it computes the same;
there is no stochastic depth; a map for n layers is `even_source`, which is theirs for 12. Their
distillation divides by rows and classes: `losses.distilled(reduction="mean")`.
"""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.models.stack import Shared, check_layered, unstack
from ffnlab.transform import Transform

__all__ = ["even_source", "expand", "share"]

PER_LAYER = ("windows", "ffns")  # fields of configurations with an entry for each layer


def even_source(layers: int, stages: int) -> tuple[int, ...]:
    """The stage of each of n layers: all stages in order, as evenly as can be, more at the front.

    Args:
      layers: n >= 1; with fewer layers than stages the first stages have one each.
      stages: S >= 1.
    Raises:
      ConfigError: n or S below 1.

    >>> even_source(12, 5)
    (0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4)
    """
    if layers < 1 or stages < 1:
        raise ConfigError(f"layers={layers} and stages={stages} must be at least 1")
    counts = [layers // stages + (i < layers % stages) for i in range(stages)]
    return tuple(i for i, count in enumerate(counts) for _ in range(count))


def share(*, repeats: tuple[int, ...] = (3, 3, 4, 3, 3)) -> Transform[Any, tuple[()]]:
    """The transform that lets the layers of a stage share one block: the first of them stays.

    Args:
      repeats: layers of each stage; together they are the model's.
    Returns:
      a Transform that observes nothing, of a model with layers in a list or stacked; its layers
      become `models.Shared`.
    Raises:
      ConfigError: no stages, or one without layers; from the transform, another number of layers,
        or layers of a stage that differ in more than their numbers.

    >>> share(repeats=(1, 2, 1)).name
    'share'
    """
    if not repeats or min(repeats) < 1:
        raise ConfigError(f"repeats={repeats}: at least one layer for each stage is accepted")
    source = tuple(i for i, count in enumerate(repeats) for _ in range(count))

    def init(model: Any) -> tuple[()]:
        check_layered(model)
        jax.eval_shape(shared, model)
        return ()

    def shared(model: Any) -> Any:
        model = unstack(model)
        layers = list(model.layers)
        if len(layers) != len(source):
            raise ConfigError(
                f"repeats={repeats} are {len(source)} layers; the model has {len(layers)}"
            )
        first = [source.index(stage) for stage in range(len(repeats))]
        unlike = [i for i, s in enumerate(source) if kind(layers[i]) != kind(layers[first[s]])]
        if unlike:
            raise ConfigError(f"layers {unlike} are built otherwise than the first of their stage")
        new = tree.copy(model)
        new.layers = Shared([layers[i] for i in first], source)
        return new

    return Transform("share", init, None, lambda model, stats: shared(model))


def kind(layer: nnx.Module) -> tuple:
    """What layers that can be one have in common."""
    leaves, structure = jax.tree.flatten(layer)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def expand(
    *,
    layers: int | None = None,
    source: tuple[int, ...] | None = None,
    allow_unordered: bool = False,
) -> Transform[Any, tuple[()]]:
    """The transform that makes a network of any depth: layer k is a copy of the block of stage
    source[k], and from then on its own.

    Args:
      layers: how many (n), spread by `even_source`; those there are when None.
      source: the stage of each layer, instead.
      allow_unordered: accept a source that decreases somewhere.
    Returns:
      a Transform that observes nothing, of a model with `models.Shared` layers, or with others,
      each of which is then a stage.
    Raises:
      ConfigError: layers and source both, layers below 1, an empty or decreasing source; from the
        transform, a stage that is not there, or a model of several widths.

    >>> expand(layers=12).name
    'expand'
    """
    if layers is not None and source is not None:
        raise ConfigError(f"layers={layers} and source={source} exclude each other")
    if layers is not None and layers < 1:
        raise ConfigError(f"layers={layers} must be at least 1")
    if source is not None and (not source or min(source) < 0):
        raise ConfigError(f"source={source}: one stage, from 0 on, for each layer is accepted")
    if source and not allow_unordered and any(b < a for a, b in pairwise(source)):
        raise ConfigError(
            f"source={source} decreases, which loses what stages have learnt of their places; "
            "allow_unordered=True accepts it"
        )

    def init(model: Any) -> tuple[()]:
        if not isinstance(getattr(model, "layers", None), Shared):
            check_layered(model)
        jax.eval_shape(expanded, model)
        return ()

    def expanded(model: Any) -> Any:
        stages, old = stages_of(model)
        chosen = source or even_source(layers or len(old), len(stages))
        if max(chosen) >= len(stages):
            raise ConfigError(f"source={chosen}: the model has stages 0 to {len(stages) - 1}")
        if len(getattr(model.config, "stages", ())) > 1:
            raise ConfigError(f"stages={model.config.stages} of this model differ in width")
        new = tree.copy(model)
        # Copies: two layers of one array could not be given up to a step that donates its model.
        new.layers = nnx.List([jax.tree.map(jnp.copy, stages[stage]) for stage in chosen])
        new.config = with_layers(model.config, [old.index(stage) for stage in chosen])
        return new

    return Transform("expand", init, None, lambda model, stats: expanded(model))


def stages_of(model: Any) -> tuple[list[nnx.Module], Sequence[int]]:
    """(the blocks, the block of every layer) of a model in any form."""
    if isinstance(model.layers, Shared):
        return list(model.layers.stages), model.layers.source
    blocks = list(unstack(model).layers)
    return blocks, range(len(blocks))


def with_layers(config: Any, layers: Sequence[int]) -> Any:
    """A configuration of layers that are these of another's."""
    held = {name: getattr(config, name, None) for name in PER_LAYER}
    chosen = {n: tuple(v[i] for i in layers) for n, v in held.items() if v is not None}
    return dataclasses.replace(config, layers=len(layers), **chosen)
