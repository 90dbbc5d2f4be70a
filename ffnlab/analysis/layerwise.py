"""A search for misclassified inputs from layer to layer, which proves nothing.

A region of layer k says how far some of its units may move, span * 1 .. span * count to either
side. It is carried to the next layer by rules that cover what the units before it can do; points of
it that they can reach are pulled back to an input by linear systems, ReLU taken as the identity.
What comes back within the region of the input is asked; the network alone decides.

Source: Huang et al., Safety Verification of Deep Neural Networks, arXiv 1610.06940, as their tool
(DLV) does it with dense layers. What differs: systems are solved by least squares, units are taken
in order of how far they are from the layer's mean and none is drawn, and where a layer has more
points than are asked evenly spaced ones are. As there, one unit of the next
layer stands for each of this one and the way back ignores ReLU: "not found" is unknown, never safe.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ffnlab.analysis.verification import (
    POINTS,
    UNKNOWN,
    Grid,
    Verdict,
    asked,
    broken,
    logits_of,
    witness_of,
)
from ffnlab.errors import ConfigError, at_least
from ffnlab.layers import MLP

__all__ = ["Region", "layerwise_search", "next_region", "pulled_back"]

MULTIPLE = 0.1  # how far a length may be from a whole multiple of the span, of the least length
FEASIBLE = 1e-6  # of a system solved by least squares, relative


@dataclasses.dataclass(frozen=True)
class Region:
    """Units of a layer that may move, and how far.

    Attributes:
      dims: which.
      spans: step of each, > 0.
      counts: steps of each to either side.
    """

    dims: tuple[int, ...]
    spans: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def reach(self) -> Float[np.ndarray, "dims"]:
        """How far each may move."""
        return np.array(self.spans) * np.array(self.counts, float)


def most_apart(values: Float[np.ndarray, "d"], count: int, taken: Sequence[int] = ()) -> list[int]:
    """Units that differ most from the mean of their layer, those that are taken left out."""
    order = np.argsort(-np.abs(values - values.mean()), kind="stable")
    return [int(i) for i in order if i not in set(taken)][:count]


def next_region(
    region: Region,
    values: Float[np.ndarray, "d"],
    weight: Float[np.ndarray, "d e"],
    bias: Float[np.ndarray, "e"],
) -> Region:
    """The region of the layer that reads this one, before its nonlinearity.

    One unit k for each unit of the region, those most apart from their mean. With

        reach_k = sum_l in |span_l count_l w_lk| + |sum_l out w_lk a_l + b_k|
        steps_k = |sum_l s_l span_l w_lk|   for all signs s

    the span is the least of reach_k and the steps that are no 0, halved until all of them are whole
    multiples of it within a tenth of the least; the count is count_l ceil(reach_k / span).

    Args:
      region: of this layer.
      values: what its units give at the input.
      weight, bias: of the map that reads it.
    """
    inside = list(region.dims)
    after = values @ weight + bias
    chosen = most_apart(after, min(len(inside), weight.shape[1]))
    outside = np.delete(np.arange(len(values)), inside)
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(inside) - 1)))
    signs = np.concatenate([np.ones((len(signs), 1)), signs], 1)  # of s and -s one is enough
    spans, counts = [], []
    for i, k in enumerate(chosen):
        moved = np.abs(region.reach * weight[inside, k]).sum()
        reach = moved + abs(values[outside] @ weight[outside, k] + bias[k])
        steps = np.abs(signs @ (np.array(region.spans) * weight[inside, k]))
        lengths = np.array([reach, *steps])
        lengths = lengths[lengths > np.finfo(np.float64).eps * max(reach, 1)]
        span = common_step(lengths) if len(lengths) else 1.0
        spans.append(span)
        counts.append(max(1, region.counts[i] * math.ceil(reach / span - 1e-9)))
    return Region(tuple(chosen), tuple(spans), tuple(counts))


def common_step(lengths: Float[np.ndarray, "n"]) -> float:
    """The least length, halved until all are near whole multiples of it."""
    least = step = float(lengths.min())
    while np.any(np.abs(lengths - step * np.round(lengths / step)) > MULTIPLE * least):
        step /= 2
    return step


def pulled_back(
    region: Region,
    values: Float[np.ndarray, "d"],
    weight: Float[np.ndarray, "d e"],
    bias: Float[np.ndarray, "e"],
    dims: Sequence[int],
    wanted: Float[np.ndarray, "n dims"],
) -> tuple[Float[np.ndarray, "n d"], np.ndarray]:
    """(values of this layer that give what is wanted of some units of the next, which of them do).

    Only the units of the region move; there are as many unknowns as equations, or more.

    Args:
      region: of this layer.
      values: what it gives at the input; all other units keep it.
      weight, bias: of the map between.
      dims: units of the next layer.
      wanted: what these are to give, before their nonlinearity; a row for each point.
    """
    inside = list(region.dims)
    rest = np.delete(np.arange(len(values)), inside)
    given = values[rest] @ weight[rest][:, list(dims)] + bias[list(dims)]
    system = weight[inside][:, list(dims)].T
    found = np.linalg.lstsq(system, (wanted - given).T, rcond=None)[0]
    error = np.abs(system @ found - (wanted - given).T).max(0)
    points = np.repeat(values[None], len(wanted), 0)
    points[:, inside] = found.T
    return points, error <= FEASIBLE * (1 + np.abs(wanted).max(1))


def layerwise_search(
    net: MLP,
    x: Float[np.ndarray, "d"],
    *,
    units: int = 5,
    span: float = 1 / 16,
    count: int = 2,
    groups: int = 1,
    layers: int | None = None,
    low: float = 0.0,
    high: float = 1.0,
    most_points: int = 10**5,
) -> Verdict:
    """Looks for an input of another class by moving groups of units, layer after layer.

    Args:
      net: with ReLU.
      x: the input.
      units: of a group; entries of the input that differ most from its mean first, then the next.
      span, count: steps of an entry, and how many to either side.
      groups: tried one after the other.
      layers: how deep regions are carried, 0 is the input alone; all hidden ones when None.
      low, high: the valid range of inputs.
      most_points: of one layer's region.
    Returns:
      a `Verdict`, "unsafe" with a witness within span * count of x in the group's entries (a tenth
      of a span more where it was pulled back, as the source has it), or "unknown".
    Raises:
      ConfigError: a network that is no MLP with ReLU, a size out of range, x outside of low..high.
      NumericalError: a logit is NaN.
    """
    if not isinstance(net, MLP) or net.activation != "relu":
        what = f"a {type(net).__name__} with activation={getattr(net, 'activation', None)!r}"
        raise ConfigError(f"net is {what}; an MLP with 'relu' is accepted")
    hidden = len(net.maps) - 1
    layers = hidden if layers is None else layers
    at_least(1, units=units, groups=groups, count=count, most_points=most_points)
    if not 0 <= layers <= hidden:
        raise ConfigError(f"layers={layers} must lie in 0..{hidden}")
    Grid(x, (0,), span, count, low, high)  # checks the rest
    with jax.enable_x64(True):
        search = Search(net, np.asarray(x, np.float64), (low, high))
        taken: list[int] = []
        for _ in range(groups):
            dims = most_apart(search.x, units, taken)
            taken += dims
            if not dims:
                break
            first = Region(tuple(dims), (span,) * len(dims), (count,) * len(dims))
            found = search.through(first, layers, most_points)
            if found is not None:
                return found
        return Verdict(UNKNOWN, search.label, proof="none was found", points=search.points)


class Search:
    """A network and an input that it is asked around.

    Attributes:
      x, label: the input and its class.
      points: how many were asked.
    """

    def __init__(self, net: MLP, x: np.ndarray, ends: tuple[float, float]):
        self.net, self.x, self.ends, self.points = net, x, ends, 0
        self.maps = [(np.asarray(m.weight.dense(), np.float64), bias_of(m)) for m in net.maps]
        self.values = [x]  # of each layer, after its nonlinearity
        for w, b in self.maps[:-1]:
            self.values.append(np.maximum(self.values[-1] @ w + b, 0))
        self.label = int(logits_of(self.ask, x[None])[0].argmax())

    def ask(self, points: Any) -> Array:
        """Logits of points."""
        return asked(self.net, jnp.asarray(points))

    def through(self, first: Region, layers: int, most: int) -> Verdict | None:
        """A witness of a group, from any layer."""
        regions, moved = [first], first.reach
        for depth in range(layers + 1):
            if depth:
                w, b = self.maps[depth - 1]
                regions.append(next_region(regions[-1], self.values[depth - 1], w, b))
                moved = moved @ np.abs(w[list(regions[-2].dims)][:, list(regions[-1].dims)])
            found = self.asked_at(regions, moved, most)
            if found is not None:
                return found
        return None

    def asked_at(self, regions: Sequence[Region], moved: np.ndarray, most: int) -> Verdict | None:
        """Asks points of the last region, pulled back to the input.

        Args:
          regions: of all layers so far.
          moved: how far the first one moves the units of the last at most.
          most: points.
        """
        region, depth = regions[-1], len(regions) - 1
        each = max(3, int(most ** (1 / len(region.dims)) + 1e-9))
        sides = [multiples(span, end, each) for span, end in zip(region.spans, moved, strict=True)]
        moves = np.array(list(itertools.product(*sides)))
        if depth == 0:
            points = np.repeat(self.x[None], len(moves), 0)
            points[:, list(region.dims)] += moves
        else:
            w, b = self.maps[depth - 1]
            before = self.values[depth - 1] @ w + b
            points = before[list(region.dims)] + moves
            for back in range(depth - 1, -1, -1):
                points, does = pulled_back(
                    regions[back],
                    self.values[back],
                    *self.maps[back],
                    regions[back + 1].dims,
                    points,
                )
                points = points[does]
                if back:
                    points = points[:, list(regions[back].dims)]
            apart = np.abs(points - self.x)[:, list(regions[0].dims)]
            slack = MULTIPLE * np.array(regions[0].spans)
            points = points[(apart <= regions[0].reach + slack).all(1)]
        return self.asked_of(np.clip(points, *self.ends))

    def asked_of(self, points: np.ndarray) -> Verdict | None:
        """The first of some points with another class."""
        for begin in range(0, len(points), POINTS):
            part = points[begin : begin + POINTS]
            logits = logits_of(self.ask, part)
            row = broken(logits, self.label)
            self.points += len(part) if row is None else row + 1
            if row is not None:
                return witness_of(part[row], logits[row], self.label, self.points)
        return None


def multiples(span: float, end: float, most: int) -> Float[np.ndarray, "n"]:
    """Whole multiples of a span up to an end to either side; evenly spaced ones, if too many."""
    count = int(end / span + 1e-9)
    steps = np.unique(np.round(np.linspace(-count, count, min(2 * count + 1, most))))
    return span * steps


def bias_of(linear: Any) -> np.ndarray:
    """A map's bias in float64, zeros without one."""
    if linear.bias is None:
        return np.zeros(linear.weight.shape[1])
    return np.asarray(linear.bias, np.float64)
