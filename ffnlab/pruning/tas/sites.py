"""What a search may choose in a model: channels of its layers, blocks of its stages, and the work
of every choice.

A width is chosen for each channel group of `ffnlab.models.groups` that lies between layers: hidden
maps of an MLP or a ConvNet, convolutions of a ResNet, FFNs of a model of Blocks. Of its channels
the first so many are kept. Of a ResNet it may be chosen for each convolution by itself, as the
authors do; what is found is then no part of the model, but a network with shortcuts that it had
not.

A depth is how many blocks of a stage are kept, from the first on: blocks between two changes of a
ResNet's sizes, hidden maps of an MLP where they are equally wide, all Blocks of other models.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers import FFN, MLP, Conv, Residual, Spatial
from ffnlab.layers.feed_forward.ffn import is_plain
from ffnlab.models.convnet import ConvNet
from ffnlab.models.groups import COLUMNS, Group, groups
from ffnlab.models.resnet import ResNet
from ffnlab.models.units import removable
from ffnlab.pruning.tas import core

__all__ = ["Depth", "Sites", "Width", "is_of_blocks", "sites_of"]

# Nonlinearities that make something of a channel that is not there.
NOT_OF_ZERO = ("sigmoid", "softplus")


class Width(NamedTuple):
    """Layers whose outputs are as many.

    Attributes:
      name: of the channel group, or path of the convolution.
      size: channels of the whole model.
      choices: how many may be kept, ascending.
      writers: paths of the maps that give them.
    """

    name: str
    size: int
    choices: tuple[int, ...]
    writers: tuple[str, ...]


class Depth(NamedTuple):
    """Blocks of which the first so many are kept.

    Attributes:
      name: of the stage.
      blocks: their paths.
      choices: how many may be kept, ascending.
      ends: number of the width of what each choice gives; () where it is the stream of a model.
    """

    name: str
    blocks: tuple[str, ...]
    choices: tuple[int, ...]
    ends: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Sites:
    """All that is chosen in a model.

    Attributes:
      widths, depths: what is chosen.
      reads, writes: number of the width that each map reads, and that it gives, by its path.
      tied: whether widths are those of channel groups.
    """

    widths: tuple[Width, ...]
    depths: tuple[Depth, ...]
    reads: dict[str, int]
    writes: dict[str, int]
    tied: bool

    @property
    def width_counts(self) -> list[int]:
        """Candidates of every width."""
        return [len(width.choices) for width in self.widths]

    @property
    def depth_counts(self) -> list[int]:
        """Candidates of every depth."""
        return [len(depth.choices) for depth in self.depths]

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of a number for each candidate: (widths, most candidates), and of depths likewise."""
        most = max(2, *self.width_counts), max([1, *self.depth_counts])
        return (len(self.widths), most[0]), (len(self.depths), most[1])

    @functools.cached_property
    def channels(self) -> Int[np.ndarray, "rows n"]:
        """Channels of every candidate of every width, 0 beyond them."""
        table = np.zeros(self.shapes[0], np.int32)
        for row, width in enumerate(self.widths):
            table[row, : len(width.choices)] = width.choices
        return table


def sites_of(
    model: Any,
    *,
    ratios: Sequence[float] = core.RATIOS,
    depth: bool = True,
    tied: bool = True,
) -> Sites:
    """What may be chosen in a model; nothing is computed.

    Args:
      model: an MLP, ConvNet or ResNet, or a model of Blocks in a list; leaves may be abstract.
      ratios: of a layer's channels that may be kept, see `core.width_choices`.
      depth: choose blocks too.
      tied: convolutions of a ResNet that a sum joins have one width; else each its own.
    Raises:
      ConfigError: another model, nothing to choose in it, a nonlinearity that does not keep zeros,
        convolutions in groups, or shortcuts that cannot join convolutions of widths of their own.

    >>> import jax
    >>> sites_of(MLP((4, 10, 10, 2), key=jax.random.key(0)), ratios=(0.5, 1.0)).widths[1].choices
    (5, 10)
    """
    found = searched(model)
    if not tied and not isinstance(model, ResNet):
        raise ConfigError(f"tied=False is of a ResNet; the model is a {type(model).__name__}")
    if not found:
        raise ConfigError(f"a {type(model).__name__} without hidden channels has nothing to choose")
    check_zeros(model, found)
    widths, reads, writes = by_group(found, ratios) if tied else by_convolution(model, ratios)
    nodes = dict(tree.walk(model))
    cut = [path for path in writes if isinstance(nodes[path], Conv) and nodes[path].groups > 1]
    if cut:
        raise ConfigError(f"{cut[0]} is a convolution in groups; one of all channels is accepted")
    depths = tuple(depths_of(model, widths, writes)) if depth else ()
    return Sites(tuple(widths), depths, reads, writes, tied)


def is_of_blocks(model: Any) -> bool:
    """Whether a model is one of `Block`s on a stream."""
    return not isinstance(model, MLP | ConvNet | ResNet)


def searched(model: Any) -> list[Group]:
    """The channel groups that are hidden in a model; of Blocks those of their FFNs."""
    found = groups(model)
    if not is_of_blocks(model):
        return found
    nodes = dict(tree.walk(model))
    return [group for group in found if is_plain(nodes.get(group.name))]


def check_zeros(model: Any, found: Sequence[Group]) -> None:
    """Raises ConfigError where channels that are not there would reach the layer behind them."""
    nodes = dict(tree.walk(model))
    layers = [model] if isinstance(model, MLP) else [nodes.get(group.name) for group in found]
    for layer in layers:
        used = getattr(layer, "activation", "relu") if isinstance(layer, MLP | FFN) else "relu"
        if used in NOT_OF_ZERO or getattr(layer, "units", None) is not None:
            raise ConfigError(
                f"activation={used!r} makes something of channels that are not there, or has "
                "parameters of its own; one of 0 at 0 is accepted, such as 'relu' or 'gelu'"
            )


Found = tuple[list[Width], dict[str, int], dict[str, int]]  # widths, reads, writes


def by_group(found: Sequence[Group], ratios: Sequence[float]) -> Found:
    """A width for each channel group."""
    widths: list[Width] = []
    reads: dict[str, int] = {}
    writes: dict[str, int] = {}
    for row, group in enumerate(found):
        writers = []
        for part in group.parts:
            path, _, attribute = part.path.rpartition(".")
            if attribute == "w" and part.axis == COLUMNS:
                writers.append(path)
                writes[path] = row
            elif attribute == "w":
                reads[path] = row
        choices = core.width_choices(group.size, ratios)
        widths.append(Width(group.name, group.size, choices, tuple(writers)))
    return widths, reads, writes


def by_convolution(model: ResNet, ratios: Sequence[float]) -> Found:
    """A width for each convolution of a ResNet; a shortcut has that of its block's last one."""
    widths: list[Width] = []
    reads: dict[str, int] = {}
    writes: dict[str, int] = {}
    nodes = dict(tree.walk(model))

    def made(*paths: str) -> int:
        size = nodes[paths[0]].weight.shape[1]
        writes.update(dict.fromkeys(paths, len(widths)))
        widths.append(Width(paths[0], size, core.width_choices(size, ratios), paths))
        return len(widths) - 1

    stream = made("stem.conv")
    for i, block in enumerate(model.residuals):
        path = f"residuals[{i}]"
        *inner, last = convolutions(path, block)
        before = stream
        for name in inner:
            reads[name], before = before, made(name)
        reads[last] = before
        kept = shortcut_of(path, block)
        reads.update(dict.fromkeys(kept, stream))
        stream = made(last, *kept)
    reads["head"] = stream
    return widths, reads, writes


def convolutions(path: str, block: Residual) -> list[str]:
    """Paths of the convolutions of a block, without its shortcut.

    Raises:
      ConfigError: its spatial step has none.
    """
    if not isinstance(block.spatial, Spatial):
        return [f"{path}.spatial.conv", f"{path}.expand.conv"]
    if block.spatial.conv is None:
        raise ConfigError(f"{path}.spatial is {block.spatial.op!r}; tied=False needs convolutions")
    return [f"{path}.{name}.conv" for name in ("reduce", "spatial.conv", "expand")]


def shortcut_of(path: str, block: Residual) -> list[str]:
    """The path of a shortcut's convolution; nothing where x itself is added.

    Raises:
      ConfigError: a shortcut without parameters changes the sizes.
    """
    if block.shortcut is not None:
        return [f"{path}.shortcut.conv"]
    if not is_same(block):
        raise ConfigError(
            f"{path} has a shortcut without parameters that changes the sizes; tied=False needs "
            "convolutions there: ResNetConfig(…, shortcut='pooled')"
        )
    return []


def is_same(block: Residual) -> bool:
    """Whether a block adds x itself to what it computes."""
    first = block.spatial if block.reduce is None else block.reduce
    rows, taps = first.conv.weight.shape[0], first.conv.size
    d_in = rows // (taps**2 if isinstance(taps, int) else int(np.prod(taps)))
    is_plain_sum = block.shortcut is None and block.sources is None and block.stride == 1
    return is_plain_sum and d_in == block.expand.conv.weight.shape[1]


def depths_of(model: Any, widths: Sequence[Width], writes: dict[str, int]) -> Iterator[Depth]:
    """The stages of a model of which blocks may go: two or more blocks that give as much."""
    if isinstance(model, MLP):
        hidden = tuple(f"maps[{i}]" for i in range(len(model.maps) - 1))
        stages, ends = [("maps", hidden)], {path: writes[path] for path in hidden}
    elif isinstance(model, ResNet) and sum(model.config.blocks) == len(model.residuals):
        bounds = np.cumsum([0, *model.config.blocks]).tolist()
        stages = [
            (f"residuals[{a}]", tuple(f"residuals[{i}]" for i in range(a, b)))
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        ends = {path: writes[f"{path}.expand.conv"] for _, blocks in stages for path in blocks}
    elif is_of_blocks(model) and removable(model).all():
        stages, ends = [("layers", tuple(f"layers[{i}]" for i in range(len(model.layers))))], {}
    else:
        stages, ends = [], {}
    for name, blocks in stages:
        rows = [ends[path] for path in blocks if ends]
        if len(blocks) > 1 and len({(widths[row].size, widths[row].choices) for row in rows}) < 2:
            choices = core.depth_choices(len(blocks))
            after = tuple(rows[choice - 1] for choice in choices) if rows else ()
            yield Depth(name, blocks, choices, after)
