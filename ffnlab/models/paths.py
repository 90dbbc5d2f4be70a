"""The paths of a residual network: where its stream begins, and what every branch adds to it.

    h_n = c_0 + c_1 + … + c_m,     c_0 = h_0,     c_j: what unit j - 1 adds (`ffnlab.models.units`)

holds of blocks whose norms stand before or inside their branches. The last norm and the head may
then read another sum, with weights (`ffnlab.layers.EnsembleScale`): the trunk carries it beside the
stream that the layers read.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers import Block, EnsembleScale
from ffnlab.layers.block import stacked
from ffnlab.layers.context import Context, LayerInputs, LayerOutputs
from ffnlab.layers.logical import constrain
from ffnlab.models.stack import Pipelined, Shared, Stacked, period_of
from ffnlab.models.units import units

__all__ = ["added_up", "check_ensemble", "path_names", "sizes_of", "with_ensemble"]

M = TypeVar("M")
Streams = tuple[Array, Array | None]  # what layers read, and the ensemble that the head reads


def sizes_of(layers: Sequence[nnx.Module] | Stacked | Pipelined | Shared) -> tuple[int, int]:
    """(layers, slots of each) of a trunk whose stream is a sum of its branches.

    Raises:
      ConfigError: it is none: a norm stands after a sum, a branch replaces the stream; or layers
        are in a pipeline, share their blocks, or have different numbers of slots.
    """
    if isinstance(layers, Pipelined):
        raise ConfigError(
            "stages of a pipeline hand on one stream, an ensemble of paths is a second one; "
            "models.unpipeline(model) gives the list form"
        )
    if isinstance(layers, Shared):
        raise ConfigError(
            "layers that share blocks have no paths of their own; structure.expand gives each one"
        )
    blocks = period_of(layers)
    strange = sorted({type(block).__name__ for block in blocks if not isinstance(block, Block)})
    if strange:
        raise ConfigError(f"layers of type {strange}; only a Block adds branches to a stream")
    for block in blocks:
        check_joins(block)
    slots = {len(block.slots) for block in blocks}
    if len(slots) != 1:
        raise ConfigError(f"the blocks of this model have {sorted(slots)} sublayers, not as many")
    repeats = layers.repeats if isinstance(layers, Stacked) else 1
    return repeats * len(blocks), slots.pop()


def check_joins(block: Block) -> None:
    """Raises ConfigError for a block after which the stream is not what it was and branches."""
    for name, join in zip(block.slots, block.joins, strict=True):
        if join.norm == "after":
            raise ConfigError(
                f"the norm of {name!r} stands after the sum (post-norm): the stream is no sum of "
                "branches, and has no paths that could be weighed"
            )
        if not join.residual:
            raise ConfigError(
                f"{name!r} has no residual: it replaces the stream, which is no sum of branches"
            )


def added_up(
    block: Block,
    streams: Streams,
    context: Context,
    given: tuple[LayerInputs, Float[Array, "s *d"] | None],
    cache: Any,
    branches: bool,
) -> tuple[Streams, Any, LayerOutputs]:
    """One block on both streams.

    Args:
      streams: what it reads, and the ensemble so far; None without one.
      given: its inputs, and the weights of its branches in the ensemble.
      cache: of its attention.
      branches: whether its branches are asked for.
    Returns:
      (streams, cache, outputs).
    """
    (h, e), (inputs, weights) = streams, given
    if e is None or weights is None:
        h, cache, outputs = block(h, context, inputs=inputs, cache=cache, branches=branches)
        return (h, e), cache, outputs
    before = h
    h, cache, outputs = block(h, context, inputs=inputs, cache=cache, branches="apart")
    added: Any = outputs.branches
    for weight, branch in zip(weights, added, strict=True):
        if branch is not None:
            after = before + branch  # as the block has it, and is computed once
            e = weighed(e, weight.astype(branch.dtype), branch, before, after)
            before = after
    outputs = LayerOutputs(outputs.reports, stacked(added, h) if branches else None)
    return (h, constrain(e, ("batch", "length", "embed"))), cache, outputs


@jax.custom_jvp
def plainly_weighed(
    e: Float[Array, "b t d"],
    weight: Float[Array, "*d"],
    branch: Float[Array, "b t d"],
    before: Float[Array, "b t d"],
    after: Float[Array, "b t d"],
) -> Float[Array, "b t d"]:
    """e + weight branch; its derivative by the weight takes after - before for the branch."""
    return e + weight * branch


@plainly_weighed.defjvp
def derivative(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """(value, tangent) of `plainly_weighed`."""
    _, weight, _, before, after = primals
    of_e, of_weight, of_branch, _, _ = tangents
    return plainly_weighed(*primals), of_e + of_weight * (after - before) + weight * of_branch


# A backward pass of branches weighed plainly would keep all of them. The stream on both sides of
# them it keeps for the norms: of those alone the derivative is computed again.
weighed = jax.checkpoint(plainly_weighed, prevent_cse=False)


def check_ensemble(model: Any) -> None:
    """Raises ConfigError for a model whose paths cannot be weighed."""
    if not hasattr(type(model), "ensemble"):
        raise ConfigError(
            f"model is a {type(model).__name__}; a ViT or a Decoder, whose head can read an "
            "ensemble of paths, is accepted"
        )
    if len(getattr(model.config, "depths", (1,))) > 1:
        raise ConfigError(
            f"depths={model.config.depths}: stages of several widths have no common sum of paths"
        )
    units(model)  # whose checks say what layers are accepted
    sizes_of(model.layers)


def with_ensemble(model: M, ensemble: EnsembleScale) -> M:
    """The model whose last norm and head read a weighted sum of its paths.

    Args:
      model: a ViT or a Decoder, its layers in a list or stacked; it is not changed.
      ensemble: the weights.
    Raises:
      ConfigError: another model, one whose stream is no sum of branches, or weights of other sizes.
    """
    check_ensemble(model)
    ensemble.weights(*sizes_of(model.layers))
    shape, width = ensemble.values.shape, model.config.width
    if shape[1:] not in ((), (width,)):
        raise ConfigError(f"ensemble has scales of {shape[1]} numbers; the width is {width}")
    new = tree.copy(model)
    new.ensemble = jax.tree.map(lambda leaf: leaf, ensemble)
    return new


def path_names(model: Any) -> tuple[str, ...]:
    """What the paths of a model are called, in order.

    >>> from ffnlab.testing import tiny
    >>> path_names(tiny())[:3]
    ('start', 'attn 0', 'ffn 0')
    """
    return ("start", *(f"{unit.slot} {unit.layer}" for unit in units(model)))
