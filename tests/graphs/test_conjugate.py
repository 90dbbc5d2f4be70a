"""Conjugate gradients: a dense solve, what truncation leaves, derivatives, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.errors import ConfigError
from ffnlab.graphs import conjugate_gradients

N, COLUMNS = 6, 3


@functools.partial(jax.jit, static_argnames="steps")
def solved(a, b, steps, x0=None):
    return conjugate_gradients(lambda x: a @ x, b, steps=steps, x0=x0)


def system(seed, *, is_complex=True, spread=2.0):
    """A positive definite matrix of condition 10^spread, and right-hand sides."""
    random = np.random.default_rng(seed)

    def draw(*shape):
        return random.standard_normal(shape) + is_complex * 1j * random.standard_normal(shape)

    q = np.linalg.qr(draw(N, N))[0]
    a, b = (q * np.logspace(0, spread, N)) @ q.conj().T, draw(N, COLUMNS)
    return (a, b) if is_complex else (a.real, b.real)


@settings(max_examples=8)
@given(st.integers(0, 2**16), st.booleans())
def test_as_many_steps_as_rows_are_a_dense_solve(seed, is_complex):
    a, b = system(seed, is_complex=is_complex)
    with jax.enable_x64(True):
        x = np.asarray(solved(jnp.asarray(a), jnp.asarray(b), N))
        more = np.asarray(solved(jnp.asarray(a), jnp.asarray(b), 4 * N))
    truth = np.linalg.solve(a, b)
    assert x.dtype == a.dtype
    np.testing.assert_allclose(x, truth, rtol=0, atol=1e-8 * np.abs(truth).max())
    np.testing.assert_allclose(more, truth, rtol=0, atol=1e-12 * np.abs(truth).max())


def test_every_step_leaves_less_in_the_norm_of_the_matrix():
    a, b = system(0)
    truth = np.linalg.solve(a, b)
    left = []
    with jax.enable_x64(True):
        for steps in range(N + 1):
            apart = np.asarray(solved(jnp.asarray(a), jnp.asarray(b), steps)) - truth
            left.append(np.einsum("nr,nm,mr->r", apart.conj(), a, apart).real)
    left = np.array(left)
    assert (np.diff(left, axis=0) < 0).all()
    assert (left[2] > 1e-3 * left[0]).all() and (left[-1] < 1e-15 * left[0]).all()
    # Two steps are the best that any polynomial of that degree does: a projection on b, A b.
    for column in range(COLUMNS):
        space = np.stack([b[:, column], a @ b[:, column]], 1)
        best = space @ np.linalg.solve(space.conj().T @ a @ space, space.conj().T @ b[:, column])
        apart = best - truth[:, column]
        assert left[2, column] == pytest.approx((apart.conj() @ a @ apart).real, rel=1e-9)


def test_columns_are_solved_by_themselves_and_rest_when_they_are():
    a, b = system(1)
    b[:, 1] = 0
    b[:, 2] = 3 * np.linalg.eigh(a)[1][:, 0]  # one step is all it takes
    a, b = a.astype(np.complex64), b.astype(np.complex64)
    found = np.asarray(solved(a, b, 50))
    assert not found[:, 1].any() and np.isfinite(found).all()
    np.testing.assert_allclose(found[:, 2], np.linalg.solve(a, b)[:, 2], rtol=1e-4)
    np.testing.assert_allclose(solved(a, b, 3)[:, 0], solved(a, b[:, 0], 3), atol=1e-5)
    near = np.linalg.solve(a, b).astype(np.complex64)
    np.testing.assert_allclose(solved(a, b, 0, near), near)
    assert np.isnan(solved(a, b * np.nan, 2)).all()  # and not a quiet zero


def test_the_derivative_is_that_of_the_truncated_solution():
    a, b = system(2, is_complex=False)
    c = np.random.default_rng(0).standard_normal((N, COLUMNS))
    with jax.enable_x64(True):
        a, b, c = map(jnp.asarray, (a, b, c))
        for steps in (2, N):
            value = lambda s, steps=steps: jnp.sum(c * solved(a + s * jnp.eye(N), b, steps))  # noqa: E731
            slope = float(jax.grad(value)(0.0))
            apart = float(value(1e-5) - value(-1e-5)) / 2e-5
            assert slope == pytest.approx(apart, rel=1e-6)
        exact = float(-jnp.sum(c * jnp.linalg.solve(a, jnp.linalg.solve(a, b))))
        assert slope == pytest.approx(exact, rel=1e-6)
        assert float(jax.grad(lambda s: jnp.sum(c * solved(a + s * jnp.eye(N), b, 2)))(0.0)) != (
            pytest.approx(exact, rel=1e-2)
        )
        # Where a right-hand side has nothing left to do, a derivative is a number still.
        rested = jax.grad(lambda s: jnp.sum(solved(s * jnp.eye(N), jnp.zeros((N, 2)), 4)))(1.0)
        assert rested == 0


def test_what_is_refused():
    a, b = (jnp.asarray(x, jnp.float32) for x in system(0, is_complex=False))
    for options, said in (
        ({"steps": -1}, "steps=-1 must be at least 0"),
        ({"b": b.astype(jnp.bfloat16), "steps": 1}, "b is bfloat16"),
        ({"matvec": lambda x: x[:2], "steps": 1}, r"matvec\(b\) is float32\[2, 3\]"),
        ({"matvec": lambda x: x + 1j, "steps": 1}, r"matvec\(b\) is complex64"),
        ({"x0": b[:, :1], "steps": 1}, r"x0 is float32\[6, 1\]"),
    ):
        with pytest.raises(ConfigError, match=said):
            conjugate_gradients(**({"matvec": lambda x: a @ x, "b": b} | options))
