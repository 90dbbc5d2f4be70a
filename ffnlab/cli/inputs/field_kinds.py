"""`[data]` of runs that learn to forecast fields, its loss and its batch."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.losses import InformedLoss

__all__ = ["WeatherConfig", "weather_batch", "weather_loss"]


@dataclasses.dataclass(frozen=True)
class WeatherConfig:
    """Fields of a moment, and what they are some hours later.

    Waves are Rossby-Haurwitz waves on the model's grid, three fields. Temperature is split by time,
    with a day between the two parts; the model has inputs = 3 (it and the hour of the day) and
    outputs = 1.

    Attributes:
      weather: "waves", "era5_uk" (air temperature, of FFNLAB_DATA) or an npz file like that.
      hours: of a step; whole ones of temperature.
      steps: that are learned together, each from the model's own step before.
      noise: standard deviation of what is added to inputs, whose fields have 1.
      waves, held_out: how many are learned from, and scored on.
      draw: seed of the waves.
      batch: moments of a batch.
    """

    weather: str = "waves"
    hours: float = 24.0
    steps: int = 1
    noise: float = 0.01
    waves: int = 400
    held_out: int = 64
    draw: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        sizes = ("steps", "waves", "held_out", "batch")
        at_least(1, **{name: getattr(self, name) for name in sizes})
        check_seed(self.draw)
        if not (self.hours > 0 and self.noise >= 0):
            raise ConfigError(
                f"hours={self.hours} must be positive and noise={self.noise} 0 or more"
            )
        if self.weather != "waves" and self.hours != int(self.hours):
            raise ConfigError(f"hours={self.hours}: temperature is known every whole hour")


def weather_loss(data: WeatherConfig) -> InformedLoss:
    """That of forecasts, with the data's noise."""
    from ffnlab.graphs import forecast_loss

    return forecast_loss(noise=data.noise)


def weather_batch(data: WeatherConfig, model: Any, rows: int, length: int) -> PyTree:
    """A batch of moments, abstract but for the globe."""
    from ffnlab.graphs import ForecastBatch, globe_of

    told = model.inputs - model.outputs
    x = jax.ShapeDtypeStruct((rows, *model.grid, model.inputs), np.float32)
    y, beside = (
        jax.ShapeDtypeStruct((rows, data.steps, *model.grid, n), np.float32)
        for n in (model.outputs, told)
    )
    return ForecastBatch(x, y, globe_of(model), beside if told else None)
