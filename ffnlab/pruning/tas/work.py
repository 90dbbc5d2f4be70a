"""The work of a network that is searched: a sum of products of sizes, exact for sizes that are
chosen, expected for sizes that are drawn.

    macs = sum over maps of  positions * taps * c_in * c_out * P(kept)   + what no choice changes

It is counted in the model itself (`ffnlab.models.cost`), so that the sum with all channels is the
model's number, and with those of a smaller network that network's.

The authors let the layer after a stage read the channels that its last block would give, also where
that block is left out; here it reads those of the block that is last. Expected sizes of the two are
equal where all blocks of a stage have one width.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ffnlab import tree
from ffnlab.layers import MLP
from ffnlab.models.cost import multiply_adds
from ffnlab.models.remove import remove
from ffnlab.models.resnet import ResNet
from ffnlab.models.stack import kind_of
from ffnlab.models.units import units
from ffnlab.pruning.tas import core
from ffnlab.pruning.tas.core import Terms
from ffnlab.pruning.tas.sites import Sites, is_of_blocks, is_same

__all__ = ["Work", "work_of"]

ALWAYS = -1  # the last of the probabilities
Term = tuple[float, int, int, int, bool]  # as the columns of `core.Terms`


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """What every choice costs.

    Sizes that terms refer to are those of all widths, then 1, then those after each stage;
    probabilities are those to reach each choice of each stage, then 1.

    Attributes:
      sites: what is chosen.
      terms: of one call with the example.
      whole: multiply-adds of the model itself.
    """

    sites: Sites
    terms: Terms
    whole: int

    def megamacs(
        self, widths: Float[Array, "rows n"], depths: Float[Array, "stages m"], *, bridges: bool
    ) -> Float[Array, ""]:
        """Millions of multiply-adds.

        Args:
          widths, depths: probability of every candidate; one-hot rows give an exact number.
          bridges: see `core.products`.
        """
        each = (widths * self.sites.channels.astype(np.float32)).sum(-1)
        after = [
            (each[np.array(depth.ends)] * depths[i, : len(depth.ends)]).sum() if depth.ends else 1.0
            for i, depth in enumerate(self.sites.depths)
        ]
        sizes = jnp.concatenate([each, jnp.stack([jnp.float32(1), *map(jnp.float32, after)])])
        kept = jnp.concatenate([core.reached(depths).reshape(-1), jnp.ones(1)])
        return core.products(self.terms, sizes, kept, bridges=bridges)

    def ratio(
        self, widths: Float[Array, "rows n"], depths: Float[Array, "stages m"]
    ) -> Float[Array, ""]:
        """The share of `whole` that a network of single candidates has, given as one-hot rows."""
        return self.megamacs(widths, depths, bridges=True) * 1e6 / self.whole

    @functools.cached_property
    def least(self) -> float:
        """The share of `whole` that the smallest network has."""
        with jax.ensure_compile_time_eval():
            first = [jnp.zeros(shape).at[:, 0].set(1.0) for shape in self.sites.shapes]
            return float(self.ratio(*first))


def work_of(model: Any, sites: Sites, example: PyTree) -> Work:
    """The work of a model's choices; it is traced and not run.

    Args:
      model: as `sites_of` takes it; leaves may be abstract.
      sites: of it.
      example: what it is called with; leaves may be abstract.
    """
    model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)
    whole = called(model, example)
    of_maps = counted(model, sorted({*sites.reads, *sites.writes}), example)
    terms = list(terms_of(model, sites, of_maps))
    rest = whole - sum(of_maps.values())
    if is_of_blocks(model):
        for keep, macs in of_blocks(model, sites, of_maps, whole, example):
            terms.append((macs, *ones(sites), keep, False))
            rest -= macs
    terms.append((rest, *ones(sites), ALWAYS, False))
    columns = zip(*terms, strict=True)
    types = np.float64, np.int32, np.int32, np.int32, bool
    return Work(sites, Terms(*map(np.array, columns, types)), whole)


def called(model: Any, example: PyTree) -> int:
    """Multiply-adds of a call."""
    return multiply_adds(lambda model, x: model(x), model, example)


def ones(sites: Sites) -> tuple[int, int]:
    """The size 1 on both sides."""
    return len(sites.widths), len(sites.widths)


def counted(model: Any, paths: list[str], example: PyTree) -> dict[str, int]:
    """Multiply-adds of some maps: positions that they run at, times the entries of their weight."""
    chosen = tree.where(lambda path, _: path in paths)
    run = lambda model, x: {p: c.output for p, c in tree.capture(model, chosen, x)[1].items()}  # noqa: E731
    outputs, nodes = jax.eval_shape(run, model, example), dict(tree.walk(model))
    return {
        path: math.prod(out.shape[:-1]) * math.prod(nodes[path].weight.shape)
        for path, out in outputs.items()
    }


def terms_of(model: Any, sites: Sites, of_maps: Mapping[str, int]) -> Iterator[Term]:
    """The terms of all maps, and of shortcuts that convolutions of widths of their own may need."""
    one, after = len(sites.widths), readers(model, sites)
    channels = [width.size for width in sites.widths]
    for path, macs in of_maps.items():
        reads, writes = sites.reads.get(path), sites.writes.get(path)
        each = macs / math.prod(channels[row] for row in (reads, writes) if row is not None)
        left = after.get(path, one if reads is None else reads)
        yield each, left, one if writes is None else writes, kept_with(sites, path), False
    if sites.tied:
        return
    stream = sites.writes["stem.conv"]
    for i, block in enumerate(model.residuals):
        path = f"residuals[{i}].expand.conv"
        if is_same(block):
            pixels = of_maps[path] / math.prod(block.expand.conv.weight.shape)
            yield pixels, stream, sites.writes[path], kept_with(sites, path), True
        stream = sites.writes[path]


def readers(model: Any, sites: Sites) -> dict[str, int]:
    """The maps that read what a stage gives, with the number of its size."""
    found: dict[str, int] = {}
    for i, depth in enumerate(sites.depths):
        number = len(sites.widths) + 1 + i
        if isinstance(model, MLP):
            found[f"maps[{len(depth.blocks)}]"] = number
        elif isinstance(model, ResNet):
            behind = int(depth.blocks[-1][len("residuals[") : -1]) + 1
            if behind == len(model.residuals):
                found["head"] = number
                continue
            first = "spatial" if model.residuals[behind].reduce is None else "reduce"
            paths = (f"residuals[{behind}].{name}.conv" for name in (first, "shortcut"))
            found |= {path: number for path in paths if path in sites.reads}
    return found


def kept_with(sites: Sites, path: str) -> int:
    """The number of the probability that a part of a block is kept."""
    most = sites.shapes[1][1]
    for i, depth in enumerate(sites.depths):
        for number, block in enumerate(depth.blocks, 1):
            if path == block or path.startswith(f"{block}."):
                return i * most + bisect.bisect_left(depth.choices, number)
    return ALWAYS


def of_blocks(
    model: Any, sites: Sites, of_maps: Mapping[str, int], whole: int, example: PyTree
) -> Iterator[tuple[int, float]]:
    """What a model of Blocks computes in each beside the maps that are searched, attention say:
    (number of the probability that it is kept, multiply-adds)."""
    known: dict[object, int] = {}
    for depth in sites.depths:
        for i, path in enumerate(depth.blocks):
            kind = kind_of(model.layers[i])
            if kind not in known:
                numbers = [unit.number for unit in units(model) if unit.layer == i]
                known[kind] = whole - called(remove(model, numbers), example)
            inside = sum(macs for map_, macs in of_maps.items() if map_.startswith(f"{path}."))
            yield kept_with(sites, path), known[kind] - inside
