"""Attention that is not causal, without rotation, with a bias, and with keys from elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.layers import Attention, AttentionSpec, Context, Memory, Rope
from ffnlab.layers.attention.attention import attend

SPEC = AttentionSpec(4, 2, 3, None, causal=False)
# Softmax and sums of up to 150 terms in float32 against float64.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def operands(t: int, s: int, heads: int = 4, kv: int = 2) -> list[np.ndarray]:
    """Queries, keys, values in float64."""
    sizes = ((t, heads), (s, kv), (s, kv))
    keys = jax.random.split(jax.random.key(4), 3)
    return [
        np.asarray(jax.random.normal(k, (2, n, h, 3)), np.float64)
        for k, (n, h) in zip(keys, sizes, strict=True)
    ]


def brute(q, k, v, sees, bias=None, cap=None):
    """Loops over every query and head; `sees` says which keys."""
    out = np.zeros_like(q)
    for row, i, head in np.ndindex(*q.shape[:3]):
        group = head // (q.shape[2] // k.shape[2])
        scores = k[row, :, group] @ q[row, i, head] / np.sqrt(q.shape[3])
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        scores = scores if bias is None else scores + bias[row % len(bias), head, i]
        p = np.where(sees[row, i], np.exp(scores - scores.max()), 0)
        out[row, i, head] = p / p.sum() @ v[row, :, group]
    return out


def ours(q, k, v, mask, spec, bias=None):
    """`attend` in float32."""
    wide = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    return attend(*wide, mask, spec, None if bias is None else jnp.asarray(bias, jnp.float32))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("t", [7, 150])
@pytest.mark.parametrize("window", [None, 3])
def test_a_token_sees_both_sides(monkeypatch, backend, t, window):
    # What other backends run is jax's own attention, which a CPU has too.
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    q, k, v = operands(t, t)
    distance = np.abs(np.subtract.outer(np.arange(t), np.arange(t)))
    sees = np.broadcast_to(distance < (window or t), (2, t, t))
    spec = dataclasses.replace(SPEC, window=window)
    np.testing.assert_allclose(ours(q, k, v, None, spec), brute(q, k, v, sees), **CLOSE)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("t", "causal"), [(6, True), (6, False), (150, True), (150, False)])
def test_a_bias_is_added_to_the_scores_of_its_head(monkeypatch, backend, rows, t, causal):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    q, k, v = operands(t, t)
    bias = np.asarray(jax.random.normal(jax.random.key(8), (rows, 4, t, t)), np.float64) * 2
    sees = np.tril(np.ones((2, t, t), bool)) if causal else np.ones((2, t, t), bool)
    spec = dataclasses.replace(SPEC, causal=causal)
    np.testing.assert_allclose(ours(q, k, v, None, spec, bias), brute(q, k, v, sees, bias), **CLOSE)


def test_a_bias_comes_after_the_cap():
    q, k, v = operands(5, 5)
    bias = np.full((1, 4, 5, 5), 3.0) * np.arange(5)
    spec = dataclasses.replace(SPEC, softcap=0.5)
    want = brute(q, k, v, np.ones((2, 5, 5), bool), bias, 0.5)
    np.testing.assert_allclose(ours(q, k, v, None, spec, bias), want, **CLOSE)


def test_a_mask_hides_keys_whatever_comes_later():
    q, k, v = operands(6, 6)
    sees = np.ones((2, 6, 6), bool)
    sees[0, :, 1] = sees[1, :, 4:] = False
    got = ours(q, k, v, jnp.asarray(sees)[:, None], SPEC)
    np.testing.assert_allclose(got, brute(q, k, v, sees), **CLOSE)


def test_without_rotation_and_causality_order_means_nothing(key):
    layer = Attention(SPEC, 8, key=key)
    x = jax.random.normal(jax.random.key(1), (1, 5, 8))
    order = jnp.array([3, 0, 4, 1, 2])
    context = Context({}, {None: None})
    np.testing.assert_allclose(
        layer(x[:, order], context)[0], layer(x, context)[0][:, order], **CLOSE
    )
    causal = Attention(dataclasses.replace(SPEC, causal=True), 8, key=key)
    assert not np.allclose(causal(x[:, order], context)[0], causal(x, context)[0][:, order])


def test_keys_from_elsewhere_are_those_of_the_memory(key):
    spec = dataclasses.replace(SPEC, memory=True)
    layer = Attention(spec, 8, key=key, source=5, qkv_bias=True)
    x = jax.random.normal(jax.random.key(1), (2, 4, 8))
    states = jax.random.normal(jax.random.key(2), (2, 7, 5))
    sees = np.ones((2, 1, 7), bool)
    sees[0, :, 5:] = False
    context = Context({}, {}, memory=Memory(states, jnp.asarray(sees)[:, None]))
    got, cache = layer(x, context, None)
    split = lambda y: np.asarray(y, np.float64).reshape(2, -1, y.shape[-1] // 3, 3)  # noqa: E731
    q, k, v = split(layer.q(x)), split(layer.k(states)), split(layer.v(states))
    want = brute(q, k, v, np.broadcast_to(sees, (2, 4, 7))).reshape(2, 4, -1)
    np.testing.assert_allclose(got, layer.o(jnp.asarray(want, jnp.float32)), **CLOSE)
    assert cache is None and layer.k.weight.shape == (5, 6)
    everything = layer(x, Context({}, {}, memory=Memory(states)))[0]
    np.testing.assert_allclose(everything[1], got[1], **CLOSE)
    assert not np.allclose(everything[0], got[0])
    with pytest.raises(ConfigError, match=r"Context\.memory is None"):
        layer(x, Context({}, {}))


@pytest.mark.parametrize("wrong", [{"causal": True}, {"rope": Rope()}, {"window": 2}])
def test_what_keys_from_elsewhere_cannot_have_is_refused(wrong):
    with pytest.raises(ConfigError, match="keys from elsewhere have neither"):
        dataclasses.replace(SPEC, memory=True, **wrong)
