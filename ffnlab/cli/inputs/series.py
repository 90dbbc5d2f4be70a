"""The series of a training run: windows to learn from, others to watch and to test on."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ffnlab.cli.inputs.series_kinds import SeriesConfig
from ffnlab.cli.training import TrainConfig
from ffnlab.data import (
    Series,
    etth1,
    lagged_series,
    parts_of,
    read_series,
    scaling_of,
    time_marks,
    window_starts,
)
from ffnlab.data.series import ETT_PARTS
from ffnlab.formats.kinds import Config
from ffnlab.models import SMambaConfig
from ffnlab.sequences import SeriesBatches, repeated_last

__all__ = ["SeriesData", "load_series"]

SHARES = (0.7, 0.1, 0.2)
AT_ONCE = 256  # windows that are scored together


@dataclasses.dataclass(frozen=True, eq=False)
class SeriesData:
    """What a run reads.

    Attributes:
      train, held_out, test: windows of the three parts, in the scale of the first.
      identity: what they are.
    """

    train: SeriesBatches
    held_out: SeriesBatches
    test: SeriesBatches
    identity: dict[str, str | int]

    watched = "held_out_error"

    def batches(self, settings: TrainConfig) -> Callable[[int], object]:
        """Batches by position, every epoch in an order of its own."""
        return self.train

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> mean squared errors, of the model and of what repeats the last place."""
        still = {f"{name}_persistence": persistence(part) for name, part in self.scored.items()}

        def scores(predict: Callable) -> dict[str, float]:
            found = {f"{name}_error": error(predict, part) for name, part in self.scored.items()}
            return found | still

        return scores

    @property
    def scored(self) -> dict[str, SeriesBatches]:
        """The parts that are not learned from."""
        return {"held_out": self.held_out, "test": self.test}

    def save_beside(self, folder: Path) -> None:
        """Nothing belongs beside the model."""

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its data and figures."""
        return {"data": dict(self.identity), **scores}


def load_series(data: SeriesConfig, model: Config, seed: int) -> SeriesData:
    """Draws or reads the series of a run.

    Args:
      data: what to read.
      model: its length and horizon.
      seed: of the order of windows.
    Raises:
      ConfigError: a part is too short for a window, or has fewer than a batch.
      FFNLabError: a file cannot be read.
    """
    assert isinstance(model, SMambaConfig)
    series = found(data)
    parts = data.parts or (ETT_PARTS if data.series == "etth1" else SHARES)
    places = parts_of(len(series.values), parts)
    values = scaling_of(series.values[places[0]])(series.values)
    marks = time_marks(series.times) if data.marks else None
    options = {"length": model.length, "horizon": model.horizon}
    starts = [window_starts(part, **options) for part in places]
    train = SeriesBatches(values, marks, starts[0], rows=data.batch, seed=seed, **options)
    held_out, test = (
        SeriesBatches(values, marks, each, rows=1, seed=seed, **options) for each in starts[1:]
    )
    content = hashlib.sha256(series.values.tobytes()).hexdigest()
    names = ("train", "held_out", "test")
    counts = {n: len(each) for n, each in zip(names, starts, strict=True)}
    identity: dict[str, str | int] = {"series": data.series, "sha256": content}
    return SeriesData(train, held_out, test, identity | counts)


def found(data: SeriesConfig) -> Series:
    """The series by their name."""
    if data.series == "lagged":
        return lagged_series(data.draw)
    return etth1() if data.series == "etth1" else read_series(data.series)


def error(predict: Callable, part: SeriesBatches) -> float:
    """Mean squared error over all windows of a part."""
    total = 0.0
    for begin in range(0, len(part.starts), AT_ONCE):
        starts = part.starts[begin : begin + AT_ONCE]
        more = min(AT_ONCE, len(part.starts)) - len(starts)  # one size, which compiles once
        inputs, y = part.at(np.pad(starts, (0, more), mode="edge"))
        forecast = predict({name: jnp.asarray(value) for name, value in inputs.items()})
        apart = (np.asarray(forecast, np.float64) - y)[: len(starts)]
        total += float(np.sum(np.mean(apart**2, axis=(1, 2))))
    return total / len(part.starts)


def persistence(part: SeriesBatches) -> float:
    """Mean squared error of the last place, again and again."""
    inputs, y = part.at(part.starts)
    return float(np.mean((repeated_last(inputs["x"], part.horizon).astype(np.float64) - y) ** 2))
