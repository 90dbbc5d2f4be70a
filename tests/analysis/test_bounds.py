"""Intervals and lines: sound against sampling, exact where they must be, lines the narrower."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.analysis.bounds import linear_bounds
from ffnlab.analysis.intervals import interval_bounds
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP, LayerNorm, max_pool
from ffnlab.models import ConvNet

MADE = []  # drawn before anything is traced: a program may round what it draws in another way


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        for make in MADE:
            drawn(make)
        yield


def in64(model):
    is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda a: a.astype(jnp.float64) if is_float(a) else a, model)


@functools.cache
def drawn(make):
    return in64(make())


def of(make):
    MADE.append(make)
    return lambda x: drawn(make)(x)


def net(activation, sizes=(3, 8, 8, 2)):
    return of(lambda: MLP(sizes, key=jax.random.key(3), activation=activation))


CONVOLUTIONS = of(lambda: ConvNet((1, 2, 2), 3, key=jax.random.key(1)))
NORM = of(lambda: LayerNorm(4))
RESIDUAL, DEEP = net("relu"), net("relu", (3, 16, 16, 16, 2))


W = np.random.default_rng(0).normal(size=(4, 5))
MIDDLE = np.random.default_rng(5).normal(size=4)  # of the box below: no comparison is decided
FUNCTIONS = {
    "relu": (net("relu"), (3,)),
    "tanh": (net("tanh"), (3,)),
    "sigmoid": (net("sigmoid"), (3,)),
    "elu": (net("elu"), (3,)),
    "gelu": (net("gelu"), (3,)),
    "silu": (net("silu"), (3,)),
    "softplus": (net("softplus"), (3,)),
    "leaky": (net("leaky_relu"), (3,)),
    "abs": (net("abs"), (3,)),
    "convolutions": (
        lambda x: in64(ConvNet((1, 2, 2), 3, key=jax.random.key(1)))(x[None]),
        (4, 4, 1),
    ),
    "pooled": (lambda x: max_pool(x[None], (2, 2))[0] - x[:2, :2] / 2, (4, 4, 1)),
    "norm": (lambda x: NORM(x * 2 + jnp.arange(4.0)), (4,)),
    "softmax": (lambda x: jax.nn.softmax(x @ W) @ W.T, (4,)),
    "product": (lambda x: (x @ W) * jnp.tanh(x @ (2 * W)), (4,)),
    "choice": (lambda x: jnp.where(x > 0.1, 3 * x, x**2 - jnp.cos(x)), (4,)),
    "powers": (lambda x: x**3 - jnp.square(x) + jnp.exp(-x), (4,)),
    "clipped": (lambda x: jnp.clip(x, -0.3, 0.4) / 3 - jnp.minimum(x, 0.2), (4,)),
    "mask": (lambda x: (x > MIDDLE).astype(jnp.float64) @ W, (4,)),
    "both masks": (lambda x: ((x > MIDDLE) | ~(x > MIDDLE - 0.01)).astype(float) @ W, (4,)),
    "whole": (lambda x: (3 * x).astype(jnp.int32).astype(jnp.float64) @ W, (4,)),
    "any": (lambda x: jnp.maximum(x, 0.2 * x.astype(bool)) @ W, (4,)),
    "unbounded maximum": (lambda x: jnp.maximum(x, -jnp.inf) @ W, (4,)),
    "residual": (lambda x: x[:2] + RESIDUAL(x[:3]), (4,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_sample_lies_outside(name):
    fn, shape = FUNCTIONS[name]
    random = np.random.default_rng(5)
    center, radius = random.normal(size=shape), random.uniform(0.05, 0.6, size=shape)
    low, high = jnp.asarray(center - radius), jnp.asarray(center + radius)
    both = jax.jit(lambda *ends: (interval_bounds(fn, *ends), linear_bounds(fn, *ends)))
    found = both(low, high)
    points = random.uniform(center - radius, center + radius, size=(400, *shape))
    corners = np.where(random.uniform(size=(200, *shape)) < 0.5, low, high)
    values = jax.vmap(fn)(jnp.asarray(np.concatenate([points, corners])))
    for box in found:
        assert np.all(values >= box.low - 1e-9) and np.all(values <= box.high + 1e-9)
    plain, lines = found
    assert np.all(lines.low >= plain.low - 1e-12) and np.all(lines.high <= plain.high + 1e-12)
    assert np.isfinite(plain.low).all() and np.all(lines.high > lines.low)


def test_a_linear_function_has_its_range():
    fn, low, high = lambda x: x @ W - 1, jnp.full(4, -1.0), jnp.arange(4.0)
    want = [np.minimum(low[:, None] * W, high[:, None] * W).sum(0) - 1]
    want.append(np.maximum(low[:, None] * W, high[:, None] * W).sum(0) - 1)
    for bounds in (interval_bounds, linear_bounds):
        found = bounds(fn, low, high)
        np.testing.assert_allclose([found.low, found.high], want, atol=1e-12)


def test_lines_see_that_parts_cancel():
    """x - x is 0 to lines; to intervals it is as wide as twice x."""
    fn = lambda x: x @ W - (x @ W + 1)  # noqa: E731
    low, high = -jnp.ones(4), jnp.ones(4)
    lines, plain = linear_bounds(fn, low, high), interval_bounds(fn, low, high)
    np.testing.assert_allclose(lines.low, -1, atol=1e-12)
    np.testing.assert_allclose(lines.high, -1, atol=1e-12)
    assert np.all(plain.high - plain.low > 2)


def test_a_decided_relu_is_exact():
    """Where no unit changes its mind the network is linear, and lines are exact."""
    fn, x = RESIDUAL, jnp.array([0.3, -0.2, 0.5])
    radius = 1e-4
    found = linear_bounds(fn, x - radius, x + radius)
    slopes = jax.jacobian(fn)(x)
    reach = radius * np.abs(slopes).sum(1)
    np.testing.assert_allclose(found.low, fn(x) - reach, atol=1e-12)
    np.testing.assert_allclose(found.high, fn(x) + reach, atol=1e-12)


def test_one_relu_lies_between_its_lines():
    """By hand: of [-1, 3] the chord is 3/4 (z + 1), the line below z itself."""
    found = linear_bounds(lambda x: jnp.maximum(x, 0) - x, jnp.array([-1.0]), jnp.array([3.0]))
    assert float(found.low[0]) == pytest.approx(0)
    assert float(found.high[0]) == pytest.approx(1)  # 3/4 (z + 1) - z at -1


def test_layers_by_lines_are_narrower():
    fn = DEEP
    low, high = jnp.full(3, -0.2), jnp.full(3, 0.4)
    wide = lambda box: float(jnp.sum(box.high - box.low))  # noqa: E731
    refined, once = linear_bounds(fn, low, high), linear_bounds(fn, low, high, widest=0)
    assert wide(refined) < wide(once) < wide(interval_bounds(fn, low, high))


def test_many_boxes_at_once():
    fn, _ = FUNCTIONS["tanh"]
    lows = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3)))
    found = jax.vmap(lambda low: linear_bounds(fn, low, low + 0.1))(lows)
    one = linear_bounds(fn, lows[1], lows[1] + 0.1)
    np.testing.assert_allclose(found.low[1], one.low, atol=1e-12)


def test_a_number_is_zero_or_not():
    """As a truth: 0 lies between two that are true."""
    fn, ends = lambda x: x.astype(bool).astype(jnp.float64), jnp.ones(1)
    for low, high, want in ((-1, 1, (0, 1)), (1, 2, (1, 1)), (0, 0, (0, 0)), (-2, -1, (1, 1))):
        for bounds in (interval_bounds, linear_bounds):
            found = bounds(fn, low * ends, high * ends)
            assert (float(found.low[0]), float(found.high[0])) == want


def test_lines_without_an_end_leave_intervals():
    fn = lambda x: jnp.minimum(1 / x, 3.0) - 0 * (1 / x)  # noqa: E731
    low, high = jnp.array([-1.0, 1.0]), jnp.array([1.0, 2.0])
    found, plain = linear_bounds(fn, low, high), interval_bounds(fn, low, high)
    assert np.isfinite(found.low[1]) and found.low[1] >= plain.low[1]
    assert not found.low[0] > -1e9, "nothing is known where it divides by 0"


def test_what_has_no_interval_is_named():
    bits = lambda x: (x.astype(jnp.int32) & 1).astype(jnp.float64)  # noqa: E731
    wraps = lambda x: x.astype(jnp.uint8).astype(jnp.float64)  # noqa: E731
    for bounds in (interval_bounds, linear_bounds):
        with pytest.raises(ConfigError, match="and of bits that follow the input"):
            bounds(bits, jnp.zeros(3), jnp.ones(3))
        with pytest.raises(ConfigError, match="uint8 may wrap around"):
            bounds(wraps, jnp.zeros(3), jnp.ones(3))
    for bounds in (interval_bounds, linear_bounds):
        with pytest.raises(ConfigError, match="nothing is known of 'sort'"):
            bounds(lambda x: jnp.sort(x), jnp.zeros(3), jnp.ones(3))
    looped = lambda x: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c + x), x)  # noqa: E731
    assert interval_bounds(looped, jnp.zeros(3), jnp.ones(3)).high.shape == (3,)
    with pytest.raises(ConfigError, match="blocks in a list"):
        linear_bounds(looped, jnp.zeros(3), jnp.ones(3))
