"""What a search may end a stage with: outputs of several of its blocks, as wide as the widest.

Modules keep their kind, and so does the model: their calls go through functions (`hook`) that note
what a stage may end with, and after its last block give the sum.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ffnlab.layers import MLP, Residual
from ffnlab.models.resnet import ResNet
from ffnlab.pruning.tas import core
from ffnlab.pruning.tas.core import Draw
from ffnlab.pruning.tas.sites import Depth, Sites, Width, is_same

__all__ = ["Feature", "aligned", "hook", "join_blocks", "join_maps", "join_residuals", "joined"]

EXACT = jax.lax.Precision.HIGHEST


def aligned(x: Float[Array, "*b d"], matrix: Float[Array, "d d"]) -> Float[Array, "*b d"]:
    """Channels as a matrix makes them, float32."""
    return jnp.matmul(x.astype(jnp.float32), matrix.T, precision=EXACT)


@functools.cache
def hooked(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass whose calls go through `self.hook(call, x, …)`, and is its parent in all else."""

    def call(self: Any, *args: Any, **options: Any) -> Any:
        return self.hook(functools.partial(kind.__call__, self), *args, **options)

    return type(f"Hooked{kind.__name__}", (kind,), {"__call__": call})


def hook(node: nnx.Module, fn: Callable) -> None:
    """Lets the calls of a module go through a function."""
    node.__class__ = hooked(type(node))
    node.hook = fn


class Feature(NamedTuple):
    """What a stage may end with.

    Attributes:
      x: activations, all channels.
      width: [] int, candidate that they are as wide as.
    """

    x: Array
    width: Int[Array, ""]


def joined(features: Sequence[Feature], share: Float[Array, "n"], width: Width | None) -> Feature:
    """The sum of features, each as much as it counts, aligned to the widest of those that do.

    Args:
      width: what their channels are candidates of; None of a stream, all of whose channels stay.
    """
    dtype = features[0].x.dtype
    if width is None:
        parts = (q * f.x.astype(jnp.float32) for q, f in zip(share, features, strict=False))
        return Feature(sum(parts).astype(dtype), jnp.int32(0))
    table = jnp.asarray(core.windows(width.choices, width.size))
    pairs = list(zip(share, features, strict=False))
    widest = jnp.stack([jnp.where(q > 0, f.width, 0) for q, f in pairs]).max()
    parts = (q * aligned(f.x, core.averaging(table[f.width, widest])) for q, f in pairs)
    return Feature(sum(parts).astype(dtype), widest)


def join_residuals(model: ResNet, sites: Sites, draw: Draw, nodes: Mapping[str, Any]) -> None:
    """Joins what the stages of a ResNet end with, in place, and follows how wide its stream is."""
    widest = draw.pairs.widest
    stream = [widest[sites.writes["stem.conv"]]]  # the last one counts
    features: list[Feature] = []
    stages = {path: (i, depth) for i, depth in enumerate(sites.depths) for path in depth.blocks}

    def behind(path: str, block: Residual) -> Callable:
        row = sites.writes[f"{path}.expand.conv"]
        is_sum, is_padded = is_same(block), block.shortcut is None

        def after(call: Callable, x: Array) -> Array:
            y, width = call(x), widest[row]
            if is_sum:
                width = jnp.maximum(width, stream[-1])
            elif is_padded:  # it has channels that this width has not
                left = jnp.arange(y.shape[-1]) < jnp.asarray(sites.channels)[row, width]
                y = y * left.astype(y.dtype)
            end = Feature(y, width)
            if path in stages:
                end = of_stage(*stages[path], path, end, features, draw, sites.widths[row])
            stream.append(end.width)
            return end.x

        return after

    for i, block in enumerate(model.residuals):
        path = f"residuals[{i}]"
        hook(nodes[path], behind(path, block))


def of_stage(
    i: int,
    depth: Depth,
    path: str,
    end: Feature,
    features: list[Feature],
    draw: Draw,
    width: Width | None,
) -> Feature:
    """What goes on after a block of a stage: its output, or after the last one the joined ones."""
    number = depth.blocks.index(path) + 1
    if number == 1:
        features.clear()
    if number in depth.choices:
        features.append(end)
    if number < len(depth.blocks):
        return end
    return joined(features, draw.depths[i], width)


def join_maps(model: MLP, sites: Sites, draw: Draw) -> None:
    """Joins what the hidden maps of an MLP end with, in place, where the last map reads."""
    for i, depth in enumerate(sites.depths):
        features: list[Feature] = []

        def read(call: Callable, x: Array, block: int, i: int, depth: Depth, to: list) -> Array:
            path = depth.blocks[block]
            row = sites.writes[path]
            end = Feature(x, draw.pairs.widest[row])
            return call(of_stage(i, depth, path, end, to, draw, sites.widths[row]).x)

        for block in range(len(depth.blocks)):
            given = {"block": block, "i": i, "depth": depth, "to": features}
            hook(model.maps[block + 1], functools.partial(read, **given))


def join_blocks(sites: Sites, draw: Draw, nodes: Mapping[str, Any]) -> None:
    """Joins what the blocks of a model end with, in place."""
    for i, depth in enumerate(sites.depths):
        features: list[Feature] = []

        def after(
            call: Callable, *args: Any, path: str, i: int, depth: Depth, to: list, **options: Any
        ) -> Any:
            h, *rest = call(*args, **options)
            end = of_stage(i, depth, path, Feature(h, jnp.int32(0)), to, draw, None)
            return end.x, *rest

        for path in depth.blocks:
            given = {"path": path, "i": i, "depth": depth, "to": features}
            hook(nodes[path], functools.partial(after, **given))
