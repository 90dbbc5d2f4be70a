"""Weather as rows to learn a forecast from: moments, and what came of each.

Waves are rows drawn one by one, each at its own phase. Temperature is one row after the other in
time, so it is split by time and parts are kept a day apart. Beside the temperature a network is
told the hour of the day (sine and cosine), which changes with every step of a roll-out.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from ffnlab.data import AirTemperature, ArrayBatches, Scaling, Waves, scaling_of, wave_fields
from ffnlab.errors import ConfigError, at_least
from ffnlab.graphs.globe import grid_axes
from ffnlab.graphs.oneforecast import ForecastBatch, rollout
from ffnlab.models.globe import Globe
from ffnlab.models.oneforecast import OneForecast, OneForecastConfig

__all__ = [
    "CLOCK",
    "ForecastBatches",
    "Rows",
    "forecasts",
    "split_by_time",
    "temperature_rows",
    "wave_rows",
]

CLOCK = 2  # numbers that tell the hour of the day
DAY = 24


class Rows(NamedTuple):
    """Moments and what came of them.

    Attributes:
      x: [n, h, w, c] float32, what a network is given, `told` of the moment included.
      y: [n, s, h, w, o] float32, one step later, two, …
      told: [n, s, h, w, c - o], what is told at those times; None where c = o.
    """

    x: Float32[np.ndarray, "n h w c"]
    y: Float32[np.ndarray, "n s h w o"]
    told: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class ForecastBatches:
    """Shuffled rows with the globe beside them: `batches(position)` is a `ForecastBatch`.

    Attributes:
      rows: at least as many as a batch has.
      globe: of their grid.
      batch: rows of a batch.
      seed: of the orders.
    """

    rows: Rows
    globe: Globe
    batch: int = 1
    seed: int = 0

    def __call__(self, position: int) -> ForecastBatch:
        x, y, told = ArrayBatches(self.rows, self.batch, self.seed)(position)
        return ForecastBatch(x, y, self.globe, told)


def wave_rows(
    waves: Waves,
    config: OneForecastConfig,
    *,
    hours: float = 24.0,
    steps: int = 1,
    scaling: Scaling | None = None,
) -> tuple[Rows, Scaling]:
    """Waves on the grid of a configuration, three fields.

    Args:
      waves: n of them.
      config: of the network; its grid and what that covers.
      hours: of a step, positive.
      steps: that are known after the moment, at least 1.
      scaling: of the fields; that of these very moments when None.
    Raises:
      ConfigError: hours or steps out of range, or as `grid_axes`.
    """
    at_least(1, steps=steps)
    if not hours > 0:
        raise ConfigError(f"hours={hours} must be positive")
    axes = grid_axes(config.grid, config.latitudes, config.longitudes)
    first, *later = (wave_fields(waves, *axes, hours * i) for i in range(steps + 1))
    scaling = scaling_of(first) if scaling is None else scaling
    return Rows(scaling(first), scaling(np.stack(later, axis=1))), scaling


def split_by_time(
    count: int, shares: tuple[float, ...], gap: int = DAY
) -> list[Int[np.ndarray, "_"]]:
    """Which moments of a row in time each part has, with moments left out between two parts.

    Args:
      count: moments.
      shares: of the parts, one after the other; positive, 1 in all.
      gap: moments between two parts.
    Raises:
      ConfigError: shares that are not, or a part that would be empty.

    >>> [part.tolist() for part in split_by_time(10, (0.5, 0.5), gap=2)]
    [[0, 1, 2, 3], [6, 7, 8, 9]]
    """
    at_least(0, gap=gap)
    if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise ConfigError(f"shares={shares} must be positive and 1 in all")
    room = count - gap * (len(shares) - 1)
    ends = np.round(np.cumsum(shares) * room).astype(int)
    starts = np.concatenate([[0], ends[:-1]])
    if room < 1 or (ends <= starts).any():
        raise ConfigError(f"count={count} with shares={shares} and gap={gap} leaves a part empty")
    pairs = zip(starts, ends, strict=True)
    return [np.arange(a, b) + gap * i for i, (a, b) in enumerate(pairs)]


def temperature_rows(
    found: AirTemperature,
    part: Int[np.ndarray, "p"],
    *,
    hours: int = 6,
    steps: int = 1,
    scaling: Scaling | None = None,
) -> tuple[Rows, Scaling, Int[np.ndarray, "n"]]:
    """Temperature of some hours, with what came of them inside of the same part.

    Args:
      found: hour after hour.
      part: which hours, one after the other (`split_by_time`).
      hours: of a step, at least 1.
      steps: known after the moment, at least 1.
      scaling: of the temperature; that of the part's hours when None.
    Returns:
      the rows, their scaling, and the hour of the series that each row begins with.
    Raises:
      ConfigError: sizes below 1, or a part too short for a row.
    """
    at_least(1, hours=hours, steps=steps)
    ahead = hours * steps
    if len(part) <= ahead:
        raise ConfigError(f"part of {len(part)} hours has no moment with {ahead} after it")
    kelvin = found.kelvin[..., None]
    scaling = scaling_of(kelvin[part]) if scaling is None else scaling
    scaled, first = scaling(kelvin), part[: len(part) - ahead]
    later = first[:, None] + hours * np.arange(1, steps + 1)
    told = clock(found.hours, kelvin.shape[1:3])
    x = np.concatenate([scaled[first], told[first]], axis=-1)
    return Rows(x, scaled[later], told[later]), scaling, first


def clock(hours: Int[np.ndarray, "t"], grid: tuple[int, ...]) -> Float32[np.ndarray, "t h w 2"]:
    """Sine and cosine of the hour of the day, the same at every place."""
    angle = 2 * np.pi * (np.asarray(hours) % DAY) / DAY
    told = np.stack([np.sin(angle), np.cos(angle)], -1).astype(np.float32)
    return np.ascontiguousarray(np.broadcast_to(told[:, None, None], (len(told), *grid, CLOCK)))


@jax.jit
def forecasts(model: OneForecast, batch: ForecastBatch) -> Float[Array, "n s h w o"]:
    """Roll-outs of every row, as many steps as are known, one row after the other.

    Args:
      model: of the grid.
      batch: all rows at once; of y only the number of steps counts.
    """
    steps = batch.y.shape[1]

    def one(given: tuple[Array, Array | None]) -> Array:
        return rollout(model, given[0], batch.globe, steps, given[1])

    return jax.lax.map(one, (jnp.asarray(batch.x), batch.told))
