"""The weather of a training run: moments to learn from, others to score on."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ffnlab.cli.inputs.field_kinds import WeatherConfig
from ffnlab.cli.training import TrainConfig
from ffnlab.data import air_temperature, drawn_waves
from ffnlab.errors import ConfigError
from ffnlab.formats.kinds import Config
from ffnlab.graphs import (
    ForecastBatches,
    Rows,
    globe_of,
    split_by_time,
    temperature_rows,
    wave_rows,
)
from ffnlab.graphs.weather import CLOCK
from ffnlab.models import Globe, OneForecastConfig

__all__ = ["WeatherData", "load_weather"]

SHARES = (0.8, 0.2)  # of the hours, to learn from and to score on
WAVE_FIELDS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class WeatherData:
    """What a run reads.

    Attributes:
      train, held_out: rows.
      globe: that the model runs on.
      identity: what they are.
    """

    train: Rows
    held_out: Rows
    globe: Globe
    identity: dict[str, str | int]

    watched = "held_out_error"

    def batches(self, settings: TrainConfig) -> Callable[[int], object]:
        """Batches by position, every epoch in an order of its own."""
        return ForecastBatches(self.train, self.globe, settings.data.batch, settings.run.seed)

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> mean squared errors of one step, of the model and of what stays as it is."""
        now = self.held_out.x[..., : self.held_out.y.shape[-1]]
        wanted = self.held_out.y[:, 0]
        still = float(np.mean((now - wanted).astype(np.float64) ** 2))

        def scores(predict: Callable) -> dict[str, float]:
            moments = (jnp.asarray(x) for x in self.held_out.x)
            found = np.stack([predict({"x": x, "globe": self.globe}) for x in moments])
            error = float(np.mean((found.astype(np.float64) - wanted) ** 2))
            return {self.watched: error, "held_out_persistence": still}

        return scores

    def save_beside(self, folder: Path) -> None:
        """Nothing belongs beside the model."""

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its data and figures."""
        return {"data": dict(self.identity), **scores}


def load_weather(data: WeatherConfig, model: Config) -> WeatherData:
    """Draws or reads the weather of a run.

    Raises:
      ConfigError: the model has other fields or another grid, or there are fewer moments than a
        batch has.
      FFNLabError: a file cannot be read.
    """
    assert isinstance(model, OneForecastConfig)
    train, held_out = waves(data, model) if data.weather == "waves" else hours(data, model)
    if len(train.x) < data.batch:
        raise ConfigError(f"batch={data.batch}: there are {len(train.x)} moments to learn from")
    content = hashlib.sha256()
    for leaf in jax.tree.leaves((train, held_out)):
        content.update(np.ascontiguousarray(leaf).tobytes())
    identity: dict[str, str | int] = {"weather": data.weather, "sha256": content.hexdigest()}
    counts = {"train": len(train.x), "held_out": len(held_out.x)}
    return WeatherData(train, held_out, globe_of(model), identity | counts)


def waves(data: WeatherConfig, model: OneForecastConfig) -> tuple[Rows, Rows]:
    """Waves to learn from and others, drawn together."""
    check_fields(model, WAVE_FIELDS, WAVE_FIELDS, "waves")
    drawn = drawn_waves(data.waves + data.held_out, data.draw)
    parts = (
        type(drawn)(*(each[rows] for each in drawn))
        for rows in (slice(data.waves), slice(data.waves, None))
    )
    options = {"hours": data.hours, "steps": data.steps}
    train, scaling = wave_rows(next(parts), model, **options)
    return train, wave_rows(next(parts), model, scaling=scaling, **options)[0]


def hours(data: WeatherConfig, model: OneForecastConfig) -> tuple[Rows, Rows]:
    """Hours of temperature, the last ones to score on."""
    check_fields(model, 1 + CLOCK, 1, data.weather)
    found = air_temperature(None if data.weather == "era5_uk" else data.weather)
    if model.grid != found.kelvin.shape[1:]:
        raise ConfigError(
            f"grid={list(model.grid)}: {data.weather} has {list(found.kelvin.shape[1:])}"
        )
    first, second = split_by_time(len(found.hours), SHARES)
    options = {"hours": int(data.hours), "steps": data.steps}
    train, scaling, _ = temperature_rows(found, first, **options)
    return train, temperature_rows(found, second, scaling=scaling, **options)[0]


def check_fields(model: OneForecastConfig, inputs: int, outputs: int, what: str) -> None:
    """Raises ConfigError unless the model has the fields of the data."""
    if (model.inputs, model.outputs) != (inputs, outputs):
        raise ConfigError(
            f"inputs={model.inputs}, outputs={model.outputs}: {what} has {inputs} and {outputs}"
        )
