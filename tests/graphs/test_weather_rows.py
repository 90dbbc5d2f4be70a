"""Rows of weather: parts in time that do not touch, scaling, batches, roll-outs of all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.data import AirTemperature, drawn_waves, wave_fields
from ffnlab.errors import ConfigError
from ffnlab.graphs import (
    ForecastBatch,
    ForecastBatches,
    Rows,
    forecasts,
    globe_of,
    rollout,
    split_by_time,
    temperature_rows,
    wave_rows,
)
from ffnlab.models import OneForecastConfig

CONFIG = OneForecastConfig((4, 6), 3, 3, 0, width=4, blocks=3, heads=2)


@given(
    st.integers(60, 700), st.integers(0, 24), st.sampled_from([(1.0,), (0.5, 0.5), (0.6, 0.2, 0.2)])
)
def test_parts_are_apart_and_nothing_else_is_left_out(count, gap, shares):
    parts = split_by_time(count, shares, gap)
    assert len(parts) == len(shares) and parts[0][0] == 0 and parts[-1][-1] == count - 1
    for before, after in zip(parts, parts[1:], strict=False):
        assert after[0] - before[-1] == gap + 1
    assert all((np.diff(part) == 1).all() for part in parts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((10, (0.5, 0.6)), "must be positive and 1 in all"),
        ((10, ()), "must be positive"),
        ((10, (0.5, 0.5), -1), "gap=-1"),
        ((20, (0.5, 0.5)), "leaves a part empty"),
    ],
)
def test_bad_splits(given, message):
    with pytest.raises(ConfigError, match=message):
        split_by_time(*given)


def test_waves_on_the_grid_of_a_configuration():
    waves = drawn_waves(5)
    rows, scaling = wave_rows(waves, CONFIG, hours=6.0, steps=2)
    lat, lon = np.array([-90.0, -45, 0, 45]), np.arange(-120.0, 181, 60)
    for hours, found in ((0, rows.x), (6, rows.y[:, 0]), (12, rows.y[:, 1])):
        wanted = wave_fields(waves, lat, lon, float(hours))
        np.testing.assert_allclose(found, scaling(wanted), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows.x.std((0, 1, 2)), 1, rtol=1e-5)
    again, _ = wave_rows(drawn_waves(2, 1), CONFIG, scaling=scaling)
    assert again.y.shape == (2, 1, 4, 6, 3)
    for options, message in (({"steps": 0}, "steps=0"), ({"hours": 0.0}, "hours=0.0")):
        with pytest.raises(ConfigError, match=message):
            wave_rows(waves, CONFIG, **options)


def test_hours_never_look_beyond_their_part():
    kelvin = np.arange(60, dtype=np.float32)[:, None, None] + np.zeros((1, 2, 3), np.float32) + 280
    found = AirTemperature(kelvin, np.arange(60) + 100, np.arange(2.0), np.arange(3.0))
    rows, scaling, first = temperature_rows(found, np.arange(20, 40), hours=3, steps=2)
    assert first.tolist() == list(range(20, 34)) and rows.told.shape == (14, 2, 2, 3, 2)
    np.testing.assert_allclose(
        scaling.back(rows.x[..., :1]).mean((1, 2, 3)), 280 + first, rtol=1e-6
    )
    later = scaling.back(rows.y).mean((2, 3, 4))
    np.testing.assert_allclose(later, 280 + first[:, None] + [3, 6], rtol=1e-6)
    with pytest.raises(ConfigError, match="20 hours has no moment with 20 after it"):
        temperature_rows(found, np.arange(20), hours=10, steps=2)


def test_every_row_is_rolled_out_and_batches_hold_the_globe():
    model, globe = CONFIG.make(key=jax.random.key(0)), globe_of(CONFIG)
    rows, _ = wave_rows(drawn_waves(3), CONFIG, steps=2)
    batches = ForecastBatches(rows, globe, batch=2, seed=5)
    batch = batches(4)
    assert batch.globe is globe and batch.x.shape == (2, 4, 6, 3) and batch.told is None
    np.testing.assert_array_equal(batches(4).x, batch.x)
    seen = np.concatenate([batches(i).x for i in range(20)])
    assert len(np.unique(seen, axis=0)) == 3
    whole = ForecastBatch(*map(jnp.asarray, rows[:2]), globe)
    found = forecasts(model, whole)
    wanted = rollout(model, jnp.asarray(rows.x[2]), globe, 2)
    np.testing.assert_allclose(found[2], wanted, atol=1e-5)
    assert Rows(*rows).told is None
