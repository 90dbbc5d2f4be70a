"""What a search found, as a network: the most likely size of every layer and of every stage."""

import dataclasses
import re
from typing import Any, NamedTuple, TypeVar

import numpy as np
from flax import nnx
from jaxtyping import Array

from ffnlab import tree
from ffnlab.layers import MLP
from ffnlab.models.groups import groups
from ffnlab.models.narrow import narrow
from ffnlab.models.remove import remove
from ffnlab.models.resnet import ResNet, ResNetConfig
from ffnlab.models.units import units
from ffnlab.pruning.tas.network import Architecture, picked
from ffnlab.pruning.tas.sites import Sites, convolutions

__all__ = ["Shape", "found_config", "found_network", "shape_of"]

M = TypeVar("M")
BLOCK = re.compile(r"residuals\[(\d+)\]")


class Shape(NamedTuple):
    """Sizes of a network.

    Attributes:
      widths: channels that are kept, by the name of the width.
      blocks: how many are kept, by the name of the stage.
    """

    widths: dict[str, int]
    blocks: dict[str, int]

    def __str__(self) -> str:
        said = [f"{name} {size}" for name, size in (self.widths | self.blocks).items()]
        return ", ".join(said)


def shape_of(sites: Sites, architecture: Architecture) -> Shape:
    """The most likely sizes, the smaller of equally likely ones; on the host."""
    widths, depths = (np.asarray(logits) for logits in architecture)
    return Shape(
        {
            w.name: w.choices[int(widths[i, : len(w.choices)].argmax())]
            for i, w in enumerate(sites.widths)
        },
        {
            d.name: d.choices[int(depths[i, : len(d.choices)].argmax())]
            for i, d in enumerate(sites.depths)
        },
    )


def found_network(model: M, sites: Sites, shape: Shape, key: Array) -> M:
    """The network of some sizes, by itself.

    Args:
      model: of `with_candidates`: what was searched, with its weights.
      sites: what was chosen in it, by channel groups or by convolutions.
      shape: one of theirs.
      key: of the weights of a ResNet whose convolutions had widths of their own; neighbours of
        other widths are joined by shortcuts that were never trained, so that all are drawn anew.
    Returns:
      a model of the same kind. Of widths by groups it computes what the search network does with
      these sizes alone, and has its weights and norms.
    """
    index = {i: w.choices.index(shape.widths[w.name]) for i, w in enumerate(sites.widths)}
    if not sites.tied:
        return ResNet(found_config(model, sites, shape), key=key)
    plain, old = shortened(picked(model, sites, index), sites, shape)
    kept = {}
    for group in groups(plain):
        name = old(group.name)
        if name in shape.widths:
            kept[group.name] = range(shape.widths[name])
    return narrow(plain, kept)


def shortened(model: Any, sites: Sites, shape: Shape) -> tuple[Any, Any]:
    """(A model without the blocks that go, new name of a channel group -> name that it had)."""
    gone = [path for depth in sites.depths for path in depth.blocks[shape.blocks[depth.name] :]]
    numbers = {int(path[path.index("[") + 1 : -1]) for path in gone}
    same = lambda name: name  # noqa: E731
    if not gone:
        return model, same
    if isinstance(model, MLP):
        new = tree.copy(model)
        new.maps = nnx.List([each for i, each in enumerate(model.maps) if i not in numbers])
        return new, same  # those that are kept are the first ones
    if not isinstance(model, ResNet):
        out = [unit.number for unit in units(model) if unit.layer in numbers and unit.present]
        return remove(model, out), same
    left = [i for i in range(len(model.residuals)) if i not in numbers]
    new = tree.copy(model)
    new.residuals = nnx.List([new.residuals[i] for i in left])
    new.config = cut(model.config, sites, shape)
    return new, lambda name: BLOCK.sub(lambda match: f"residuals[{left[int(match[1])]}]", name)


def cut(config: ResNetConfig, sites: Sites, shape: Shape) -> ResNetConfig:
    """A configuration with as many blocks in each stage as are kept."""
    bounds = np.cumsum([0, *config.blocks]).tolist()
    names = [f"residuals[{start}]" for start in bounds[:-1]]
    kept = [shape.blocks.get(name, count) for name, count in zip(names, config.blocks, strict=True)]
    n, sizes = config.convolutions, config.sizes[:1]
    for start, count in zip(bounds, kept, strict=False):
        sizes += config.sizes[1 + n * start : 1 + n * (start + count)]
    return dataclasses.replace(config, blocks=tuple(kept), sizes=sizes)


def found_config(model: ResNet, sites: Sites, shape: Shape) -> ResNetConfig:
    """The configuration of a ResNet whose convolutions have widths of their own."""
    paths = ["stem.conv"]
    for i, block in enumerate(model.residuals):
        paths += convolutions(f"residuals[{i}]", block)
    names = [sites.widths[sites.writes[path]].name for path in paths]
    whole = dataclasses.replace(model.config, sizes=tuple(shape.widths[name] for name in names))
    return cut(whole, sites, shape)
