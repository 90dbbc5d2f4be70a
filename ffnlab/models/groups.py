"""Channel groups: which entries of which parameters stand or fall together.

A unit of a group is what `ffnlab.models.narrow` can take out of a model: a hidden channel of an
FFN (columns of gate and up, the row of down), keys and values of attention with the queries that
share them, a channel of a convolution (with its batch norm, and its rows in what reads it), or a
channel of a sum of residuals. The groups are found from the structure of the model:

    MLP, ConvNet        outputs of each map or convolution but the last
    ResNet              channels inside each block; channels of each sum, from where the shortcut
                        changes their number to where it does so again
    models of Blocks    each FFN; each attention
    Decoder             the residual stream too

A norm over channels (LayerNorm) counts those that are gone, so that the streams of encoders and
vision transformers form no group; RMSNorm does too, but there a factor of its scale and its eps
make up for it. Outputs (classes, tokens) and inputs form none, nor do experts of a mixture.

A shortcut without parameters (option A of arXiv 1512.03385) joins two sums: it is a matrix of zeros
and ones that is not stored, whose index map says where each channel comes to stand. A channel may
go while the one that it is added to stays.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers import (
    MLP,
    Attention,
    BatchNorm,
    Block,
    Conv,
    FixedAffine,
    Linear,
    Residual,
    RMSNorm,
    SparseGatedFFN,
)
from ffnlab.layers.feed_forward.ffn import is_plain
from ffnlab.layers.linear import Map
from ffnlab.layers.residual import ConvNorm, Spatial, usual_sources
from ffnlab.models.convnet import ConvNet
from ffnlab.models.decoder import Decoder
from ffnlab.models.resnet import ResNet
from ffnlab.models.stack import Stacked, check_layered, period_of, unstack

__all__ = ["Group", "Part", "groups"]

ROWS, COLUMNS = -2, -1


class Part(NamedTuple):
    """What of one parameter goes with the units of a group.

    Attributes:
      path: of the Variable, in the list form of the model (`models.unstack`); of a `Residual` whose
        shortcut has no parameters, that of the block.
      axis: of its array: -2 for rows of a weight, -1 for columns and for entries of vectors.
      index: entries along the axis that go with each unit, [units, n]; -1 for none.
    """

    path: str
    axis: int
    index: Int[np.ndarray, "units n"]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Units of which any may go, but not all.

    Attributes:
      name: path of the module that first makes the units, "layers[0].ffn", "residuals[3].expand".
      size: how many units there are.
      parts: all that goes with them.
    """

    name: str
    size: int
    parts: tuple[Part, ...]


def groups(model: Any) -> list[Group]:
    """The groups of a model, in the order in which it computes them.

    Args:
      model: an MLP, a ConvNet, a ResNet, or a model whose layers are Blocks, stacked or not; leaves
        may be abstract. Parts that do not look as these models are made (a map that was replaced by
        several, experts) form no groups.
    Raises:
      ConfigError: another model, or a block of a ResNet with parts of another kind.

    >>> [(g.name, g.size) for g in groups(MLP((4, 3, 2), key=jax.random.key(0)))]
    [('maps[0]', 3)]
    """
    if isinstance(model, MLP):
        return list(_of_mlp(model))
    if isinstance(model, ConvNet):
        return list(_of_convnet(model))
    if isinstance(model, ResNet):
        return list(_of_resnet(model))
    if not hasattr(model, "layers"):
        raise ConfigError(
            f"model is a {type(model).__name__}; an MLP, a ConvNet, a ResNet or a model whose "
            "layers are Blocks is accepted"
        )
    check_layered(model)
    flat = jax.eval_shape(unstack, model) if isinstance(model.layers, Stacked) else model
    found = [g for i, layer in enumerate(flat.layers) for g in _of_block(f"layers[{i}]", layer)]
    stream = _stream(flat) if isinstance(flat, Decoder) else None
    return found if stream is None else [stream, *found]


def runs(units: int, n: int = 1) -> Int[np.ndarray, "units n"]:
    """n neighbours for each unit.

    >>> runs(2, 3).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    return np.arange(units * n).reshape(units, n)


def repeats(units: int, n: int) -> Int[np.ndarray, "units n"]:
    """Every units-th entry: rows of a kernel are by tap, then by channel; flattened pixels alike.

    >>> repeats(2, 3).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    return np.arange(units * n).reshape(n, units).T


def outputs(path: str, layer: Map, index: np.ndarray) -> list[Part]:
    """Columns of a map, and the entries of its bias."""
    names = ["w"] + ["b"] * (layer.b is not None)
    return [Part(f"{path}.{name}", COLUMNS, index) for name in names]


def inputs(path: str, layer: Map, units: int) -> list[Part]:
    """Rows of a map that read channels: once for every tap, or for every pixel that was flattened.

    Raises:
      ConfigError: a convolution in groups, or rows that are no multiple of the channels.
    """
    rows = layer.weight.shape[0]
    if getattr(layer, "groups", 1) != 1 or rows % units:
        raise ConfigError(
            f"{path} reads {units} channels with {rows} rows in {getattr(layer, 'groups', 1)} "
            "groups; a map of all channels is accepted"
        )
    return [Part(f"{path}.w", ROWS, repeats(units, rows // units))]


def _of_mlp(model: MLP) -> Iterator[Group]:
    for i, linear in enumerate(list(model.maps)[:-1]):
        units = linear.weight.shape[1]
        parts = outputs(f"maps[{i}]", linear, runs(units))
        if model.units is not None:
            parts += vectors(f"units[{i}]", model.units[i], units)
        parts += inputs(f"maps[{i + 1}]", model.maps[i + 1], units)
        yield Group(f"maps[{i}]", units, tuple(parts))


def _of_convnet(model: ConvNet) -> Iterator[Group]:
    after = [(f"convs[{i}]", conv) for i, conv in enumerate(model.convs)][1:]
    readers = [*after, ("head", model.head)]
    for i, (conv, (path, reader)) in enumerate(zip(model.convs, readers, strict=True)):
        units = conv.weight.shape[1]
        parts = outputs(f"convs[{i}]", conv, runs(units)) + inputs(path, reader, units)
        yield Group(f"convs[{i}]", units, tuple(parts))


def vectors(path: str, module: nnx.Module, units: int) -> list[Part]:
    """The entries of all variables of a layer that has one for each unit."""
    found = [(name, node) for name, node in tree.walk(module) if isinstance(node, nnx.Variable)]
    own = [name for name, node in found if node.get_value().shape[-1:] == (units,)]
    return [Part(f"{path}.{name}", COLUMNS, runs(units)) for name in own if units > 1]


def normed(path: str, layer: ConvNorm) -> list[Part]:
    """Outputs of a convolution with its norm.

    Raises:
      ConfigError: a norm that is not one of every channel by itself.
    """
    if not isinstance(layer, ConvNorm) or not isinstance(layer.norm, BatchNorm | FixedAffine):
        kind = type(getattr(layer, "norm", layer)).__name__
        raise ConfigError(f"{path}: a {kind}; a ConvNorm with BatchNorm or FixedAffine is accepted")
    units = layer.conv.weight.shape[1]
    own = outputs(f"{path}.conv", layer.conv, runs(units))
    return own + vectors(f"{path}.norm", layer.norm, units)


def _of_resnet(model: ResNet) -> Iterator[Group]:
    name, units, parts = "stem", model.stem.conv.weight.shape[1], normed("stem", model.stem)
    for i, block in enumerate(model.residuals):
        path = f"residuals[{i}]"
        out = block.expand.conv.weight.shape[1]
        first, reader = _first(path, block)
        parts += inputs(f"{first}.conv", reader.conv, units)
        inner = list(_inside(path, block))
        if block.shortcut is None and block.sources is None and units == out:  # x itself: one sum
            parts += normed(f"{path}.expand", block.expand)
            yield from inner
            continue
        new = normed(f"{path}.expand", block.expand)
        if block.shortcut is None:
            sources = usual_sources(units, out) if block.sources is None else block.sources
            where = placed_at(sources, units)
            parts.append(Part(path, ROWS, where))
            new.append(Part(path, COLUMNS, runs(out)))
        else:
            parts += inputs(f"{path}.shortcut.conv", block.shortcut.conv, units)
            new += normed(f"{path}.shortcut", block.shortcut)
        yield Group(name, units, tuple(parts))
        yield from inner
        name, units, parts = f"{path}.expand", out, new
    yield Group(name, units, (*parts, *inputs("head", model.head, units)))


def placed_at(sources: tuple[int, ...], units: int) -> Int[np.ndarray, "units 1"]:
    """Where a shortcut without parameters puts each channel, -1 for nowhere; of where each of its
    outputs comes from."""
    where = np.full((units, 1), -1)
    for place, source in enumerate(sources):
        if source >= 0:
            where[source] = place
    return where


def _first(path: str, block: Residual) -> tuple[str, ConvNorm]:
    """The convolution that reads the sum, outside of the shortcut."""
    if block.reduce is not None:
        return f"{path}.reduce", block.reduce
    if not isinstance(block.spatial, ConvNorm):
        kind = type(block.spatial).__name__
        raise ConfigError(f"{path}.spatial is a {kind}; a basic block has a ConvNorm")
    return f"{path}.spatial", block.spatial


def _inside(path: str, block: Residual) -> Iterator[Group]:
    """The channels between the convolutions of a block; pooling and depthwise steps keep them."""
    name, maker = _first(path, block)
    units, parts = maker.conv.weight.shape[1], normed(name, maker)
    spatial = block.spatial.conv if isinstance(block.spatial, Spatial) else None
    if block.reduce is not None and not isinstance(block.spatial, Spatial):
        kind = type(block.spatial).__name__
        raise ConfigError(f"{path}.spatial is a {kind}; a bottleneck has a Spatial")
    if spatial is not None:
        own = f"{path}.spatial.conv"
        if is_depthwise(spatial.conv):
            parts += normed(own, spatial)
        else:
            yield Group(name, units, (*parts, *inputs(f"{own}.conv", spatial.conv, units)))
            name, units, parts = (
                f"{path}.spatial",
                spatial.conv.weight.shape[1],
                normed(own, spatial),
            )
    yield Group(name, units, (*parts, *inputs(f"{path}.expand.conv", block.expand.conv, units)))


def is_depthwise(conv: Conv) -> bool:
    """Whether every channel of a convolution is by itself, and there are several."""
    return conv.groups > 1 and conv.channels == (conv.groups, conv.groups)


def _of_block(path: str, block: nnx.Module) -> Iterator[Group]:
    if not isinstance(block, Block):
        raise ConfigError(f"{path} is a {type(block).__name__}; only a Block has groups")
    for slot in block.slots:
        sublayer, own = getattr(block, slot), f"{path}.{slot}"
        if is_plain(sublayer) or is_sparse(sublayer):
            yield _ffn(own, sublayer)
        elif is_attention(sublayer):
            yield _attention(own, sublayer)


def is_sparse(sublayer: object) -> bool:
    """Whether this is a `SparseGatedFFN` of linear maps."""
    if not isinstance(sublayer, SparseGatedFFN):
        return False
    return all(isinstance(m, Linear) for m in (sublayer.gate, sublayer.up, sublayer.down))


def is_attention(sublayer: object) -> bool:
    """Whether this is attention of linear maps, without keys that stand beside it."""
    if not isinstance(sublayer, Attention) or sublayer.beside is not None:
        return False
    return all(isinstance(getattr(sublayer, name), Linear) for name in "qkvo")


def _ffn(path: str, ffn: Any) -> Group:
    units, first = ffn.down.weight.shape[0], ["gate"] * hasattr(ffn, "gate") + ["up"]
    parts = [
        p for name in first for p in outputs(f"{path}.{name}", getattr(ffn, name), runs(units))
    ]
    if isinstance(ffn, SparseGatedFFN):
        parts.append(Part(f"{path}.threshold", COLUMNS, runs(units)))
    return Group(path, units, (*parts, *inputs(f"{path}.down", ffn.down, units)))


def _attention(path: str, attention: Attention) -> Group:
    """A unit is a head of keys and values, with all queries that read it."""
    spec = attention.spec
    units, size = spec.kv_heads, spec.head_dim
    queries = runs(units, spec.heads // units * size)
    parts = outputs(f"{path}.q", attention.q, queries)
    for name in "kv":
        parts += outputs(f"{path}.{name}", getattr(attention, name), runs(units, size))
    for name in ("prefix", "post_scale"):  # [..., kv_heads, head_dim]
        if getattr(attention, name) is not None:
            parts.append(Part(f"{path}.{name}", ROWS, runs(units)))
    return Group(path, units, (*parts, Part(f"{path}.o.w", ROWS, queries)))


def _stream(model: Decoder) -> Group | None:
    """The residual stream of a decoder, where all that touches it is known."""
    if model.connectors is not None or model.modalities is not None:
        return None
    units = model.config.width
    parts, norms = [Part("embed.w", COLUMNS, runs(units))], [("norm", model.norm)]
    for i, block in enumerate(period_of(model.layers)):
        for slot in block.slots:
            path, sublayer = f"layers[{i}].{slot}", getattr(block, slot)
            norms.append((f"{path}_norm", getattr(block, f"{slot}_norm")))
            post = f"post_{slot}_norm"
            norms.append((f"layers[{i}].{post}", getattr(block, post, None)))
            if sublayer is None:
                continue
            if is_plain(sublayer) or is_sparse(sublayer):
                readers, writer = ["gate"] * hasattr(sublayer, "gate") + ["up"], "down"
            elif is_attention(sublayer) and not sublayer.spec.memory:
                readers, writer = list("qkv"), "o"
            else:
                return None
            for name in readers:
                parts += inputs(f"{path}.{name}", getattr(sublayer, name), units)
            parts += outputs(f"{path}.{writer}", getattr(sublayer, writer), runs(units))
    found = [(path, norm) for path, norm in norms if norm is not None]
    if not all(isinstance(norm, RMSNorm) for _, norm in found):
        return None
    parts += [Part(f"{path}.scale", COLUMNS, runs(units)) for path, _ in found]
    parts += [] if model.head is None else inputs("head", model.head, units)
    if model.ensemble is not None and model.ensemble.values.ndim == 2:
        parts.append(Part("ensemble.scale", COLUMNS, runs(units)))
    return Group("embed", units, tuple(parts))


def owner_of(nodes: Mapping[str, Any], path: str) -> tuple[Any, str]:
    """The module that holds the parameter at a path, and its name there."""
    owner, _, attribute = path.rpartition(".")
    return nodes[owner], attribute


def check_names(given: Mapping[str, object], known: Mapping[str, Group]) -> None:
    """Raises ConfigError for a name that is no group's."""
    for name in given:
        if name not in known:
            raise ConfigError(f"{name!r} is no group of this model; it has {', '.join(known)}")
