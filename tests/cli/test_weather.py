"""`ffnlab train` on weather: what is learned and scored, of waves and of a file, and refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.cli.inputs.weather import load_weather
from ffnlab.cli.train import run
from ffnlab.cli.training import TrainConfig, read_training
from ffnlab.errors import ConfigError
from ffnlab.formats import load
from ffnlab.graphs import globe_of
from ffnlab.parallel import from_table

SIZES = {"width": 4, "blocks": 3, "heads": 2, "level": 0}
MODEL = {"kind": "oneforecast", "grid": [4, 6], "inputs": 3, "outputs": 3} | SIZES
DATA = {"kind": "weather", "waves": 6, "held_out": 2, "steps": 2, "batch": 2}
RUN = {"steps": 4, "log_every": 4, "checkpoint_every": 2, "dtype": "float32"}


def settings(**change):
    table = {"model": MODEL, "data": DATA, "optimizer": {"name": "adamw", "rate": 1e-2}, "run": RUN}
    return from_table(table | change, TrainConfig)


def test_waves_are_learned_and_others_scored(tmp_path):
    record = run(settings(), tmp_path / "run")
    model = load(tmp_path / "run" / "model")
    data = load_weather(settings().data, settings().model)
    assert (record["data"]["train"], record["data"]["held_out"]) == (6, 2)
    wanted, globe = data.held_out.y[:, 0], globe_of(settings().model)
    found = np.stack([model(jnp.asarray(x), globe) for x in data.held_out.x])
    assert record["held_out_error"] == pytest.approx(
        float(np.mean((found - wanted) ** 2)), rel=1e-4
    )
    still = float(np.mean((data.held_out.x - wanted) ** 2))
    assert record["held_out_persistence"] == pytest.approx(still, rel=1e-5)
    assert abs(data.train.x.mean()) < 0.2 and data.train.y.shape == (6, 2, 4, 6, 3)


@pytest.fixture
def hours(tmp_path):
    """A file of 100 hours on 3 x 4 places."""
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "t.npz",
        t2m_k=(280 + random.standard_normal((100, 3, 4))).astype(np.float32),
        hour_since_epoch=np.arange(100) + 5,
        lat=np.array([50, 51, 52], np.float32),
        lon=np.array([0, 1, 2, 3], np.float32),
    )
    return str(tmp_path / "t.npz")


def test_hours_of_a_file_are_split_by_time(hours):
    data = DATA | {"weather": hours, "hours": 6.0}
    model = MODEL | {"grid": [3, 4], "outputs": 1}
    made = settings(data=data, model=model)
    found = load_weather(made.data, made.model)
    # 76 hours but for a day between the parts: 61 and 15, less 12 ahead
    assert (len(found.train.x), len(found.held_out.x)) == (61 - 12, 15 - 12)
    np.testing.assert_array_equal(found.train.x[6, ..., 0], found.train.y[0, 0, ..., 0])
    np.testing.assert_array_equal(found.train.x[12, ..., 0], found.train.y[0, 1, ..., 0])
    np.testing.assert_array_equal(found.train.x[6, ..., 1:], found.train.told[0, 0])
    angle = 2 * np.pi * 5 / 24
    np.testing.assert_allclose(
        found.train.x[0, 1, 2, 1:], [np.sin(angle), np.cos(angle)], rtol=1e-5
    )
    rule_batch = found.batches(made)(0)
    assert rule_batch.told.shape == (2, 2, 3, 4, 2)


def test_the_preset_is_read():
    preset = read_training("forecast_waves")
    assert preset.kind == "oneforecast" and preset.data.weather == "waves"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": DATA | {"waves": 0}}, "waves=0"),
        ({"data": DATA | {"hours": 0.0}}, "hours=0.0 must be positive"),
        ({"data": DATA | {"weather": "era5_uk", "hours": 1.5}}, "every whole hour"),
        ({"data": {"kind": "images"}}, "kind 'oneforecast' reads weather"),
        ({"rule": "noprop"}, "does not train a model of kind 'oneforecast'"),
        ({"model": {"kind": "mlp", "sizes": [2, 2]}}, "reads images or records"),
        ({"run": RUN | {"scan": True}}, "scan=True: a field is one batch"),
    ],
)
def test_a_file_that_does_not_fit_together(change, message):
    with pytest.raises(ConfigError, match=message):
        settings(**change)


def test_data_that_do_not_fit_the_model(hours):
    def refused(message, data, model):
        made = settings(data=DATA | data, model=MODEL | model)
        with pytest.raises(ConfigError, match=message):
            load_weather(made.data, made.model)

    refused("inputs=2, outputs=3: waves has 3 and 3", {}, {"inputs": 2})
    refused("batch=9: there are 6 moments", {"batch": 9}, {})
    named = {"weather": hours, "hours": 6.0}
    refused("inputs=3, outputs=3: .* has 3 and 1", named, {})
    refused(r"grid=\[4, 6\]: .* has \[3, 4\]", named, {"outputs": 1})
    refused("has no moment with 72 after it", named | {"steps": 12}, {"outputs": 1, "grid": [3, 4]})


def test_work_is_counted():
    from ffnlab.cli.training import fresh
    from ffnlab.cli.work import work_of

    one, two = (settings(data=DATA | {"steps": s}) for s in (1, 2))
    model = jax.eval_shape(lambda key: fresh(one, key), jax.random.key(0))
    single, double = (work_of(each, model) for each in (one, two))
    assert double.flops == pytest.approx(2 * single.flops, rel=1e-3) and single.flops > 0
    assert single.items(0) == DATA["batch"]
