"""Blocked causal attention against jax.nn.dot_product_attention, values and gradients."""

import jax
import numpy as np
import pytest

from ffnlab.layers import causal
from ffnlab.layers.causal import causal_attention

# Float32 sums in another order: a few units in the last place of values of order one.
TOLERANCE = 2e-5


def qkv(key, b, t, heads, kv, hd):
    keys = jax.random.split(key, 4)
    shapes = [(b, t, heads, hd), (b, t, kv, hd), (b, t, kv, hd), (b, t, heads, hd)]
    return [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]


def reference(q, k, v, scale):
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True)


@pytest.mark.parametrize(
    ("b", "t", "heads", "kv", "hd"),
    [(1, 1, 2, 1, 2), (2, 7, 4, 2, 6), (1, 129, 3, 3, 4), (1, 300, 2, 1, 2)],
)
def test_values_and_gradients(key, b, t, heads, kv, hd):
    q, k, v, cotangent = qkv(key, b, t, heads, kv, hd)
    ours, ours_back = jax.vjp(lambda *x: causal_attention(*x, 0.3), q, k, v)
    theirs, theirs_back = jax.vjp(lambda *x: reference(*x, 0.3), q, k, v)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    for a, b in zip(ours_back(cotangent), theirs_back(cotangent), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


def test_many_blocks_and_vmap(key, monkeypatch):
    monkeypatch.setattr(causal, "BLOCK", 4)
    monkeypatch.setattr(causal, "MAX_BLOCKS", 3)
    assert causal._blocks(30) == [(0, 10), (10, 20), (20, 30)]
    q, k, v, cotangent = qkv(key, 3, 30, 4, 2, 4)

    def one(*x):
        return causal_attention(*(a[None] for a in x), 0.5)[0]

    ours, back = jax.vjp(jax.vmap(one), q, k, v)
    theirs, their_back = jax.vjp(lambda *x: reference(*x, 0.5), q, k, v)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    for a, b in zip(back(cotangent), their_back(cotangent), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


def test_future_is_not_seen(key):
    q, k, v, _ = qkv(key, 1, 9, 2, 1, 4)
    seen = causal_attention(q, k, v, 1.0)
    later = causal_attention(q, k.at[:, 5:].add(9.0), v.at[:, 5:].set(1e30), 1.0)
    np.testing.assert_array_equal(seen[:, :5], later[:, :5])
