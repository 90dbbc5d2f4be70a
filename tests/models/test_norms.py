"""Norms of a whole population: exact, and the same however the data are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ffnlab import transform, tree
from ffnlab.errors import ConfigError, SelectionError
from ffnlab.layers import MLP, BatchNorm, Conv, FixedAffine, Linear, global_avg_pool
from ffnlab.models import population_norms
from ffnlab.testing import check_transform
from tests.contracts import input_of

ATOL = 2e-5  # float32, over three norms one after the other


class Deep(nnx.Module):
    """Three norms one after the other, one of which runs twice."""

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.conv = Conv(2, 4, key=a, size=(3,))
        self.maps = nnx.List([Linear(4, 4, key=k, axes=("embed", "mlp")) for k in (b, c)])
        self.norms = nnx.List([BatchNorm(4, axis="mlp") for _ in range(3)])

    def __call__(self, x):
        x = jax.nn.relu(self.norms[0](self.conv(x)))
        x = self.norms[1](self.maps[0](x)) + self.norms[1](self.maps[1](x))
        return self.norms[2](global_avg_pool(jnp.tanh(x)))


def batches(*sizes):
    """The same rows in batches of such sizes."""
    x = np.asarray(input_of((12, 5, 2)) * 3 + 1)
    return [jnp.asarray(part) for part in np.split(x, np.cumsum(sizes)[:-1])]


@pytest.fixture(scope="module")
def whole():
    model = Deep(jax.random.key(0))
    return model, *transform.apply(population_norms(), model, batches(12), progress=False)


def test_every_norm_has_the_moments_of_what_it_is_given(whole):
    model, fixed, stats = whole
    (x,) = batches(12)
    _, calls = tree.capture(fixed, tree.of_type(FixedAffine), x, calls="all")
    assert [len(calls[f"norms[{i}]"]) for i in range(3)] == [1, 2, 1]
    for path, found in calls.items():
        seen = np.concatenate([np.asarray(c.input[0], np.float64).reshape(-1, 4) for c in found])
        given = np.concatenate([np.asarray(c.output).reshape(-1, 4) for c in found])
        norm = (seen - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-5)
        np.testing.assert_allclose(given, norm, atol=ATOL)
        np.testing.assert_allclose(stats.mean[path], seen.mean(0), atol=ATOL)
    assert 2 <= stats.passes <= 3
    assert tree.copy(fixed).norms[0] is not model.norms[0]
    assert fixed.norms[0].a.axes == ("mlp",)


@pytest.mark.parametrize("sizes", [(1, 11), (5, 4, 3), (1,) * 12])
def test_unequal_batches_give_the_same(sizes, whole):
    model, fixed, stats = whole
    other, found = transform.apply(population_norms(), model, batches(*sizes), progress=False)
    for path in stats.mean:
        np.testing.assert_allclose(found.mean[path], stats.mean[path], atol=ATOL)
        np.testing.assert_allclose(found.variance[path], stats.variance[path], atol=ATOL)
    (x,) = batches(12)
    np.testing.assert_allclose(other(x), fixed(x), atol=10 * ATOL)


def test_one_pass_is_exact_for_the_first_norm_alone(whole):
    model, _, stats = whole
    once = transform.calibrate(population_norms(passes=1), model, batches(12), progress=False)
    assert once.passes == 1
    np.testing.assert_allclose(once.mean["norms[0]"], stats.mean["norms[0]"], atol=ATOL)
    assert not np.allclose(once.mean["norms[2]"], stats.mean["norms[2]"], atol=1e-3)


def test_running_statistics_and_parameters_have_their_part(whole):
    model, _, stats = whole
    moved = tree.copy(model)
    moved.norms[1].scale.set_value(jnp.full(4, 2.0))
    moved.norms[1].bias.set_value(jnp.full(4, 0.5))
    fixed = population_norms().rewrite(moved, stats)
    a = 2 / np.sqrt(np.asarray(stats.variance["norms[1]"]) + 1e-5)
    np.testing.assert_allclose(fixed.norms[1].a[...], a, rtol=1e-5)
    np.testing.assert_allclose(fixed.norms[1].c[...], 0.5 - stats.mean["norms[1]"] * a, atol=ATOL)


def test_it_holds_the_contract_of_a_transform():
    check_transform(population_norms, model=Deep(jax.random.key(1)), batches=batches(5, 7))


def test_refusals(key):
    with pytest.raises(ConfigError, match="passes=0"):
        population_norms(passes=0)
    with pytest.raises(SelectionError, match="matches nothing"):
        population_norms().init(MLP((2, 2), key=key))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), Deep(key))
    with pytest.raises(ConfigError, match=r"norms\[0\] lies in a scanned stack"):
        population_norms().init(stacked)
