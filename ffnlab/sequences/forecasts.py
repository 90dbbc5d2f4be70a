"""Learning to forecast series: batches of windows, the loss, and what says nothing new."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from ffnlab.data.series import windows
from ffnlab.errors import ConfigError, at_least
from ffnlab.losses import Moment

__all__ = ["SeriesBatches", "forecast_squares", "repeated_last"]

Host = Array | np.ndarray
Forecasts = tuple[Mapping[str, Host], Float[Host, "r s n"]]


class SeriesBatches:
    """Windows of a series by position, every epoch in an order of its own.

    Windows are cut as they are asked for: n windows of one series take the memory of the series.

    Attributes:
      values: [t, n], scaled.
      marks: [t, m], or None.
      starts: of all windows.
      length, horizon: of a window and of its forecast.
      rows: of a batch.
      seed: of the orders.
    """

    def __init__(
        self,
        values: Float32[np.ndarray, "t n"],
        marks: Float32[np.ndarray, "t m"] | None,
        starts: Int[np.ndarray, "w"],
        *,
        length: int,
        horizon: int,
        rows: int,
        seed: int = 0,
    ):
        """Batches of these.

        Raises:
          ConfigError: fewer windows than rows.
        """
        at_least(1, rows=rows)
        if len(starts) < rows:
            raise ConfigError(f"batch={rows}: there are {len(starts)} windows to learn from")
        self.values, self.marks, self.starts = values, marks, starts
        self.length, self.horizon, self.rows, self.seed = length, horizon, rows, seed

    def __call__(self, position: int) -> Forecasts:
        """Batch number `position`; what is left of an epoch below a batch is passed over."""
        epoch, place = divmod(position, len(self.starts) // self.rows)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.starts))
        return self.at(self.starts[order[place * self.rows : (place + 1) * self.rows]])

    def at(self, starts: Int[np.ndarray, "r"]) -> Forecasts:
        """({"x", and "marks" where there are some}, y) of windows that begin at some places."""
        found = windows(self.values, self.marks, starts, self.length, self.horizon)
        marks = {} if found.marks is None else {"marks": found.marks}
        return {"x": found.x} | marks, found.y


def forecast_squares(
    model: Callable, batch: Forecasts, moment: Moment
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean squared error of forecasts, activations dropped as the moment draws.

    Args:
      model: (x, marks, key=) -> [r, s, n].
      batch: (inputs by name, y).
      moment: of the step.
    Returns:
      (mean over all numbers [], {"rms": its root []}).
    """
    inputs, y = batch
    apart = model(**inputs, key=moment.key).astype(jnp.float32) - y
    mean = jnp.mean(apart**2)
    return mean, {"rms": jnp.sqrt(mean)}


def repeated_last(x: Float[np.ndarray, "r t n"], horizon: int) -> Float[np.ndarray, "r s n"]:
    """The last place of each window, again and again."""
    return np.repeat(x[:, -1:], horizon, axis=1)
