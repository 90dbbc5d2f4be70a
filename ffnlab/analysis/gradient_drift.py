"""Drift and diffusion of the gradients of minibatches, layer by layer.

    mu_l = |mean g_l|,   sigma_l = sqrt(trace of the covariance of g_l)

over minibatches of one model. Where mu is above sigma steps agree, and the model drifts down its
loss; where it is far below they are noise, and it diffuses (arXiv 1703.00810, whose authors take
weight matrices alone and add layers up; here each has its own figures).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ffnlab import tree
from ffnlab.analysis.parts import bars, layer_of, selected, taken_apart
from ffnlab.errors import ConfigError
from ffnlab.losses import Loss
from ffnlab.report import Report

__all__ = ["Drift", "DriftReport", "DriftStats", "Minibatches", "gradient_drift"]


class DriftStats(NamedTuple):
    """What is kept of minibatches, by Welford's sums: squares of means and means of squares, which
    nearly cancel where gradients agree, are never subtracted.

    Attributes:
      mean: of gradients, float32.
      squares: of their distances from the mean, summed, by layer.
      count: of minibatches, [].
    """

    mean: PyTree
    squares: dict[str, Float[Array, ""]]
    count: Float[Array, ""]


class Drift(NamedTuple):
    """Of a layer.

    Attributes:
      mu: norm of the mean gradient.
      sigma: root of the trace of their covariance.
    """

    mu: float
    sigma: float

    @property
    def ratio(self) -> float:
        """mu / sigma; without end where all gradients are one, 0 where there are none."""
        if self.sigma:
            return self.mu / self.sigma
        return math.inf if self.mu else 0.0


@dataclasses.dataclass(frozen=True)
class DriftReport(Report):
    """Gradients of minibatches.

    Attributes:
      layers: by path.
      batches: how many were looked at.
    """

    layers: Mapping[str, Drift]
    batches: int

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer."""
        return [
            {"layer": name, "mu": at.mu, "sigma": at.sigma, "mu / sigma": at.ratio}
            for name, at in self.layers.items()
        ]

    def figures(self) -> dict[str, float]:
        """mu and sigma by layer."""
        mu = {f"mu/{name}": at.mu for name, at in self.layers.items()}
        return mu | {f"sigma/{name}": at.sigma for name, at in self.layers.items()}

    def draw(self, figure: Any) -> None:
        """mu over sigma, where it has an end."""
        ratios = {name: at.ratio for name, at in self.layers.items()}
        finite = {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}
        bars(figure, finite, "mean over deviation")


class Minibatches(NamedTuple):
    """A look at minibatches as they are: a probe but for one thing, that how rows are divided among
    batches is what it looks at.

    Attributes:
      init: model -> stats.
      observe: (stats, model, batch) -> stats, pure and compiled once; members are looked at side
        by side by `jax.vmap(observe, (0, 0, None))`.
      report: stats -> `DriftReport`.
    """

    init: Callable[[PyTree], DriftStats]
    observe: Callable[[DriftStats, PyTree, PyTree], DriftStats]
    report: Callable[[DriftStats], DriftReport]

    def __call__(self, model: PyTree, batches: Iterable) -> DriftReport:
        """Looks at a model and at all batches."""
        stats = self.init(model)
        for batch in batches:
            stats = self.observe(stats, model, batch)
        return self.report(stats)


def gradient_drift(loss: Loss, *, select: str = "**") -> Minibatches:
    """How far the gradients of minibatches agree; sums alone are kept.

    Args:
      loss: (model, batch) -> (mean, metrics); see `ffnlab.losses`.
      select: variables, by paths of the list form ("maps[*].w" for weight matrices alone).
    Raises:
      SelectionError: from `init`, the pattern matches nothing.
      ConfigError: from `report`, fewer than two minibatches.
    """

    def layers(gradient: PyTree) -> dict[str, list[Array]]:
        found: dict[str, list[Array]] = {}
        for path, value in selected(taken_apart(gradient), select).items():
            found.setdefault(layer_of(path), []).extend(jax.tree.leaves(value))
        return found

    def init(model: PyTree) -> DriftStats:
        trained, _ = tree.trained(model)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained)
        return DriftStats(zeros, dict.fromkeys(layers(zeros), jnp.float32(0)), jnp.float32(0))

    @jax.jit
    def observe(stats: DriftStats, model: PyTree, batch: PyTree) -> DriftStats:
        trained, fixed = tree.trained(model)
        gradient = jax.grad(lambda part: loss(tree.combine(part, fixed), batch)[0])(trained)
        gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)
        count = stats.count + 1
        away = jax.tree.map(jnp.subtract, gradient, stats.mean)
        mean = jax.tree.map(lambda mean, step: mean + step / count, stats.mean, away)
        left = 1 - 1 / count  # of the way from the old mean that lies beyond the new one
        squares = {name: stats.squares[name] + left * square(g) for name, g in layers(away).items()}
        return DriftStats(mean, squares, count)

    def report(stats: DriftStats) -> DriftReport:
        count = int(stats.count)
        if count < 2:
            raise ConfigError(f"batches: {count}; two or more minibatches have a covariance")
        found = {
            name: Drift(
                math.sqrt(float(square(mean))), math.sqrt(float(stats.squares[name]) / count)
            )
            for name, mean in layers(stats.mean).items()
        }
        return DriftReport(found, count)

    return Minibatches(init, observe, report)


def square(leaves: list[Array]) -> Float[Array, ""]:
    """The sum of squares."""
    return jnp.stack([jnp.sum(leaf**2) for leaf in leaves]).sum()
