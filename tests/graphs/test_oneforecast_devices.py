"""A forecast on eight devices: weights cut by their names, moments by row, the globe whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab.graphs import ForecastBatch, forecast_loss, forecasts, globe_of
from ffnlab.learning import backprop
from ffnlab.models import OneForecastConfig
from ffnlab.parallel import make_step, parse_mesh, place_batch, shard

CONFIG = OneForecastConfig((2, 3), 2, 2, 0, width=8, blocks=3, heads=2)
TOLERANCE = 1e-5  # the issue's


@pytest.fixture(scope="module")
def made():
    """A network and a batch of four moments with two steps each, on the host."""
    random = np.random.default_rng(0)
    x = random.standard_normal((4, 2, 3, 2)).astype(np.float32)
    y = random.standard_normal((4, 2, 2, 3, 2)).astype(np.float32)
    globe = jax.tree.map(np.asarray, globe_of(CONFIG))
    return CONFIG.make(key=jax.random.key(0)), ForecastBatch(x, y, globe)


@pytest.mark.slow
def test_a_step_is_that_of_one_device(made):
    model, batch = made
    mesh = parse_mesh("dp=4,tp=2")
    rule = backprop(forecast_loss(noise=0.1), optax.sgd(0.1), informed=True)
    state = rule.init(model, jax.random.key(1))
    placed = shard(state, mesh), place_batch(batch, mesh)
    cut = [leaf for leaf in jax.tree.leaves(rule.model(placed[0]))
           if not leaf.sharding.is_fully_replicated]  # fmt: skip
    assert len(cut) > 20
    assert placed[1].x.sharding.shard_shape((4, 2, 3, 2)) == (1, 2, 3, 2)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed[1].globe))
    found, metrics = make_step(rule, mesh)(*placed)
    again = rule.init(CONFIG.make(key=jax.random.key(0)), jax.random.key(1))  # steps donate
    wanted, alone = rule.step(again, batch)
    np.testing.assert_allclose(metrics["loss"], alone["loss"], rtol=TOLERANCE)
    pairs = zip(*(jax.tree.leaves(rule.model(s)) for s in (found, wanted)), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_forecasts_of_moments_on_eight_devices_are_those_of_one(made):
    model, batch = made
    mesh = parse_mesh("dp=8")
    twice = jax.tree.map(lambda rows: np.concatenate([rows, 2 * rows]), (batch.x, batch.y))
    batch = ForecastBatch(*twice, batch.globe)
    run = jax.jit(jax.vmap(lambda model, x, globe: model(x, globe), (None, 0, None)))
    placed = place_batch(batch, mesh)
    found = run(shard(model, mesh), placed.x, placed.globe)
    wanted = forecasts(model, jax.tree.map(jnp.asarray, batch))[:, 0]
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
