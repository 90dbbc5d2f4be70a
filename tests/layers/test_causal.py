"""Blocked causal attention against jax.nn.dot_product_attention: values and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.layers.attention import causal
from ffnlab.layers.attention.causal import causal_attention

# Float32 sums in another order: a few units in the last place of values of order one.
TOLERANCE = 2e-5


def qkv(key, b, t, heads, kv, hd):
    keys = jax.random.split(key, 4)
    shapes = [(b, t, heads, hd), (b, t, kv, hd), (b, t, kv, hd), (b, t, heads, hd)]
    return [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]


def reference(q, k, v, scale):
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True)


def assert_equal_results(function, *args):
    """`function(attention, *args)` gives the same with ours and with the reference."""

    @jax.jit
    def both(*args):
        return function(causal_attention, *args), function(reference, *args)

    ours, theirs = both(*args)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of nine tokens take three blocks."""
    monkeypatch.setattr(causal, "BLOCK", 3)


@pytest.mark.parametrize(
    ("b", "t", "heads", "kv", "hd"),
    [(1, 1, 2, 1, 2), (2, 7, 4, 2, 6), (1, 129, 3, 3, 4), (1, 300, 2, 1, 2)],
)
def test_values_and_gradients(key, b, t, heads, kv, hd):
    def run(attention, q, k, v, cotangent):
        values, back = jax.vjp(lambda *x: attention(*x, 0.3), q, k, v)
        return values, back(cotangent)

    assert_equal_results(run, *qkv(key, b, t, heads, kv, hd))


def test_many_blocks_and_vmap(key, monkeypatch):
    monkeypatch.setattr(causal, "BLOCK", 4)
    monkeypatch.setattr(causal, "MAX_BLOCKS", 3)
    assert causal.blocks(30) == [(0, 10), (10, 20), (20, 30)]

    def run(attention, q, k, v, cotangent):
        one = lambda *x: attention(*(a[None] for a in x), 0.5)[0]  # noqa: E731
        values, back = jax.vjp(jax.vmap(one), q, k, v)
        return values, back(cotangent)

    assert_equal_results(run, *qkv(key, 3, 30, 4, 2, 4))


def test_forward_mode(key, small_blocks):
    def run(attention, x, tangents):
        jacobian = jax.jacfwd(lambda q: attention(q, *x[1:], 0.5)[0, 4])(x[0])
        return jax.jvp(lambda *x: attention(*x, 0.5), x, tangents), jacobian

    tangents = qkv(jax.random.fold_in(key, 1), 1, 9, 2, 1, 4)
    assert_equal_results(run, tuple(qkv(key, 1, 9, 2, 1, 4)[:3]), tuple(tangents[:3]))


@pytest.mark.parametrize("outer", ["jvp", "vjp"])
def test_products_with_the_hessian(key, small_blocks, outer):
    def run(attention, x, direction):
        slope = jax.grad(lambda x: jnp.sum(jnp.sin(attention(*x, 0.5))))
        if outer == "jvp":
            return jax.jvp(slope, (x,), (direction,))[1]
        return jax.vjp(slope, x)[1](direction)

    direction = qkv(jax.random.fold_in(key, 1), 1, 9, 2, 1, 4)
    assert_equal_results(run, tuple(qkv(key, 1, 9, 2, 1, 4)[:3]), tuple(direction[:3]))


def test_probabilities_are_not_kept_for_the_backward_pass():
    t = 512
    x = [jax.ShapeDtypeStruct((1, t, heads, 2), jnp.float32) for heads in (2, 1, 1)]
    back = jax.eval_shape(lambda *x: jax.vjp(lambda *x: causal_attention(*x, 0.5), *x)[1], *x)
    assert 0 < max(leaf.size for leaf in jax.tree.leaves(back)) < t * t / causal.MAX_BLOCKS


def test_future_is_not_seen(key):
    q, k, v, _ = qkv(key, 1, 9, 2, 1, 4)
    attention = jax.jit(causal_attention, static_argnums=3)
    seen = attention(q, k, v, 1.0)
    later = attention(q, k.at[:, 5:].add(9.0), v.at[:, 5:].set(1e30), 1.0)
    np.testing.assert_array_equal(seen[:, :5], later[:, :5])
