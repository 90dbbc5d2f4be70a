"""`ffnlab train` on series: what is learned and scored, of drawn ones and of files, and refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.cli.inputs import series as series_input
from ffnlab.cli.inputs.series import error, load_series
from ffnlab.cli.train import run
from ffnlab.cli.training import TrainConfig, read_training
from ffnlab.data import lagged_series, time_marks
from ffnlab.errors import ConfigError
from ffnlab.formats import load
from ffnlab.parallel import from_table

MODEL = {"kind": "s_mamba", "length": 6, "horizon": 3, "width": 8, "hidden": 5, "states": 2}
RUN = {"steps": 4, "log_every": 4, "checkpoint_every": 2, "dtype": "float32"}


@pytest.fixture
def file(tmp_path):
    """Eighty half hours of two series."""
    values = 5 + 3 * np.random.default_rng(0).standard_normal((80, 2))
    times = np.datetime64("2020-01-01T00:00:00") + np.arange(80) * np.timedelta64(30, "m")
    rows = [f"{t},{a:.6f},{b:.6f}" for t, (a, b) in zip(times, values, strict=True)]
    (tmp_path / "s.csv").write_text("time,a,b\n" + "\n".join(rows) + "\n")
    return str(tmp_path / "s.csv")


def settings(file, data=None, **change):
    data = {"kind": "series", "series": file, "batch": 8} | (data or {})
    table = {"model": MODEL, "data": data, "optimizer": {"name": "adamw", "rate": 1e-2}, "run": RUN}
    return from_table(table | change, TrainConfig)


def test_a_file_is_learned_and_its_later_parts_scored(file, tmp_path):
    made = settings(file, {"marks": True})
    record = run(made, tmp_path / "run")
    model = load(tmp_path / "run" / "model")
    assert record["data"] | {"sha256": ""} == {
        "series": file, "sha256": "", "train": 56 - 8, "held_out": 8 - 2, "test": 16 - 2,
    }  # fmt: skip
    data = load_series(made.data, made.model, 0)
    for name, part in data.scored.items():
        inputs, y = part.at(part.starts)
        found = model(**{key: jnp.asarray(value) for key, value in inputs.items()})
        assert record[f"{name}_error"] == pytest.approx(float(np.mean((found - y) ** 2)), rel=1e-4)
        still = np.mean((inputs["x"][:, -1:] - y) ** 2)
        assert record[f"{name}_persistence"] == pytest.approx(float(still), rel=1e-5)
    first = data.train.at(data.train.starts)[0]
    assert first["marks"].shape == (48, 6, 4)
    learned = data.train.values[:56]
    np.testing.assert_allclose(learned.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(learned.std(0), 1, atol=1e-4)


def test_every_window_once_an_epoch(file):
    data = load_series(settings(file).data, settings(file).model, 3)
    batches = [data.train(position) for position in range(12)]
    firsts = np.concatenate([inputs["x"][:, 0, 0] for inputs, _ in batches])
    assert len(np.unique(firsts[:48])) == 48 and set(firsts[:48]) == set(firsts[48:])
    assert (firsts[:48] != firsts[48:]).any()
    inputs, y = batches[0]
    place = np.flatnonzero(data.train.values[:, 0] == inputs["x"][0, 0, 0])[0]
    np.testing.assert_array_equal(y[0], data.train.values[place + 6 : place + 9])


def test_errors_are_of_every_window(file, monkeypatch):
    """In pieces that do not divide them."""
    data = load_series(settings(file).data, settings(file).model, 0)
    forecast = lambda inputs: 0.1 * inputs["x"][:, :3] + 1  # noqa: E731
    inputs, y = data.test.at(data.test.starts)
    wanted = np.mean((np.asarray(forecast(inputs), np.float64) - y) ** 2)
    for size in (256, 5, 14):
        monkeypatch.setattr(series_input, "AT_ONCE", size)
        assert error(forecast, data.test) == pytest.approx(float(wanted), rel=1e-5)


def test_drawn_series_and_the_preset():
    preset = read_training("forecast_series")
    data = load_series(preset.data, preset.model, 0)
    drawn = lagged_series(0)
    assert data.train.values.shape == drawn.values.shape and data.train.marks is None
    np.testing.assert_array_equal(
        time_marks(drawn.times)[:24, 0], np.float32(np.arange(24) / 23 - 0.5)
    )
    batch = jax.eval_shape(lambda: preset.reading.batch(preset.data, preset.model, 4, 0))
    assert batch[0]["x"].shape == (4, 48, 1) and batch[1].shape == (4, 12, 1)


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        ({"parts": [0.5, 0.5]}, {}, "three shares"),
        ({"parts": [0.9, 0.1, 0.1]}, {}, "three shares"),
        ({"batch": 0}, {}, "batch=0"),
        ({"batch": 49}, {}, "batch=49: there are 48 windows"),
        ({}, {"horizon": 9}, "too few"),
    ],
)
def test_what_is_refused(file, data, model, message):
    with pytest.raises(ConfigError, match=message):
        made = settings(file, data, model=MODEL | model)
        load_series(made.data, made.model, 0)


def test_other_models_read_no_series(file):
    with pytest.raises(ConfigError, match="'mlp' reads images or records"):
        settings(file, model={"kind": "mlp", "sizes": [6, 3]})
    assert dataclasses.replace(settings(file).data, batch=2).batch == 2
