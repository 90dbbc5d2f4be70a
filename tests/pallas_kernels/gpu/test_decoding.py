"""Sparse products and attention on the device itself: against float64, twice the same bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, sparse
from tests.pallas_kernels.sparse.operands import expected, operands

pytestmark = pytest.mark.gpu
# Float32 sums of up to 8192 products; 8 significant bits of bfloat16; 4 of e4m3.
SUMS, HALF, EIGHTH = 1e-5, 2.0**-7, 2.0**-4


@pytest.fixture
def mosaic(interpreted):
    """The backend of the sparse products under test."""
    if not interpreted and jax.default_backend() != "gpu":
        pytest.skip(f"no NVIDIA GPU here: jax finds {jax.devices()[0].device_kind}")
    return "mosaic_interpret" if interpreted else "mosaic"


@pytest.fixture
def hopper(kernel):
    """The backend of attention under test."""
    return kernel if kernel.startswith("sm90") else pytest.skip("attention's kernels need Hopper")


def error(y, wanted):
    """Largest difference relative to the largest value; NaN if anything is."""
    y, wanted = np.asarray(y).astype(np.float64), np.asarray(wanted, np.float64)
    return np.abs(y - wanted).max() / max(np.abs(wanted).max(), 1e-30)


def twice(run, *operands):
    """A jitted call after the memory it may get was filled with NaN, twice: the same bits."""
    for _ in range(4):
        jnp.full((1 << 20,), jnp.nan, jnp.float32).block_until_ready()
    run = jax.jit(run)
    y = run(*operands)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(run(*operands)))
    return y


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int4"])
@pytest.mark.parametrize("name", ["matvec", "take", "rows", "glu"])
@pytest.mark.parametrize(("m", "sparsity"), [(1, 0.7), (4, 0.5), (1, 1.0)])
def test_sparse(mosaic, interpreted, name, kind, m, sparsity):
    units = 1 if interpreted else {"int4": 4}.get(kind, 16)  # 2048 or 4096 columns
    args = operands(name, kind, m=m, f=13 if interpreted else 4099, units=units, sparsity=sparsity)
    y = twice(functools.partial(getattr(sparse, name), backend=mosaic), *args)
    assert error(y, expected(name, args)) < SUMS


def plain(q, k, v, lengths, window):
    """Causal attention in float64; the queries of sequence i are its last ones."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    y = np.zeros_like(q)
    for i, h in np.ndindex(q.shape[0], q.shape[2]):
        g, keys = h // (q.shape[2] // k.shape[2]), np.arange(lengths[i])
        at = np.arange(q.shape[1])[:, None] + lengths[i] - q.shape[1]
        s = q[i, :, h] @ k[i, : lengths[i], g].T * q.shape[-1] ** -0.5
        seen = keys <= at if window is None else (keys <= at) & (keys > at - window)
        p = np.exp(np.where(seen, s, -np.inf) - s.max(-1, keepdims=True))
        y[i, :, h] = p @ v[i, : lengths[i], g] / p.sum(-1, keepdims=True)
    return y


def cache(random, b, s, kv, d):
    """INT4 codes and scales of keys and values, and the values they stand for."""
    codes = [random.integers(-8, 8, (b, s, kv, d)) for _ in range(2)]
    scales = [jnp.asarray(random.uniform(0.1, 0.3, (b, s, kv)), jnp.float8_e4m3fn) for _ in codes]
    wide = [np.asarray(x).astype(np.float64)[..., None] for x in scales]
    return codes, scales, [c * x for c, x in zip(codes, wide, strict=True)]


@pytest.mark.parametrize("precision", ["fp8", "float32"])
@pytest.mark.parametrize("window", [None, 70])
def test_prefill(hopper, interpreted, precision, window):
    t, s, heads, d = (64, 100, 2, 64) if interpreted else (1000, 1300, 8, 128)
    random = np.random.default_rng(0)
    q = jnp.asarray(random.normal(size=(2, t, heads, d)), jnp.bfloat16)
    (k, v), (k_scale, v_scale), exact = cache(random, 2, s, heads // 2, d)
    options = {"precision": precision, "window": window, "backend": hopper}
    run = functools.partial(attention.prefill, **options)
    y = twice(
        lambda q, k, v, a, b: run(q, k, v, k_scale=a, v_scale=b),
        *(q, jnp.asarray(k, jnp.int8), jnp.asarray(v, jnp.int8), k_scale, v_scale),
    )
    bound = HALF if precision == "float32" else 2 * EIGHTH
    assert error(y, plain(q, *exact, [s, s], window)) < bound


@pytest.mark.parametrize(
    ("precision", "codes", "d", "tile"),
    [
        ("float32", False, 64, None),
        ("float32", False, 128, None),
        ("float32", True, 64, None),
        ("fp8", True, 64, None),
        ("fp8", True, 128, 128),
    ],
)
def test_prefill_in_every_form(hopper, interpreted, precision, codes, d, tile):
    """Which registers hold what depends on scales, channels and tile."""
    t, s, heads = (64, 200, 2) if interpreted else (2000, 2300, 8)
    random = np.random.default_rng(1)
    q = jnp.asarray(random.normal(size=(1, t, heads, d)), jnp.bfloat16)
    (k, v), scales, exact = cache(random, 1, s, heads // 2, d)
    options = {"precision": precision, "tile": tile, "backend": hopper}
    if codes:
        options |= dict(zip(("k_scale", "v_scale"), scales, strict=True))
    else:
        exact = [jnp.asarray(x, jnp.bfloat16) for x in exact]
    keys = (jnp.asarray(x, jnp.int8) for x in (k, v)) if codes else exact
    y = twice(functools.partial(attention.prefill, **options), q, *keys)
    bound = HALF if precision == "float32" else 2 * EIGHTH
    assert error(y, plain(q, *exact, [s], None)) < bound


def test_decode_of_16_bits(hopper, interpreted):
    s, heads, d = (128, 2, 64) if interpreted else (2048, 16, 128)
    random, lengths = np.random.default_rng(0), [s, s // 2 - 5]
    q = jnp.asarray(random.normal(size=(2, heads, d)), jnp.bfloat16)
    keys = [jnp.asarray(random.normal(size=(2, s, heads // 2, d)), jnp.bfloat16) for _ in range(2)]
    run = functools.partial(attention.decode, backend=hopper)
    y = twice(run, q, *keys, jnp.asarray(lengths, jnp.int32))
    assert error(y, plain(q[:, None], *keys, lengths, None)[:, 0]) < HALF


@pytest.mark.parametrize("window", [None, 70])
def test_decode(hopper, interpreted, window):
    s, heads, d = (128, 2, 64) if interpreted else (2048, 16, 128)
    random, lengths = np.random.default_rng(0), [s, s // 2 - 5]
    q = jnp.asarray(random.normal(size=(2, heads, d)), jnp.bfloat16)
    codes, scales, exact = cache(random, 2, s, heads // 2, d)
    nibbles = [np.asarray(c, np.uint8) & 15 for c in codes]
    packed = [jnp.asarray(c[..., ::2] | c[..., 1::2] << 4, jnp.uint8) for c in nibbles]
    run = functools.partial(attention.decode, window=window, backend=hopper)
    y = twice(
        lambda q, k, v, n, a, b: run(q, k, v, n, k_scale=a, v_scale=b),
        *(q, *packed, jnp.asarray(lengths, jnp.int32)),
        *(x.transpose(0, 2, 1) for x in scales),
    )
    assert error(y, plain(q[:, None], *exact, lengths, window)[:, 0]) < HALF
