"""Mixed low-rank updates, against merged matrices token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.layers import Linear, RoutedLinear
from ffnlab.weights import Dense, Int8, LoRA

E, IN, OUT, R = 3, 8, 6, 2


def made(key: jax.Array, **options: object) -> RoutedLinear:
    """Three updates of rank 2 of a map from 8 to 6 channels with a bias."""
    keys = jax.random.split(key, 4)
    base = Linear(IN, OUT, key=keys[0], axes=("embed", "mlp"), bias=True)
    base.b[...] = jnp.arange(6.0)
    router = Linear(IN, E, key=keys[1], axes=("embed", "router"))
    a = jax.random.normal(keys[2], (E, IN, R))
    b = jax.random.normal(keys[3], (E, R, OUT))
    return RoutedLinear(base, router, a, b, **options)


def by_hand(layer: RoutedLinear, x: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Each row by a matrix of its own, in float64."""
    w, bias = (np.asarray(v, np.float64) for v in (layer.base.weight.dense(), layer.base.b[...]))
    a, b = (np.asarray(v[...], np.float64) for v in (layer.lora_a, layer.lora_b))
    rows, shares = x.reshape(-1, IN), p.reshape(-1, E)
    found = [
        row @ (w + sum(s * m @ n for s, m, n in zip(share, a, b, strict=True))) + bias
        for row, share in zip(rows, shares, strict=True)
    ]
    return np.stack(found).reshape(*x.shape[:-1], OUT)


def softmax(logits: jax.Array) -> np.ndarray:
    """In float64."""
    e = np.exp(np.asarray(logits, np.float64))
    return e / e.sum(-1, keepdims=True)


def test_a_soft_mixture_is_the_merged_matrix_of_each_token(key):
    layer, x = made(key), jax.random.normal(key, (2, 5, IN))
    p = softmax(layer.router(x))
    np.testing.assert_allclose(layer(x), by_hand(layer, x, p), rtol=1e-5, atol=1e-5)
    assert np.std(p) > 0.1


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_largest_k_count(key, k, normalize):
    layer, x = made(key, k=k, normalize=normalize), jax.random.normal(key, (2, 5, IN))
    p = softmax(layer.router(x))
    p[p < np.sort(p)[..., -k, None]] = 0
    p = p / p.sum(-1, keepdims=True) if normalize else p
    np.testing.assert_allclose(jax.jit(layer)(x), by_hand(layer, x, p), rtol=1e-5, atol=1e-5)


def test_one_expert_is_plain_lora_and_zero_ones_are_the_base(key):
    layer, x = made(key), jax.random.normal(key, (4, 3, IN))
    a, b = layer.lora_a[...], layer.lora_b[...]
    one = RoutedLinear(
        layer.base, Linear(IN, 1, key=key, axes=("embed", "router")), a[:1], b[:1] * 4
    )
    lora = layer.base.replace(LoRA(layer.base.weight, a[0], b[0], 8.0))  # 8 / rank = 4
    np.testing.assert_allclose(one(x), lora(x), rtol=1e-6, atol=1e-6)
    none = RoutedLinear(layer.base, layer.router, a, jnp.zeros_like(b))
    np.testing.assert_array_equal(none(x), layer.base(x))


def test_a_told_task_is_the_expert_of_its_row_and_it_alone_learns(key):
    layer, x = made(key), jax.random.normal(key, (2, 5, IN))
    task = jnp.array([2, 0])
    p = np.broadcast_to(np.eye(E)[np.asarray(task)][:, None], (2, 5, E))
    np.testing.assert_allclose(layer.told(task)(x), by_hand(layer, x, p), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(layer.told(task).told(None)(x), layer(x))
    np.testing.assert_array_equal(layer.told(jnp.array([3, -1]))(x), layer.base(x))
    found = jax.grad(lambda layer: (layer.told(task)(x) ** 2).sum())(layer)
    for gradient in (found.lora_a[...], found.lora_b[...]):
        assert not gradient[1].any() and gradient[0].any() and gradient[2].any()
    assert not found.router.weight.w.any() and not found.base.weight.w.any()


def test_a_token_that_cannot_be_read_has_no_update(key):
    layer, x = made(key), jax.random.normal(key, (1, 2, IN))
    layer.router = layer.router.replace(Dense(layer.router.weight.w.at[0, 0].set(jnp.nan)))
    np.testing.assert_array_equal(layer(x), layer.base(x))


def test_a_quantized_base_is_taken(key):
    layer, x = made(key), jax.random.normal(key, (2, 3, IN))
    small = layer.base.replace(Int8.quantize(layer.base.weight.dense(), group=4))
    other = RoutedLinear(small, layer.router, layer.lora_a[...], layer.lora_b[...])
    np.testing.assert_allclose(other(x) - small(x), layer(x) - layer.base(x), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(key):
    layer = made(key)
    a, b = layer.lora_a[...], layer.lora_b[...]
    for given, match in (
        ((layer.router, a[:, :4], b), "a has shape"),
        ((layer.router, a, b[:, :1]), "b has shape"),
        ((layer.router, a[:2], b[:2]), "router is"),
    ):
        with pytest.raises(ConfigError, match=match):
            RoutedLinear(layer.base, *given)
    for k in (0, 4):
        with pytest.raises(ConfigError, match="k="):
            RoutedLinear(layer.base, layer.router, a, b, k=k)
