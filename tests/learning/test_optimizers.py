"""Optimizers by name: schedules, which leaves each part sees, closed forms, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.learning import Extension, OptimizerConfig, make_optimizer, rate_at
from ffnlab.learning.optimizers.named import OPTIMIZERS, layer_matrices
from ffnlab.models import Decoder, DecoderConfig, stack

CONFIG = DecoderConfig(vocab=16, width=8, hidden=8, layers=2, heads=1, kv_heads=1, head_dim=8)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("trapezoid", {0: 0, 5: 0.5, 10: 1, 49: 1, 80: 0.4, 100: 0}),
        ("cosine", {0: 0, 10: 1, 55: 0.5, 100: 0}),
        ("constant", {0: 0, 10: 1, 100: 1}),
    ],
)
def test_schedules(schedule, wanted):
    rate = rate_at(OptimizerConfig(schedule=schedule, warmup=10, decay=0.5), 1.0, steps=100)
    for step, value in wanted.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)


def test_longer_runs_begin_alike():
    config = OptimizerConfig(warmup=10, decay=0.5)
    short, long = rate_at(config, 1.0, 100), rate_at(config, 1.0, 200)
    assert [float(short(s)) for s in range(50)] == [float(long(s)) for s in range(50)]


def test_an_extension_rises_and_falls_once_more():
    config, more = OptimizerConfig(warmup=10), Extension(steps=20, rate=0.25)
    plain, extended = rate_at(config, 1.0, 100), rate_at(config, 1.0, 100, more)
    assert [float(plain(s)) for s in range(100)] == [float(extended(s)) for s in range(100)]
    wanted = {100: 0, 101: 0.125, 102: 0.25, 111: 0.125, 120: 0}
    for step, value in wanted.items():
        assert float(extended(step)) == pytest.approx(value, abs=1e-6)
    for bad in ({"steps": -1}, {"rate": 0.0}):
        with pytest.raises(ConfigError, match="extension needs"):
            Extension(**bad)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_runs_shorter_than_the_warm_up(steps):
    for schedule in ("trapezoid", "cosine", "constant"):
        rate = rate_at(OptimizerConfig(schedule=schedule, warmup=50), 1.0, steps)
        assert all(0 <= float(rate(s)) <= 1 for s in range(steps + 1))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.own))
@pytest.mark.parametrize("stacked", [False, True])
def test_every_optimizer_moves_every_parameter(key, name, stacked):
    model = Decoder(CONFIG, key=key)
    model = stack(model) if stacked else model
    optimizer = make_optimizer(OptimizerConfig(name=name, warmup=0), 10)
    gradient = jax.tree.map(jnp.ones_like, model)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(model), model)
    for update in jax.tree.leaves(updates):
        assert np.isfinite(update).all() and (np.asarray(update) != 0).any()


def test_muon_takes_the_maps_and_leaves_the_tables(key):
    model = Decoder(CONFIG, key=key)
    numbers = jax.tree.leaves(layer_matrices(model), is_leaf=lambda x: hasattr(x, "output_axis"))
    assert len(numbers) == 2 * 7, "q, k, v, o, gate, up, down of two blocks; no embedding, no norm"


def test_muon_makes_the_update_orthogonal():
    config = OptimizerConfig("muon", rate=1.0, warmup=0, weight_decay=0.0, clip=0.0, b1=0.0)
    optimizer = make_optimizer(config, 100)
    params = {"w": jnp.zeros((8, 8))}
    gradient = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)}
    state = optimizer.init(params)
    update, _ = optimizer.update(gradient, state, params)
    values = np.linalg.svd(np.asarray(update["w"]) / (0.2 * np.sqrt(8)), compute_uv=False)
    # Five Newton-Schulz steps bring singular values to about 0.7 .. 1.2, not to 1.
    assert (values > 0.5).all() and (values < 1.35).all()


def test_weight_decay_spares_vectors():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    for name in ("adamw", "lion", "sgd"):
        config = OptimizerConfig(name, rate=0.1, warmup=0, weight_decay=0.5)
        optimizer = make_optimizer(config, 10)
        update, _ = optimizer.update(zero, optimizer.init(params), params)
        np.testing.assert_allclose(update["w"], -0.05, rtol=1e-6)
        np.testing.assert_array_equal(update["b"], 0.0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "adamm", "unknown optimizer 'adamm'; did you mean 'adamw'"),
        ("schedule", "linear", "is not one of"),
        ("rate", 0.0, "must be positive"),
        ("table_rate", -1.0, "must be positive"),
        ("decay", 0.0, r"must lie in \(0, 1\]"),
        ("clip", -1.0, "must not be negative"),
        ("warmup", -1, "must not be negative"),
    ],
)
def test_bad_options(field, value, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**{field: value})
