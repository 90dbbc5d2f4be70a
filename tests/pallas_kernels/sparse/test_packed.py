"""INT4 rows: round trip, error, and the products on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import sparse
from pallas_kernels.sparse import Config, Int4Rows
from tests.pallas_kernels.sparse.operands import call, expected, operands

ALWAYS = Config(partial=2, unroll=4, lanes=8, rows_until=1.0, matvec_until=1.0, min_bytes=0)


@settings(max_examples=10)
@given(k=st.integers(1, 5), words=st.integers(1, 7), seed=st.integers(0, 99))
def test_codes_come_back(k, words, seed):
    q = np.random.default_rng(seed).integers(-7, 8, (k, 8, words))
    q[:, :, 0] = 7  # so that the scale is 1
    w = jnp.asarray(q.reshape(k, -1), jnp.float32)
    packed = sparse.pack(w)
    assert packed.shape == w.shape
    np.testing.assert_array_equal(sparse.unpack(packed), w)


def test_zeros_and_the_error_of_gaussian_rows(key):
    w = jax.random.normal(key, (64, 4096)).at[0].set(0)
    ours = sparse.unpack(sparse.pack(w))
    assert not np.any(np.asarray(ours[0]))
    groups = w.reshape(64, 32, 128)
    scale = jnp.maximum(jnp.abs(groups).max(-1, keepdims=True) / 7, 1e-9)
    theirs = (jnp.round(groups / scale) * scale).reshape(w.shape)
    ours, theirs = (float(jnp.linalg.norm(a - w) / jnp.linalg.norm(w)) for a in (ours, theirs))
    assert 0.13 < ours < 0.14 and 1.14 < ours / theirs < 1.16


@pytest.mark.parametrize("backend", ["xla", "dense", "reference"])
@pytest.mark.parametrize("name", ["matvec", "take", "rows", "glu"])
@pytest.mark.parametrize("m", [1, 3])
def test_products_equal_those_of_the_values(name, backend, m):
    args = operands(name, "int4", m=m, f=30, units=1)
    wanted = expected(name, args)
    y = call(name, args, backend=backend, config=ALWAYS)
    # 1024 products of float32 numbers, twice for glu.
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_scales_have_gradients_and_codes_have_none(key):
    x, w = jax.random.normal(key, (1, 6)), sparse.pack(jax.random.normal(key, (6, 16)))

    def loss(scales):
        return (sparse.matvec(x, Int4Rows(w.words, scales)) ** 2).sum()

    found = jax.grad(loss)(w.scales)
    step = 1e-2 * jax.random.normal(jax.random.key(1), w.scales.shape)
    change = (loss(w.scales + step) - loss(w.scales - step)) / 2
    np.testing.assert_allclose((found * step).sum(), change, rtol=1e-3)


def test_bad_weights():
    w = sparse.pack(jnp.ones((4, 16)))
    with pytest.raises(ValueError, match="n a multiple of 8; got"):
        sparse.pack(jnp.ones((4, 12)))
    with pytest.raises(ValueError, match=r"w must be \[k, n\] with k=5"):
        sparse.matvec(jnp.ones(5), w)
    with pytest.raises(ValueError, match=r"words \[k, n / 8\] int32 and scales \[k, 8\] float32"):
        sparse.matvec(jnp.ones(4), w._replace(scales=w.scales[:, :4]))
    with pytest.raises(ValueError, match="uint32"):
        sparse.matvec(jnp.ones(4), w._replace(words=w.words.astype(jnp.uint32)))
    with pytest.raises(ValueError, match=r"ids must be \[c\] int32"):
        sparse.take(jnp.ones(4), w, jnp.ones(2), jnp.int32(1))
    with pytest.raises(ValueError, match="count must be an int32 scalar"):
        sparse.take(jnp.ones(4), w, jnp.zeros(2, jnp.int32), jnp.float32(1))
    with pytest.raises(ValueError, match="accepted: None, Config, GpuConfig"):
        sparse.matvec(jnp.ones(4), w, config="fast")
    with pytest.raises(ValueError, match="w holds a NaN or an infinity"):
        sparse.pack(jnp.full((4, 16), jnp.inf))
    for value in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match=r"w.scales hold a NaN or an infinity"):
            sparse.matvec(jnp.ones(4), w._replace(scales=w.scales.at[1, 2].set(value)))
    with pytest.raises(ValueError, match=r"words \[k, n / 8\] int32"):
        sparse.matvec(jnp.ones(4), w._replace(words=w.words[:3]))  # cut
    with pytest.raises(ValueError, match=r"up_rows must be \[f, d\] = \(4, 16\)"):
        cut = w._replace(words=w.words[:, :1])
        sparse.glu(jnp.ones(4), cut, w, jnp.ones(16))
