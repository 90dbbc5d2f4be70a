"""Cache formats: round trips, writes anywhere, error bounds and the INT4 formula itself."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ffnlab.errors import ConfigError
from ffnlab.weights import kv

KINDS = ("dense", "float8", "int4")
DTYPES = (jnp.float32, jnp.bfloat16)
EXAMPLES = settings(max_examples=40, deadline=None)
# Subnormal numbers are left out: XLA flushes them to zero on a CPU.
finite = st.floats(-1e3, 1e3, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)
rows = hnp.arrays(np.float32, st.sampled_from([(1, 2), (3, 6)]), elements=finite)


# Compiled: op by op, most of the time would go into compiling single operations.
fake = jax.jit(kv.fake, static_argnums=0)
fake_query = jax.jit(kv.fake_query, static_argnums=0)
quantize_int4 = jax.jit(kv.quantize_int4)
quantize_float8 = jax.jit(kv.quantize_float8)


def numpy_int4(x):
    """The formula of the module's first lines, in numpy."""
    absmax = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
    scale = np.clip(absmax / np.float32(7), 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn)
    scale = scale.astype(np.float32)
    return np.clip(np.rint(x / scale), -8, 7), scale


def numpy_float8(x):
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(448)
    scale = np.where(scale == 0, 1, scale).astype(ml_dtypes.bfloat16).astype(np.float32)
    codes = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float32), scale


@EXAMPLES
@given(rows)
def test_int4_equals_the_formula_and_packs_losslessly(x):
    codes, scale = quantize_int4(jnp.asarray(x))
    expected, expected_scale = numpy_int4(x)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(scale.astype(jnp.float32), expected_scale[..., 0])
    np.testing.assert_array_equal(kv.unpack(kv.pack(codes)), expected)


@EXAMPLES
@given(hnp.arrays(np.int8, st.sampled_from([(1, 2), (3, 6), (2, 0)]), elements=st.integers(-8, 7)))
def test_pack_puts_even_channels_in_the_low_nibble(codes):
    packed = np.asarray(kv.pack(jnp.asarray(codes)))
    np.testing.assert_array_equal(packed & 15, codes[:, 0::2] & 15)
    np.testing.assert_array_equal(packed >> 4, codes[:, 1::2] & 15)
    np.testing.assert_array_equal(kv.unpack(jnp.asarray(packed)), codes)


@EXAMPLES
@given(rows)
def test_float8_equals_the_formula(x):
    codes, scale = quantize_float8(jnp.asarray(x))
    expected, expected_scale = numpy_float8(x)
    np.testing.assert_array_equal(codes.astype(jnp.float32), expected)
    np.testing.assert_array_equal(scale.astype(jnp.float32), expected_scale[..., 0])


@EXAMPLES
@given(rows)
def test_errors_are_bounded(x):
    # Half a step of q, or one step where the scale was rounded down and the code clipped (int4,
    # subnormal scales round by up to half of 2^-9); 2^-4 relative for e4m3 plus its subnormal step.
    m = np.abs(x).max(-1, keepdims=True)
    _, scale = numpy_int4(x)
    clipped = np.maximum(m - 7 * scale, 0)
    int4_error = np.abs(np.asarray(fake("int4", jnp.asarray(x))) - x)
    assert (int4_error <= scale / 2 + clipped + 1e-6 * m).all()
    float8_error = np.abs(np.asarray(fake("float8", jnp.asarray(x))) - x)
    assert (float8_error <= np.abs(x) * 2.0**-4 + m / 448 * 2.0**-9 + 1e-30).all()


@EXAMPLES
@given(rows)
def test_fake_is_idempotent_in_float32(x):
    once = fake("float8", jnp.asarray(x))
    np.testing.assert_array_equal(fake("float8", once), once)
    # An int4 scale below 2^-6 is an e4m3 subnormal: its rounding can move the largest code away
    # from 7, and a second pass then sees another scale.
    normal = x[np.abs(x).max(-1) >= 7 * 2.0**-6]
    if len(normal):
        once = fake("int4", jnp.asarray(normal))
        np.testing.assert_array_equal(fake("int4", once), once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_write_then_read_equals_fake_at_every_index(kind, dtype):
    b, length, heads, hd, t = 2, 5, 3, 6, 2
    write = jax.jit(lambda cache, k, v, index: cache.write(k, v, index))
    for index in range(length - t + 1):
        k, v = jax.random.normal(jax.random.key(index), (2, b, t, heads, hd), dtype)
        before = kv.empty(kind, b, length, heads, hd, dtype).write(v[:, :1], k[:, :1], 0)
        after = write(before, k, v, index)
        assert jax.tree.structure(after) == jax.tree.structure(before)
        assert after.shape == (b, length, heads, hd)
        for new, old, x, y in zip(
            after.read(dtype), before.read(dtype), (k, v), (v, k), strict=True
        ):
            assert new.dtype == dtype
            np.testing.assert_array_equal(new[:, index : index + t], fake(kind, x))
            rest = np.r_[0:index, index + t : length]
            np.testing.assert_array_equal(new[:, rest], old[:, rest])
            if index:
                np.testing.assert_array_equal(new[:, :1], fake(kind, y[:, :1]))
    assert write._cache_size() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_bfloat16_fake_is_the_float32_one_rounded(dtype):
    x = jax.random.normal(jax.random.key(0), (3, 2, 8)).astype(dtype)
    for kind in KINDS:
        wide = fake(kind, x.astype(jnp.float32)).astype(dtype)
        np.testing.assert_array_equal(fake(kind, x), wide)


def test_bytes_are_those_of_the_format():
    b, length, heads, hd = 2, 16, 2, 32
    entries = 2 * b * length * heads
    expected = {
        "dense": entries * hd * 4,
        "float8": entries * (hd + 2),
        "int4": entries * (hd // 2 + 1),
    }
    for kind, nbytes in expected.items():
        assert kv.empty(kind, b, length, heads, hd).nbytes == nbytes
    assert kv.empty(None, b, length, heads, hd, jnp.bfloat16).nbytes == entries * hd * 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_cache_holds_zeros(kind):
    for leaf in jax.tree.leaves(kv.empty(kind, 1, 2, 1, 4)):
        assert not np.asarray(leaf.astype(jnp.float32)).any()


def test_leaf_axes_follow_the_structure():
    for kind in KINDS:
        cache = kv.empty(kind, 1, 4, 2, 8)
        axes = jax.tree.leaves(cache.leaf_axes(), is_leaf=lambda x: isinstance(x, tuple))
        for leaf, names in zip(jax.tree.leaves(cache), axes, strict=True):
            assert len(names) == leaf.ndim
            assert names[:3] == ("batch", "cache", "kv_heads")


def test_extreme_rows_have_the_documented_result():
    zero = jnp.zeros((1, 4))
    for kind in KINDS:
        np.testing.assert_array_equal(fake(kind, zero), zero)
    np.testing.assert_array_equal(fake_query("e4m3", zero), zero)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        x = jnp.array([[bad, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
        for kind in ("float8", "int4"):
            rounded = np.asarray(fake(kind, x))
            assert np.isnan(rounded[0]).all()
            assert np.isfinite(rounded[1]).all()
    assert float(fake("int4", jnp.array([1e4, 0.0]))[0]) == 7 * 448
    negative = jnp.array([-1.5 * 7 * 2.0**-9 * 0.999, 0.0])
    codes, scale = quantize_int4(negative)
    assert (int(codes[0]), float(scale)) == (-8, 2.0**-9)


def test_query_rounding_keeps_the_largest_and_is_e4m3_close():
    q = jax.random.normal(jax.random.key(1), (5, 3, 8))
    rounded = fake_query("e4m3", q)
    peak = jnp.argmax(jnp.abs(q), -1)[..., None]
    np.testing.assert_allclose(
        jnp.take_along_axis(rounded, peak, -1), jnp.take_along_axis(q, peak, -1), rtol=1e-6
    )
    np.testing.assert_allclose(
        rounded, q, rtol=2.0**-4, atol=float(jnp.abs(q).max()) / 448 * 2.0**-9
    )
    assert kv.fake_query(None, q) is q


@pytest.mark.parametrize("kind", ["float8", "int4"])
def test_gradient_passes_straight_through(kind):
    x = jax.random.normal(jax.random.key(2), (3, 8))
    np.testing.assert_array_equal(jax.grad(lambda x: fake(kind, x).sum())(x), jnp.ones_like(x))
    np.testing.assert_array_equal(
        jax.grad(lambda x: fake_query("e4m3", x).sum())(x), jnp.ones_like(x)
    )


def test_scan_and_vmap_carry_a_stacked_cache():
    for kind in KINDS:
        stacked = jax.vmap(lambda _, kind=kind: kv.empty(kind, 1, 4, 2, 8))(jnp.arange(3))
        k = jax.random.normal(jax.random.key(3), (1, 1, 2, 8))

        def layer(k, cache):
            cache = cache.write(k, -k, 2)
            return k + 1, cache

        _, after = jax.lax.scan(layer, k, stacked)
        third = jax.tree.map(lambda leaf: leaf[2], after)
        np.testing.assert_array_equal(third.read(jnp.float32)[0][:, 2:3], fake(kind, k + 2))


def test_bad_arguments_are_named():
    with pytest.raises(ConfigError, match="head_dim=7 is odd"):
        kv.empty("int4", 1, 4, 2, 7)
    with pytest.raises(ConfigError, match="head_dim=7 is odd"):
        kv.fake("int4", jnp.ones((1, 7)))
    with pytest.raises(ConfigError, match="'int3' is unknown; accepted: dense, float8, int4"):
        kv.empty("int3", 1, 4, 2, 8)
    with pytest.raises(ConfigError, match="accepted: None, 'e4m3'"):
        kv.fake_query("int8", jnp.ones((1, 8)))
    cache = kv.empty("dense", 1, 4, 2, 8)
    with pytest.raises(ConfigError, match=r"index=3 with 2 tokens .* accepted: 0..2"):
        cache.write(jnp.ones((1, 2, 2, 8)), jnp.ones((1, 2, 2, 8)), 3)
