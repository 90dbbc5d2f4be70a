"""How each kind of model is a graph: which of its numbers are a node's and which an edge's.

    layout    f  node                                             g  edge
    mlp       1  bias                                             1  weight
    ffn       1  bias                                             1  weight
    gated     2  bias, bias of the gate                           2  weight, weight of the gate
    convnet   5  scale, shift, mean, variance, bias               9  kernel of 3 x 3
    resnet    8  scale, shift, mean, variance of the batch norm,  9  kernel of 3 x 3
                 and the same of the shortcut's

Defaults of the four of a norm are 1, 0, 0, 1, else 0. A kernel of one tap and the matrix of the
classifier stand in the centre of nine; a shortcut without parameters is edges whose centre is 1
where it puts a channel, also between sums of different widths (option A). The classifier's bias
stands at the shift of a "resnet", and at the bias of a "convnet". "ffn" and "gated" are the FFNs of
a model with blocks, each a graph of its own with nodes for what it reads, for its hidden channels
and for what it gives; nothing else of the model is in them.

Source: Meta Pruning via Graph Metanetworks (2025) for "convnet" (its VGG) and "resnet"; the others
are its scheme for what has no taps. What differs from the authors' code: its way back takes the
rows of the classifier's matrix, stored by outputs, as if they were stored by inputs, and so returns
another classifier; here all comes back as it was.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax import nnx

from ffnlab.errors import ConfigError
from ffnlab.layers import MLP, BatchNorm, Conv, GatedFFN, Residual
from ffnlab.layers.feed_forward.ffn import is_plain
from ffnlab.layers.linear import Map
from ffnlab.layers.residual import ConvNorm, usual_sources
from ffnlab.models import ConvNet, ResNet
from ffnlab.models.stack import Stacked, unstack
from ffnlab.models.units import is_attention, units
from ffnlab.pruning.meta.graphs import Column, Fan, Kernel, Layout, NodeLayer
from ffnlab.weights import Dense

__all__ = ["layout_of"]

CENTRE, TAPS = 4, 9
NORM = ("scale", "bias", "mean", "variance")  # of a batch norm, in the order of their slots


def layout_of(model: Any) -> Layout:
    """The layout of a model.

    Args:
      model: an MLP, a ConvNet, a ResNet, or a model of Blocks with FFNs, stacked or not; leaves may
        be abstract.
    Raises:
      ConfigError: another model, a layer that the layout has no place for, or a matrix in another
        format than `Dense`; it is named.

    >>> found = layout_of(MLP((4, 3, 2), key=jax.random.key(0)))
    >>> found.name, found.nodes, found.edges
    ('mlp', 9, 18)
    """
    for kind, make in LAYOUTS.items():
        if isinstance(model, kind):
            return make(model)
    if not hasattr(model, "layers"):
        raise ConfigError(
            f"model is a {type(model).__name__}; an MLP, a ConvNet, a ResNet or a model whose "
            "layers are Blocks is accepted"
        )
    flat = jax.eval_shape(unstack, model) if isinstance(model.layers, Stacked) else model
    return of_blocks(flat)


class Layers:
    """The layers of a layout, one after the other."""

    def __init__(self) -> None:
        self.made: list[NodeLayer] = []
        self.nodes = 0

    def add(self, count: int, columns: Iterable[Column] = (), *fans: Fan) -> NodeLayer:
        """A layer of so many nodes behind the others."""
        ordered = tuple(sorted(fans, key=lambda fan: fan.first))
        self.made.append(NodeLayer(self.nodes, count, tuple(columns), ordered))
        self.nodes += count
        return self.made[-1]


def dense(path: str, layer: Map, inputs: int, taps: int = 1) -> None:
    """Raises ConfigError unless a map is one dense matrix of so many taps of so many inputs."""
    weight = layer.weight
    if not isinstance(weight, Dense) or weight.act is not None:
        raise ConfigError(f"{path} is a {type(weight).__name__}; only a Dense is corrected")
    if getattr(layer, "groups", 1) != 1 or weight.shape[0] != taps * inputs:
        raise ConfigError(
            f"{path} reads {inputs} channels with {weight.shape[0]} rows in "
            f"{getattr(layer, 'groups', 1)} groups; a map of all channels is accepted"
        )


def bias(path: str, layer: Map, slot: int) -> Iterator[Column]:
    """The column of a map's bias, where it has one."""
    if layer.b is not None:
        yield Column(f"{path}.b", slot)


def of_mlp(model: MLP) -> Layout:
    """Neurons of one number, the bias."""
    if model.units is not None:
        kind = type(model.units[0]).__name__
        raise ConfigError(f"units[0] is a {kind}; an MLP whose activation learns has no layout")
    layers = Layers()
    below = layers.add(model.sizes[0])
    for i, linear in enumerate(model.maps):
        path = f"maps[{i}]"
        dense(path, linear, below.count)
        fan = Fan(below.first, below.count, (Kernel(f"{path}.w", 1, 0),))
        below = layers.add(linear.weight.shape[1], bias(path, linear, 0), fan)
    return Layout("mlp", (0.0,), 1, tuple(layers.made))


def fan_of(path: str, layer: Map, below: NodeLayer) -> Fan:
    """The edges of a convolution or of the classifier, nine numbers each."""
    size = layer.window.size if isinstance(layer, Conv) else (1, 1)
    if size not in ((1, 1), (3, 3)):
        told = " x ".join(map(str, size))
        raise ConfigError(f"{path} has a kernel of {told}; 3 x 3 and 1 x 1 are accepted")
    taps = math.prod(size)
    dense(path, layer, below.count, taps)
    slot = 0 if taps == TAPS else CENTRE
    return Fan(below.first, below.count, (Kernel(f"{path}.w", taps, slot),))


def of_convnet(model: ConvNet) -> Layout:
    """Channels of five numbers, of which the network has the bias alone."""
    layers = Layers()
    below = layers.add(model.sizes[0])
    last = [("head", model.head)]
    for path, layer in [*((f"convs[{i}]", conv) for i, conv in enumerate(model.convs)), *last]:
        columns = bias(path, layer, len(NORM))
        below = layers.add(layer.weight.shape[1], columns, fan_of(path, layer, below))
    return Layout("convnet", (1.0, 0.0, 0.0, 1.0, 0.0), TAPS, tuple(layers.made))


def normed(path: str, layer: nnx.Module, first: int = 0) -> Iterator[Column]:
    """The columns of the norm behind a convolution.

    Raises:
      ConfigError: another layer, or another norm.
    """
    if not isinstance(layer, ConvNorm) or not isinstance(layer.norm, BatchNorm):
        kind = type(getattr(layer, "norm", layer)).__name__
        raise ConfigError(f"{path}: a {kind}; a ConvNorm with a BatchNorm is accepted")
    for slot, name in enumerate(NORM):
        if getattr(layer.norm, name) is not None:
            learns = name in ("scale", "bias")
            yield Column(f"{path}.norm.{name}", first + slot, learns)


def of_resnet(model: ResNet) -> Layout:
    """Channels of eight numbers: of their norm, and of the shortcut's."""
    layers = Layers()
    image = layers.add(model.stem.conv.channels[0])
    columns = tuple(normed("stem", model.stem))
    fan = fan_of("stem.conv", model.stem.conv, image)
    total = layers.add(model.stem.conv.channels[1], columns, fan)
    for i, block in enumerate(model.residuals):
        path = f"residuals[{i}]"
        below = total
        for name, layer in inner(path, block):
            own = tuple(normed(name, layer))
            fan = fan_of(f"{name}.conv", layer.conv, below)
            below = layers.add(layer.conv.channels[1], own, fan)
        own = tuple(normed(f"{path}.expand", block.expand))
        fan = fan_of(f"{path}.expand.conv", block.expand.conv, below)
        out = block.expand.conv.channels[1]
        more, shortcut = shortened(path, block, total, out)
        total = layers.add(out, (*own, *more), shortcut, fan)
    head = fan_of("head", model.head, total)
    layers.add(model.head.weight.shape[1], bias("head", model.head, 1), head)
    return Layout("resnet", (1.0, 0.0, 0.0, 1.0) * 2, TAPS, tuple(layers.made))


def inner(path: str, block: Residual) -> Iterator[tuple[str, Any]]:
    """The convolutions of a block before its last one; pooling has no place of its own."""
    if block.reduce is not None:
        yield f"{path}.reduce", block.reduce
    if isinstance(block.spatial, ConvNorm):
        yield f"{path}.spatial", block.spatial
    elif getattr(block.spatial, "conv", None) is not None:
        yield f"{path}.spatial.conv", block.spatial.conv


def shortened(
    path: str, block: Residual, total: NodeLayer, out: int
) -> tuple[tuple[Column, ...], Fan]:
    """The columns and the edges of a shortcut."""
    if block.shortcut is not None:
        own = f"{path}.shortcut"
        columns = tuple(normed(own, block.shortcut, len(NORM)))
        return columns, fan_of(f"{own}.conv", block.shortcut.conv, total)
    sources = usual_sources(total.count, out) if block.sources is None else block.sources
    fixed = np.zeros((out, total.count), np.float32)
    for place, source in enumerate(sources):
        if source >= 0:
            fixed[place, source] = 1
    return (), Fan(total.first, total.count, fixed=fixed, slot=CENTRE)


def of_blocks(model: Any) -> Layout:
    """The FFNs of a model, each by itself."""
    found = []
    for unit in units(model):
        sublayer, path = getattr(model.layers[unit.layer], unit.slot), f"layers[{unit.layer}]"
        if sublayer is None or is_attention(unit.slot):
            continue
        if not is_plain(sublayer):
            kind = type(sublayer).__name__
            raise ConfigError(f"{path}.{unit.slot} is a {kind}; FFN and GatedFFN have a layout")
        found.append((f"{path}.{unit.slot}", sublayer))
    if not found:
        raise ConfigError(f"this {type(model).__name__} has no FFN left to correct")
    numbers = 1 + any(isinstance(ffn, GatedFFN) for _, ffn in found)
    layers = Layers()
    for path, ffn in found:
        of_ffn(layers, path, ffn)
    name = {1: "ffn", 2: "gated"}[numbers]
    return Layout(name, (0.0,) * numbers, numbers, tuple(layers.made))


def of_ffn(layers: Layers, path: str, ffn: Any) -> None:
    """Adds the three layers of an FFN."""
    width, hidden = ffn.up.weight.shape
    below = layers.add(width)
    first = [("up", ffn.up), *([("gate", ffn.gate)] if isinstance(ffn, GatedFFN) else [])]
    columns: list[Column] = []
    kernels = []
    for slot, (name, each) in enumerate(first):
        dense(f"{path}.{name}", each, width)
        columns += bias(f"{path}.{name}", each, slot)
        kernels.append(Kernel(f"{path}.{name}.w", 1, slot))
    middle = layers.add(hidden, columns, Fan(below.first, width, tuple(kernels)))
    dense(f"{path}.down", ffn.down, hidden)
    down = Fan(middle.first, hidden, (Kernel(f"{path}.down.w", 1, 0),))
    layers.add(ffn.down.weight.shape[1], bias(f"{path}.down", ffn.down, 0), down)


LAYOUTS: Mapping[type, Callable[[Any], Layout]] = MappingProxyType(
    {MLP: of_mlp, ConvNet: of_convnet, ResNet: of_resnet}
)
