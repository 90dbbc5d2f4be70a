"""Masked attention against jax.nn.dot_product_attention, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.layers.attention import causal
from ffnlab.layers.attention.causal import BLOCK
from ffnlab.layers.attention.masked import masked_attention, split


def inputs(key, t, s, dtype=jnp.float32):
    shapes = [(2, t, 4, 8), (2, s, 2, 8), (2, s, 2, 8)]
    q, k, v = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(jax.random.split(key, 3), shapes, strict=True)
    )
    mask = jax.random.bernoulli(key, 0.5, (2, 1, t, s)).at[..., 0].set(True)
    return q, k, v, mask


# One query, one block, and several blocks of which the last is not full.
@pytest.mark.parametrize(("t", "s"), [(1, 9), (5, 9), (2 * BLOCK + 3, 11)])
def test_values_and_gradients_equal_the_reference(t, s, key):
    q, k, v, mask = inputs(key, t, s)
    weight = jax.random.normal(jax.random.key(1), q.shape)

    def ours(q, k, v):
        return jnp.sum(weight * masked_attention(q, k, v, mask, scale=0.3))

    def reference(q, k, v):
        return jnp.sum(weight * jax.nn.dot_product_attention(q, k, v, mask=mask, scale=0.3))

    value, grads = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(q, k, v)
    expected, expected_grads = jax.jit(jax.value_and_grad(reference, (0, 1, 2)))(q, k, v)
    # Sums of float32 products in another order.
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)
    for ours, reference in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-4)


@pytest.mark.parametrize(("t", "s"), [(5, 5), (9, 14)])
def test_a_causal_mask_leaves_keys_out(t, s, key, monkeypatch):
    monkeypatch.setattr(causal, "BLOCK", 3)
    monkeypatch.setattr(causal, "MAX_BLOCKS", 2)
    q, k, v, mask = inputs(key, t, s)
    mask &= jnp.arange(s) <= s - t + jnp.arange(t)[:, None]

    first = causal.blocks(t)[0][1]
    unseen = v.at[:, s - t + first :].set(jnp.nan)  # must not even be multiplied by 0

    @jax.jit
    def run(q, k, v, mask):
        attention = functools.partial(masked_attention, mask=mask, scale=0.3, softcap=2.0)
        short = attention(q, k, unseen, causal=True)
        return attention(q, k, v, causal=True), attention(q, k, v), short[:, :first]

    ours, plain, short = run(q, k, v, mask)
    # Float32 sums of fewer zeros.
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    np.testing.assert_allclose(short, plain[:, :first], atol=1e-5)


def test_one_mask_serves_all_rows(key):
    q, k, v, mask = inputs(key, 5, 5)
    shared = masked_attention(q, k, v, mask[:1], scale=1.0)
    repeated = masked_attention(q, k, v, jnp.repeat(mask[:1], 2, axis=0), scale=1.0)
    np.testing.assert_array_equal(shared, repeated)


def test_a_query_that_sees_nothing_stays_finite_and_bfloat16_stays(key):
    q, k, v, mask = inputs(key, 3, 4, jnp.bfloat16)
    out = masked_attention(q, k, v, jnp.zeros_like(mask), scale=1.0)
    assert out.dtype == jnp.bfloat16
    mean = jnp.repeat(v.astype(jnp.float32).mean(1), 2, axis=1)[:, None]
    # bfloat16 has 8 bits.
    np.testing.assert_allclose(out.astype(jnp.float32), np.broadcast_to(mean, out.shape), atol=0.02)


def test_split_pads_the_last_piece():
    pieces = split(jnp.arange(10).reshape(2, 5), 1, 3)
    np.testing.assert_array_equal(pieces, [[[0, 1], [5, 6]], [[2, 3], [7, 8]], [[4, 0], [9, 0]]])
