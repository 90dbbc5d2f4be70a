"""Pipelined prefill attention against plain attention, in float64 and in FireQ's roundings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.testing import counted
from ffnlab.weights import kv
from pallas_kernels.attention import prefill

TILE = 16
attend = jax.jit(
    functools.partial(prefill, tile=TILE),
    static_argnames=("precision", "scale", "backend", "window"),
)
# The card: 1e-5 in float32 mode, sums of up to 112 keys in another order.
EXACT = 1e-5


def qkv(key, t, s=None, heads=4, kv_heads=2, d=8):
    shapes = ((2, t, heads, d), (2, s or t, kv_heads, d), (2, s or t, kv_heads, d))
    keys = jax.random.split(key, 3)
    return [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]


def plain(q, k, v, scale=None, window=None):
    """Causal attention in float64, one head after the other."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (t, heads, d), (s, kv_heads) = q.shape[1:], k.shape[1:3]
    y = np.zeros_like(q)
    for h in range(heads):
        g = h // (heads // kv_heads)
        scores = np.einsum("btd,bsd->bts", q[:, :, h], k[:, :, g]) * (scale or d**-0.5)
        seen = np.tril(np.ones((t, s), bool), s - t)
        if window is not None:
            seen &= ~np.tril(seen, s - t - window)
        scores[:, ~seen] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y[:, :, h] = p @ v[:, :, g] / p.sum(-1, keepdims=True)
    return y


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("tiles", [1, 2, 3, 7])
@pytest.mark.parametrize("ragged", [0, 15])
def test_equals_plain_attention(tiles, ragged, backend, key):
    q, k, v = qkv(key, tiles * TILE - ragged)
    y = attend(q, k, v, backend=backend)
    np.testing.assert_allclose(y, plain(q, k, v), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("window", [1, 5, 16, 40, 99])
def test_a_window_hides_older_keys(window, backend, key):
    q, k, v = qkv(key, 37, 53)
    y = attend(q, k, v, window=window, backend=backend)
    np.testing.assert_allclose(y, plain(q, k, v, window=window), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (3, 1)])
def test_grouped_heads_more_keys_than_queries_and_a_scale(heads, key):
    q, k, v = qkv(key, 9, 41, *heads)
    y = attend(q, k, v, scale=0.7)
    np.testing.assert_allclose(y, plain(q, k, v, 0.7), rtol=EXACT, atol=EXACT)


def test_large_scores_do_not_overflow(key):
    q, k, v = qkv(key, 48)
    y = attend(100 * q, 100 * k, v)
    np.testing.assert_allclose(y, plain(100 * q, 100 * k, v), rtol=1e-3, atol=1e-3)
    growing = k * jnp.arange(48.0)[None, :, None, None]  # the maximum moves in every tile
    np.testing.assert_allclose(attend(q, growing, v), plain(q, growing, v), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tiles", [1, 2, 3, 7])
def test_fp8_mode_over_int4_keys_and_values(tiles, key):
    q, k, v = qkv(key, tiles * TILE, d=32)
    (k8, k_scale), (v8, v_scale) = kv.quantize_int4(k), kv.quantize_int4(v)
    fp8 = {"k_scale": k_scale, "v_scale": v_scale, "precision": "fp8"}
    pipelined, whole = (attend(q, k8, v8, **fp8, backend=b) for b in ("xla", "reference"))
    ideal = plain(q, kv.fake("int4", k), kv.fake("int4", v))
    # Queries and weights carry 4 significant bits: 2^-4 each, averaged over keys and channels.
    assert np.abs(pipelined - ideal).max() < 2.0**-4 * np.abs(ideal).max()
    # Weights are rounded relative to the maximum so far, which only the last tile knows fully.
    assert np.abs(pipelined - whole).max() < 2.0**-5 * np.abs(ideal).max()
    assert np.abs(pipelined - ideal).max() > 1e-4  # it does round


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_fp8_mode_rounds_scores_to_float16(backend):
    """Beside 1000 neighbours are .5 apart: scores of 1000 and 1000.2 are equal."""
    q, k = jnp.ones((1, 2, 1, 1)), jnp.array([1000.0, 1000.2]).reshape(1, 2, 1, 1)
    v = jnp.array([0.0, 1.0]).reshape(1, 2, 1, 1)
    run = functools.partial(attend, q, k, v, scale=1.0, backend=backend)
    assert run(precision="fp8")[0, 1, 0, 0] == 0.5
    assert run()[0, 1, 0, 0] == pytest.approx(1 / (1 + np.exp(-0.2)), rel=1e-3)


def test_int4_codes_and_their_values_are_the_same_keys(key):
    q, k, v = qkv(key, 40)
    (k8, k_scale), (v8, v_scale) = kv.quantize_int4(k), kv.quantize_int4(v)
    codes = attend(q, k8, v8, k_scale=k_scale, v_scale=v_scale)
    dense = attend(q, kv.fake("int4", k), kv.fake("int4", v))
    np.testing.assert_allclose(codes, dense, rtol=EXACT, atol=EXACT)


def test_nan_and_zero_rows(key):
    q, k, v = qkv(key, 40)
    y = attend(q.at[0, 5, 1, 2].set(jnp.nan), k, v)
    assert jnp.isnan(y[0, 5, 1]).all() and int(jnp.isnan(y).sum()) == y.shape[-1]
    y = attend(q, k.at[1, 20, 0, 0].set(jnp.nan), v)
    assert jnp.isnan(y[1, 20:, :2]).all() and int(jnp.isnan(y).sum()) == y[1, 20:, :2].size
    zero = attend(q.at[0, 9, 0].set(0), k, v, precision="fp8")
    np.testing.assert_allclose(zero[0, 9, 0], v[0, :10, 0].mean(axis=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_output_follows_the_queries(dtype, key):
    q, k, v = (x.astype(dtype) for x in qkv(key, 20))
    assert prefill(q, k, v).dtype == dtype
    assert prefill(q, k, v, out_dtype=jnp.float32).dtype == jnp.float32


def test_differentiates_and_compiles_once(key):
    q, k, v = qkv(key, 40)

    def loss(backend):
        return jax.jit(jax.grad(lambda *x: (prefill(*x, tile=TILE, backend=backend) ** 2).sum()))

    np.testing.assert_allclose(
        loss("xla")(q, k, v), loss("reference")(q, k, v), rtol=1e-4, atol=1e-4
    )
    run = jax.jit(lambda *x: prefill(*x, tile=TILE))
    run(q, k, v)
    with counted() as count:
        run(q, v, k)
    assert count.programs == 0


def test_the_program_does_not_grow_with_the_number_of_tiles(key):
    def lines(tiles):
        q, k, v = qkv(key, tiles * TILE)
        run = jax.jit(lambda *x: prefill(*x, tile=TILE))
        return run.lower(q, k, v).as_text().count("\n")

    assert lines(20) == lines(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.ones((1, 4, 8))}, r"q must be \[b, t, heads, d\]"),
        ({"v": jnp.ones((1, 4, 1, 4))}, "k and v"),
        ({"q": jnp.ones((1, 5, 2, 8))}, "t <= s"),
        ({"q": jnp.ones((2, 4, 2, 8))}, "same b and d"),
        ({"q": jnp.ones((1, 4, 2, 6))}, "same b and d"),
        ({"q": jnp.ones((1, 0, 2, 8))}, "1 <= t"),
        ({"k": jnp.ones((1, 4, 3, 8)), "v": jnp.ones((1, 4, 3, 8))}, "heads a multiple of kv"),
        ({"q": jnp.ones((1, 4, 2, 8), jnp.int32)}, "q has dtype int32"),
        ({"k": jnp.ones((1, 4, 1, 8), jnp.int32)}, "k has dtype int32"),
        ({"v": jnp.ones((1, 4, 1, 8), jnp.int8)}, "v holds int8 codes: pass v_scale"),
        ({"k_scale": jnp.ones((1, 4))}, r"k_scale must be \(1, 4, 1\)"),
        ({"v_scale": jnp.ones((1, 4, 1), jnp.int32)}, "v_scale must be .* got .* int32"),
        ({"v": jnp.ones((1, 4, 1, 8), jnp.uint8)}, "v has dtype uint8"),
        ({"scale": jnp.nan}, "scale=nan; it takes a finite number"),
        ({"tile": 0}, "tile=0"),
        ({"precision": "bf16"}, "'float32', 'fp8'"),
        ({"window": 0}, "window=0"),
        ({"backend": "sm80"}, "'sm90', 'xla', 'reference'"),
        ({"backend": "sm90"}, "sm90: runs on gpu, this is cpu"),
    ],
)
def test_bad_operands_name_themselves(change, message):
    operands = {name: jnp.ones((1, 4, 1, 8)) for name in "kv"} | {"q": jnp.ones((1, 4, 2, 8))}
    with pytest.raises(ValueError, match=message):
        prefill(**operands | change)
