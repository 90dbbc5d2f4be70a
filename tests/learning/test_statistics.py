"""Statistics that a loss returns: written once, of the whole batch, and only with a step taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ffnlab import tree
from ffnlab.errors import SelectionError
from ffnlab.layers import BatchNorm, Linear, measured
from ffnlab.layers.stacking import Statistic, stack_modules
from ffnlab.learning import backprop, computed_in
from ffnlab.learning.statistics import written
from ffnlab.parallel import make_step, parse_mesh, place_batch, shard, skip_bad_steps
from ffnlab.weights import register

# Means of some float32 terms in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Normed(nnx.Module):
    """A map of inputs with running moments of them."""

    def __init__(self, key):
        self.map = Linear(4, 4, key=key, axes=("embed", "mlp"))
        self.mean = Statistic(jnp.zeros(4), axes=("embed",))
        self.variance = Statistic(jnp.ones(4), axes=("embed",))

    def __call__(self, x):
        return self.map((x - self.mean[...]) / jnp.sqrt(self.variance[...]))


@register
@dataclasses.dataclass(frozen=True)
class Variance:
    """The variance of the rows of all parts."""

    mean: jax.Array
    square: jax.Array

    def settle(self, parts):
        return self.square - self.mean**2


def measuring(model, batch):
    """A loss whose rows count for their first entry, with moments of what counts."""
    x, counts = batch
    mean_of = lambda rows: counts @ rows / counts.sum()  # noqa: E731
    mean = mean_of(x)
    metrics = {"count": counts.sum()}
    new = {"mean": mean, "variance": Variance(mean, mean_of(x**2))}
    return mean_of(model(x)[:, :1] ** 2)[0], metrics, new


def rows():
    x = np.random.default_rng(0).normal(2.0, 3.0, (8, 4)).astype(np.float32)
    return x, np.array([1, 2, 0, 4, 1, 1, 0, 3], np.float32)


def moments(x, counts):
    mean = np.average(x, 0, counts)
    return mean, np.average((x - mean) ** 2, 0, counts)


@pytest.mark.parametrize(
    ("parts", "mesh"), [(1, None), (2, None), (4, None), (1, "dp=2"), (2, "dp=2,fsdp=2")]
)
def test_moments_of_the_whole_batch_are_written_once(key, parts, mesh):
    rule = backprop(measuring, optax.sgd(0.1), microbatches=parts)
    state, step, batch = rule.init(Normed(key), key), rule.step, rows()
    if mesh is not None:
        mesh = parse_mesh(mesh)
        step, state, batch = make_step(rule, mesh), shard(state, mesh), place_batch(batch, mesh)
    state, _ = step(state, batch)
    mean, variance = moments(*rows())
    within = moments(rows()[0][::2], rows()[1][::2])[1]
    assert np.abs(within - variance).max() > 0.1, "else a mean of variances would do"
    np.testing.assert_allclose(state.model.mean[...], mean, **CLOSE)
    np.testing.assert_allclose(state.model.variance[...], variance, rtol=1e-5, atol=1e-4)
    assert state.model.mean.get_metadata()["axes"] == ("embed",)


class BatchNormed(nnx.Module):
    """A map with a batch norm after it."""

    def __init__(self, key):
        self.map = Linear(4, 4, key=key, axes=("embed", "mlp"))
        self.norm = BatchNorm(4, axis="mlp", unbiased=True)

    def __call__(self, x):
        return self.norm(self.map(x))


@pytest.mark.parametrize(("parts", "mesh"), [(1, None), (4, None), (2, "dp=2")])
def test_a_batch_norm_moves_once_towards_the_whole_batch(key, parts, mesh):
    def loss(model, x):
        y, statistics = measured(model, x)
        return jnp.mean(jnp.tanh(y)), {}, statistics

    rule, model = backprop(loss, optax.sgd(0.0), microbatches=parts), BatchNormed(key)
    state, step, x = rule.init(model, key), rule.step, rows()[0]
    if mesh is not None:
        mesh = parse_mesh(mesh)
        step, state, x = make_step(rule, mesh), shard(state, mesh), place_batch(x, mesh)
    mean, variance, h = np.zeros(4), np.ones(4), np.asarray(model.map(jnp.asarray(rows()[0])))
    for _ in range(2):
        state, _ = step(state, x)
        mean, variance = 0.9 * mean + 0.1 * h.mean(0), 0.9 * variance + 0.1 * h.var(0, ddof=1)
    np.testing.assert_allclose(state.model.norm.mean[...], mean, **CLOSE)
    np.testing.assert_allclose(state.model.norm.variance[...], variance, **CLOSE)


def test_parts_that_count_nothing_leave_no_mark_and_nothing_at_all_weighs_equally(key):
    rule = backprop(
        lambda model, x: (x.mean(), {"count": x.sum()}, {"mean": jnp.full(4, x.sum())}),
        optax.sgd(0.1),
        microbatches=2,
    )
    for x, wanted in (([0.0, 3.0], 3.0), ([2.0, -2.0], 0.0), ([0.0, 0.0], 0.0), ([1.0, 3.0], 2.5)):
        state, _ = rule.step(rule.init(Normed(key), key), jnp.array(x))
        np.testing.assert_allclose(state.model.mean[...], np.full(4, wanted), rtol=1e-6)


def test_a_step_left_out_writes_nothing(key):
    def loss(model, x):
        return jnp.mean(model(x) ** 2), {}, {"mean": jnp.full(4, 7.0)}

    rule = skip_bad_steps(backprop(loss, optax.sgd(0.1)))
    state, metrics = rule.step(rule.init(Normed(key), key), jnp.full((2, 4), jnp.nan))
    assert metrics["skipped"] == 1
    np.testing.assert_array_equal(state.model.mean[...], np.zeros(4))
    state, _ = rule.step(state, jnp.ones((2, 4)))
    np.testing.assert_array_equal(state.model.mean[...], np.full(4, 7.0))


@pytest.mark.parametrize("loss", ["plain", "bfloat16"])
def test_five_steps_of_adamw_leave_a_running_variance_of_one_at_one(key, loss):
    squared = lambda model, x: (jnp.mean(model(x) ** 2), {})  # noqa: E731
    loss = squared if loss == "plain" else computed_in(loss, squared)
    rule = backprop(loss, optax.adamw(0.1, weight_decay=0.5))
    state = rule.init(Normed(key), key)
    for _ in range(5):
        state, _ = rule.step(state, jnp.ones((2, 4)))
    np.testing.assert_array_equal(state.model.variance[...], np.ones(4))
    np.testing.assert_array_equal(state.model.mean[...], np.zeros(4))
    sizes = {leaf.size for leaf in jax.tree.leaves(state.optimizer)}
    assert sizes == {16, 1}, "moments of the map alone"


def test_stacked_statistics_are_written_by_their_path(key):
    model = {"layers": stack_modules([Normed(k) for k in jax.random.split(key, 3)])}
    after = written(model, {"['layers'].mean": jnp.ones((3, 4))})
    np.testing.assert_array_equal(after["layers"].mean[...], np.ones((3, 4)))
    np.testing.assert_array_equal(model["layers"].mean[...], np.zeros((3, 4)))
    assert jax.tree.structure(after) == jax.tree.structure(model)
    assert written(model, {}) is model


def test_statistics_that_do_not_fit_are_named(key):
    model = Normed(key)
    assert "mean.value" in {path for path, _ in tree.walk(model)}
    for path in ("men", "mean.value", "map.w"):
        with pytest.raises(SelectionError, match=rf"'{path}' is not in the model; it has"):
            written(model, {path: jnp.zeros(4)})
    for value, found in ((jnp.zeros(3), r"float32\[3\]"), (jnp.zeros(4, "int32"), r"int32\[4\]")):
        with pytest.raises(ValueError, match=rf"'mean' is {found}; the model holds float32\[4\]"):
            written(model, {"mean": value})
    rule = backprop(lambda model, x: (x.mean(), {}, {"other": x}), optax.sgd(0.1))
    with pytest.raises(SelectionError, match="'other'"):
        rule.step(rule.init(model, key), jnp.ones(4))
