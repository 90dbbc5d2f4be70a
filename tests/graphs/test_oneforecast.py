"""Learning to forecast: loss and balance beside the authors', roll-out by hand, noise, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ffnlab.errors import ConfigError
from ffnlab.graphs import (
    ForecastBatch,
    balanced,
    forecast_loss,
    globe_of,
    oneforecast,
    relative_distance,
    rollout,
)
from ffnlab.learning import backprop
from ffnlab.losses import Moment
from ffnlab.models import OneForecastConfig
from tests.fixtures.oneforecast import record

CONFIG = OneForecastConfig((3, 4), 2, 2, 0, width=8, blocks=3, heads=2)
run = jax.jit(lambda model, x, globe: model(x, globe))
roll = jax.jit(rollout, static_argnums=3)
MOMENT = Moment(jnp.int32(0), jax.random.key(0))


@pytest.fixture(scope="module")
def made():
    """A network, its globe, and two moments."""
    x = jax.random.normal(jax.random.key(1), (2, 3, 4, 2))
    return CONFIG.make(key=jax.random.key(0)), globe_of(CONFIG), x


def last(fields):
    """The authors' fields, [b, c, h, w], as ours."""
    return jnp.moveaxis(jnp.asarray(fields), 1, -1)


def test_loss_and_balanced_gradient_are_the_authors(fixtures):
    with np.load(fixtures / "oneforecast" / "official.npz") as saved:
        official = dict(saved)
    found = last(record.drawn("found", (2, 3, 4, 5)))
    scale = np.array([1, 5, 0.2], np.float32)[:, None, None]
    true = last(record.drawn("true", (2, 3, 4, 5)) * scale)

    def loss(found):
        each = jax.vmap(relative_distance)(balanced(found), true)
        return each.mean(), each.mean(0)

    (mean, by_field), gradient = jax.value_and_grad(loss, has_aux=True)(found)
    np.testing.assert_allclose(mean, official["loss"], rtol=1e-5)
    np.testing.assert_allclose(by_field, official["by_field"], rtol=1e-5)
    np.testing.assert_allclose(gradient, last(official["gradient"]), atol=1e-5)


@settings(max_examples=20)
@given(arrays(np.float32, (2, 3, 3), elements=st.floats(0.125, 8, width=32)))
def test_gradients_of_all_fields_get_one_length(g):
    x = jnp.ones(g.shape)
    found, pull = jax.vjp(balanced, x)
    np.testing.assert_array_equal(found, x)
    size = np.sqrt((g**2).sum((0, 1)))
    back = np.asarray(pull(jnp.asarray(g))[0])
    wanted = 3 / (1 / size).sum()
    np.testing.assert_allclose(np.sqrt((back**2).sum((0, 1))), wanted, rtol=1e-4)
    np.testing.assert_allclose(back, g * wanted / size, rtol=1e-4)


def test_fields_of_zero_and_fields_that_are_met_give_no_nan():
    zero, one = jnp.zeros((2, 2, 1)), jnp.ones((2, 2, 1))
    assert relative_distance(one, zero).tolist() == [2.0]
    value, gradient = jax.value_and_grad(lambda x: relative_distance(x, one)[0])(one)
    assert value == 0 and (gradient == 0).all()
    assert np.isfinite(jax.vjp(balanced, one)[1](zero)[0]).all()


def test_roll_out_feeds_what_it_found(made):
    model, globe, x = made
    found = roll(model, x[0], globe, 3)
    by_hand, now = [], x[0]
    for _ in range(3):
        now = run(model, now, globe)
        by_hand.append(now)
    np.testing.assert_allclose(found, jnp.stack(by_hand), atol=1e-5)


def test_what_is_told_stands_beside_what_was_found():
    config = OneForecastConfig((3, 4), 2, 1, 0, width=8, blocks=3, heads=2)
    model, globe = config.make(key=jax.random.key(0)), globe_of(config)
    x, told = jax.random.normal(jax.random.key(1), (2, 3, 4, 2)), jnp.ones((2, 3, 4, 1))
    found = roll(model, x[0], globe, 2, 7 * told)
    again = run(model, jnp.concatenate([found[0], 7 * told[0]], -1), globe)
    np.testing.assert_allclose(found[1], again, atol=1e-5)
    alone = jax.eval_shape(lambda x: rollout(model, x, globe, 1), x[0])
    assert alone.shape == (1, 3, 4, 1)
    for steps, beside, message in ((2, None, "told has 0"), (0, None, "steps=0")):
        with pytest.raises(ConfigError, match=message):
            rollout(model, x[0], globe, steps, beside)


def test_the_loss_adds_up_steps_of_their_own_forecasts(made):
    model, globe, x = made
    y = jax.random.normal(jax.random.key(2), (2, 2, 3, 4, 2))
    value, metrics = jax.jit(forecast_loss())(model, ForecastBatch(x, y, globe), MOMENT)
    each = np.zeros((2, 2))
    for i in range(2):
        found = np.asarray(roll(model, x[i], globe, 2))
        apart = np.sqrt(((found - y[i]) ** 2).sum((1, 2)))
        each[i] = (apart / np.sqrt((np.asarray(y[i]) ** 2).sum((1, 2)))).mean(1)
    np.testing.assert_allclose(value, each.mean(0).sum(), rtol=1e-4)
    np.testing.assert_allclose(metrics["first"], each[:, 0].mean(), rtol=1e-4)


def test_noise_is_of_the_step_and_of_the_size_asked_for(made, monkeypatch):
    model, globe, x = made
    batch = ForecastBatch(x, x[:, None], globe)
    plain, noisy = jax.jit(forecast_loss()), jax.jit(forecast_loss(noise=0.3))
    other = Moment(jnp.int32(1), jax.random.key(1))
    values = [float(loss(model, batch, at)[0]) for loss, at in
              ((plain, MOMENT), (plain, other), (noisy, MOMENT), (noisy, other))]  # fmt: skip
    assert values[0] == values[1] and len(set(values)) == 3
    with pytest.raises(ConfigError, match="noise=-1"):
        forecast_loss(noise=-1.0)
    as_it_is = lambda model, x, *_, **options: x[None]  # noqa: E731
    monkeypatch.setattr(oneforecast, "rollout", as_it_is)
    wide = jnp.zeros((8, 30, 40, 2))
    still = ForecastBatch(wide, wide[:, None], globe)
    assert float(forecast_loss(noise=0.3)(model, still, MOMENT)[1]["rms"]) == pytest.approx(
        0.3, rel=0.03
    )


@pytest.mark.slow
def test_it_is_learned(made):
    model, globe, x = made
    batch = ForecastBatch(x, -x[:, None], globe)
    rule = backprop(forecast_loss(noise=0.01), optax.adam(1e-2), informed=True)
    state = rule.init(model, jax.random.key(0))
    losses = []
    for _ in range(40):
        state, metrics = rule.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0] and np.isfinite(losses).all()
