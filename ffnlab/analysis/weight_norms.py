"""How large the weights of a model are, one by one: a first look at any model, and along training.

    norm_w = sqrt(sum_ij w_ij^2)

of the matrix that a weight stands for, whatever it is stored in.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ffnlab.analysis.parts import bars, selected, taken_apart
from ffnlab.probe import Probe
from ffnlab.report import Report
from ffnlab.weights import is_weight

__all__ = ["NormReport", "weight_norms"]


class Norm(NamedTuple):
    """The size of one weight.

    Attributes:
      weight: its path.
      shape: of the matrix, or of the array.
      norm: the root of the sum of squares.
      largest: absolute value.
    """

    weight: str
    shape: tuple[int, ...]
    norm: float
    largest: float

    @property
    def rms(self) -> float:
        """The norm over the root of the number of entries."""
        return self.norm / math.sqrt(max(1, math.prod(self.shape)))


@dataclasses.dataclass(frozen=True)
class NormReport(Report):
    """The norms of weights.

    Attributes:
      norms: of every weight, in the model's order.
    """

    norms: Sequence[Norm]

    def rows(self) -> list[dict[str, object]]:
        """A row for each weight."""
        return [
            {
                "weight": found.weight,
                "shape": " x ".join(map(str, found.shape)),
                "norm": found.norm,
                "rms": found.rms,
                "largest": found.largest,
            }
            for found in self.norms
        ]

    def figures(self) -> dict[str, float]:
        """The norm of each weight as "norm/path", and that of all as "norm"."""
        whole = math.hypot(*(found.norm for found in self.norms))
        return {"norm": whole} | {f"norm/{found.weight}": found.norm for found in self.norms}

    def draw(self, figure: Any) -> None:
        """Root mean squares, which weights of any shape have in common."""
        bars(figure, {found.weight: found.rms for found in self.norms}, "rms")


def weight_norms(*, select: str = "**") -> Probe[PyTree, None]:
    """A probe of how large weights are; it looks at the model alone.

    Biases and gains of norms are there too; a quantized weight is measured as the matrix it stands
    for, which is made for one weight at a time.

    Args:
      select: paths of the weights, or of what holds them; `*` is any one name, `**` anything.
    Raises:
      SelectionError: from the probe, when the pattern matches nothing.

    >>> from ffnlab.layers import MLP
    >>> sorted(weight_norms()(MLP((3, 2), key=jax.random.key(0))).figures())
    ['norm', 'norm/maps[0].b', 'norm/maps[0].w']
    """

    def report(model: PyTree, stats: None) -> NormReport:
        return NormReport(
            [
                Norm(path, tuple(value.shape), *map(float, _size(value)))
                for path, value in selected(taken_apart(model), select).items()
            ]
        )

    return Probe("weight_norms", lambda model: None, None, report)


@jax.jit
def _size(value: PyTree) -> tuple[Float[Array, ""], Float[Array, ""]]:
    entries = (value.dense() if is_weight(value) else value).astype(jnp.float32)
    largest = jnp.abs(entries).max(initial=0)
    safe = jnp.where(largest > 0, largest, 1)  # squares of small numbers are zero
    return largest * jnp.sqrt(jnp.sum((entries / safe) ** 2)), largest
