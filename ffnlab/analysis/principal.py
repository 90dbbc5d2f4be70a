"""Principal components of layers: what compresses an activation to a few numbers.

The mean and the scatter matrix of each selected layer are streamed over the batches; `components`
of those stats compress. As a transform the model is rewritten so that its maps see no more than
the components of what they are given: what of a model's output hangs on the rest is what a
compression loses (of arXiv 2305.08013, where every layer is compressed to four numbers).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from ffnlab import tree
from ffnlab.analysis.activations import AFTER, activations, network_of, stage_of
from ffnlab.errors import ConfigError, NumericalError, at_least
from ffnlab.layers import MLP, Linear
from ffnlab.transform import Transform
from ffnlab.weights import Dense

__all__ = ["INPUT", "Components", "Scatter", "components_of", "principal"]

INPUT = "input"  # beside the paths of layers


class Scatter(NamedTuple):
    """Moments of the rows of a layer.

    Attributes:
      count: rows seen.
      mean: of each unit.
      scatter: sum over rows of the outer product of what they differ from the mean.
    """

    count: Float[Array, ""]
    mean: Float[Array, "d"]
    scatter: Float[Array, "d d"]

    def joined(self, rows: Float[Array, "b d"]) -> "Scatter":
        """With more rows, whatever came before (Chan, Golub and LeVeque, 1979)."""
        here = rows.mean(0)
        apart = rows - here
        count = self.count + len(rows)
        gap = here - self.mean
        between = self.count * len(rows) / count * jnp.outer(gap, gap)
        return Scatter(
            count, self.mean + gap * (len(rows) / count), self.scatter + apart.T @ apart + between
        )


class Components(NamedTuple):
    """Principal components of a layer.

    Attributes:
      mean: of each unit.
      axes: orthonormal columns, of the largest variance first; the largest entry of each is > 0.
      shares: of the variance along each.
    """

    mean: Float[Array, "d"]
    axes: Float[Array, "d k"]
    shares: Float[Array, "k"]

    def codes(self, rows: Float[Array, "b d"]) -> Float[Array, "b k"]:
        """What rows are along the axes."""
        return (rows - self.mean) @ self.axes


def components_of(found: Scatter, most: int = 4) -> Components:
    """The components of a layer, at most so many and no more than its rank.

    A layer that gives one value has none.

    Raises:
      ConfigError: most below 1.
      NumericalError: the layer gave NaN or infinity.
    """
    at_least(1, most=most)
    if not jnp.isfinite(found.scatter).all():
        raise NumericalError("the moments of a layer are not finite: it gave NaN or infinity")
    values, vectors = jnp.linalg.eigh(found.scatter)
    values, vectors = values[::-1], vectors[:, ::-1]
    eps = jnp.finfo(values.dtype).eps
    rounding = found.count * (8 * eps * jnp.abs(found.mean).max()) ** 2  # of a constant unit
    least = jnp.maximum(eps * len(values) * values[0], rounding)
    rank = int(jnp.sum(values > least))
    axes = vectors[:, : min(most, rank)]
    largest = jnp.take_along_axis(axes, jnp.abs(axes).argmax(0)[None], 0)
    total = jnp.maximum(values, 0).sum()
    return Components(found.mean, axes * jnp.sign(largest), values[: axes.shape[1]] / total)


def principal(
    inputs: PyTree, *, components: int = 4, select: str = "**"
) -> Transform[nnx.Module, dict[str, Scatter]]:
    """The transform after which layers give no more than their principal components.

    Of an MLP the components are of what comes after a nonlinearity, and are folded into the map
    that reads it; of other maps (`Linear`) of what they give, folded into the map itself. The model
    has the same shapes as before, and is the same function where `components` is the width of every
    layer.

    Args:
      inputs: a batch, or its shapes (`jax.ShapeDtypeStruct`), which tell the widths of layers.
      components: of each layer, at most; >= 1.
      select: which layers, see `ffnlab.analysis.activations`.
    Returns:
      a transform. Its batches are what the model takes, or (that, labels). Its stats are of any
      layer, a convolution's whole map as one row, and of a numeric input itself under `INPUT`;
      `rewrite` takes maps alone.
    Raises:
      ConfigError: components below 1; from `rewrite`, a layer that is no `Linear`.
      SelectionError: from `init`, a pattern that matches nothing that runs.
    """
    at_least(1, components=components)

    def rows_of(model: PyTree, x: PyTree) -> dict[str, Float[Array, "r d"]]:
        found = {
            name: value.astype(jnp.float32).reshape(-1, width_of(model, name, value))
            for name, (value, _) in activations(model, x, select).items()
        }
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating):
            found[INPUT] = x.astype(jnp.float32).reshape(len(x), -1)
        return found

    def init(model: nnx.Module) -> dict[str, Scatter]:
        shapes = jax.eval_shape(rows_of, model, inputs)
        return {name: empty(found.shape[1]) for name, found in shapes.items()}

    @jax.jit
    def observe(stats: dict[str, Scatter], model: nnx.Module, batch: PyTree) -> dict[str, Scatter]:
        x = batch[0] if isinstance(batch, tuple) else batch
        return {name: stats[name].joined(rows) for name, rows in rows_of(model, x).items()}

    def rewrite(model: nnx.Module, stats: Mapping[str, Scatter]) -> nnx.Module:
        network = network_of(model)
        for name, found in stats.items():
            if name != INPUT:
                network = projected(network, name, components_of(found, components))
        return network if model is network_of(model) else tree.replace(model, {"model": network})

    return Transform("principal", init, observe, rewrite)


def width_of(model: PyTree, name: str, value: Array) -> int:
    """Numbers of a row: what a map gives for each place, of other layers all that an input has."""
    (layer,) = tree.select(network_of(model), tree.at(name)).values()
    return value.shape[-1] if isinstance(layer, Linear) else math.prod(value.shape[1:])


def empty(width: int) -> Scatter:
    """Of no rows."""
    return Scatter(jnp.float32(0), jnp.zeros(width), jnp.zeros((width, width)))


def projected(model: nnx.Module, name: str, found: Components) -> nnx.Module:
    """A model whose layer passes on its components alone."""
    kept = found.axes @ found.axes.T
    rest = found.mean - found.mean @ kept
    reader = read_by(model, name)
    (layer,) = tree.select(model, tree.at(reader or name)).values()
    if not isinstance(layer, Linear):
        raise ConfigError(
            f"{name} is a {type(layer).__name__}; components are folded into Linear maps alone"
        )
    w = layer.weight.dense()
    b = jnp.zeros(w.shape[1]) if layer.bias is None else layer.bias
    new = (w @ kept, b @ kept + rest) if reader is None else (kept @ w, b + rest @ w)
    weight, bias = (part.astype(w.dtype) for part in new)
    return tree.replace(model, {reader or name: layer.replace(Dense(weight), bias)})


def read_by(model: nnx.Module, name: str) -> str | None:
    """The map that reads what comes after an MLP's nonlinearity; None of all other layers."""
    if not isinstance(model, MLP) or stage_of(model, name) != AFTER:
        return None
    names = [f"maps[{i}]" for i in range(len(model.maps))]
    return names[names.index(name) + 1]
