"""Batch normalization against torch (recorded), and its statistics as data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from ffnlab import compat, tree
from ffnlab.errors import ConfigError, SelectionError
from ffnlab.layers import BatchNorm, FixedAffine, Linear, Moments, measured
from ffnlab.layers.stacking import run_stack, stack_modules
from tests.contracts import input_of, linear
from tests.fixtures.layers import record

ATOL = 1e-5  # float32 against float64, of values of about one


class Net(nnx.Module):
    """Map, norm, map, the same norm: two of them one after the other."""

    def __init__(self, key, **options):
        self.first, self.second = linear(key, 6, 5), linear(key, 5, 5)
        self.norms = nnx.List([BatchNorm(5, **options), BatchNorm(5, **options)])

    def __call__(self, x):
        x = jax.nn.relu(self.norms[0](self.first(x)))
        return self.norms[1](self.second(x))


def test_norms_of_a_scanned_stack_are_refused():
    """Their moments would stay inside the scan."""
    norms = [BatchNorm(3) for _ in range(2)]

    class Deep(nnx.Module):
        def __init__(self):
            self.norms = stack_modules(norms)

        def __call__(self, x):
            return run_stack(self.norms, x, lambda norm, x, _: (norm(x), None))[0]

    x = jnp.ones((4, 3))
    assert Deep()(x).shape == (4, 3)
    with pytest.raises(ConfigError, match=r"scanned stack cannot be measured: \['norms'\]"):
        measured(Deep(), x)


class Shared(nnx.Module):
    """One norm that runs twice."""

    def __init__(self):
        self.norm = BatchNorm(3)

    def __call__(self, x):
        return self.norm(x) + self.norm(2 * x + 1)


def close(found, wanted):
    """Holds two trees of arrays against each other."""
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=ATOL), found, wanted)


def moved(norm, moments):
    """The norm after a whole batch."""
    new = norm.statistics(moments)
    return norm.with_statistics(new["mean"], new["variance"].settle(1))


def float32(*shape, seed=0):
    return jnp.asarray(record.normal(*shape, seed=seed), jnp.float32)


@pytest.fixture(scope="module")
def expected(fixtures):
    return np.load(fixtures / "layers" / "expected.npz")


def test_three_steps_and_a_call_are_torch_s(expected):
    norm = BatchNorm(5, eps=record.EPS, momentum=record.MOMENTUM, unbiased=True)
    norm.scale.set_value(float32(5, seed=1))
    norm.bias.set_value(float32(5, seed=2))
    weigh = float32(4, 3, 2, 5, seed=9)
    for step in range(3):
        x, name = float32(4, 3, 2, 5, seed=step) + step, f"batch_norm/{step}"
        y, moments = norm.in_training(x)
        np.testing.assert_allclose(y, expected[name], atol=ATOL)
        weighed = lambda x: (norm.in_training(x)[0] * weigh).sum()  # noqa: B023, E731
        np.testing.assert_allclose(jax.grad(weighed)(x), expected[f"{name}/gradient"], atol=ATOL)
        norm = moved(norm, moments)
        np.testing.assert_allclose(norm.mean[...], expected[f"{name}/mean"], atol=ATOL)
        np.testing.assert_allclose(norm.variance[...], expected[f"{name}/variance"], atol=ATOL)
    np.testing.assert_allclose(norm(float32(4, 3, 2, 5)), expected["batch_norm/eval"], atol=ATOL)


def test_the_running_variance_is_biased_unless_asked_for():
    x = jnp.array([[1.0], [5.0]])  # mean 3, variance 4, of two less one 8
    for unbiased, found in ((False, 4.0), (True, 8.0)):
        norm = BatchNorm(1, momentum=1.0, unbiased=unbiased)
        new = moved(norm, norm.in_training(x)[1])
        np.testing.assert_allclose((new.mean[0], new.variance[0]), (3.0, found), rtol=1e-6)
        assert norm.mean[0] == 0.0 and norm.variance[0] == 1.0


def test_a_batch_of_one_row_is_its_bias_and_stays_finite():
    norm = BatchNorm(3, unbiased=True)
    norm.bias.set_value(jnp.array([1.0, 2.0, 3.0]))
    y, moments = norm.in_training(input_of((1, 3)))
    np.testing.assert_array_equal(y, [[1, 2, 3]])
    np.testing.assert_allclose(moved(norm, moments).variance[...], 0.9, rtol=1e-6)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.floats(-50, 50))
def test_parts_merge_to_the_whole(sizes, mean):
    x = record.normal(sum(sizes), 3) + mean
    cuts = np.cumsum(sizes)[:-1]
    parts = [Moments.of(jnp.asarray(part, jnp.float32)) for part in np.split(x, cuts)]
    whole = jax.tree.map(lambda *p: jnp.stack(p), *parts).merged()
    assert whole.count == len(x)
    # A mean of 50 has 4e-6 of rounding; the variance, of centred values, that of its own size.
    np.testing.assert_allclose(whole.mean, x.mean(0), atol=2e-5)
    np.testing.assert_allclose(whole.variance, x.var(0), atol=1e-4)


def test_no_gradient_reaches_what_is_written():
    norm = BatchNorm(3)
    x = input_of((4, 3))
    gradient = jax.grad(lambda x: sum(v.sum() for v in norm.in_training(x)[1]))(x)
    np.testing.assert_array_equal(gradient, 0)


def test_a_model_is_measured_by_path(key):
    net, x = Net(key), input_of((7, 6))
    before = jax.tree.map(np.array, net)
    y, found = jax.jit(measured)(net, x)
    first, at_first = net.norms[0].in_training(net.first(x))
    second, at_second = net.norms[1].in_training(net.second(jax.nn.relu(first)))
    np.testing.assert_allclose(y, second, atol=ATOL)
    names = ("norms[0].mean", "norms[0].variance", "norms[1].mean", "norms[1].variance")
    assert tuple(found) == names
    wanted = {
        f"norms[{i}].{name}": value
        for i, moments in enumerate((at_first, at_second))
        for name, value in net.norms[i].statistics(moments).items()
    }
    close(found, wanted)
    np.testing.assert_allclose(found[names[2]], 0.1 * at_second.mean, atol=ATOL)
    np.testing.assert_allclose(found[names[3]].settle(1), 0.9 + 0.1 * at_second.variance, atol=ATOL)
    jax.tree.map(np.testing.assert_array_equal, before, net)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_parts_of_a_batch_average_to_the_whole_batch(unbiased, mean):
    """What a rule does with microbatches: means over parts, settled once."""
    norm = BatchNorm(3, unbiased=unbiased, momentum=0.3)
    norm = norm.with_statistics(jnp.full(3, 0.9 * mean), jnp.full(3, 2.0))
    x = jnp.asarray(record.normal(12, 3) + mean + np.arange(12)[:, None], jnp.float32)
    whole = norm.statistics(norm.in_training(x)[1])
    parts = [norm.statistics(norm.in_training(part)[1]) for part in jnp.split(x, 4)]
    averaged = jax.tree.map(lambda *p: sum(p) / 4, *parts)
    np.testing.assert_allclose(averaged["mean"], whole["mean"], rtol=1e-6)
    expected = 0.7 * 2 + 0.3 * np.asarray(x, np.float64).var(0, ddof=int(unbiased))
    for found, n in ((whole, 1), (averaged, 4)):
        np.testing.assert_allclose(found["variance"].settle(n), expected, rtol=1e-5)


def test_a_stacked_norm_has_stacked_statistics():
    norm = BatchNorm(3, unbiased=True)
    x = input_of((2, 5, 3)) + jnp.arange(2.0)[:, None, None]
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), norm)
    moments = jax.vmap(Moments.of)(x)
    found = stacked.statistics(moments)
    for i in range(2):
        alone = jax.tree.map(lambda leaf: leaf[i], stacked)  # noqa: B023
        same = alone.statistics(Moments.of(x[i]))
        np.testing.assert_allclose(found["mean"][i], same["mean"], atol=ATOL)
        settled = found["variance"].settle(2)[i]
        np.testing.assert_allclose(settled, same["variance"].settle(2), atol=ATOL)


def test_a_norm_that_runs_twice_measures_both_inputs_as_one():
    net, x = Shared(), input_of((4, 3))
    _, found = measured(net, x)
    both = net.norm.statistics(Moments.of(jnp.concatenate([x, 2 * x + 1])))
    close(found, {f"norm.{name}": value for name, value in both.items()})


def test_statistics_are_not_trained(key):
    trained, fixed = tree.trained(Net(key))
    assert len(jax.tree.leaves(trained)) == 8 and len(jax.tree.leaves(fixed)) == 4
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fixed))


def test_on_two_devices_the_moments_are_those_of_the_global_batch(key):
    net = Net(key)
    # Two halves with other means: each half's own moments would be far away.
    x = input_of((8, 6)) + jnp.repeat(jnp.array([0.0, 5.0]), 4)[:, None]
    mesh = compat.make_mesh((2,), ("data",))
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    assert len(placed.addressable_shards) == 2
    y, found = jax.jit(measured)(net, placed)
    same, alone = jax.jit(measured)(net, x)
    np.testing.assert_allclose(y, same, atol=ATOL)
    close(found, alone)
    assert found["norms[0].variance"].count == 8


def test_a_fixed_map_is_the_norm(key):
    norm = BatchNorm(4)
    norm = norm.with_statistics(input_of((4,)), jnp.abs(input_of((4,))) + 0.1)
    norm.scale.set_value(input_of((4,)) + 2)
    norm.bias.set_value(input_of((4,)) - 1)
    x = input_of((5, 4))
    np.testing.assert_allclose(FixedAffine(*norm.affine())(x), norm(x), atol=ATOL)
    plain = BatchNorm(4, scale=False, bias=False)
    plain = plain.with_statistics(norm.mean[...], norm.variance[...])
    np.testing.assert_allclose(FixedAffine(*plain.affine())(x), plain(x), atol=ATOL)


def test_refusals(key):
    for momentum in (-0.1, 1.1):
        with pytest.raises(ConfigError, match=r"must lie in 0\.\.1"):
            BatchNorm(3, momentum=momentum)
    with pytest.raises(SelectionError, match="matches nothing"):
        measured(nnx.List([Linear(3, 3, key=key, axes=("a", "b"))]))


def test_a_norm_that_does_not_run_is_said(key):
    class Unused(Net):
        def __call__(self, x):
            return self.norms[0](self.first(x))

    with pytest.raises(SelectionError, match=r"did not run: \['norms\[1\]'\]"):
        measured(Unused(key), input_of((4, 6)))
