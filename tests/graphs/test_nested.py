"""A region told of its surroundings: cuts and resizing by hand, roll-out, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.graphs import Nest, globe_of, nested_inputs, nested_rollout, rollout
from ffnlab.models import OneForecastConfig

NEST = Nest((2, 4), (1, 4), 1, (2, 0))


def bilinear(field, height, width):
    """A field resized, corners not aligned, in plain NumPy."""
    for axis, size in ((0, height), (1, width)):
        old = field.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        high, share = np.minimum(low + 1, old - 1), place - low
        share = share.reshape([-1 if i == axis else 1 for i in range(field.ndim)])
        field = np.take(field, low, axis) * (1 - share) + np.take(field, high, axis) * share
    return field


def test_inputs_are_the_region_and_two_cuts():
    random = np.random.default_rng(0)
    region = random.standard_normal((8, 12, 2)).astype(np.float32)
    world = random.standard_normal((6, 6, 3)).astype(np.float32)
    found = np.asarray(nested_inputs(NEST, jnp.asarray(region), jnp.asarray(world)))
    assert found.shape == (8, 12, 6)
    np.testing.assert_array_equal(found[..., :2], region)
    told = world[..., [2, 0]]
    np.testing.assert_allclose(found[..., 2:4], bilinear(told[2:4, 1:4], 8, 12), atol=1e-5)
    np.testing.assert_allclose(found[..., 4:], bilinear(told[1:5, 0:5], 8, 12), atol=1e-5)


def test_without_a_margin_both_cuts_are_one():
    world = jnp.arange(36.0).reshape(6, 6, 1)
    found = nested_inputs(Nest((2, 4), (1, 4), 0, (0,)), jnp.zeros((4, 6, 1)), world)
    np.testing.assert_array_equal(found[..., 1], found[..., 2])


def test_both_forecasts_are_fed_back_to_their_own_network():
    nest = Nest((1, 2), (1, 3), 1, (1,))
    big = OneForecastConfig((3, 4), 2, 2, 0, width=8, blocks=3, heads=2)
    near = OneForecastConfig((2, 3), 3, 1, 0, width=8, blocks=3, heads=2)
    world, small = ((c.make(key=jax.random.key(i)), globe_of(c)) for i, c in enumerate((big, near)))
    x = jax.random.normal(jax.random.key(2), (3, 4, 2))
    region = jax.random.normal(jax.random.key(3), (2, 3, 1))
    found = jax.jit(nested_rollout, static_argnums=(0, 5))(nest, small, world, region, x, 2)
    forecasts = jax.jit(rollout, static_argnums=3)(world[0], x, world[1], 2)
    run = jax.jit(lambda model, x, globe: model(x, globe))
    first = run(small[0], nested_inputs(nest, region, forecasts[0]), small[1])
    second = run(small[0], nested_inputs(nest, first, forecasts[1]), small[1])
    np.testing.assert_allclose(found, jnp.stack([first, second]), atol=1e-5)
    total = lambda x: jnp.sum(nested_rollout(nest, small, world, region, x, 1))  # noqa: E731
    of_world = jax.jit(jax.grad(total))(x)
    assert (of_world == 0).all()  # the global network is frozen


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (((2, 2), (0, 1), 0, (0,)), "rows=.* ascending"),
        (((0, 1), (-1, 1), 0, (0,)), "columns=.* from 0 on"),
        (((0, 1), (0, 1), -1, (0,)), "margin=-1"),
        (((0, 1), (0, 1), 0, ()), "channels=.* one or more"),
    ],
)
def test_bad_nests(given, message):
    with pytest.raises(ConfigError, match=message):
        Nest(*given)


@pytest.mark.parametrize(
    ("nest", "message"),
    [
        (Nest((0, 2), (1, 4), 1, (0,)), "rows=.* margin=1 reach beyond the grid's 0..6"),
        (Nest((1, 2), (1, 6), 1, (0,)), "columns=.* reach beyond"),
        (Nest((1, 2), (1, 4), 1, (3,)), "the forecast has 3 fields"),
    ],
)
def test_regions_beyond_the_grid(nest, message):
    with pytest.raises(ConfigError, match=message):
        nested_inputs(nest, jnp.zeros((4, 4, 1)), jnp.zeros((6, 6, 3)))
