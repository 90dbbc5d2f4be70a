"""Which loss moves which layer: the gradients of a rule's own losses, one by one.

    s_ij = |d loss_i / d layer_j|

A rule is local where every loss moves the parts that its paper gives it, and no other: the table of
these norms shows it, whatever the code looks like.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ffnlab import tree
from ffnlab.analysis.parts import layer_of, selected, taken_apart
from ffnlab.errors import NumericalError
from ffnlab.report import Report

__all__ = ["LocalityReport", "locality"]


@dataclasses.dataclass(frozen=True)
class LocalityReport(Report):
    """Gradients of losses with respect to layers.

    Attributes:
      layers: their names.
      slopes: [losses, layers], norms of gradients.
    """

    layers: Sequence[str]
    slopes: Float[np.ndarray, "losses layers"]

    @property
    def reached(self) -> list[tuple[str, ...]]:
        """The layers that each loss moves."""
        return [
            tuple(name for name, slope in zip(self.layers, row, strict=True) if slope)
            for row in self.slopes
        ]

    def rows(self) -> list[dict[str, object]]:
        """A row for each loss; a layer that it does not move has 0."""
        return [
            {"loss": i, **dict(zip(self.layers, map(float, row), strict=True))}
            for i, row in enumerate(self.slopes)
        ]

    def figures(self) -> dict[str, float]:
        """The share of pairs of a loss and a layer with a gradient, and the most layers of one."""
        counts = [len(names) for names in self.reached]
        return {"share": sum(counts) / self.slopes.size, "layers of a loss": float(max(counts))}

    def draw(self, figure: Any) -> None:
        """The norms by loss and layer; white is no gradient at all."""
        self.on(figure.subplots())

    def on(self, axes: Any) -> None:
        """`draw` on axes that are there already."""
        with np.errstate(divide="ignore"):
            logs = np.log10(self.slopes)
        axes.imshow(np.where(self.slopes > 0, logs, np.nan), aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(self.layers)), self.layers, fontsize=7, rotation=90)
        axes.set_yticks(range(len(self.slopes)), range(len(self.slopes)), fontsize=7)
        axes.set_ylabel("loss")


def locality(
    losses: Callable[[PyTree], Float[Array, "losses"]],
    model: PyTree,
    *,
    select: str = "**",
    group: Callable[[str], str] = layer_of,
) -> LocalityReport:
    """The table of gradients of losses with respect to layers.

    Args:
      losses: model -> the losses [n] that a rule sums or descends one by one, with all that is
        detached in them.
      model: any tree of modules; what is floating in it counts.
      select: paths of layers, or of what holds them; `*` is any one name, `**` anything.
      group: path of a variable -> the name of its layer.
    Raises:
      SelectionError: the pattern matches nothing.
      ValueError: losses that are no vector, or an empty one.
      NumericalError: a gradient that is not finite.

    >>> from ffnlab.layers import MLP
    >>> net = MLP((3, 4, 2), key=jax.random.key(0))
    >>> found = locality(lambda net: net(jnp.ones((1, 3)))[0], net)
    >>> found.reached[0]
    ('maps[0]', 'maps[1]')
    """
    trained, fixed = tree.trained(model)
    names = dict.fromkeys(map(group, selected(taken_apart(trained), select)))
    shape = jax.eval_shape(losses, model).shape
    if len(shape) != 1 or not shape[0]:
        raise ValueError(f"losses gives shape {shape}; a vector of one or more is needed")

    @jax.jit
    def slope(trained: PyTree, i: Array) -> PyTree:
        return jax.grad(lambda part: losses(tree.combine(part, fixed))[i])(trained)

    found = np.zeros((shape[0], len(names)))
    column = {name: j for j, name in enumerate(names)}
    for i in range(shape[0]):
        for path, part in selected(taken_apart(slope(trained, jnp.int32(i))), select).items():
            values = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(part)]
            j = column[group(path)]
            found[i, j] = np.hypot(found[i, j], np.linalg.norm(np.concatenate(values)))
    if not np.isfinite(found).all():
        raise NumericalError("a gradient of losses is not finite")
    return LocalityReport(tuple(names), found)
