"""What the layers of a network with noise know of a continuous input and of the answer.

Layers and inputs are compressed to a few numbers each, and the information of these is estimated
by nearest neighbours (arXiv 2305.08013). No processing adds information, so that of what is
compressed is at most that of what was; the estimate of it has a bias that its error does not tell.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from ffnlab import tree
from ffnlab.analysis.activations import activations
from ffnlab.analysis.entropy import entropy
from ffnlab.analysis.nearest import Estimate, nearest_information
from ffnlab.analysis.principal import INPUT, Components, Scatter, components_of
from ffnlab.errors import ConfigError, NumericalError, SelectionError
from ffnlab.probe import Probe
from ffnlab.report import Report

__all__ = ["LossyLayer", "LossyReport", "lossy_information"]

BIT = math.log(2)


@dataclasses.dataclass(frozen=True)
class LossyLayer:
    """A layer, in bits.

    Attributes:
      x: I(X;T), and its standard deviation.
      y: I(T;Y), likewise.
      components: numbers that the layer was compressed to.
      kept: share of its variance along them.
    """

    x: Estimate
    y: Estimate
    components: int
    kept: float


@dataclasses.dataclass(frozen=True)
class LossyReport(Report):
    """Both informations of every layer, estimated after compression.

    Attributes:
      layers: by path.
      labels: H(Y) in bits, which no I(T;Y) exceeds but an estimate may.
      count: how many inputs were looked at.
    """

    layers: Mapping[str, LossyLayer]
    labels: float
    count: int

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer."""
        return [
            {"layer": name, "I(X;T) bits": at.x.value, "+-": at.x.error}
            | {"I(T;Y) bits": at.y.value, "+- ": at.y.error, "components": at.components}
            | {"of the variance": at.kept, "H(Y)": self.labels}
            for name, at in self.layers.items()
        ]

    def figures(self) -> dict[str, float]:
        """Both informations by layer, in bits."""
        x = {f"input/{name}": at.x.value for name, at in self.layers.items()}
        return x | {f"label/{name}": at.y.value for name, at in self.layers.items()}

    def draw(self, figure: Any) -> None:
        """The plane, from the first layer to the last, with standard deviations."""
        axes = figure.subplots()
        x, y = ([getattr(at, side) for at in self.layers.values()] for side in ("x", "y"))
        axes.errorbar(
            [each.value for each in x],
            [each.value for each in y],
            [each.error for each in y],
            [each.error for each in x],
            fmt="o-",
            linewidth=1,
        )
        for name, at in self.layers.items():
            axes.annotate(name, (at.x.value, at.y.value), fontsize=7)
        axes.axhline(self.labels, color="0.6", linestyle="--", linewidth=1)
        axes.set_xlabel("I(X;T), bits")
        axes.set_ylabel("I(T;Y), bits")
        axes.spines[["top", "right"]].set_visible(False)


class Seen(NamedTuple):
    """What is kept of all rows so far.

    Attributes:
      count: of rows.
      parts: of each batch (codes of the input, codes of each layer, classes).
    """

    count: int = 0
    parts: tuple[PyTree, ...] = ()


def lossy_information(
    fitted: Mapping[str, Scatter],
    *,
    select: str = "**",
    components: int = 4,
    encode: Callable[[Array], Array] | None = None,
    neighbours: int = 5,
    jitter: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Probe:
    """A probe of what layers know, over batches (x, y) of inputs and classes.

    Codes of all rows are kept, not the activations that they compress.

    Args:
      fitted: stats of `ffnlab.analysis.principal` for the same model.
      select: which of its layers are looked at, by their paths.
      components: that a layer is compressed to, at most.
      encode: x [b, …] -> [b, k], the compressor of inputs; an encoder that was learned, for
        instance. As many principal components of the input when None.
      neighbours, jitter: see `nearest_information`. Where a layer follows from the input without
        noise, information is infinite: the estimate then says how far rows are apart.
      key: of the noise of a model that draws (`ffnlab.layers.Noisy`), anew for each row.
    Returns:
      a probe; its report is a `LossyReport`.
    Raises:
      ConfigError: components below 1, inputs that were not fitted and have no `encode`; from the
        probe, batches without classes, layers that give a row for each place, as
        `nearest_information`.
      SelectionError: from the probe, a pattern that matches no fitted layer.
      NumericalError: from the probe, codes that are not finite.
    """
    is_chosen = tree.at(select)
    chosen = {name: found for name, found in fitted.items() if is_chosen(name, found)}
    chosen.pop(INPUT, None)
    axes = {name: components_of(found, components) for name, found in chosen.items()}
    if encode is None and INPUT not in fitted:
        raise ConfigError(f"the fitted layers are {list(fitted)}, without {INPUT!r}; give encode")
    inputs = None if encode is not None else components_of(fitted[INPUT], components)

    def init(model: PyTree) -> Seen:
        del model
        if not axes:
            raise SelectionError(f"select={select!r} matches nothing of the fitted {list(fitted)}")
        return Seen()

    def observe(stats: Seen, model: PyTree, batch: PyTree) -> Seen:
        if not isinstance(batch, tuple):
            raise ConfigError("probe 'lossy_information' is shown pairs of inputs and classes")
        x, y = batch
        keys = None if key is None else keys_of(key, stats.count, len(x))
        found = jax.device_get((*codes_of(model, jnp.asarray(x), axes, inputs, keys, encode), y))
        return Seen(stats.count + len(x), (*stats.parts, found))

    def report(model: PyTree, stats: Seen) -> LossyReport:
        del model
        x, layers, y = jax.tree.map(lambda *parts: np.concatenate(parts), *stats.parts)
        if not np.issubdtype(y.dtype, np.integer):
            raise ConfigError(f"labels are {y.dtype}; classes, whole numbers, are accepted")
        found = {}
        for name, codes in layers.items():
            if not np.isfinite(codes).all():
                raise NumericalError(f"probe 'lossy_information': {name} gives NaN or infinity")
            count, kept = codes.shape[1], float(axes[name].shares.sum())
            known = told(x, codes, neighbours, jitter), told(y, codes, neighbours, jitter)
            found[name] = LossyLayer(known[0], known[1], count, kept)
        return LossyReport(found, entropy(y) / BIT, len(y))

    return Probe("lossy_information", init, observe, report)


def told(side: np.ndarray, codes: np.ndarray, neighbours: int, jitter: float) -> Estimate:
    """The information in bits of inputs or classes and a layer; of what is constant none."""
    if 0 in (side.shape[-1], codes.shape[1]):
        return Estimate(0.0, 0.0)
    found = nearest_information(side, codes, neighbours=neighbours, jitter=jitter)
    return Estimate(found.value / BIT, found.error / BIT)


@functools.partial(jax.jit, static_argnums=2)
def keys_of(key: Array, before: int | Array, count: int) -> Array:
    """A key for each of a batch's rows by its place among all, however batches are divided."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(before + jnp.arange(count))


@functools.partial(jax.jit, static_argnames="encode")
def codes_of(
    model: PyTree,
    x: Array,
    axes: Mapping[str, Components],
    inputs: Components | None,
    keys: Array | None,
    encode: Callable[[Array], Array] | None,
) -> tuple[Float[Array, "b j"], dict[str, Float[Array, "b _"]]]:
    """(codes of inputs, codes of layers), each row with noise of its own."""

    def of(x: Array, key: Array | None) -> dict[str, Array]:
        found = activations(model, x, key=key)
        return {name: found[name].value.reshape(len(x), -1) for name in axes}

    if keys is None:
        rows = of(x, None)
    else:
        rows = jax.vmap(lambda each, key: jax.tree.map(lambda a: a[0], of(each[None], key)))(
            x, keys
        )
    for name, found in axes.items():
        if rows[name].shape[1] != len(found.mean):
            raise ConfigError(
                f"{name} gives {rows[name].shape[1]} numbers for an input, {len(found.mean)} were "
                "fitted; a layer that gives a row for each place is not accepted"
            )
    layers = {name: found.codes(rows[name].astype(jnp.float32)) for name, found in axes.items()}
    if inputs is None:
        return typing.cast("Callable", encode)(x).astype(jnp.float32), layers
    return inputs.codes(x.reshape(len(x), -1).astype(jnp.float32)), layers
