"""`[data]` of runs that learn to forecast series, its loss and its batch."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.losses import InformedLoss

__all__ = ["SeriesConfig", "series_batch", "series_loss"]

MARKS = 4  # of `ffnlab.data.time_marks`


@dataclasses.dataclass(frozen=True)
class SeriesConfig:
    """Series over time; the model's length is read, its horizon forecast.

    Attributes:
      series: "lagged" (drawn), "etth1" (of FFNLAB_DATA), or a CSV file of times and numbers.
      parts: shares of the places to learn from, to watch, and to test on, in this order; none is
        the published months of "etth1", and .7, .1 and .2 of others.
      marks: whether the hour, the day and the month of what is read are told.
      draw: seed of what is drawn.
      batch: windows of a batch.
    """

    series: str = "lagged"
    parts: tuple[float, ...] = ()
    marks: bool = False
    draw: int = 0
    batch: int = 32

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch)
        check_seed(self.draw)
        if self.parts and (len(self.parts) != 3 or min(self.parts) <= 0 or sum(self.parts) > 1.001):
            raise ConfigError(f"parts={list(self.parts)}: three shares that add up to 1 at most")


def series_loss(data: SeriesConfig) -> InformedLoss:
    """That of forecasts."""
    from ffnlab.sequences import forecast_squares

    return forecast_squares


def series_batch(data: SeriesConfig, model: Any, rows: int, length: int) -> PyTree:
    """A batch of windows of one series, abstract: a model takes any number."""
    shape = lambda *sizes: jax.ShapeDtypeStruct((rows, *sizes), np.float32)  # noqa: E731
    marks = {"marks": shape(model.length, MARKS)} if data.marks else {}
    return {"x": shape(model.length, 1)} | marks, shape(model.horizon, 1)
