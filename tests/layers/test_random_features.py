"""Random features: the official code, closed forms of what they average to, and their draws."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.errors import ConfigError
from ffnlab.layers import FourierFeatures, KernelAdapter, KernelFFN, Linear, ReluFeatures
from ffnlab.layers.random_features import (
    SPECTRA,
    arc_cosine,
    exponential_features,
    projections,
    relu_features,
    scaled_to,
)
from tests.fixtures.snnk import record

GIVEN = {name: jnp.asarray(value) for name, value in record.drawn().items()}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def expected(fixtures):
    with np.load(fixtures / "snnk" / "expected.npz") as file:
        return dict(file)


@pytest.mark.parametrize("floor", [0.0, -5.0])
def test_relu_features_of_the_official_code(expected, floor):
    phi = ReluFeatures(GIVEN["g"], floor=floor)
    np.testing.assert_allclose(phi(GIVEN["x"]), expected[f"relu {floor} x"], atol=TOLERANCE)
    weights = phi.weights(GIVEN["w"].T)
    np.testing.assert_allclose(weights, expected[f"relu {floor} w"].T, atol=TOLERANCE)


def test_inputs_are_scaled_as_the_official_code_scales_them(expected):
    phi = ReluFeatures(GIVEN["g"], length=2.0)
    np.testing.assert_allclose(phi(GIVEN["x"]), expected["relu scaled"], atol=TOLERANCE)
    np.testing.assert_array_equal(scaled_to(jnp.zeros((2, 3)), 1.0), np.zeros((2, 3)))


def test_exponential_features_of_the_official_code(expected):
    a = 2j * math.pi * GIVEN["s"]
    for name, rows, tower in (("x", "x", a), ("w", "w", jnp.ones_like(a))):
        made = exponential_features(GIVEN[rows], GIVEN["g"], tower)
        wanted = expected[f"symmetric {name}"]
        np.testing.assert_allclose(made, wanted, rtol=TOLERANCE, atol=TOLERANCE)
        for damping in record.DAMPING:
            made = exponential_features(GIVEN[rows], GIVEN["g"], tower, damping=damping)
            made = made / (1 + 4 * damping) ** (record.WIDTH / 4)  # which theirs leaves out
            if name == "w":
                made = made * jnp.exp(a * GIVEN["b"][:, None])
            wanted = expected[f"asymmetric {damping} {name}"]
            np.testing.assert_allclose(made, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_layer_of_fourier_features_is_the_real_part_of_the_towers():
    """Re(Phi Psi^T) of complex features is the product of the layer's real ones."""
    x, w, b = GIVEN["x"], GIVEN["w"], GIVEN["b"]
    frequencies = 2 * math.pi * GIVEN["s"]
    for name in SPECTRA:
        phi = FourierFeatures(GIVEN["g"], frequencies, function=name, damping=0.05)
        half = np.sqrt(1j * np.asarray(frequencies))
        first = exponential_features(x, GIVEN["g"], jnp.asarray(half), damping=0.05)
        second = exponential_features(w, GIVEN["g"], jnp.asarray(half), damping=0.05)
        second = SPECTRA[name].weight * jnp.exp(1j * frequencies * b[:, None]) * second
        np.testing.assert_allclose(
            phi(x) @ phi.weights(w.T, b), (first @ second.T).real, atol=TOLERANCE
        )
        assert phi(x).shape == (record.ROWS, phi.count) == (record.ROWS, 2 * record.COUNT)


FUNCTIONS = {"cos": jnp.cos, "sin": jnp.sin, "gaussian": lambda z: jnp.exp(-(z**2) / 2)}


@pytest.mark.parametrize("damping", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_product_averages_to_the_function_whatever_the_damping(name, damping):
    """The mean of 200 draws of 256 projections lies within five of its standard errors."""
    x, w = (v / jnp.linalg.norm(v) for v in (GIVEN["x"][0], GIVEN["w"][0]))
    b = jnp.array([0.7])

    @jax.jit
    @jax.vmap
    def one(key):
        g, f = jax.random.split(key)
        drawn = projections(g, 256, record.WIDTH, orthogonal=False)
        frequencies = SPECTRA[name].draw(f, 256)
        phi = FourierFeatures(drawn, frequencies, function=name, damping=damping)
        return (phi(x[None]) @ phi.weights(w[:, None], b))[0, 0]

    found = np.asarray(one(jax.random.split(jax.random.key(1), 200)))
    wanted = float(FUNCTIONS[name](x @ w + b[0]))
    error = found.std() / math.sqrt(200)
    assert error < 0.03 and abs(found.mean() - wanted) < 5 * error


def test_any_split_of_the_exponent_averages_to_the_same():
    """All of it on the input's side, as the paper writes it, for a cosine."""
    x, w = (v / jnp.linalg.norm(v) for v in (GIVEN["x"][0], GIVEN["w"][0]))

    @jax.jit
    @jax.vmap
    def one(key):
        g = projections(key, 256, record.WIDTH)
        pairs = ((1j, 1.0), (jnp.sqrt(1j), jnp.sqrt(1j)))
        towers = [[jnp.full(256, a, jnp.complex64) for a in pair] for pair in pairs]
        return jnp.array(
            [
                (exponential_features(x, g, a) @ exponential_features(w, g, h)).real
                for a, h in towers
            ]
        )

    found = np.asarray(one(jax.random.split(jax.random.key(4), 200)))
    error = found.std(0) / math.sqrt(200)
    assert (np.abs(found.mean(0) - np.cos(x @ w)) < 5 * error).all() and error.max() < 0.02


def test_rectified_features_average_to_the_arc_cosine_kernel():
    x, w = GIVEN["x"], GIVEN["w"]
    wanted = arc_cosine(x[:, None], w[None])
    keys = jax.random.split(jax.random.key(0), 4000)

    @jax.vmap
    def one(key):
        g = projections(key, record.WIDTH, record.WIDTH)
        return relu_features(x, g) @ relu_features(w, g).T

    found = np.asarray(jax.jit(one)(keys))
    error = found.std(0) / math.sqrt(len(keys))
    assert (np.abs(found.mean(0) - wanted) < 5 * error).all()


def test_the_kernel_by_hand():
    """Parallel vectors give half their product, opposite ones nothing, square ones 1 / (2 pi)."""
    x = jnp.array([[3.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    w = jnp.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    wanted = [3.0, 0.0, 1 / (2 * math.pi), 0.0]
    np.testing.assert_allclose(arc_cosine(x, w), wanted, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 20), width=st.integers(1, 7), seed=st.integers(0, 2**31 - 1))
def test_orthogonal_projections_are_in_blocks(count, width, seed):
    g = projections(jax.random.key(seed), count, width)
    assert g.shape == (count, width)
    for start in range(0, count, width):
        block = np.asarray(g[start : start + width], np.float64)
        lengths = np.linalg.norm(block, axis=1)
        products = block @ block.T / np.outer(lengths, lengths)
        np.testing.assert_allclose(products, np.eye(len(block)), atol=1e-5)


def test_rotations_are_even_and_lengths_are_of_gaussian_vectors():
    """Every entry has mean 0 and variance 1, which the signs of a bare QR decomposition spoil."""
    n, width = 3000, 3
    keys = jax.random.split(jax.random.key(0), n)
    g = np.asarray(jax.jit(jax.vmap(lambda k: projections(k, width, width)))(keys), np.float64)
    assert (np.abs(g.mean(0)) < 5 / math.sqrt(n)).all()
    spread = math.sqrt(2 / n)
    assert (np.abs((g**2).mean(0) - 1) < 5 * spread).all()
    square = (g**2).sum(-1)  # chi^2 of `width` degrees: mean width, variance 2 width
    assert abs(square.mean() - width) < 5 * math.sqrt(2 * width / (n * width))
    assert abs(square.var() / (2 * width) - 1) < 0.15


def test_orthogonal_projections_have_less_error():
    """Of the kernel of unit vectors, at every number of features that was tried."""
    draw = jax.random.normal(jax.random.key(2), (2, 64, 16))
    x, w = (v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in draw)
    wanted = arc_cosine(x, w)

    def error(count, orthogonal):
        def one(key):
            g = projections(key, count, 16, orthogonal=orthogonal)
            return (relu_features(x, g) * relu_features(w, g)).sum(-1) - wanted

        found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 40))
        return float(jnp.sqrt(jnp.mean(found**2)))

    for count in (16, 64, 256):
        assert error(count, True) < error(count, False)


def linear(shape):
    return Linear(*shape, key=jax.random.key(0), axes=("embed", "mlp"), bias=True)


def test_an_ffn_of_features_by_hand():
    phi = ReluFeatures(GIVEN["g"])
    psi, up, down = linear((10, 7)), linear((6, 7)), linear((7, 6))
    x = GIVEN["x"]
    plain, gated = KernelFFN(phi, down, psi=psi), KernelFFN(phi, down, psi=psi, up=up)
    np.testing.assert_allclose(plain(x), down(psi(phi(x))), atol=1e-6)
    np.testing.assert_allclose(gated(x), down(psi(phi(x)) * up(x)), atol=1e-6)
    one = linear((10, 6))
    np.testing.assert_allclose(KernelFFN(phi, one)(x), one(phi(x)), atol=1e-6)


def test_features_are_of_the_dtype_of_their_input():
    for phi in (ReluFeatures(GIVEN["g"]), FourierFeatures(GIVEN["g"], GIVEN["s"])):
        found = phi(GIVEN["x"].astype(jnp.bfloat16))
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), phi(GIVEN["x"]), atol=0.05)


def test_what_is_refused():
    g, s = GIVEN["g"], GIVEN["s"]
    for make, message in (
        (lambda: projections(jax.random.key(0), 0, 3), "count"),
        (lambda: projections(jax.random.key(0), 3, 0), "width"),
        (lambda: ReluFeatures(g, length=0.0), "length=0.0"),
        (lambda: ReluFeatures(g, length=math.inf), "length=inf"),
        (lambda: ReluFeatures(g, floor=math.nan), "floor=nan"),
        (lambda: ReluFeatures(g, floor=math.inf), "floor=inf"),
        (lambda: FourierFeatures(g, s, damping=math.inf), "damping=inf"),
        (lambda: FourierFeatures(g, s, function="tan"), "function='tan'"),
        (lambda: FourierFeatures(g, s, damping=-0.1), "damping=-0.1"),
        (lambda: FourierFeatures(g, s[1:]), "frequencies of 10"),
        (lambda: KernelFFN(ReluFeatures(g), linear((7, 6)), up=linear((6, 7))), "give psi too"),
        (lambda: KernelFFN(ReluFeatures(g), linear((7, 6))), "must be of 10"),
        (lambda: KernelFFN(ReluFeatures(g), linear((7, 6)), psi=linear((9, 7))), "takes 9 of 10"),
        (lambda: KernelAdapter(ReluFeatures(g), linear((10, 6)), jnp.zeros(5)), "to .5,. channels"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
