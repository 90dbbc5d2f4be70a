"""Physical systems: what they compute, by NumPy; noise; rows of zeros; other specimens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.errors import ConfigError
from ffnlab.layers import TanhChain, Transmission, TwoBit
from ffnlab.layers.physical import BlackBox, bits

SYSTEMS = {
    "transmission": lambda key, **more: Transmission(6, 5, key=key, **more),
    "tanh_chain": lambda key, **more: TanhChain(6, key=key, **more),
    "two_bit": lambda key, **more: TwoBit(6, 5, key=key, **more),
}


@pytest.fixture
def x(key):
    return jax.random.normal(key, (4, 6))


def power(x):
    """Rows over the root of their mean square."""
    x = np.asarray(x, float)
    return x / np.sqrt((x**2).mean(1, keepdims=True))


def test_a_medium_is_the_modulus_of_a_complex_product(key, x):
    medium = Transmission(6, 5, key=key)
    t = np.asarray(medium.t[...], float)
    expected = np.abs(power(x) @ (t[:, 0] + 1j * t[:, 1]))
    np.testing.assert_allclose(medium(x), expected, rtol=1e-5, atol=1e-6)
    assert medium.outputs == 5


def test_a_medium_gives_powers_of_order_one():
    """The mean square over media is 1: each of 64 x 400 is exponential, of variance 1."""
    medium = Transmission(64, 400, key=jax.random.key(3))
    y = medium(jax.random.normal(jax.random.key(4), (64, 64)))
    assert float(jnp.mean(y**2)) == pytest.approx(1, abs=0.05)
    t = np.asarray(medium.t[...])
    assert abs(np.mean(t[:, 0] * t[:, 1])) * 128 < 0.05, "parts are drawn apart"


def test_a_chain_passes_on_what_its_neighbours_have(key, x):
    chain = TanhChain(6, key=key, rounds=3)
    (a, b, c), u = np.asarray(chain.gains[...], float), power(np.abs(x))
    s = np.zeros((4, 6))
    for _ in range(3):
        new = np.empty_like(s)
        for i in range(6):
            before, after = (s[:, i - 1] if i else 0), (s[:, i + 1] if i < 5 else 0)
            new[:, i] = np.tanh(a[i] * u[:, i] + b[i] * before + c[i] * after)
        s = new
    np.testing.assert_allclose(chain(x), s, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(chain(x), chain(-x))
    assert chain.outputs == 6


@settings(max_examples=30)
@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=7))
def test_bits_are_those_of_the_quarter_a_value_lies_in(row):
    low, high = min(row), max(row)
    found = np.asarray(bits(jnp.array([row], jnp.float32))).reshape(-1, 2)
    for value, (upper, lower) in zip(row, found, strict=True):
        place = np.float32(np.float32(value) - np.float32(low)) / np.float32(
            np.float32(high) - np.float32(low) if high > low else 1
        )
        quarter = sum(place >= edge for edge in (0.25, 0.5, 0.75))
        assert (upper, lower) == (quarter // 2, quarter % 2)


def test_two_bits_drive_a_medium_and_have_no_slope(key, x):
    system = TwoBit(6, 5, key=key)
    np.testing.assert_array_equal(system(x), system.medium(bits(x)))
    assert not np.any(jax.grad(lambda x: system(x).sum())(x))
    np.testing.assert_array_equal(bits(jnp.full((1, 3), 2.0)), np.zeros((1, 6)))


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system(name, key, x):
    system = SYSTEMS[name](key)
    # A row does not depend on the others, nor on how bright it is.
    np.testing.assert_allclose(system(x[1:2]), system(x)[1:2], rtol=1e-5)
    np.testing.assert_allclose(system(7 * x), system(x), rtol=1e-4, atol=1e-5)
    dark = system(jnp.zeros((1, 6)))
    np.testing.assert_array_equal(dark, np.zeros_like(dark))
    slope = jax.grad(lambda x: system(x).sum())(jnp.zeros((1, 6)))
    assert np.all(np.isfinite(slope))
    other = system.redrawn(jax.random.key(9))
    assert jax.tree.structure(other) == jax.tree.structure(system)
    assert np.abs(other(x) - system(x)).max() > 0.1
    np.testing.assert_array_equal(system(x, key), system(x), "no noise is asked for")


@pytest.mark.parametrize("name", SYSTEMS)
def test_noise_is_drawn_by_the_key_alone(name, key):
    x = jax.random.normal(key, (500, 6))
    quiet, loud = SYSTEMS[name](key), SYSTEMS[name](key, noise=0.3)
    np.testing.assert_array_equal(loud(x), quiet(x))
    noise = np.asarray(loud(x, key) - quiet(x))
    assert noise.std() == pytest.approx(0.3, rel=0.1) and abs(noise.mean()) < 0.03
    np.testing.assert_array_equal(loud(x, key), loud(x, key))
    assert np.any(loud(x, key) != loud(x, jax.random.key(1)))
    noises = [loud.redrawn(k)(x, key) - loud.redrawn(k)(x) for k in jax.random.split(key)]
    np.testing.assert_allclose(*noises, atol=1e-5, err_msg="another specimen is as noisy")


def test_a_box_of_ones_own(key, x):
    def scaled(params, h, key):
        shift = 0.0 if key is None else jax.random.normal(key)
        return params["by"] * h @ params["w"] + shift

    box = BlackBox(scaled, 2, {"by": 3.0, "w": np.ones((6, 2), np.float32)})
    np.testing.assert_allclose(box(x), 3 * np.asarray(x).sum(1, keepdims=True) * [1, 1], rtol=1e-5)
    np.testing.assert_allclose(box(x, key) - box(x), jax.random.normal(key), rtol=1e-3)
    assert BlackBox(lambda params, h, key: h, 6)(x) is x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda key: Transmission(0, 5, key=key), "d_in=0 must be at least 1"),
        (lambda key: Transmission(5, 0, key=key), "d_out=0"),
        (lambda key: TanhChain(0, key=key), "d=0"),
        (lambda key: TanhChain(3, key=key, rounds=0), "rounds=0"),
        (lambda key: TwoBit(3, 4, key=key, noise=-0.1), "noise=-0.1 must not be negative"),
        (lambda key: Transmission(3, 4, key=key, noise=float("nan")), "noise=nan"),
        (lambda key: Transmission(3, 4, key=key, noise=float("inf")), "noise=inf"),
        (lambda key: BlackBox(max, 0), "outputs=0"),
    ],
)
def test_refusals(make, message, key):
    with pytest.raises(ConfigError, match=message):
        make(key)
