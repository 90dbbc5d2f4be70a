"""The selective state space layer: against loops over places, read piece by piece, quantized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import transform
from ffnlab.errors import ConfigError
from ffnlab.layers import Mamba
from ffnlab.layers.mamba import LEAST_STEP, STEPS, MambaState, first_steps
from ffnlab.quantization import nearest

X = jax.random.normal(jax.random.key(1), (2, 7, 6))


def layer(**options):
    options = {"states": 3, "expand": 2, "taps": 4, "rank": 2} | options
    model = Mamba(6, key=jax.random.key(0), **options)
    bias = 0.1 * jax.random.normal(jax.random.key(2), model.conv.bias.shape)
    model.conv = model.conv.replace(model.conv.weight, bias)
    return model


def looped(model, x):
    """In float64, place by place, from the equations."""
    matrix = lambda linear: np.asarray(linear.weight.dense(), np.float64)  # noqa: E731
    silu = lambda v: v / (1 + np.exp(-v))  # noqa: E731
    x = np.asarray(x, np.float64)
    u, z = np.split(x @ matrix(model.input), 2, -1)
    kernel, taps = matrix(model.conv), len(matrix(model.conv))
    rank, n = matrix(model.step).shape[0], model.log_rate.shape[1]
    rate, skip = -np.exp(np.asarray(model.log_rate[...], np.float64)), np.asarray(model.skip[...])
    found = np.zeros_like(x)
    for row in range(len(x)):
        h = np.zeros((u.shape[-1], n))
        for t in range(x.shape[1]):
            taken = sum(
                u[row, t - (taps - 1 - k)] * kernel[k] for k in range(taps) if t >= taps - 1 - k
            )
            v = silu(taken + np.asarray(model.conv.bias))
            chosen = v @ matrix(model.select)
            raw = chosen[:rank] @ matrix(model.step) + np.asarray(model.step.bias)
            delta, b, c = np.log1p(np.exp(raw)), chosen[rank : rank + n], chosen[rank + n :]
            h = np.exp(delta[:, None] * rate) * h + (delta * v)[:, None] * b
            found[row, t] = ((h @ c + skip * v) * silu(z[row, t])) @ matrix(model.output)
    return found


@pytest.mark.parametrize("options", [{}, {"taps": 1}, {"states": 1, "expand": 1, "taps": 2}])
def test_it_is_the_loop_over_places(options):
    model = layer(**options)
    y, _ = jax.jit(lambda model, x: model(x))(model, X)
    np.testing.assert_allclose(y, looped(model, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pieces", [[1] * 7, [3, 4], [5, 1, 1]])
def test_pieces_are_the_whole(pieces):
    model, state, found = layer(), None, []
    run = jax.jit(lambda model, x, state: model(x, state))
    whole, last = model(X)
    for piece in jnp.split(X, np.cumsum(pieces)[:-1], axis=1):
        y, state = run(model, piece, state)
        found.append(y)
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, atol=1e-6)
    for one, other in zip(state, last, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_no_place_reads_those_after_it():
    model = layer()
    moved = model(X.at[:, 4].add(1.0))[0] - model(X)[0]
    assert (np.abs(moved).max((0, 2)) > 0).tolist() == [False] * 4 + [True] * 3


def test_what_it_begins_with():
    model = layer(rank=None, states=2)
    np.testing.assert_allclose(model.log_rate[...], np.log([[1, 2]] * 12), rtol=1e-6)
    assert model.step.weight.shape == (1, 12) and (np.asarray(model.skip[...]) == 1).all()
    steps = jax.nn.softplus(first_steps(jax.random.key(0), 2000))
    assert STEPS[0] * 0.99 <= steps.min() <= 1.1 * STEPS[0] and LEAST_STEP < STEPS[0]
    assert 0.9 * STEPS[1] <= steps.max() <= STEPS[1] * 1.01
    np.testing.assert_allclose(np.median(steps), 1e-2, rtol=0.15)


def test_quantized_and_in_half_precision():
    model = layer(dtype=jnp.bfloat16)
    y, state = model(X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and state.h.dtype == jnp.float32
    whole = layer()
    small, _ = transform.apply(nearest(format="int8", group=None), whole)
    far = np.abs(small(X)[0] - whole(X)[0]).max() / np.abs(whole(X)[0]).max()
    assert 0 < far < 0.05


def test_gradients_are_finite():
    model = layer()
    slopes = jax.grad(lambda model: jnp.sum(model(100 * X)[0]))(model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_what_is_refused():
    with pytest.raises(ConfigError, match="states=0"):
        layer(states=0)
    state = layer()(X)[1]
    with pytest.raises(ConfigError, match="state has shapes"):
        layer()(X, MambaState(state.inputs[:1], state.h))
