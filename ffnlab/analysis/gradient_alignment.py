"""How far a rule's steps go where the gradient goes, layer by layer.

    cos_l = <d_l, g_l> / (|d_l| |g_l|),   d = mean of (before - after),   g = mean gradient

A step down the gradient has 1, one across it 0. The angle is what is compared where a rule does
without backpropagation (counter-current learning, arXiv 2409.19841; feedback alignment, arXiv
1411.0247): below 90 degrees a small step still goes downhill.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ffnlab import tree
from ffnlab.analysis.parts import bars, layer_of, selected, taken_apart
from ffnlab.errors import NumericalError, check_seed
from ffnlab.losses import Loss
from ffnlab.probe import Probe
from ffnlab.report import Report
from ffnlab.rule import Rule

__all__ = ["AlignmentReport", "AlignmentStats", "gradient_alignment"]

WHOLE = "all"


class AlignmentStats(NamedTuple):
    """Sums over batches, each times its weight.

    Attributes:
      update: what steps took from the trained parts, float32.
      gradient: of the loss, float32.
      weight: of all batches, [].
    """

    update: PyTree
    gradient: PyTree
    weight: Float[Array, ""]


class Alignment(NamedTuple):
    """Of a layer, or of all.

    Attributes:
      cosine: of update and gradient; 0 where one of them is zero, and no angle is there.
      update, gradient: norms of the mean step and of the mean gradient.
    """

    cosine: float
    update: float
    gradient: float


@dataclasses.dataclass(frozen=True)
class AlignmentReport(Report):
    """Cosines of updates with gradients.

    Attributes:
      layers: by path of the layer; "all" is all of them as one vector.
    """

    layers: Mapping[str, Alignment]

    @property
    def cosines(self) -> dict[str, float]:
        """By layer, where both update and gradient are there."""
        return {name: x.cosine for name, x in self.layers.items() if x.update != 0 != x.gradient}

    def rows(self) -> list[dict[str, object]]:
        """A row for each layer; without a cosine where update or gradient is zero."""
        rows: list[dict[str, object]] = []
        for name, found in self.layers.items():
            cosine = {"cosine": found.cosine} if name in self.cosines else {}
            rows.append({"layer": name, **cosine, "step": found.update, "gradient": found.gradient})
        return rows

    def figures(self) -> dict[str, float]:
        """The cosine of each layer as "cosine/path", and that of all as "cosine"."""
        names = {name: "cosine" if name == WHOLE else f"cosine/{name}" for name in self.layers}
        return {names[name]: cosine for name, cosine in self.cosines.items()}

    def draw(self, figure: Any) -> None:
        """The cosines."""
        bars(figure, self.cosines, "cosine of update and gradient")


def gradient_alignment(
    rule: Rule,
    loss: Loss,
    *,
    select: str = "**",
    seed: int = 0,
    begin: Callable[[PyTree], PyTree] | None = None,
) -> Probe[PyTree, AlignmentStats]:
    """A probe of the angle between a rule's step and the gradient of a loss.

    Each batch is one step from the same state. Mean steps are compared with the mean gradient, so
    that the division into batches makes no difference where a step is linear in its gradients;
    with optimizers that are not (Adam, clipping) steps are those of the batches as given. A step
    that is much smaller than its weights is known to their rounding only, which is why a fresh
    state is one of float32 parameters.

    Args:
      rule: its `step` is taken, and undone.
      loss: (model, batch) -> (mean, metrics); see `ffnlab.losses`. A batch weighs as much as its
        "count" says, where there is one, else as many rows as it has.
      select: paths of layers, or of what holds them; `*` is any one name, `**` anything.
      seed: of the rule's first state.
      begin: model -> the state that steps start from, for a state with a history of its own: what
        a probe is given is a model, from which `rule.init` begins anew.
    Raises:
      SelectionError: from the probe, when the pattern matches nothing.
      NumericalError: from the probe, when steps or gradients are zero altogether, or a loss is NaN.
    """
    check_seed(seed)
    fresh = lambda model: rule.init(in_float32(model), jax.random.key(seed))  # noqa: E731
    start = fresh if begin is None else begin

    def init(model: PyTree) -> AlignmentStats:
        trained, _ = tree.trained(rule.model(start(model)))
        selected(taken_apart(trained), select)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained)
        return AlignmentStats(zeros, zeros, jnp.float32(0))

    def of_trained(trained: PyTree, fixed: PyTree, batch: PyTree) -> tuple[Array, Array]:
        mean, metrics, *_ = loss(tree.combine(trained, fixed), batch)
        weight = jnp.asarray(metrics.get("count", rows_of(batch)), jnp.float32)
        # A loss that is NaN, of a class that is not there, may have a finite gradient.
        return mean, jnp.where(jnp.isfinite(mean), weight, jnp.nan)

    slope = jax.jit(jax.grad(of_trained, has_aux=True))

    def observe(stats: AlignmentStats, model: PyTree, batch: PyTree) -> AlignmentStats:
        state = jax.tree.map(jnp.copy, start(model))  # the step may donate it
        rule.check(state, batch)
        before, fixed = jax.tree.map(jnp.copy, tree.trained(rule.model(state)))
        gradient, weight = slope(before, fixed, batch)
        after, _ = tree.trained(rule.model(rule.step(state, batch)[0]))
        return _added(stats, before, after, gradient, weight)

    def report(model: PyTree, stats: AlignmentStats) -> AlignmentReport:
        sums = (stats.update, stats.gradient)
        updates, gradients = (selected(taken_apart(total), select) for total in sums)
        layers: dict[str, list[tuple[PyTree, PyTree]]] = {}
        for path, update in updates.items():
            layers.setdefault(layer_of(path), []).append((update, gradients[path]))
        layers[WHOLE] = [pair for pairs in layers.values() for pair in pairs]
        found = {}
        for name, pairs in layers.items():
            cosine, *norms = map(float, _angle(pairs))
            found[name] = Alignment(cosine, *(norm / float(stats.weight) for norm in norms))
        for what in ("update", "gradient"):
            if getattr(found[WHOLE], what) == 0:
                raise NumericalError(
                    f"probe 'gradient_alignment': the {what} of {rule.name} is zero everywhere"
                )
        return AlignmentReport(found)

    return Probe("gradient_alignment", init, observe, report)


def in_float32(model: PyTree) -> PyTree:
    """The model with its trained parts in float32, which bfloat16 becomes without rounding."""
    trained, fixed = tree.trained(model)
    return tree.combine(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained), fixed)


def rows_of(batch: PyTree) -> int:
    """How many rows a batch has."""
    return jax.tree.leaves(batch)[0].shape[0]


@jax.jit
def _added(
    stats: AlignmentStats, before: PyTree, after: PyTree, gradient: PyTree, weight: Float[Array, ""]
) -> AlignmentStats:
    wide = lambda leaf: leaf.astype(jnp.float32)  # noqa: E731
    step = jax.tree.map(lambda a, b: wide(a) - wide(b), before, after)
    add = lambda total, new: total + weight * wide(new)  # noqa: E731
    return AlignmentStats(
        jax.tree.map(add, stats.update, step),
        jax.tree.map(add, stats.gradient, gradient),
        stats.weight + weight,
    )


@jax.jit
def _angle(
    pairs: list[tuple[PyTree, PyTree]],
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """(cosine, norm, norm) of two vectors in pieces; each is scaled first, or squares vanish."""
    a, b = ([jax.tree.leaves(pair[i]) for pair in pairs] for i in (0, 1))
    a, b = ([leaf for leaves in side for leaf in leaves] for side in (a, b))
    (a, size_a), (b, size_b) = _unit(a), _unit(b)
    cosine = jnp.stack([jnp.vdot(x, y) for x, y in zip(a, b, strict=True)]).sum()
    return cosine, size_a, size_b


def _unit(pieces: list[Array]) -> tuple[list[Array], Float[Array, ""]]:
    """A vector of length one, and the length that it had; zeros stay zeros."""
    largest = jnp.stack([jnp.abs(piece).max(initial=0) for piece in pieces]).max()
    scale = jnp.where(largest == 0, 1, largest)
    scaled = [piece / scale for piece in pieces]
    norm = jnp.sqrt(sum(jnp.sum(piece**2) for piece in scaled))
    return [piece / jnp.where(norm == 0, 1, norm) for piece in scaled], scale * norm
