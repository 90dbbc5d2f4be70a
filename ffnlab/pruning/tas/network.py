"""The search network: an ordinary model, of which some maps and norms mix candidates.

No channel is cut. What a smaller layer has not is zero in the whole one, so that convolutions of
all channels read padded inputs and a sum of unequal channels adds what both have:

    a map of one weight and bias     its columns are mixed, W M^T: one map of the same shape
    a convolution with a batch norm  is normalized as every candidate of the pair by that
                                     candidate's own norm, then mixed
    a stage                          gives sum_d q_d M x_d over the blocks x_d it may end with
                                     (`ffnlab.pruning.tas.stages`)

A pair and a stage are aligned to the widest candidate that counts at all: where a candidate has all
the weight, as in the limit of low temperatures, the network is the plain one of its sizes. The
authors align to the widest of both draws; the two differ only where a weight is 0 in float32.

Batch norms of the model have a leading axis of candidates (`with_candidates`), so that one for each
size is learned, saved and decayed with the rest.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP, BatchNorm
from ffnlab.layers.batch_norm import Moments
from ffnlab.layers.linear import Map
from ffnlab.layers.residual import ConvNorm
from ffnlab.layers.stacking import stack_modules, unstack_modules
from ffnlab.models.resnet import ResNet
from ffnlab.pruning.tas import core
from ffnlab.pruning.tas.core import Draw, Pairs
from ffnlab.pruning.tas.sites import Sites, Width, is_of_blocks
from ffnlab.pruning.tas.stages import aligned, join_blocks, join_maps, join_residuals
from ffnlab.weights import Dense

__all__ = [
    "Architecture",
    "Seen",
    "drawn",
    "likely",
    "most_likely",
    "network",
    "picked",
    "started",
    "with_candidates",
    "with_moments",
]

M = TypeVar("M")


class Architecture(NamedTuple):
    """What a search learns beside the weights: a logit for every candidate.

    Attributes:
      widths: alpha, [widths, most candidates].
      depths: beta, [stages, most candidates].
    """

    widths: Float[Array, "rows n"]
    depths: Float[Array, "stages m"]


class Seen(NamedTuple):
    """What the norms of a convolution met.

    Attributes:
      index: [2], candidates that were used.
      moments: of the whole convolution's outputs.
    """

    index: Int[Array, "2"]
    moments: Moments


def started(sites: Sites, key: Array) -> Architecture:
    """Logits drawn from N(0, 0.01^2), as the authors begin."""
    keys = jax.random.split(key)
    drawn_ = (0.01 * jax.random.normal(k, s) for k, s in zip(keys, sites.shapes, strict=True))
    return Architecture(*drawn_)


def drawn(sites: Sites, architecture: Architecture, tau: Array | float, key: Array) -> Draw:
    """Draws a network; see `core.pairs` and `core.shares`."""
    wide, deep = jax.random.split(key)
    pairs = core.pairs(architecture.widths, sites.width_counts, tau, wide)
    return Draw(pairs, core.shares(architecture.depths, sites.depth_counts, tau, deep))


def likely(sites: Sites, architecture: Architecture) -> Architecture:
    """Probabilities of all candidates, without noise."""
    counts = sites.width_counts, sites.depth_counts
    found = (
        jax.nn.softmax(jnp.where(core.legal(count, logits.shape[1]), logits, core.NEVER))
        for logits, count in zip(architecture, counts, strict=True)
    )
    return Architecture(*found)


def most_likely(sites: Sites, architecture: Architecture) -> Architecture:
    """1 for the most likely candidate of every row, the first of equal ones, else 0."""
    found = likely(sites, architecture)
    return Architecture(*(jax.nn.one_hot(p.argmax(-1), p.shape[1]) for p in found))


def as_draw(chosen: Architecture) -> Draw:
    """The draw of single candidates, given as one-hot rows."""
    index = chosen.widths.argmax(-1)
    weights = jnp.tile(jnp.array([1.0, 0.0]), (len(index), 1))
    return Draw(Pairs(jnp.stack([index, index], -1), weights), chosen.depths)


def norms_of(model: Any, width: Width) -> dict[str, ConvNorm]:
    """The convolutions of a width that have a norm, by path."""
    nodes = dict(tree.walk(model))
    owners = {path.rpartition(".")[0] for path in width.writers}
    return {path: nodes[path] for path in sorted(owners) if isinstance(nodes.get(path), ConvNorm)}


def with_candidates(model: M, sites: Sites) -> M:
    """The model with a batch norm for every candidate of its convolutions, equal ones at first.

    Raises:
      ConfigError: another norm than BatchNorm, or a map in another format than `Dense`.
    """
    new = tree.copy(model)
    nodes = dict(tree.walk(new))
    for width in sites.widths:
        for path in width.writers:
            check_dense(path, nodes[path])
        for path, layer in norms_of(new, width).items():
            if not isinstance(layer.norm, BatchNorm):
                kind = type(layer.norm).__name__
                raise ConfigError(f"{path}.norm is a {kind}; a search needs a BatchNorm to learn")
            layer.norm = stack_modules([layer.norm] * len(width.choices))
    return new


def check_dense(path: str, layer: Map) -> None:
    """Raises ConfigError for a map that neither learns nor is mixed."""
    if not isinstance(layer.weight, Dense):
        raise ConfigError(f"{path} is a {type(layer.weight).__name__}; only a Dense is searched")


def picked(model: M, sites: Sites, index: Mapping[int, int]) -> M:
    """The inverse of `with_candidates`.

    Args:
      index: number of a width -> the candidate whose norms stay.
    """
    new = tree.copy(model)
    for row, width in enumerate(sites.widths):
        for layer in norms_of(new, width).values():
            layer.norm = unstack_modules(layer.norm, len(width.choices))[index[row]]
    return new


def plain_of(model: M) -> M:
    """The model of `with_candidates` as it was before, with the norms of the largest sizes."""
    new = tree.copy(model)
    for _, layer in tree.walk(new):
        if isinstance(layer, ConvNorm) and layer.norm.mean.get_value().ndim > 1:
            layer.norm = unstack_modules(layer.norm, len(layer.norm.mean.get_value()))[-1]
    return new


class Standing(nnx.Module):
    """What stands for a module while a search network runs.

    Attributes:
      call: what it does (static).
    """

    def __init__(self, call: Callable[[Array], Array]):
        self.call = call

    def __call__(self, x: Array) -> Array:
        return self.call(x)


def network(model: M, sites: Sites, draw: Draw, *, training: bool) -> tuple[M, dict[str, Seen]]:
    """The model as the network that was drawn, to be called like it.

    Args:
      model: of `with_candidates`, in the list form.
      sites: what is chosen in it.
      draw: see `Draw`.
      training: whether norms use the moments of their batch.
    Returns:
      (the network, what its norms have met, by path, once it has been called).
    """
    new, seen = tree.copy(model), {}
    nodes = dict(tree.walk(new))
    widest = draw.pairs.widest
    for row, width in enumerate(sites.widths):
        index, weights = draw.pairs.index[row], draw.pairs.weights[row]
        table = jnp.asarray(core.windows(width.choices, width.size))[index, widest[row]]
        matrices = jax.vmap(core.averaging)(table)
        normed = norms_of(new, width)
        for path, layer in normed.items():
            note = functools.partial(seen.setdefault, f"{path}.norm")
            mixed = functools.partial(mixed_norms, layer.norm, index, weights, matrices, training)
            layer.norm = Standing(functools.partial(mixed, note))
        for path in width.writers:
            if path.rpartition(".")[0] not in normed:
                mix_columns(nodes[path], jnp.tensordot(weights, matrices, 1))
    if isinstance(new, ResNet):
        join_residuals(new, sites, draw, nodes)
    elif isinstance(new, MLP):
        join_maps(new, sites, draw)
    elif is_of_blocks(new):
        join_blocks(sites, draw, nodes)
    return new, seen


def mixed_norms(
    norms: BatchNorm,
    index: Int[Array, "2"],
    weights: Float[Array, "2"],
    matrices: Float[Array, "2 d d"],
    training: bool,
    note: Callable[[Seen], object],
    x: Float[Array, "*b d"],
) -> Float[Array, "*b d"]:
    """What a pair of candidates makes of a convolution's outputs."""
    total = jnp.zeros(x.shape, jnp.float32)
    for k in range(2):
        norm = at(norms, index[k])
        if training:
            y, moments = norm.in_training(x)
            note(Seen(index, moments))
        else:
            y = norm(x)
        total += weights[k] * aligned(y, matrices[k])
    return total.astype(x.dtype)


def at(norms: BatchNorm, which: Int[Array, ""]) -> BatchNorm:
    """The norm of one candidate."""
    return jax.tree.map(lambda leaf: leaf[which], norms)


def mix_columns(layer: Map, matrix: Float[Array, "d d"]) -> None:
    """Mixes the outputs of a map of a `Dense`, in place, by mixing its columns."""
    weight = layer.weight
    mixed = aligned(weight.w, matrix).astype(weight.w.dtype)
    layer.w = layer.w.replace(Dense(mixed, weight.act))
    if layer.b is not None:
        bias = layer.b.get_value()
        layer.b = layer.b.replace(aligned(bias, matrix).astype(bias.dtype))


def with_moments(model: M, seen: Mapping[str, Seen]) -> M:
    """The model whose norms have moved towards what they met, those of the pair alone."""
    new = tree.copy(model)
    nodes = dict(tree.walk(new))
    for path, (index, moments) in seen.items():
        norms = nodes[path]
        mean, variance = norms.mean.get_value(), norms.variance.get_value()
        moved = [at(norms, which).statistics(moments) for which in (index[0], index[1])]
        # A layer of one candidate has it twice, and moves it once.
        for which, each in zip((index[0], index[1]), moved, strict=True):
            mean = mean.at[which].set(each["mean"])
            variance = variance.at[which].set(each["variance"].settle(1))
        norms.mean = norms.mean.replace(mean)
        norms.variance = norms.variance.replace(variance)
    return new
