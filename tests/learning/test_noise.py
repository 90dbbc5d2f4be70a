"""Gradient noise: its statistics, optax's in float32, keys, shards, dtypes, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ffnlab.compat import make_mesh
from ffnlab.errors import ConfigError
from ffnlab.learning import OptimizerConfig, backprop, gradient_noise, make_optimizer, noise_scale
from ffnlab.storage import trees

ETA, GAMMA = 0.3, 0.55


def run(transform, gradient, steps):
    """What each step adds to a gradient."""
    state, update, found = transform.init(gradient), jax.jit(transform.update), []
    for _ in range(steps):
        updates, state = update(gradient, state)
        found.append(updates)
    return found, state


def test_mean_and_variance(key):
    zero = {"a": jnp.zeros(1_000_000), "b": jnp.zeros(1_000_000)}
    found, _ = run(gradient_noise(ETA, GAMMA, key=key), zero, 3)
    for t, noise in enumerate(found):
        variance = ETA / (1 + t) ** GAMMA
        assert float(noise_scale(ETA, GAMMA, t)) ** 2 == pytest.approx(variance, rel=1e-6)
        for leaf in noise.values():
            assert float(jnp.var(leaf)) == pytest.approx(variance, rel=0.01)
            assert abs(float(leaf.mean())) < 4 * np.sqrt(variance / leaf.size)
    pairs = [(found[0]["a"], found[0]["b"]), (found[0]["a"], found[1]["a"])]
    for a, b in pairs:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.01


def test_optax_adds_the_same(key):
    gradient = {"a": jnp.ones((3, 4)), "b": jnp.linspace(0, 1, 7)}
    ours, _ = run(gradient_noise(ETA, GAMMA, key=key), gradient, 20)
    theirs, _ = run(optax.add_noise(ETA, GAMMA, key), gradient, 20)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_no_noise_changes_no_bit(key):
    gradient = {"a": jnp.linspace(-1, 1, 9)}
    found, _ = run(gradient_noise(0.0, key=key), gradient, 3)
    for step in found:
        np.testing.assert_array_equal(step["a"], gradient["a"])


def test_bfloat16_noise_is_drawn_finely(key):
    gradient = {"a": jnp.zeros(4096, jnp.bfloat16)}
    (found,), _ = run(gradient_noise(ETA, key=key), gradient, 1)
    (wide,), _ = run(gradient_noise(ETA, key=key), {"a": jnp.zeros(4096)}, 1)
    assert found["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["a"], wide["a"].astype(jnp.bfloat16))


def test_shards_get_the_noise_of_the_whole(key):
    mesh = make_mesh((4,), ("data",))
    shards = NamedSharding(mesh, PartitionSpec("data"))
    gradient = {"a": jnp.zeros((8, 3))}
    (whole,), _ = run(gradient_noise(ETA, key=key), gradient, 1)
    (cut,), _ = run(gradient_noise(ETA, key=key), jax.device_put(gradient, shards), 1)
    np.testing.assert_allclose(whole["a"], cut["a"], atol=1e-6)
    rows = np.asarray(cut["a"]).reshape(4, -1)
    assert len(np.unique(rows, axis=0)) == 4, "no shard repeats another's noise"


def test_a_checkpoint_keeps_the_decay(key, tmp_path):
    gradient, noise = {"a": jnp.zeros(5)}, gradient_noise(ETA, key=key)
    whole, _ = run(noise, gradient, 4)
    _, state = run(noise, gradient, 2)
    trees.save(tmp_path / "state", state)
    restored = trees.restore(tmp_path / "state", noise.init(gradient))
    assert int(restored.step) == 2
    updates, _ = jax.jit(noise.update)(gradient, restored)
    np.testing.assert_array_equal(updates["a"], whole[2]["a"])


def test_noise_comes_after_clipping_and_before_the_optimizer(key):
    settings = {"rate": 1.0, "schedule": "constant", "warmup": 0, "weight_decay": 0.0, "b1": 0.0}
    config = OptimizerConfig("sgd", clip=1e-3, noise=ETA, **settings)
    optimizer, gradient = make_optimizer(config, 10, key=key), {"a": jnp.full(64, 1e6)}
    updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    (noise,), _ = run(gradient_noise(ETA, key=key), {"a": jnp.zeros(64)}, 1)
    np.testing.assert_allclose(updates["a"], -noise["a"], atol=2e-3)
    with pytest.raises(ConfigError, match="key=None"):
        make_optimizer(config, 10)


def test_refusals(key):
    for bad in ({"eta": -1.0}, {"eta": float("nan")}, {"eta": 1.0, "gamma": -0.1}):
        with pytest.raises(ConfigError, match="must not be negative"):
            gradient_noise(**bad, key=key)
    with pytest.raises(ConfigError, match="key=None"):
        gradient_noise(1.0, key=None)
    with pytest.raises(ValueError, match="dtype int32"):
        run(gradient_noise(1.0, key=key), {"a": jnp.zeros(2, jnp.int32)}, 1)


def test_a_rule_with_noise_runs_twice(key):
    """A step donates its state: the caller's key must not be in it."""
    rule = backprop(
        lambda model, x: (jnp.sum(model["w"] * x), {}),
        optax.chain(gradient_noise(ETA, key=key), optax.sgd(0.1)),
    )
    ends = []
    for _ in range(2):
        state = rule.init({"w": jnp.ones(3)}, key)
        for _ in range(2):
            state, _ = rule.step(state, jnp.ones(3))
        ends.append(state.model["w"])
    np.testing.assert_array_equal(*ends)
    assert jax.random.key_data(key).shape == (2,)
