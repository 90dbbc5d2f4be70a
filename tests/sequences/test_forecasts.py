"""Batches of windows, and the loss of forecasts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.losses import Moment
from ffnlab.sequences import SeriesBatches, forecast_squares, repeated_last

VALUES = np.arange(24, dtype=np.float32).reshape(12, 2)
MARKS = -np.arange(12, dtype=np.float32)[:, None]


def made(rows=2, marks=MARKS, starts=range(7), seed=0):
    options = {"length": 4, "horizon": 2, "rows": rows, "seed": seed}
    return SeriesBatches(VALUES, marks, np.array(list(starts)), **options)


def test_windows_are_what_they_say():
    inputs, y = made().at(np.array([3]))
    np.testing.assert_array_equal(inputs["x"][0], VALUES[3:7])
    np.testing.assert_array_equal(inputs["marks"][0], MARKS[3:7])
    np.testing.assert_array_equal(y[0], VALUES[7:9])
    assert set(made(marks=None).at(np.array([0]))[0]) == {"x"}


def test_an_epoch_has_every_window_once_but_for_what_is_left():
    batches = made()
    first = [batches(i)[0]["x"][:, 0, 0].tolist() for i in range(6)]
    epochs = [sum(first[:3], []), sum(first[3:], [])]
    assert all(len(set(epoch)) == 6 for epoch in epochs) and epochs[0] != epochs[1]
    np.testing.assert_array_equal(made()(4)[1], batches(4)[1])
    assert (made(seed=1)(0)[1] != batches(0)[1]).any()


def test_too_few_windows():
    with pytest.raises(ConfigError, match="batch=8: there are 7 windows"):
        made(rows=8)
    with pytest.raises(ConfigError, match="rows=0"):
        made(rows=0)


def test_the_loss_is_the_mean_square_with_the_moments_key():
    moment = Moment(jnp.int32(0), jax.random.key(3))
    seen = {}

    def model(x, marks=None, key=None):
        seen.update(marks=marks, key=key)
        return x[:, :2] + 1

    inputs, y = made().at(np.array([0, 5]))
    loss, metrics = forecast_squares(model, (inputs, y), moment)
    wanted = np.mean((inputs["x"][:, :2] + 1 - y) ** 2)
    assert float(loss) == pytest.approx(float(wanted)) and seen["marks"].shape == (2, 4, 1)
    assert float(metrics["rms"]) == pytest.approx(float(wanted) ** 0.5)
    assert (jax.random.key_data(seen["key"]) == jax.random.key_data(moment.key)).all()


def test_the_last_place_again():
    np.testing.assert_array_equal(repeated_last(VALUES[None], 3)[0], np.tile(VALUES[-1], (3, 1)))
