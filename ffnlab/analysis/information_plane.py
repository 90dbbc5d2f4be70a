"""What the layers of a network know of their input and of the answer: the information plane.

    I(X;T) = H(T) - H(T|X),    I(T;Y) = H(T) - sum_y p(y) H(T|Y = y)

T is what all units of a layer give together, made discrete by cells (`Cells`) or smooth by kernels
(`ffnlab.analysis.kde.Kernels`), over a whole finite set of inputs, each as likely.

Sources: Shwartz-Ziv and Tishby, arXiv 1703.00810, with a fixed grid; Chelombiev et al.,
arXiv 1902.09037, with grids and kernels that follow a layer's activity.

What is measured depends on the estimator as much as on the network: I(X;T) of a wide layer sits at
its ceiling, the log of the number of inputs, and a fixed grid shows compression where a
nonlinearity saturates. The report gives ceiling and estimator with the figures.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PyTree

from ffnlab.analysis.activations import activations, stage_of
from ffnlab.analysis.edges import adaptive_codes, edges_of, fixed_codes
from ffnlab.analysis.entropy import (
    Host,
    Information,
    check_finite,
    check_rows,
    entropy,
    information,
    joint_states,
)
from ffnlab.analysis.parts import taken_apart
from ffnlab.errors import ConfigError, NumericalError, at_least
from ffnlab.probe import Probe, rows
from ffnlab.report import Report

__all__ = ["LOWS", "Cells", "LayerInformation", "PlaneReport", "information_plane", "layers_of"]

Estimate = Callable[[Array, Array, Array | None], Information]

# What nonlinearities do not go below; of the others grids that follow begin at their least value.
LOWS = {
    "relu": 0.0,
    "softplus": 0.0,
    "silu": 0.0,
    "abs": 0.0,
    "sigmoid": 0.0,
    "tanh": -1.000001,
    "elu": -1.000001,
}


@dataclasses.dataclass(frozen=True)
class Cells:
    """Both informations of a layer by cells of a grid.

    Attributes:
      bins: edges of a fixed grid, or cells of one that follows (EBAB).
      low, high: ends of a fixed grid; `low` also of one that follows, see `LOWS`.
      adaptive: whether the grid follows the layer.
    """

    bins: int = 30
    low: float = -1.0
    high: float = 1.0
    adaptive: bool = False

    def __post_init__(self) -> None:
        at_least(1 if self.adaptive else 2, bins=self.bins)
        if not math.isfinite(self.low):
            raise ConfigError(f"low={self.low} must be finite")
        if not self.adaptive and not self.low < self.high < math.inf:
            raise ConfigError(f"low={self.low} must lie below high={self.high}, which is finite")

    @property
    def count(self) -> int:
        """How many codes there are."""
        return self.bins + (3 if self.adaptive else 1)

    def codes(self, values: Float[Host, "n d"]) -> Integer[Host, "n d"]:
        """The cell of each activation."""
        if self.adaptive:
            return adaptive_codes(values, self.bins, self.low)
        return fixed_codes(values, edges_of(self.low, self.high, self.bins))

    def __call__(
        self,
        values: Float[Host, "n d"],
        labels: Integer[Host, "labels"],
        inputs: Integer[Host, "inputs"] | None = None,
    ) -> Information:
        """I(X;T) and I(T;Y) in nats, see `information`.

        Raises:
          ConfigError: as `information`.
          NumericalError: values that are not finite.
        """
        check_rows("values", values, labels=labels, inputs=inputs)
        check_finite("values", values)
        return information(self.codes(values), labels, self.count, inputs)


@dataclasses.dataclass(frozen=True)
class LayerInformation:
    """A point of the plane, in bits.

    Attributes:
      x: I(X;T).
      y: I(T;Y).
      width: units of the layer.
      stage: see `ffnlab.analysis.activations.Recorded`.
    """

    x: float
    y: float
    width: int
    stage: str


@dataclasses.dataclass(frozen=True)
class PlaneReport(Report):
    """The information plane of a network as it is.

    Attributes:
      layers: by path.
      ceiling: H(X) in bits, which no I(X;T) exceeds.
      labels: H(Y) in bits, which no I(T;Y) exceeds.
      estimator: in words.
    """

    layers: Mapping[str, LayerInformation]
    ceiling: float
    labels: float
    estimator: str

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer."""
        return [
            {"layer": name, "I(X;T) bits": at.x, "I(T;Y) bits": at.y, "width": at.width}
            | {"stage": at.stage, "ceiling": self.ceiling, "H(Y)": self.labels}
            for name, at in self.layers.items()
        ]

    def figures(self) -> dict[str, float]:
        """Both informations by layer, in bits."""
        x = {f"input/{name}": at.x for name, at in self.layers.items()}
        return x | {f"label/{name}": at.y for name, at in self.layers.items()}

    def draw(self, figure: Any) -> None:
        """The plane, from the first layer to the last."""
        axes = figure.subplots()
        axes.plot(
            [at.x for at in self.layers.values()], [at.y for at in self.layers.values()], "o-"
        )
        for name, at in self.layers.items():
            axes.annotate(name, (at.x, at.y), fontsize=7)
        axes.axvline(self.ceiling, color="0.6", linestyle="--", linewidth=1)
        axes.axhline(self.labels, color="0.6", linestyle="--", linewidth=1)
        axes.set_xlabel("I(X;T), bits")
        axes.set_ylabel("I(T;Y), bits")
        axes.spines[["top", "right"]].set_visible(False)


def layers_of(
    model: PyTree, x: PyTree, select: str = "**", *, probabilities: bool = True
) -> dict[str, Float[Array, "b d"]]:
    """Activations of layers as rows, for estimators; under jit and vmap.

    Args:
      model, x, select: see `ffnlab.analysis.activations`.
      probabilities: whether what an MLP gives in the end is the softmax of its scores, as both
        papers have it.
    """
    found = {}
    for name, (value, stage) in activations(model, x, select).items():
        value = value.astype(jnp.float32)
        is_end = probabilities and stage == "output" and value.ndim == 2
        found[name] = jax.nn.softmax(value) if is_end else value.reshape(len(value), -1)
    return found


def of_tokens(
    model: PyTree, tokens: Integer[Array, "b t"], select: str
) -> tuple[dict[str, Float[Array, "r d"]], Integer[Array, "r"], Integer[Array, "r t-1"]]:
    """(activations, next tokens, contexts) of every place but the last, a row each."""
    x, y = tokens[:, :-1], tokens[:, 1:].reshape(-1)
    count, length = x.shape
    layers = {
        name: value.astype(jnp.float32).reshape(count * length, -1)
        for name, (value, _) in activations(model, x, select).items()
    }
    is_seen = jnp.tril(jnp.ones((length, length), bool))
    contexts = jnp.where(is_seen, x[:, None, :], -1)  # what lies ahead is not known
    return layers, y, contexts.reshape(count * length, length)


def information_plane(
    *,
    select: str = "**",
    bins: int = 30,
    low: float = -1.0,
    high: float = 1.0,
    adaptive: bool = False,
    estimate: Estimate | None = None,
    probabilities: bool = True,
) -> Probe:
    """A probe of what layers know, over batches (x, y) of classes that are the whole set of inputs.

    Batches of token ids [b, t] are rows of a language model: each place is an input, all tokens up
    to it, and its class the next token. All of what a layer gives is kept until the last batch:
    joint states are of whole rows.

    Args:
      select: which layers, see `ffnlab.analysis.activations`.
      bins, low, high, adaptive: of `Cells`.
      estimate: another estimator, (values [n, d], labels [n], inputs [n]) -> `Information`;
        `Kernels` for instance.
      probabilities: see `layers_of`.
    Returns:
      a probe; its report is a `PlaneReport`.
    Raises:
      ConfigError: as `Cells`; from the probe, labels that are no whole numbers.
      NumericalError: from the probe, activations that are not finite.
    """
    chosen = Cells(bins, low, high, adaptive) if estimate is None else estimate

    def measure(model: PyTree, batch: PyTree) -> PyTree:
        model = taken_apart(model)
        if not isinstance(batch, tuple):
            return of_tokens(model, batch, select)
        x, y = batch
        inputs = jnp.asarray(x).reshape(len(x), -1)
        return layers_of(model, x, select, probabilities=probabilities), y, inputs

    def report(model: PyTree, found: PyTree) -> PlaneReport:
        layers, labels, inputs = found
        if not np.issubdtype(labels.dtype, np.integer):
            raise ConfigError(f"labels are {labels.dtype}; classes, whole numbers, are accepted")
        bad = [name for name, values in layers.items() if not np.isfinite(values).all()]
        if bad:
            raise NumericalError(f"probe 'information_plane': {bad[0]} gives NaN or infinity")
        each = joint_states(np.ascontiguousarray(inputs).view(np.uint8))
        inputs_of = None if len(np.unique(each)) == len(each) else jnp.asarray(each)
        ask = jax.jit(lambda values: chosen(values, jnp.asarray(labels), inputs_of))
        points = {}
        for name, values in layers.items():
            x, y = (float(part) / math.log(2) for part in ask(values))
            points[name] = LayerInformation(
                x, y, values.shape[1], stage_of(taken_apart(model), name)
            )
        return PlaneReport(
            points,
            entropy(each) / math.log(2),
            entropy(labels) / math.log(2),
            repr(chosen),
        )

    return rows("information_plane", measure, report)
