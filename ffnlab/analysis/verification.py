"""Whether any point of a region gets another class: unsafe with a witness, safe with a proof, or
unknown.

Two kinds of regions. A `Grid` is finite: its points are all asked, and the verdict is complete. Of
a `Cube` every point counts: bounds of the margin, by `ffnlab.analysis.bounds`, prove cells safe,
and cells that are not are halved, until a witness is found or there are too many.

    margin = logit of the class - largest other logit;   unsafe where it is 0 or less

Source: the regions and the refinement of Huang et al., Safety Verification of Deep Neural Networks,
arXiv 1610.06940. What differs from their tool (DLV): its way from layer to layer proves nothing
(one dimension is drawn for each, and ReLU taken as the identity on the way back), and nothing is
called safe here for want of a witness.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ffnlab.analysis.bounds import linear_bounds
from ffnlab.analysis.intervals import Box, Intervals, interval_bounds
from ffnlab.analysis.walk import line_of, walk
from ffnlab.errors import ConfigError, NumericalError, at_least, is_whole

__all__ = ["Cube", "Grid", "Verdict", "verify"]

POINTS = 4096  # asked at once
CELLS = 64  # bounded at once
ROUNDING = 1e-9  # of float64, relative to the logits: a margin must be larger to prove anything
BOUNDS = {"lines": linear_bounds, "intervals": interval_bounds}
SAFE, UNSAFE, UNKNOWN = "safe", "unsafe", "unknown"


@dataclasses.dataclass(frozen=True)
class Grid:
    """Steps from an input along some of its entries.

        { clip(x + step k) : k whole, |k_d| <= count for d in dims, 0 elsewhere }

    Attributes:
      x: the input, [*in].
      dims: places of the entries that move, in x in a row.
      step: > 0.
      count: steps to either side, >= 1.
      low, high: the valid range, to which points are clipped.
    """

    x: Float[np.ndarray, "*in"]
    dims: Sequence[int]
    step: float
    count: int
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_input(self.x, self.low, self.high)
        check_dims(self.dims, self.x.size)
        at_least(1, count=self.count)
        if not 0 < self.step < math.inf:
            raise ConfigError(f"step={self.step} must be positive and finite")

    @property
    def size(self) -> int:
        """How many combinations of steps there are."""
        return (2 * self.count + 1) ** len(self.dims)

    def points(self, begin: int, end: int) -> Float[np.ndarray, "n *in"]:
        """Those of some numbers; number s has step (s // base^i) % base - count in entry i."""
        base, numbers = 2 * self.count + 1, np.arange(begin, end)
        found = np.repeat(self.x.reshape(1, -1).astype(np.float64), len(numbers), 0)
        for i, dim in enumerate(self.dims):
            found[:, dim] += self.step * ((numbers // base**i) % base - self.count)
        return np.clip(found, self.low, self.high).reshape(-1, *self.x.shape)


@dataclasses.dataclass(frozen=True)
class Cube:
    """All points within a distance of an input, entry by entry, in the valid range.

    Attributes:
      x: the input, [*in].
      radius: of every entry that moves, > 0.
      dims: places of the entries that move, in x in a row; all when None.
      low, high: the valid range.
    """

    x: Float[np.ndarray, "*in"]
    radius: float
    dims: Sequence[int] | None = None
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_input(self.x, self.low, self.high)
        if self.dims is not None:
            check_dims(self.dims, self.x.size)
        if not self.radius > 0:
            raise ConfigError(f"radius={self.radius} must be positive")

    @property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Both ends of every entry, float64."""
        radius = np.zeros(self.x.size)
        radius[slice(None) if self.dims is None else list(self.dims)] = self.radius
        x = self.x.astype(np.float64)
        ends = [x + sign * radius.reshape(self.x.shape) for sign in (-1, 1)]
        low, high = (np.clip(end, self.low, self.high) for end in ends)
        return low, high


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a region.

    Attributes:
      status: "safe", "unsafe" or "unknown".
      label: the class of the input.
      witness: a point of the region with another class, float64; None unless unsafe.
      other: its class.
      proof: why it is safe: "enumeration" or "bounds"; why it is unknown, in words.
      points, cells: how many points were asked, and how many cells bounded.
    """

    status: str
    label: int
    witness: np.ndarray | None = None
    other: int | None = None
    proof: str = ""
    points: int = 0
    cells: int = 0


def verify(
    fn: Callable[[Array], Array],
    region: Grid | Cube,
    *,
    label: int | None = None,
    bounds: str = "lines",
    most_points: int = 10**6,
    most_cells: int = 4096,
) -> Verdict:
    """Asks whether a function gives one class all over a region, in float64.

    Args:
      fn: inputs [*in] -> logits [classes], a model or any function of jax. Weights may be of any
        dtype; what follows the input is float64, and a cube is refused where it would be rounded
        to less.
      region: `Grid` or `Cube`.
      label: the class that all points are to have; that of the input when None.
      bounds: of a cube's cells, "lines" or "intervals".
      most_points: of a grid; a larger one is refused before anything is asked.
      most_cells: of a cube; where more are needed the verdict is unknown.
    Returns:
      a `Verdict`; a tie of the largest logits is no class of one's own, and unsafe.
    Raises:
      ConfigError: a grid of too many points, other `bounds`, no such label, logits that are no
        vector, or, of a cube, a function that computes in less than float64 or whose bounds are
        not known.
      NumericalError: a logit is NaN, which proves nothing.
    """
    at_least(1, most_points=most_points, most_cells=most_cells)
    at_least(0, label=label)
    if bounds not in BOUNDS:
        raise ConfigError(f"bounds={bounds!r} is not one of {sorted(BOUNDS)}")
    if isinstance(region, Grid) and region.size > most_points:
        raise ConfigError(
            f"region has {region.size:,} points; at most most_points={most_points:,} are asked"
        )
    with jax.enable_x64(True):
        x = np.asarray(region.x, np.float64)
        given = fn if isinstance(fn, nnx.Module) else jax.tree_util.Partial(fn)
        ask = functools.partial(asked, given)
        first = logits_of(ask, x[None])
        chosen = int(first[0].argmax() if label is None else label)
        if not 0 <= chosen < first.shape[1]:
            raise ConfigError(f"label={label} is outside of {first.shape[1]} classes")
        if isinstance(region, Grid):
            return enumerated(ask, region, chosen)
        check_exact(given, x)
        least = functools.partial(least_margins, given, bounds=bounds)
        return bisected(ask, least, region, chosen, most_cells)


def logits_of(ask: Callable[[Array], Array], points: np.ndarray) -> Float[np.ndarray, "n c"]:
    """Logits of points; raises for NaN and for what is no vector."""
    found = np.asarray(ask(jnp.asarray(points)))
    if found.ndim != 2 or found.shape[1] < 2:
        raise ConfigError(
            f"fn gives shape {found.shape[1:]} for one input; logits [classes] of two or more are "
            "accepted"
        )
    if np.isnan(found).any():
        raise NumericalError("a logit is NaN; nothing follows from it")
    return found


def broken(logits: np.ndarray, label: int) -> int | None:
    """The first row whose class is another, or tied; None where there is none."""
    others = np.delete(logits, label, axis=1).max(1)
    found = np.flatnonzero(others >= logits[:, label])
    return int(found[0]) if len(found) else None


def witness_of(
    point: np.ndarray, logits: np.ndarray, label: int, points: int, cells: int = 0
) -> Verdict:
    """An unsafe verdict; of a tie the other class."""
    others = logits.copy()
    others[label] = -np.inf
    return Verdict(UNSAFE, label, point, int(others.argmax()), points=points, cells=cells)


def enumerated(ask: Callable[[Array], Array], region: Grid, label: int) -> Verdict:
    """Asks all points of a grid."""
    for begin in range(0, region.size, POINTS):
        points = region.points(begin, min(begin + POINTS, region.size))
        full = np.concatenate([points, np.repeat(points[:1], POINTS - len(points), 0)])
        logits = logits_of(ask, full if region.size > POINTS else points)[: len(points)]
        row = broken(logits, label)
        if row is not None:
            return witness_of(points[row], logits[row], label, begin + row + 1)
    return Verdict(SAFE, label, proof="enumeration", points=region.size)


class Exactly(Intervals):
    """Intervals that refuse what rounds more than float64 does."""

    def converted(self, inputs: Sequence[Any], equation: Any) -> Sequence[Box]:
        new = equation.params["new_dtype"]
        if jnp.issubdtype(new, jnp.floating) and jnp.finfo(new).bits < 64:
            raise ConfigError(
                f"fn rounds what it is given to {new}, which no bound counts: {line_of(equation)}"
            )
        return super().converted(inputs, equation)


def check_exact(fn: Callable[[Array], Array], x: np.ndarray) -> None:
    """Raises ConfigError for a function that computes in less than float64."""
    closed, box = jax.make_jaxpr(fn)(jnp.asarray(x)), Box(jnp.asarray(x), jnp.asarray(x))
    jax.eval_shape(lambda box: walk(Exactly(), closed.jaxpr, closed.consts, [box]), box)


@jax.jit
def asked(fn: Any, points: Float[Array, "n *in"]) -> Array:
    """Logits of points. The function is an argument: a model that changed is another one."""
    return jax.vmap(lambda point: fn(point))(points)


@functools.partial(jax.jit, static_argnames="bounds")
def least_margins(
    fn: Any, lows: Float[Array, "n *in"], highs: Float[Array, "n *in"], label: Any, *, bounds: str
) -> tuple[Array, Array]:
    """(least margins of cells, what rounding may take of them)."""

    def least(low: Array, high: Array) -> tuple[Array, Array]:
        def margins(x: Array) -> Array:
            logits = fn(x)
            mine = jax.nn.one_hot(label, len(logits), dtype=logits.dtype)
            return mine @ logits - logits

        found = BOUNDS[bounds](margins, low, high)
        is_other = jnp.arange(len(found.low)) != label
        size = jnp.where(is_other, jnp.abs(found.low) + jnp.abs(found.high), 0)
        slack = ROUNDING * (1 + size.max())
        return jnp.where(is_other, found.low, jnp.inf).min(), slack

    return jax.vmap(least)(lows, highs)


def bisected(
    ask: Callable[[Array], Array],
    least: Callable[..., tuple[Array, Array]],
    region: Cube,
    label: int,
    most_cells: int,
) -> Verdict:
    """Proves cells of a cube safe and halves those that are not."""
    cells = [region.ends]
    counts = {"points": 0, "cells": 0}
    while cells:
        now, cells = cells[:CELLS], cells[CELLS:]
        padded = now + now[:1] * (CELLS - len(now))
        lows, highs = (np.stack(part) for part in zip(*padded, strict=True))
        if counts["cells"] + len(now) > most_cells:
            return Verdict(UNKNOWN, label, proof=f"more than {most_cells} cells", **counts)
        middles = (lows + highs) / 2
        logits = logits_of(ask, middles)[: len(now)]
        counts["points"] += len(now)
        row = broken(logits, label)
        if row is not None:
            return witness_of(middles[row], logits[row], label, **counts)
        bound, slack = (np.asarray(each)[: len(now)] for each in least(lows, highs, label))
        counts["cells"] += len(now)
        for i in np.flatnonzero(~(bound > slack)):
            cells += halves(*now[i])
        if any(np.array_equal(low, high) for low, high in cells):
            return Verdict(UNKNOWN, label, proof="a margin within rounding", **counts)
    return Verdict(SAFE, label, proof="bounds", **counts)


def halves(low: np.ndarray, high: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """A cell cut across its widest entry."""
    place = np.unravel_index(int((high - low).argmax()), low.shape)
    middle = (low[place] + high[place]) / 2
    if not low[place] < middle < high[place]:
        return [(low, low)]  # nothing is left to halve
    first, second = high.copy(), low.copy()
    first[place] = second[place] = middle
    return [(low, first), (second, high)]


def check_input(x: np.ndarray, low: float, high: float) -> None:
    """Raises ConfigError for an input that is not finite, or outside of its range."""
    kind = getattr(x, "dtype", None)
    is_array = kind is not None and np.issubdtype(kind, np.floating) and x.size
    if not is_array or not np.isfinite(x).all():
        what = type(x).__name__ if kind is None else f"{kind}{list(x.shape)}"
        raise ConfigError(f"x is {what}; an array of finite floating numbers is accepted")
    if not low < high or np.min(x) < low or np.max(x) > high:
        raise ConfigError(
            f"x lies in {np.min(x):g} to {np.max(x):g}, outside of low={low}, high={high}"
        )


def check_dims(dims: Sequence[int], size: int) -> None:
    """Raises ConfigError for places that repeat, or that are not there; a mask holds none."""
    places = list(dims) if np.ndim(dims) == 1 else []
    is_there = all(is_whole(d) and not isinstance(d, bool) and 0 <= d < size for d in places)
    if not places or not is_there or len(set(places)) != len(places):
        raise ConfigError(
            f"dims={places or dims}: places in 0..{size - 1}, each once and at least one, are "
            "accepted"
        )
